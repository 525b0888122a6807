"""The PPO loop on the tiny base: what it normalises, penalises, updates, and reports."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import MakeTrainer, same, text_length, watch, weights

from lora_rlhf.base.adapters import read_adapter
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, VALUE
from lora_rlhf.config import PpoSettings
from lora_rlhf.errors import UserError
from lora_rlhf.ppo import trainer as trainer_module
from lora_rlhf.ppo.losses import AdaptiveKl
from lora_rlhf.ppo.optimization import learning_rate_share
from lora_rlhf.ppo.rollout import Rollout
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.reward.sources import ScoreScale


def rolled_and_scored(trainer: PpoTrainer, count: int = 6) -> tuple[Rollout, Any]:
    chosen = trainer._next_prompts(count)
    rollout = trainer._rollout(POLICY, chosen)
    return rollout, trainer._scored(rollout, chosen)


# -- scores and targets -----------------------------------------------------------------------------------------------


def test_scores_are_normalised_on_samples_of_the_reference_before_ppo(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    roles: list[str] = []
    watch(
        monkeypatch,
        trainer_module,
        "sampled_answers",
        lambda _, role, prompts, *__: roles.extend([role] * len(prompts)),
    )

    def recorded(**kwargs: Any) -> list[int]:
        seen.append(text_length(**kwargs))
        return seen[-1]

    trainer = make_trainer(recorded)
    assert [len(batch) for batch in seen] == [4, 4]  # never more at a time than a PPO step samples
    raw = torch.tensor(seen[0] + seen[1], dtype=torch.float32)
    assert roles == [REFERENCE] * 8
    scale = trainer.reward.scales["function"]
    normalised = (raw - scale.mean) / scale.std
    assert normalised.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert normalised.std().item() == pytest.approx(1.0, abs=1e-5)

    metrics = trainer.step()
    assert metrics["score/function"] == pytest.approx(sum(seen[2]) / 4)
    assert metrics["score"] == pytest.approx((metrics["score/function"] - scale.mean) / scale.std, abs=1e-5)
    assert trainer.normalization()["scales"] == {"function": {"mean": scale.mean, "std": scale.std}}


def test_scales_that_are_there_already_are_kept(make_trainer: MakeTrainer) -> None:
    scales = {"function": ScoreScale(3.0, 2.0)}
    assert make_trainer(text_length, scales=scales).reward.scales == scales


def test_an_answer_without_end_loses_the_penalty(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(text_length, batch_size=16, missing_eos_penalty=2.5, kl_coef=0.0)
    metrics = trainer.step()
    assert 0 < metrics["ended_rate"] < 1 and metrics["eos_rate"] == metrics["ended_rate"]
    expected = metrics["score"] - 2.5 * (1 - metrics["ended_rate"])
    assert metrics["reward"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("share", "expected"), [(0.0, [1, 1, -1.5]), (0.4, [1, 0, -1.5]), (1.0, [1, -1.5, -1.5])])
def test_an_answer_that_ends_at_a_stop_string_loses_a_share_of_the_penalty(
    make_trainer: MakeTrainer, share: float, expected: list[float]
) -> None:
    trainer = make_trainer(missing_eos_penalty=2.5, stop_string_penalty=share)
    rollout, _ = rolled_and_scored(trainer, 3)
    ended, by_eos = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    rollout = replace(rollout, ended=ended, ended_by_eos=by_eos)
    assert trainer.penalised(torch.ones(3), rollout).tolist() == expected  # by EOS, at a stop string, cut


def test_the_rate_of_eos_leaves_out_what_ended_at_a_stop_string(make_trainer: MakeTrainer) -> None:
    settings = {"batch_size": 16, "kl_coef": 0.0, "missing_eos_penalty": 2.0, "stop_string_penalty": 0.25}
    metrics = make_trainer(text_length, stop_strings=["e", "t"], response_length=4, **settings).step()
    ended, by_eos = metrics["ended_rate"], metrics["eos_rate"]
    assert 0 < by_eos < ended < 1
    expected = metrics["score"] - 2.0 * (1 - ended) - 0.5 * (ended - by_eos)
    assert metrics["reward"] == pytest.approx(expected, abs=1e-5)


def test_the_reward_that_is_learned_from_is_penalised_score_less_kl(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(lam=1.0, missing_eos_penalty=2.5, kl_coef=0.3)
    rollout, scored = rolled_and_scored(trainer, 10)
    assert 0 < rollout.ended.sum() < 10
    kl, mask = scored.logprobs - scored.reference, rollout.action_mask
    advantages, returns = trainer.targets(rollout, scored, kl)
    # With λ = γ = 1 the return of a state is all that comes after it, and the advantage is what the value missed.
    score = scored.score - 2.5 * (~rollout.ended).float()
    later = score[:, None] - 0.3 * kl.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns[:, :-1][mask], later[mask], atol=1e-4, rtol=1e-5)
    missed = (later - scored.values[:, :-1])[mask]
    assert missed.std() > 0.1
    expected = (missed - missed.mean()) / missed.std()
    torch.testing.assert_close(advantages[mask], expected, atol=1e-4, rtol=1e-4)
    assert (advantages[~mask] == 0).all()


@pytest.mark.parametrize("weight", [1.0, -3.0])
def test_the_value_role_starts_as_the_reward_role_with_its_head_at_the_normalised_score(
    make_trainer: MakeTrainer, weight: float
) -> None:
    trainer = make_trainer(weight=weight)
    adapter, value = weights(trainer, REWARD), weights(trainer, VALUE)
    assert same(adapter[:-1], value[:-1])
    torch.testing.assert_close(value[-1], adapter[-1] * weight / trainer.reward.scales["reward"].std)
    rollout, scored = rolled_and_scored(trainer, 16)
    last, ended = rollout.action_mask.sum(1, keepdim=True), rollout.ended  # others are scored with an EOS more
    torch.testing.assert_close(scored.values.gather(1, last)[ended, 0], scored.score[ended], atol=1e-4, rtol=0)
    assert ended.sum() > 2 and scored.score[ended].std() > 0.1
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


# -- the update -------------------------------------------------------------------------------------------------------


def test_tokens_that_the_sampler_found_rarer_count_for_more_up_to_the_cap(make_trainer: MakeTrainer) -> None:
    losses = []
    for cap, factor in ((2.0, 1.0), (None, 2.0), (None, 1.0)):
        trainer = make_trainer(sampler_correction=cap, num_ppo_epochs=1)
        rollout, scored = rolled_and_scored(trainer)
        rollout.sampled_logprobs = scored.logprobs - 1.1  # e^1.1 = 3.0 times as likely for the trainer: capped at 2
        advantages = factor * torch.linspace(-1, 2, scored.logprobs.numel()).view_as(scored.logprobs)
        losses.append(trainer.update(rollout, scored, advantages, scored.values)["policy_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] == pytest.approx(2 * losses[2], rel=1e-5)


def test_old_and_new_policy_agree_in_the_first_minibatch(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(num_ppo_epochs=2, num_mini_batches=2)
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["first_ratio_deviation"] < 1e-5
        assert metrics["sampler_max_difference"] < 1e-4
    assert metrics["update_kl"] > 1e-8  # later minibatches did move


def test_every_epoch_goes_through_the_batch_in_a_fresh_order(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(batch_size=8, num_ppo_epochs=3, num_mini_batches=2, update_kl_limit=None)
    rows: list[list[int]] = []
    watch(monkeypatch, trainer, "_accumulate", lambda *args: rows.append(args[4].tolist()))
    trainer.step()
    assert [len(r) for r in rows] == [4] * 6
    epochs = [rows[i] + rows[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_prompts_are_drawn_through_one_permutation_after_another(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(text_length, normalization_samples=5)
    drawn = [i for _ in range(5) for i in trainer._next_prompts(4)]
    passes = [drawn[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(one) == list(range(5)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_the_learning_rate_is_annealed_to_0(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(text_length, learning_rate=4e-3, value_learning_rate=8e-3, total_steps=4)
    seen = []
    for _ in range(4):
        value_rate = trainer.optimizer.param_groups[1]["lr"]
        rate = trainer.step()["learning_rate"]
        assert value_rate == pytest.approx(2 * rate)
        seen.append(rate)
    assert seen == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("warmup_ratio", "shares"),
    [(0.0, [1, 0.75, 0.5, 0.25]), (0.25, [1, 1, 2 / 3, 1 / 3]), (0.5, [0.5, 1, 1, 0.5])],
)
def test_the_learning_rate_rises_over_the_warm_up_first(warmup_ratio: float, shares: list[float]) -> None:
    assert [learning_rate_share(step, 4, warmup_ratio) for step in range(4)] == pytest.approx(shares)
    assert learning_rate_share(4, 4, warmup_ratio) == 0


def test_the_optimizer_is_adam_with_epsilon_1e_5_over_policy_and_value_alone(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    assert type(trainer.optimizer) is torch.optim.Adam
    policy, value = trainer.optimizer.param_groups
    assert policy["eps"] == value["eps"] == 1e-5
    assert policy["lr"] == value["lr"] == 1e-3  # no value_learning_rate: the same
    for group, role in ((policy, POLICY), (value, VALUE)):
        assert {id(p) for p in group["params"]} == {id(p) for p in trainer.base.parameters(role)}
    trainable = {id(p) for p in (*trainer.base.model.parameters(), *trainer.base.heads.parameters()) if p.requires_grad}
    assert trainable == {id(p) for role in (POLICY, VALUE) for p in trainer.base.parameters(role)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the optimizer is there on CUDA")
def test_the_paged_optimizer_without_cuda_says_what_to_set(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UserError, match=r"ppo.optim: paged_adam_8bit needs CUDA; set ppo.optim: adam"):
        make_trainer(optim="paged_adam_8bit")


def test_gradients_are_clipped_to_one_norm_over_policy_and_value(make_trainer: MakeTrainer) -> None:
    trainer, learned_from = make_trainer(max_grad_norm=1e-3), []

    def noted(*_: Any) -> None:
        both = [p.grad for role in (POLICY, VALUE) for p in trainer.base.parameters(role)]
        learned_from.append(torch.nn.utils.get_total_norm(both).item())

    trainer.optimizer.register_step_pre_hook(noted)
    assert trainer.step()["grad_norm"] > 1e-3
    assert learned_from and learned_from == pytest.approx([1e-3] * len(learned_from), rel=0.01)


def test_gradients_take_no_memory_between_the_updates(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.step()
    assert all(p.grad is None for role in (POLICY, VALUE) for p in trainer.base.parameters(role))


def test_the_sampler_decides_once_whether_to_expand(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(text_length)
    assert trainer.sampling.expand_weights is True
    monkeypatch.setattr(trainer.base.layers, "has_room_for_copy", lambda: pytest.fail("asked again"))
    trainer.step()


def test_value_warm_up_moves_the_value_alone_and_then_ends(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(value_warmup_steps=2)
    for step in range(3):
        policy, value = weights(trainer, POLICY), weights(trainer, VALUE)
        trainer.step()
        assert same(policy, weights(trainer, POLICY)) == (step < 2)
        assert not same(value, weights(trainer, VALUE))


@pytest.mark.parametrize(("limit", "optimizer_steps"), [(1e-9, 1), (None, 4), (1e9, 4)])
def test_a_step_ends_early_when_new_and_old_policy_part(
    make_trainer: MakeTrainer, limit: float | None, optimizer_steps: int
) -> None:
    trainer = make_trainer(num_ppo_epochs=4, update_kl_limit=limit)
    taken: list[int] = []
    trainer.optimizer.register_step_post_hook(lambda *_: taken.append(1))
    metrics = trainer.step()
    assert len(taken) == optimizer_steps
    assert metrics["update_stopped"] == float(optimizer_steps < 4)
    assert trainer.stopped_early is None


@pytest.mark.parametrize(("limit", "stops"), [(1e-3, True), (None, False), (1e9, False)])
def test_ppo_stops_when_the_kl_of_an_answer_passes_max_kl(
    make_trainer: MakeTrainer, limit: float | None, stops: bool
) -> None:
    trainer = make_trainer(batch_size=16, max_kl=limit)
    metrics = trainer.step()
    assert metrics["kl"] > 1e-3  # the random policy is far from the reference
    assert bool(trainer.stopped_early) == stops
    if stops:
        assert "max_kl" in trainer.stopped_early and "step 1" in trainer.stopped_early


def test_the_kl_coefficient_adapts_after_each_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(adaptive_kl=True, kl_target=1e-3, kl_horizon=40, kl_coef=0.1)
    assert isinstance(trainer.kl, AdaptiveKl)
    # far above target: × (1 + 0.2 · 4 answers / 40) = × 1.02 per step, from the second step on
    assert [trainer.step()["kl_coef"] for _ in range(3)] == pytest.approx([0.1, 0.102, 0.10404])


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_every_metric_is_finite_and_every_step_has_the_same_ones(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(num_ppo_epochs=2, adaptive_kl=True)
    steps = [trainer.step() for _ in range(3)]
    assert all(isfinite(value) for metrics in steps for value in metrics.values())
    assert {frozenset(metrics) for metrics in steps} == {frozenset(steps[0])}
    assert [m["step"] for m in steps] == [1, 2, 3] and [m["episodes"] for m in steps] == [4, 8, 12]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_uses_the_chosen_estimator_and_the_kl_metric_is_always_k1(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, estimator: PpoSettings
) -> None:
    trainer = make_trainer(text_length, kl_estimator=estimator, kl_coef=1.0, missing_eos_penalty=0.0)
    scored = []
    original = trainer_module.scored_by_roles
    monkeypatch.setattr(trainer_module, "scored_by_roles", lambda *a: scored.append(original(*a)) or scored[0])
    metrics = trainer.step()
    d = scored[0].logprobs - scored[0].reference
    estimate = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[estimator]
    assert metrics["score"] - metrics["reward"] == pytest.approx(estimate.sum(1).mean().item(), rel=1e-4)
    assert metrics["kl"] == pytest.approx(d.sum(1).mean().item(), abs=1e-4)
