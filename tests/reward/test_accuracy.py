"""How often the reward ranks two answers rightly: the given ones, and a chosen one against a spoilt one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pytest
import torch

from lora_rlhf.base.shared import REWARD
from lora_rlhf.config import RunConfig
from lora_rlhf.data.preferences import PreferencePair
from lora_rlhf.processes import Processes
from lora_rlhf.reward.contrast import spoilt_pairs
from lora_rlhf.reward.training import SPOILT_PAIRS, accuracy_in_words, reward_accuracy

KINDS = ["stub", "word salad", "repeated phrase", "answer to another prompt"]
PAIRS = [
    PreferencePair((("user", f"q{i}"),), " ".join(f"word{(i * k) % 29}" for k in range(1, 31)), "bad" * (i % 2 * 200))
    for i in range(1, 21)
]
"""Chosen answers of 30 words; every second rejected answer is longer than the chosen one."""


@dataclass
class LikesLength:
    """Stands in for a base whose reward is the number of tokens that it reads."""

    device: torch.device = torch.device("cpu")

    def scores(self, role: str, ids: torch.Tensor, mask: torch.Tensor, batch: int) -> torch.Tensor:
        assert role == REWARD and ids.shape == mask.shape and batch == 32
        return mask.sum(1).float()


@pytest.fixture
def measured(make_config: Callable[..., RunConfig], tokenizer: Any) -> dict[str, Any]:
    config = make_config(ppo={"scoring_batch_size": 32}, max_length=2000)
    return reward_accuracy(config, LikesLength(), tokenizer, PAIRS, Processes.one())  # type: ignore[arg-type]


def test_the_share_of_pairs_whose_chosen_answer_scores_higher(measured: dict[str, Any]) -> None:
    assert (measured["accuracy"], measured["n"]) == (0.5, 20)


def test_a_reward_that_counts_tokens_sees_through_stubs_and_not_through_other_answers(measured: dict[str, Any]) -> None:
    against = measured["against_spoilt"]
    assert list(against) == KINDS
    assert against["stub"] == 1.0  # three words of thirty
    assert against["repeated phrase"] == 1.0  # at most 24 words
    assert against["answer to another prompt"] < 0.8 and against["word salad"] < 0.8


def test_spoilt_answers_that_training_would_leave_out_are_not_asked_for(
    make_config: Callable[..., RunConfig], tokenizer: Any
) -> None:
    config = make_config(ppo={"scoring_batch_size": 32}, max_length=8)
    measured = reward_accuracy(config, LikesLength(), tokenizer, PAIRS, Processes.one())  # type: ignore[arg-type]
    assert measured["against_spoilt"] == {} and measured["n"] == 20
    assert accuracy_in_words(measured) == ["accuracy on 20 held-out pairs: 0.500"]


def test_what_the_reward_falls_for_is_said_with_the_setting_that_helps() -> None:
    against = dict(zip(KINDS, (1.0, 0.5, 0.8, 0.79), strict=True))
    lines = accuracy_in_words({"accuracy": 0.75, "n": 8, "against_spoilt": against})
    assert lines[1] == (
        "chosen answers above spoilt ones: stub 100%, word salad 50%, repeated phrase 80%, answer to another prompt 79%"
    )
    assert "(word salad, answer to another prompt)" in lines[2] and "reward.contrast_share" in lines[2]
    safe = {"accuracy": 0.75, "n": 8, "against_spoilt": dict.fromkeys(KINDS, 0.9)}
    assert len(accuracy_in_words(safe)) == 2


def test_each_kind_has_a_quarter_of_the_spoilt_answers() -> None:
    made = spoilt_pairs(PAIRS, SPOILT_PAIRS, seed=0)
    shares = [fmean(kind == name for kind, _ in made) for name in KINDS]
    assert shares == pytest.approx([0.25] * 4, abs=0.02)  # a few answers to "another" prompt are to the same one
