"""Log-probabilities of given tokens from hidden states, without ever holding the logits of more than one chunk."""

from __future__ import annotations

from typing import Any

import torch

CHUNK_BYTES = 2**24
"""Float32 logits that exist at one time; larger blocks are no faster, and malloc gives them back after each use."""


def rows_per_chunk(vocabulary: int) -> int:
    """Return how many rows of float32 logits take `CHUNK_BYTES`; at least 1."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(h Wᵀ / T)[token] per row, chunk by chunk.

    d logp / d h = (W[token] − softmax · W) / T has the shape of h, so it is computed beside the forward and kept in
    place of the logits: backward is one multiplication, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        tokens: torch.Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = hidden.shape[0]
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            scaled = (hidden[part] @ weight.T).float()
            if temperature != 1:
                scaled /= temperature
            scaled = torch.log_softmax(scaled, -1)
            logprobs[part] = scaled.gather(1, tokens[part, None])[:, 0]
            if with_entropy:
                entropy[part] = -torch.linalg.vecdot(scaled.exp(), scaled)
            if slope is not None:
                probs = scaled.exp_()
                expected = probs.to(weight.dtype) @ weight
                slope[part] = (weight[tokens[part]] - expected).div_(temperature)
        ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(*([slope] if slope is not None else []))
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (grads[0][:, None] * slope).to(slope.dtype), None, None, None, None, None


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    chunk: int | None,
    with_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probs, entropies) in nats, float32 [n]; gradients flow to `hidden` from the log-probs only.

    Args:
        hidden: [n, d] states after the final norm.
        weight: [vocabulary, d] of the (frozen) LM head.
        tokens: [n] ids, int64.
        temperature: divides the logits.
        chunk: rows whose logits exist at one time; none: as many as take 16 MiB in float32.
        with_entropy: off, the entropies are zeros.
    """
    chunk = chunk or rows_per_chunk(len(weight))
    return _TokenLogProbs.apply(hidden, weight, tokens, temperature, chunk, with_entropy)
