"""Steps that go wrong are skipped and written down, runs that go wrong are stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainer_cases import MakeTrainer, same, text_length, weights

from lora_rlhf.config import PpoSettings
from lora_rlhf.errors import NotFinite, UserError
from lora_rlhf.ppo.guards import Guards, check_finite, repetition
from lora_rlhf.ppo.trainer import PpoTrainer

NAN = float("nan")


def broken_at(trainer: PpoTrainer, steps: set[int], what: str) -> PpoTrainer:
    """Let a number be NaN in these steps."""
    plain = {"targets": trainer.targets, "scored": trainer._scored}

    def targets(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        advantages, returns = plain["targets"](*args)
        return (advantages * NAN if trainer.step_count + 1 in steps else advantages), returns

    def scored(*args: Any) -> Any:
        found = plain["scored"](*args)
        if trainer.step_count + 1 in steps:
            getattr(found, what)[0] = NAN
        return found

    if what == "gradient":
        trainer.targets = targets  # type: ignore[method-assign]
    else:
        trainer._scored = scored  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize(
    ("what", "reason"),
    [("gradient", "gradient is NaN"), ("score", "score is NaN"), ("logprobs", "log probability is NaN"),
     ("values", "value is NaN")],
)  # fmt: skip
def test_a_step_with_nan_is_skipped_and_the_run_goes_on(make_trainer: MakeTrainer, what: str, reason: str) -> None:
    trainer = broken_at(make_trainer(text_length), {2}, what)
    taken = trainer.step()
    before, rate = weights(trainer), trainer.scheduler.get_last_lr()
    skipped = trainer.step()
    assert "skipped" not in taken
    assert skipped == {"step": 2, "episodes": 8, "skipped": 1.0, "kl_coef": trainer.kl.coef}
    assert reason in trainer.skip_reason
    assert same(before, weights(trainer)) and trainer.scheduler.get_last_lr() < rate
    assert all(p.grad is None for own in trainer.parameters.values() for p in own)
    assert trainer.step()["step"] == 3 and trainer.guards == Guards()
    assert not same(before, weights(trainer))


def test_a_reward_that_gives_nan_skips_the_step(make_trainer: MakeTrainer) -> None:
    calls: list[int] = []

    def sometimes(completions: Any, **rest: Any) -> list[float]:
        calls.append(len(completions))
        return [NAN if len(calls) == 4 else float(i) for i in range(len(completions))]

    trainer = make_trainer(sometimes)  # two calls for the scales
    assert ["skipped" in trainer.step() for _ in range(3)] == [False, True, False]
    trainer = broken_at(make_trainer(text_length), {1}, "score")
    trainer.step()
    assert trainer.answered is not None
    assert len(trainer.answered.texts) == 4 and trainer.answered.scores == []


def test_a_skipped_step_can_be_taken_again_from_what_is_written_down(make_trainer: MakeTrainer) -> None:
    trainer = broken_at(make_trainer(text_length), {1}, "gradient")
    trainer.step()
    answered = trainer.answered
    assert answered is not None
    trainer.generator.set_state(answered.random_state)
    trainer._order = answered.order
    again = trainer._next_prompts(4)
    assert again == answered.chosen
    assert trainer._rollout("policy", again).texts == answered.texts


def test_too_many_skipped_steps_in_a_row_end_the_run(make_trainer: MakeTrainer) -> None:
    trainer = broken_at(make_trainer(text_length, max_skipped_steps=2), {2, 3, 5, 6, 7}, "gradient")
    for _ in range(6):
        trainer.step()
    with pytest.raises(UserError, match=r"PPO step 7: gradient is NaN .* 2 steps before: a smaller ppo\.learning_rate"):
        trainer.step()
    endless = broken_at(make_trainer(text_length, max_skipped_steps=None), set(range(9)), "gradient")
    for _ in range(8):
        endless.step()


def test_a_policy_that_always_moves_too_far_ends_the_run(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(text_length, update_kl_limit=1e-12, max_stopped_updates=3, num_ppo_epochs=3)
    for _ in range(3):
        assert trainer.stopped_early is None
        assert trainer.step()["update_stopped"] == 1.0
    assert (
        trainer.stopped_early
        == "the policy moved further than ppo.update_kl_limit 1e-12 within 3 steps in a row at step 3"
    )


def test_stopped_updates_must_be_in_a_row() -> None:
    guards, settings = Guards(), PpoSettings(max_stopped_updates=2)
    assert [guards.note_taken(settings, stopped) for stopped in (True, False, True)] == [None] * 3
    assert guards.note_taken(settings, True) is not None
    assert all(guards.note_taken(PpoSettings(max_stopped_updates=None), True) is None for _ in range(99))


def test_what_is_not_finite_is_named() -> None:
    check_finite(score=torch.zeros(3), value=torch.ones(2))
    for bad in (NAN, float("inf"), -float("inf")):
        with pytest.raises(NotFinite, match="^log probability is NaN or infinite$"):
            check_finite(score=torch.zeros(3), log_probability=torch.tensor([0.0, bad]))


def test_repetition_by_hand() -> None:
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1], [1, 2, 3, 4, 5, 6, 7], [1, 1, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[True] * 7, [True] * 7, [True, True] + [False] * 5])
    # of the first: 123 231 312 123 231, two of five were there before; the last is too short for any
    assert repetition(ids, mask) == pytest.approx((0.4 + 0 + 0) / 3)
