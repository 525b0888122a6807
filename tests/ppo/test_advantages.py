"""Token rewards, GAE and whitening: golden values worked by hand, and properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_rlhf.ppo.advantages import advantages_and_returns, masked_mean, masked_whiten, token_rewards, value_mask

NO, YES = False, True
properties = settings(max_examples=50, deadline=None)


def near(found: torch.Tensor, expected: list, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=tolerance, rtol=0, check_dtype=False)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Random rewards and values [batch, R + 1] in float64, with answers of 1 to R tokens; junk where masked."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    lengths = torch.tensor(draw(st.lists(st.integers(1, length), min_size=rows, max_size=rows)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rewards, values = torch.randn((2, rows, length + 1), generator=generator, dtype=torch.float64)
    action = torch.arange(length) < lengths[:, None]
    return {"rewards": rewards, "values": values, "mask": value_mask(action), "action": action}


unit = st.floats(0, 1)


# -- masks and rewards ------------------------------------------------------------------------------------------------


def test_the_value_mask_reaches_one_step_past_the_token_mask() -> None:
    action = torch.tensor([[YES, YES, NO], [YES, YES, YES], [YES, NO, NO]])
    expected = torch.tensor([[YES, YES, YES, NO], [YES, YES, YES, YES], [YES, YES, NO, NO]])
    assert torch.equal(value_mask(action), expected)


def test_each_token_pays_for_its_kl_and_the_score_comes_at_the_state_after_the_last_one() -> None:
    kl = torch.tensor([[1.0, 2.0, 9.0], [0.5, -1.0, 4.0]])
    action = torch.tensor([[YES, YES, NO], [YES, YES, YES]])
    # β = 0.1. Short answer, 2 tokens: −0.1·1, −0.1·2, then its score 3 at step 2; the masked 9 pays nothing.
    # Full answer, 3 tokens: −0.1·0.5, +0.1·1, −0.1·4, then its score −2 at step 3, one past the last token.
    rewards = token_rewards(kl, 0.1, torch.tensor([3.0, -2.0]), action)
    near(rewards, [[-0.1, -0.2, 3.0, 0.0], [-0.05, 0.1, -0.4, -2.0]])


@properties
@given(batches(), st.floats(0, 2))
def test_token_rewards_sum_to_the_score_less_the_kl_of_the_answer(batch: dict[str, torch.Tensor], beta: float) -> None:
    kl, score, action = batch["rewards"][:, :-1], batch["values"][:, 0], batch["action"]
    rewards = token_rewards(kl, beta, score, action)
    torch.testing.assert_close(rewards.sum(1), score - beta * (kl * action).sum(1))
    assert (rewards[~batch["mask"]] == 0).all()


# -- generalised advantages -------------------------------------------------------------------------------------------


def test_advantages_of_three_steps_by_hand() -> None:
    # γ = 1, λ = 0.95, r = (0, 0, 1), V = (0.5, 0.4, 0.2), V = 0 past the end:
    # δ₂ = 1 − 0.2 = 0.8            A₂ = 0.8
    # δ₁ = 0 + 0.2 − 0.4 = −0.2     A₁ = −0.2 + 0.95·0.8 = 0.56
    # δ₀ = 0 + 0.4 − 0.5 = −0.1     A₀ = −0.1 + 0.95·0.56 = 0.432
    # returns, A + V: 0.932, 0.96, 1.0: not whitened.
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.2]])
    advantages, returns = advantages_and_returns(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.95)
    near(advantages, [[0.432, 0.56, 0.8]])
    near(returns, [[0.932, 0.96, 1.0]])


def test_advantages_with_discount_by_hand() -> None:
    # γ = 0.5, λ = 0.8, γλ = 0.4, r = (1, 2), V = (0.6, 0.2):
    # δ₁ = 2 − 0.2 = 1.8;  δ₀ = 1 + 0.5·0.2 − 0.6 = 0.5;  A₀ = 0.5 + 0.4·1.8 = 1.22;  returns 1.82 and 2.
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.6, 0.2]])
    advantages, returns = advantages_and_returns(rewards, values, torch.ones(1, 2, dtype=torch.bool), 0.5, 0.8)
    near(advantages, [[1.22, 1.8]])
    near(returns, [[1.82, 2.0]])


def test_masked_steps_give_and_get_nothing() -> None:
    # Steps 0 and 1 are real, r = (0, 1), V = (0.5, 0.4); step 2 holds junk that must not leak back:
    # δ₁ = 1 + 0 − 0.4 = 0.6;  δ₀ = 0.4 − 0.5 = −0.1;  A₀ = −0.1 + 0.95·0.6 = 0.47;  returns 0.97 and 1.
    rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.4, 7.0]])
    advantages, returns = advantages_and_returns(rewards, values, torch.tensor([[YES, YES, NO]]), 1.0, 0.95)
    near(advantages, [[0.47, 0.6, 0.0]])
    near(returns, [[0.97, 1.0, 0.0]])


@properties
@given(batches(), unit, unit)
def test_advantages_are_the_double_sum_of_the_definition(
    batch: dict[str, torch.Tensor], gamma: float, lam: float
) -> None:
    advantages, returns = advantages_and_returns(batch["rewards"], batch["values"], batch["mask"], gamma, lam)
    for i, length in enumerate(batch["mask"].sum(1).tolist()):
        r, v = batch["rewards"][i, :length].tolist(), [*batch["values"][i, :length].tolist(), 0.0]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-9)
            assert returns[i, t].item() == pytest.approx(expected + v[t], abs=1e-9)
    assert (advantages[~batch["mask"]] == 0).all() and (returns[~batch["mask"]] == 0).all()


@properties
@given(batches())
def test_without_discount_and_lambda_the_return_is_the_sum_of_later_rewards(batch: dict[str, torch.Tensor]) -> None:
    advantages, _ = advantages_and_returns(batch["rewards"], batch["values"], batch["mask"], 1.0, 1.0)
    later = (batch["rewards"] * batch["mask"]).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages + batch["values"] * batch["mask"], later * batch["mask"])


@properties
@given(batches(), unit, unit)
def test_with_lambda_0_the_advantage_is_the_one_step_error(
    batch: dict[str, torch.Tensor], gamma: float, coef: float
) -> None:
    rewards, mask = coef * batch["rewards"] * batch["mask"], batch["mask"]
    values = batch["values"] * mask
    advantages, _ = advantages_and_returns(rewards, values, mask, gamma, 0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    torch.testing.assert_close(advantages, (rewards + gamma * following - values) * mask)


@properties
@given(batches(), st.integers(1, 5))
def test_more_padding_changes_nothing(batch: dict[str, torch.Tensor], columns: int) -> None:
    def wider(x: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, columns), value=fill)

    rewards, values, mask, action = (batch[k] for k in ("rewards", "values", "mask", "action"))
    width, kl, score = mask.shape[1], values[:, :-1], rewards[:, 0]
    narrow = token_rewards(kl, 0.1, score, action)
    wide = token_rewards(wider(kl, 5.0), 0.1, score, wider(action, NO))
    assert torch.equal(wide[:, :width], narrow) and (wide[:, width:] == 0).all()

    narrow_pair = advantages_and_returns(rewards, values, mask, 1.0, 0.95)
    wide_pair = advantages_and_returns(wider(rewards, 5.0), wider(values, -3.0), wider(mask, NO), 1.0, 0.95)
    for one, other in zip(narrow_pair, wide_pair, strict=True):
        torch.testing.assert_close(other[:, :width], one)
        assert (other[:, width:] == 0).all()

    for keep in (False, True):
        white, wide_white = masked_whiten(values, mask, keep), masked_whiten(wider(values, 7.0), wider(mask, NO), keep)
        torch.testing.assert_close(wide_white[:, :width], white)
        assert (wide_white[:, width:] == 0).all()


# -- means and whitening ----------------------------------------------------------------------------------------------


def test_the_masked_mean_is_over_real_entries_only_and_0_where_there_are_none() -> None:
    values = torch.tensor([[1.0, 2.0], [6.0, 100.0]])
    assert masked_mean(values, torch.tensor([[YES, YES], [YES, NO]])).item() == 3.0
    assert masked_mean(values, torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize(("keep_mean", "expected"), [(False, [[-1.0, 0.0], [1.0, 0.0]]), (True, [[3, 4], [5, 0]])])
def test_whitening_by_hand(keep_mean: bool, expected: list[list[float]]) -> None:
    # Over 2, 4, 6 (the 100 is masked): mean 4, unbiased variance (4 + 0 + 4) / 2 = 4, deviation 2.
    values, mask = torch.tensor([[2.0, 4.0], [6.0, 100.0]]), torch.tensor([[YES, YES], [YES, NO]])
    near(masked_whiten(values, mask, keep_mean), expected)


@properties
@given(batches(), st.booleans(), st.floats(0.1, 10), st.floats(-5, 5))
def test_whitened_values_have_deviation_1_and_the_mean_that_was_asked_for(
    batch: dict[str, torch.Tensor], keep_mean: bool, scale: float, shift: float
) -> None:
    values, mask = scale * batch["values"] + shift, batch["mask"]
    white = masked_whiten(values, mask, keep_mean)[mask]
    assert white.mean().item() == pytest.approx(values[mask].mean().item() if keep_mean else 0.0, abs=1e-6)
    if values[mask].std() > 0.01:
        assert white.std().item() == pytest.approx(1.0, abs=1e-3)


def test_whitening_one_value_gives_a_finite_number() -> None:
    near(masked_whiten(torch.tensor([[3.0]]), torch.tensor([[YES]])), [[0.0]])
