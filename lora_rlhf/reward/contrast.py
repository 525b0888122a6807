"""Extra pairs against reward hacking: a good answer against what a policy falls back on to fool a reward model.

Written preference pairs hold no one-word answers, no word salad and no answers to another question, so that a reward
model is free to like them; PPO then finds out. Here they stand as rejected answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from lora_rlhf.data.preferences import PreferencePair


def contrast_pairs(pairs: Sequence[PreferencePair], share: float, seed: int) -> list[PreferencePair]:
    """Return up to `share` · len(pairs) pairs: chosen answers of random pairs against a spoilt answer each.

    The kinds of spoilt answers take turns: a stub (one to three words), word salad, a phrase over and over, and the
    chosen answer to another prompt.
    """
    chance = random.Random(seed)
    kinds: tuple[Callable[[PreferencePair], str], ...] = (
        lambda pair: " ".join(chance.sample(pair.chosen.split(), min(chance.randint(1, 3), len(pair.chosen.split())))),
        lambda pair: " ".join(chance.sample(pair.chosen.split(), len(pair.chosen.split()))),
        lambda pair: " ".join(pair.chosen.split()[: chance.randint(1, 3)] * chance.randint(3, 8)),
        lambda pair: chance.choice(pairs).chosen,
    )
    made = []
    for i in range(round(share * len(pairs))):
        pair = chance.choice(pairs)
        spoilt = kinds[i % len(kinds)](pair)
        if spoilt != pair.chosen:
            made.append(replace(pair, rejected=spoilt))
    return made
