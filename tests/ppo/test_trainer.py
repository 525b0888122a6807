"""The PPO loop on the tiny base: what it normalises, penalises, updates, and reports."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_cases import MakeTrainer, rolled_and_scored, same, text_length, watch, weights

from lora_rlhf.base.shared import POLICY, REFERENCE, VALUE
from lora_rlhf.config import PpoSettings
from lora_rlhf.errors import UserError
from lora_rlhf.ppo import trainer as trainer_module
from lora_rlhf.ppo.losses import AdaptiveKl
from lora_rlhf.ppo.optimization import learning_rate_share
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.reward.sources import ScoreScale

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


def test_a_reward_without_spread_is_said_once_and_its_first_success_counts_one(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def success(completions: Any, **_: Any) -> list[float]:
        calls.append(1)
        return [0.0] * (len(completions) - 1) + [float(len(calls) > 2)]  # two calls for the scales

    trainer = make_trainer(success, score_clip=None)
    assert trainer.reward.scales == {"function": ScoreScale(0.0, 1.0)}
    said = " ".join(capsys.readouterr().out.split())
    assert "reward source function: its scores of the reference's 8 answers have no spread" in said
    metrics = trainer.step()
    assert metrics["score"] == 0.25 and metrics["value_loss"] < 10 and "score_clip_fraction" not in metrics
    make_trainer(success, scales=trainer.reward.scales)  # a resumed run
    assert "no spread" not in capsys.readouterr().out


@pytest.mark.parametrize(("settings", "bound"), [({}, 5), ({"score_clip": 3.0}, 3)], ids=["default", "3"])
def test_clipped_scores_are_counted_and_the_raw_ones_stay_as_they_are(
    make_trainer: MakeTrainer, settings: dict[str, float], bound: float
) -> None:
    def outlier(completions: Any, **_: Any) -> list[float]:
        return [1e6] + [2.0] * (len(completions) - 1)

    trainer = make_trainer(outlier, scales={"function": ScoreScale(0.0, 1.0)}, missing_eos_penalty=0.0, **settings)
    metrics = trainer.step()
    assert metrics["score"] == pytest.approx((bound + 3 * 2) / 4) and metrics["score_clip_fraction"] == 0.25
    assert metrics["score/function"] == pytest.approx((1e6 + 6) / 4)
    assert metrics["value_loss"] < 10


def test_an_answer_without_end_loses_the_penalty(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(text_length, batch_size=16, missing_eos_penalty=2.5, kl_coef=0.0)
    metrics = trainer.step()
    assert 0 < metrics["ended_rate"] < 1 and metrics["eos_rate"] == metrics["ended_rate"]
    expected = metrics["score"] - 2.5 * (1 - metrics["ended_rate"])
    assert metrics["reward"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, [1, 1, -1.5]), (0.4, [1, 0, -1.5]), (1.0, [1, -1.5, -1.5]), (None, [1, -0.25, -1.5])]
)
def test_an_answer_that_ends_at_a_stop_string_loses_a_share_of_the_penalty(
    make_trainer: MakeTrainer, share: float | None, expected: list[float]
) -> None:
    """Half of it by default."""
    trainer = make_trainer(missing_eos_penalty=2.5, **({} if share is None else {"stop_string_penalty": share}))
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
    [
        (0.0, [1, 0.75, 0.5, 0.25]), (0.25, [1, 1, 2 / 3, 1 / 3]), (0.5, [0.5, 1, 1, 0.5]),
        (0.99, [0.25, 0.5, 0.75, 1]), (1.0, [0.25, 0.5, 0.75, 1]),
    ],
)  # fmt: skip
def test_the_learning_rate_rises_over_the_warm_up_first(warmup_ratio: float, shares: list[float]) -> None:
    assert [learning_rate_share(step, 4, warmup_ratio) for step in range(4)] == pytest.approx(shares)
    assert learning_rate_share(4, 4, warmup_ratio) == 0


@given(total=st.integers(1, 300), warmup_ratio=st.floats(0, 1))
def test_whatever_the_warm_up_the_learning_rate_rises_to_its_peak_once_and_falls_to_0(
    total: int, warmup_ratio: float
) -> None:
    shares = [learning_rate_share(step, total, warmup_ratio) for step in range(total + 3)]
    assert max(shares) == 1 and shares[total:] == [0, 0, 0]
    assert all(0 < share <= 1 for share in shares[:total])
    peak = shares.index(1)
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)


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


def gradient_norms(trainer: PpoTrainer) -> list[list[float]]:
    """The norms of policy's and value's gradient, at each optimizer step to come."""
    found: list[list[float]] = []

    def noted(*_: Any) -> None:
        gradients = [[p.grad for p in trainer.parameters[role] if p.grad is not None] for role in (POLICY, VALUE)]
        found.append([torch.nn.utils.get_total_norm(own).item() for own in gradients])

    trainer.optimizer.register_step_pre_hook(noted)
    return found


@pytest.mark.parametrize("value_model", ["adapter", "head"])
def test_the_gradients_of_policy_and_value_are_clipped_each_to_the_norm(
    make_trainer: MakeTrainer, value_model: str
) -> None:
    trainer = make_trainer(max_grad_norm=1e-3, value_model=value_model)
    learned_from = gradient_norms(trainer)
    metrics = trainer.step()
    assert metrics["grad_norm"] > 1e-3 and metrics["value_grad_norm"] > 1e-3
    assert learned_from == [pytest.approx([1e-3, 1e-3], rel=0.01)]


def test_a_large_gradient_of_the_value_does_not_shorten_the_policys_step(make_trainer: MakeTrainer) -> None:
    plain, loud = (make_trainer(max_grad_norm=1e3, vf_coef=vf_coef) for vf_coef in (0.1, 1e6))
    norms = [gradient_norms(plain), gradient_norms(loud)]
    metrics = [trainer.step() for trainer in (plain, loud)]
    assert metrics[0]["value_grad_norm"] < 1e3 < metrics[1]["value_grad_norm"]
    (one,), (other,) = norms
    assert one[0] == other[0] == pytest.approx(metrics[0]["grad_norm"], rel=1e-6)
    assert other[1] == pytest.approx(1e3, rel=0.01)
    assert same(weights(plain, POLICY), weights(loud, POLICY))


def test_gradients_take_no_memory_between_the_updates(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.step()
    assert all(p.grad is None for role in (POLICY, VALUE) for p in trainer.base.parameters(role))


def test_the_sampler_decides_once_whether_to_expand(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(text_length)
    assert trainer.sampling.expand_weights is True
    monkeypatch.setattr(trainer.base.layers, "has_room_for_copy", lambda: pytest.fail("asked again"))
    trainer.step()


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


def test_a_step_says_how_much_folding_would_change_the_adapter(make_trainer: MakeTrainer) -> None:
    metrics = make_trainer(expand_weights=True).step()
    assert metrics["folded_layers"] == 1.0 and metrics["folding_error"] == pytest.approx(0.0, abs=1e-3)  # float32
    assert not {"folded_layers", "folding_error"} & make_trainer(expand_weights=False).step().keys()


def test_a_backend_that_folds_nothing_says_nothing_of_it(make_trainer: MakeTrainer) -> None:
    """Unsloth's `generate` reads no working copy, whatever ppo.expand_weights says."""
    trainer = make_trainer(expand_weights=True)
    assert "folded_layers" in trainer.step()
    trainer.base.causal_lm.for_inference = lambda: None
    assert not {"folded_layers", "folding_error"} & trainer.step().keys()


def test_a_step_that_gave_up_its_copy_says_nothing_of_folding(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer_module.sampled_answers

    def without_room(base: Any, role: str, prompts: Any, sampling: Any, *others: Any) -> Any:
        if not sampling.expand_weights:
            return plain(base, role, prompts, sampling, *others)
        with base.expanded(role):
            raise torch.OutOfMemoryError("out of memory")

    trainer = make_trainer(expand_weights=True)
    assert "folded_layers" in trainer.step()
    monkeypatch.setattr(trainer_module, "sampled_answers", without_room)
    assert not {"folded_layers", "folding_error"} & trainer.step().keys()


@pytest.mark.parametrize("mixed", [True, False])
def test_before_any_update_in_16_bits_no_token_leaves_the_clip_range(make_trainer: MakeTrainer, mixed: bool) -> None:
    settings = {"num_ppo_epochs": 1, "num_mini_batches": 1, "mixed_adapter_scoring": mixed}
    metrics = make_trainer(dtype="bfloat16", **settings).step()
    assert metrics["first_ratio_deviation"] < 0.05 and metrics["clip_fraction"] == 0.0
