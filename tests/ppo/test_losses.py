"""The clipped losses, the KL estimators and the KL controllers: golden values worked by hand, and properties."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_rlhf.ppo.losses import AdaptiveKl, FixedKl, importance_weights, kl_estimate, policy_loss, value_loss

properties = settings(max_examples=50, deadline=None)
real = st.floats(-3, 3)
one = torch.ones(1, 1, dtype=torch.bool)


def cell(value: float) -> torch.Tensor:
    return torch.tensor([[value]])


# -- truncated importance sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "sampler", "expected"),
    [(0.5, 0.25, 2.0), (0.25, 0.5, 0.5), (0.9, 0.3, 2.0), (0.4, 0.4, 1.0)],  # p / q, at most 2
)
def test_importance_weights_by_hand(trainer: float, sampler: float, expected: float) -> None:
    assert importance_weights(cell(log(trainer)), cell(log(sampler)), 2.0).item() == pytest.approx(expected)


@given(st.lists(st.floats(0.05, 1), min_size=3, max_size=3), st.lists(st.floats(0.05, 1), min_size=3, max_size=3))
def test_weights_below_the_cap_turn_the_samplers_mean_into_the_trainers(p: list[float], q: list[float]) -> None:
    trainer, sampler = torch.tensor(p) / sum(p), torch.tensor(q) / sum(q)
    values = torch.tensor([1.0, -2.0, 3.0])
    weights = importance_weights(trainer.log(), sampler.log(), cap=1e9)
    torch.testing.assert_close((sampler * weights * values).sum(), (trainer * values).sum())


# -- the policy's loss ------------------------------------------------------------------------------------------------

# max(−A·ρ, −A·clip(ρ, 0.8, 1.2)), and whether the clipped term is the larger one.
POLICY_CASES = [
    (1.5, 1.0, -1.2, 1.0),  # max(−1.5, −1.2): a good token is not pushed past 1.2
    (1.5, -1.0, 1.5, 0.0),  # max(1.5, 1.2): a bad token that became likelier is pushed back
    (0.5, 1.0, -0.5, 0.0),  # max(−0.5, −0.8): a good token that became rarer is pushed back
    (0.5, -2.0, 1.6, 1.0),  # max(1, 1.6): a bad token is not pushed below 0.8
    (1.1, 2.0, -2.2, 0.0),  # within the range: both terms are −2.2
]


@pytest.mark.parametrize(("ratio", "advantage", "expected", "clipped"), POLICY_CASES)
def test_the_policy_loss_by_hand(ratio: float, advantage: float, expected: float, clipped: float) -> None:
    logprobs = cell(-1.0 + log(ratio)).requires_grad_()
    loss, share = policy_loss(logprobs, cell(-1.0), cell(advantage), one, 0.2)
    loss.backward()
    assert (loss.item(), share.item()) == (pytest.approx(expected, abs=1e-6), clipped)
    # dρ/dlogp = ρ; where clipped, nothing pushes any more
    assert logprobs.grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio, abs=1e-6)


def test_the_policy_loss_is_the_mean_over_real_tokens_whatever_row_they_are_in() -> None:
    # Real tokens: the first three cases of above. Mean (−1.2 + 1.5 − 0.5) / 3 = −0.2/3; one of three is clipped.
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[log(1.5), log(1.5)], [log(0.5), 3.0]])
    advantages = torch.tensor([[1.0, -1.0], [1.0, -50.0]])
    loss, share = policy_loss(logprobs, torch.zeros(2, 2), advantages, mask, 0.2)
    assert (loss.item(), share.item()) == (pytest.approx(-0.2 / 3, abs=1e-6), pytest.approx(1 / 3))


@properties
@given(st.lists(real, min_size=1, max_size=8), st.floats(0.01, 0.5))
def test_at_ratio_1_the_policy_loss_is_minus_the_mean_advantage(advantages: list[float], cliprange: float) -> None:
    a = torch.tensor([advantages])
    logprobs = -torch.rand(a.shape)
    loss, share = policy_loss(logprobs, logprobs.clone(), a, torch.ones_like(a, dtype=torch.bool), cliprange)
    assert loss.item() == pytest.approx(-a.mean().item(), abs=1e-5)
    assert share.item() == 0.0


# -- the value's loss -------------------------------------------------------------------------------------------------

# Old value 1, clip range 0.2: half of max((V − R)², (clip(V, 0.8, 1.2) − R)²).
VALUE_CASES = [
    (2.0, 0.0, 2.0, 0.0),  # max(4, 1.44) / 2: moved away from the return
    (2.0, 3.0, 1.62, 1.0),  # max(1, (1.2 − 3)² = 3.24) / 2: moved to the return, farther than the range allows
    (0.0, -1.0, 1.62, 1.0),  # max(1, (0.8 + 1)² = 3.24) / 2: the same downwards
    (0.0, 2.0, 2.0, 0.0),  # max(4, (0.8 − 2)² = 1.44) / 2
    (1.1, 0.0, 0.605, 0.0),  # within the range: 1.21 / 2
]


@pytest.mark.parametrize(("value", "target", "expected", "clipped"), VALUE_CASES)
def test_the_value_loss_by_hand(value: float, target: float, expected: float, clipped: float) -> None:
    values = cell(value).requires_grad_()
    loss, share = value_loss(values, cell(1.0), cell(target), one, 0.2)
    loss.backward()
    assert (loss.item(), share.item()) == (pytest.approx(expected, abs=1e-6), clipped)
    assert values.grad.item() == pytest.approx(0.0 if clipped else value - target, abs=1e-6)


def test_the_value_loss_is_half_the_mean_over_real_states() -> None:
    # (4 + 3.24) / 2 real states / 2 = 1.81; one of two clipped.
    mask = torch.tensor([[True, True, False]])
    loss, share = value_loss(
        torch.tensor([[2.0, 2.0, 80.0]]), torch.ones(1, 3), torch.tensor([[0.0, 3.0, -9.0]]), mask, 0.2
    )
    assert (loss.item(), share.item()) == (pytest.approx(1.81, abs=1e-6), 0.5)


@properties
@given(st.floats(-100, 100), st.floats(-100, 100))
def test_what_is_masked_does_not_matter(junk: float, other_junk: float) -> None:
    mask = torch.tensor([[True, False]])
    x, old, target = torch.tensor([[0.3, junk]]), torch.tensor([[0.1, other_junk]]), torch.tensor([[1.0, junk]])
    # exp of the junk difference may be huge, as long as it is finite
    x[0, 1] = old[0, 1] + min(max(junk, -50), 50)
    alone = (x[:, :1], old[:, :1], target[:, :1], mask[:, :1], 0.2)
    for loss in (policy_loss, value_loss):
        assert [t.item() for t in loss(x, old, target, mask, 0.2)] == [t.item() for t in loss(*alone)]


# -- KL estimators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    # logp = ln ½, logp_ref = ln ¼, d = ln 2 = 0.693147: k1 = d; k2 = d²/2 = 0.240227; k3 = ½ − 1 + d = 0.193147
    [("k1", 0.693147), ("k2", 0.240227), ("k3", 0.193147)],
)
def test_kl_estimators_by_hand(kind: str, expected: float) -> None:
    estimate = kl_estimate(torch.tensor(log(0.5)), torch.tensor(log(0.25)), kind)
    assert estimate.item() == pytest.approx(expected, abs=1e-6)


@properties
@given(real, real)
def test_k2_and_k3_are_never_negative_and_all_are_0_where_the_models_agree(own: float, reference: float) -> None:
    p, q = (torch.tensor(x, dtype=torch.float64) for x in (own, reference))
    assert kl_estimate(p, q, "k2") >= 0 and kl_estimate(p, q, "k3") >= 0
    assert all(kl_estimate(p, p, kind) == 0 for kind in ("k1", "k2", "k3"))


@properties
@given(st.lists(st.tuples(real, real), min_size=2, max_size=10))
def test_k1_and_k3_have_the_exact_kl_of_two_categoricals_as_their_mean(logits: list[tuple[float, float]]) -> None:
    log_p, log_q = torch.tensor(logits, dtype=torch.float64).log_softmax(0).unbind(1)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=log_p), torch.distributions.Categorical(logits=log_q)
    ).item()
    for kind in ("k1", "k3"):
        mean = (log_p.exp() * kl_estimate(log_p, log_q, kind)).sum().item()
        assert mean == pytest.approx(exact, abs=1e-9)


def test_k2_is_close_to_the_exact_kl_of_near_distributions() -> None:
    log_p = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64).log_softmax(0)
    log_q = torch.tensor([0.51, -0.21, 0.1], dtype=torch.float64).log_softmax(0)
    means = {kind: (log_p.exp() * kl_estimate(log_p, log_q, kind)).sum().item() for kind in ("k1", "k2")}
    assert means["k2"] == pytest.approx(means["k1"], rel=0.02)


# -- the KL coefficient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1.05),  # error 0.1, times 50 answers / horizon 100
        (5.4, 0.95),
        (600.0, 1.1),  # error clipped at 0.2
        (0.0, 0.9),  # and at −0.2
        (-3.0, 0.9),
    ],
)
def test_the_adaptive_coefficient_follows_the_error_clipped_at_a_fifth(kl: float, factor: float) -> None:
    controller = AdaptiveKl(0.05, target=6.0, horizon=100)
    controller.update(kl, answers=50)
    assert controller.coef == pytest.approx(0.05 * factor)


def test_the_horizon_is_in_answers_and_updates_compound() -> None:
    controller = AdaptiveKl(0.05, target=6.0, horizon=10_000)
    for _ in range(3):
        controller.update(100.0, answers=64)  # each time × (1 + 0.2 · 64 / 10 000) = × 1.00128
    assert controller.coef == pytest.approx(0.05 * 1.00128**3, rel=1e-12)


def test_the_fixed_coefficient_stays() -> None:
    controller = FixedKl(0.05)
    controller.update(100.0, answers=64)
    assert controller.coef == 0.05


@given(st.lists(st.floats(-50, 500), min_size=1, max_size=60), st.integers(1, 64), st.integers(64, 10_000))
def test_whatever_the_kl_does_the_coefficient_stays_within_reach(kls: list[float], answers: int, horizon: int) -> None:
    controller = AdaptiveKl(0.05, 10.0, horizon)
    for kl in kls:
        controller.update(kl, answers)
    reach = controller.reach(len(kls), answers)
    assert 0.05 * (1 - 0.2 * answers / horizon) ** len(kls) * (1 - 1e-9) <= controller.coef <= 0.05 * reach * (1 + 1e-9)
    assert reach <= exp(0.2 * len(kls) * answers / horizon) and controller.coef > 0
