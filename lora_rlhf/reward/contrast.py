"""Extra pairs against reward hacking: a good answer against what a policy falls back on to fool a reward model.

Written preference pairs hold no one-word answers, no word salad and no answers to another question, so that a reward
model is free to like them; PPO then finds out. Here they stand as rejected answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice

from lora_rlhf.data.preferences import PreferencePair


def contrast_pairs(pairs: Sequence[PreferencePair], share: float, seed: int) -> list[PreferencePair]:
    """Return up to `share` · len(pairs) pairs: chosen answers of random pairs against a spoilt answer each."""
    return [pair for _, pair in spoilt_pairs(pairs, round(share * len(pairs)), seed)]


def spoilt_pairs(pairs: Sequence[PreferencePair], count: int, seed: int) -> list[tuple[str, PreferencePair]]:
    """Return up to `count` pairs of a chosen answer and a spoilt one, each with the kind of the spoilt answer.

    The kinds take turns: a stub (one to three words), word salad, a phrase over and over, and the chosen answer to
    another prompt. Where the spoilt answer turns out to be the chosen one, the pair is left out.
    """
    chance = random.Random(seed)
    kinds: dict[str, Callable[[PreferencePair], str]] = {
        "stub": lambda pair: " ".join(
            chance.sample(pair.chosen.split(), min(chance.randint(1, 3), len(pair.chosen.split())))
        ),
        "word salad": lambda pair: " ".join(chance.sample(pair.chosen.split(), len(pair.chosen.split()))),
        "repeated phrase": lambda pair: " ".join(pair.chosen.split()[: chance.randint(1, 3)] * chance.randint(3, 8)),
        "answer to another prompt": lambda pair: chance.choice(pairs).chosen,
    }
    made = []
    for kind, spoil in islice(cycle(kinds.items()), count):
        pair = chance.choice(pairs)
        spoilt = spoil(pair)
        if spoilt != pair.chosen:
            made.append((kind, replace(pair, rejected=spoilt)))
    return made
