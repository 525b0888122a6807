"""Chunked token log-probs against log_softmax, gather and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from lora_rlhf.base.lm_head import LmHead
from lora_rlhf.base.token_logprobs import token_logprobs


def example(count: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((count, width), generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn((vocabulary, width), generator=generator, dtype=dtype)
    return hidden, weight, torch.randint(vocabulary, (count,), generator=generator)


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies from all logits at once, as autograd differentiates them."""
    log_all = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return log_all.gather(1, tokens[:, None])[:, 0], -(log_all.exp() * log_all).sum(-1)


@given(
    count=st.integers(1, 9), width=st.integers(1, 6), vocabulary=st.integers(1, 20), chunk=st.integers(1, 12),
    temperature=st.floats(0.3, 3), dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_values_entropies_and_gradients_are_those_of_autograd_at_any_chunk_size(
    count: int, width: int, vocabulary: int, chunk: int, temperature: float, dtype: torch.dtype, seed: int
) -> None:
    hidden, weight, tokens = example(count, width, vocabulary, dtype, seed)
    upstream = torch.linspace(-1, 2, count)
    expected, expected_entropy = plain(hidden, weight, tokens, temperature)
    (expected_slope,) = torch.autograd.grad(expected, hidden, upstream.to(dtype))

    found, entropy = token_logprobs(hidden, LmHead(weight), tokens, temperature, chunk)
    (slope,) = torch.autograd.grad(found, hidden, upstream)

    assert found.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    # An entropy is a difference of numbers as large as the logits, so its rounding goes with their size.
    rounding = 1e-5 + 2e-6 * (hidden @ weight.T / temperature).abs().max().item()
    torch.testing.assert_close(entropy, expected_entropy.float(), atol=rounding, rtol=1e-5)
    assert slope.dtype == dtype
    torch.testing.assert_close(slope, expected_slope, atol=2e-5, rtol=1e-4)


def test_entropies_that_nobody_wants_are_zeros_and_change_nothing_else() -> None:
    hidden, weight, tokens = example(5, 4, 6, torch.float32)
    results = []
    for wanted in (True, False):
        logprobs, entropy = token_logprobs(hidden, LmHead(weight), tokens, 0.7, 2, with_entropy=wanted)
        assert (entropy != 0).all() == wanted
        results.append((logprobs, *torch.autograd.grad(logprobs.sum(), hidden)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_chunks_do_not_change_a_value() -> None:
    hidden, weight, tokens = example(7, 5, 11, torch.float64)
    whole = token_logprobs(hidden, LmHead(weight), tokens, 0.7, chunk=100)
    for chunk in (1, 3, 7):
        for one, other in zip(whole, token_logprobs(hidden, LmHead(weight), tokens, 0.7, chunk), strict=True):
            torch.testing.assert_close(other, one, atol=1e-6, rtol=0)


class LogitRows(TorchFunctionMode):
    """Notes the rows of every tensor as wide as the vocabulary that is computed inside the block."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[1] == self.vocabulary:
            self.rows.append(len(result))
        return result


def test_no_more_than_one_chunk_of_logits_exists_at_a_time() -> None:
    hidden, weight, tokens = example(10, 4, 6, torch.float32)
    with LogitRows(vocabulary=6) as seen:
        token_logprobs(hidden, LmHead(weight), tokens, 1.0, chunk=4)
    assert max(seen.rows) == 4 and 2 in seen.rows


def test_gradients_flow_from_the_log_probs_only_and_not_to_the_head() -> None:
    hidden, weight, tokens = example(3, 4, 5, torch.float32)
    logprobs, entropy = token_logprobs(hidden, LmHead(weight.requires_grad_()), tokens, 1.0, 2)
    assert logprobs.requires_grad and not entropy.requires_grad
    logprobs.sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_divides_the_logits(temperature: float) -> None:
    # Logits (2, 0): log p₀ = −ln(1 + e^{−2/T})
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[2.0], [0.0]])
    logprobs, _ = token_logprobs(hidden, LmHead(weight), torch.tensor([0]), temperature, 1)
    expected = -torch.log1p(torch.exp(torch.tensor(-2.0 / temperature)))
    assert logprobs.item() == pytest.approx(expected.item(), abs=1e-6)


def test_extreme_logits_and_no_tokens_at_all_are_fine() -> None:
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])
    logprobs, entropy = token_logprobs(hidden, LmHead(weight), torch.tensor([1]), 1.0, 1)
    assert logprobs.item() == -2000.0 and entropy.item() == 0.0
    logprobs, entropy = token_logprobs(hidden[:0], LmHead(weight), torch.tensor([], dtype=torch.long), 1.0, 1)
    assert logprobs.shape == entropy.shape == (0,)


def test_without_gradient_no_slope_is_kept() -> None:
    hidden, weight, tokens = example(3, 4, 5, torch.float32)
    with torch.no_grad():
        logprobs, _ = token_logprobs(hidden, LmHead(weight), tokens, 1.0, 2)
    assert not logprobs.requires_grad
