"""The value role: an adapter of its own, or a head on the policy's states; where it starts, and what it learns from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainer_cases import MakeTrainer, rolled_and_scored, same, text_length, weights

from lora_rlhf.base.adapters import read_adapter
from lora_rlhf.base.shared import POLICY, REWARD, VALUE
from lora_rlhf.ppo.rollout import Rollout


def rows_of(rollout: Rollout) -> list[Rollout]:
    return [rollout.part(slice(i, i + 1)) for i in range(len(rollout.texts))]


@pytest.mark.parametrize("weight", [1.0, -3.0])
def test_the_value_role_starts_as_the_reward_role_with_its_head_at_the_normalised_score(
    make_trainer: MakeTrainer, weight: float
) -> None:
    trainer = make_trainer(weight=weight)
    adapter, value = weights(trainer, REWARD), weights(trainer, VALUE)
    assert same(adapter[:-1], value[:-1])
    torch.testing.assert_close(value[-1], adapter[-1] * weight / trainer.reward.scales["reward"].std)
    rollout, scored = rolled_and_scored(trainer, 16)
    last = rollout.action_mask.sum(1, keepdim=True)
    # others are scored with an EOS more, or without what nobody sees
    as_sampled = torch.tensor([torch.equal(r.ids[r.mask], r.text_ids[r.text_mask]) for r in rows_of(rollout)])
    values, scores = scored.values.gather(1, last)[as_sampled, 0], scored.score[as_sampled]
    torch.testing.assert_close(values, scores, atol=1e-4, rtol=0)
    assert len(scores) > 2 and scores.std() > 0.1
    assert trainer.normalization()["value_offset"] == trainer.value_offset != 0.0


def test_a_value_head_reads_the_policys_states_and_starts_at_0(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(value_model="head")
    assert VALUE not in trainer.base.configs and len(trainer.parameters[VALUE]) == 1
    rollout, scored = rolled_and_scored(trainer)
    assert (scored.values == 0).all()
    states = trainer.base.hidden(POLICY, rollout.ids, rollout.mask).detach()
    with torch.no_grad():
        trainer.base.heads[VALUE].weight.copy_(torch.linspace(-1, 1, states.shape[-1]))  # type: ignore[operator]
    scored = trainer._scored(rollout, [0] * 6)
    last = rollout.action_mask.sum(1)
    for i, (end, row) in enumerate(zip(last.tolist(), states, strict=True)):
        start = rollout.query_ids.shape[1] - 1
        expected = row[start : start + end + 1] @ trainer.base.heads[VALUE].weight[0]  # type: ignore[operator]
        torch.testing.assert_close(scored.values[i, : end + 1], expected.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("warming", [False, True])
def test_the_policys_adapter_learns_values_from_a_head_unless_it_warms_up(
    make_trainer: MakeTrainer, warming: bool
) -> None:
    """With no advantage there is nothing else to learn."""
    trainer = make_trainer(value_model="head")
    with torch.no_grad():
        trainer.base.heads[VALUE].weight.fill_(0.1)  # type: ignore[operator]
    rollout, scored = rolled_and_scored(trainer, 4)
    nothing = torch.zeros_like(scored.logprobs)
    with trainer.base.training():
        trainer._accumulate(rollout, scored, nothing, scored.values + 1, torch.arange(4), warming, 4)
    gradients = {role: [p.grad for p in trainer.parameters[role] if p.grad is not None] for role in (POLICY, VALUE)}
    assert any(g.any() for g in gradients[POLICY]) != warming
    assert gradients[VALUE][0].any()


def test_a_value_head_warms_up_without_the_policy_and_is_saved_with_its_adapter(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(value_model="head", value_warmup_steps=1)
    for step in range(2):
        policy, value = weights(trainer, POLICY), weights(trainer, VALUE)
        trainer.step()
        assert same(policy, weights(trainer, POLICY)) == (step == 0)
        assert not same(value, weights(trainer, VALUE))
    trainer.base.save_adapter(VALUE, tmp_path / "value")
    _, saved, head = read_adapter(tmp_path / "value", trainer.base.identity)
    assert head is not None and torch.equal(head, trainer.base.heads[VALUE].weight)  # type: ignore[arg-type]
    assert sum(w.sum().item() for w in saved.values()) == pytest.approx(
        sum(w.sum().item() for w in weights(trainer, POLICY)), abs=1e-3
    )


def test_without_a_reward_adapter_the_value_starts_at_0(make_trainer: MakeTrainer) -> None:
    _, scored = rolled_and_scored(make_trainer(text_length))
    assert (scored.values == 0).all()


def test_value_warm_up_moves_the_value_alone_and_then_ends(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(value_warmup_steps=2)
    for step in range(3):
        policy, value = weights(trainer, POLICY), weights(trainer, VALUE)
        trainer.step()
        assert same(policy, weights(trainer, POLICY)) == (step < 2)
        assert not same(value, weights(trainer, VALUE))


def test_a_policy_that_waits_for_the_value_has_a_gradient_of_0(make_trainer: MakeTrainer) -> None:
    for value_model in ("adapter", "head"):
        trainer = make_trainer(value_warmup_steps=1, value_model=value_model)
        first, second = trainer.step(), trainer.step()
        assert first["grad_norm"] == 0 < min(first["value_grad_norm"], second["grad_norm"])
