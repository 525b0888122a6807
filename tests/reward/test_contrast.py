"""Contrast pairs set a good answer against what a policy falls back on to fool a reward model."""

from __future__ import annotations

from lora_rlhf.data.preferences import PreferencePair
from lora_rlhf.reward.contrast import contrast_pairs

PAIRS = [PreferencePair((("user", f"q{i}"),), f"one{i} two{i} three{i} four{i} five{i}", "bad") for i in range(20)]


def test_half_as_many_again_each_a_chosen_answer_against_a_spoilt_one() -> None:
    made = contrast_pairs(PAIRS, 0.5, seed=0)
    assert 8 <= len(made) <= 10
    for pair in made:
        assert (pair.prompt, pair.chosen) in [(p.prompt, p.chosen) for p in PAIRS]
        assert pair.rejected != pair.chosen and pair.rejected != "bad"


def test_every_kind_of_spoilt_answer_takes_its_turn() -> None:
    kinds = set()
    for pair in contrast_pairs(PAIRS, 2.0, seed=0):
        good, bad = pair.chosen.split(), pair.rejected.split()
        if pair.rejected in [p.chosen for p in PAIRS]:
            kinds.add("other prompt")
        elif sorted(good) == sorted(bad):
            kinds.add("salad")
        elif len(bad) <= 3 and len(set(bad)) == len(bad):
            kinds.add("stub")
        elif len(set(bad)) < len(bad):
            kinds.add("over and over")
        assert pair.rejected in [p.chosen for p in PAIRS] or set(bad) <= set(good)
    assert kinds == {"other prompt", "salad", "stub", "over and over"}


def test_no_share_gives_no_pairs_and_the_seed_decides() -> None:
    assert contrast_pairs(PAIRS, 0.0, seed=0) == []
    assert (
        contrast_pairs(PAIRS, 1.0, seed=1) == contrast_pairs(PAIRS, 1.0, seed=1) != contrast_pairs(PAIRS, 1.0, seed=2)
    )
