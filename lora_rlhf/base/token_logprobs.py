"""Log-probabilities of given tokens from hidden states, without ever holding the logits of more than one chunk."""

from __future__ import annotations

from typing import Any

import torch

from lora_rlhf.base.lm_head import LmHead

CHUNK_BYTES = 2**24
"""Float32 logits that exist at one time; larger blocks are no faster, and malloc gives them back after each use."""


def rows_per_chunk(vocabulary: int) -> int:
    """Return how many rows of float32 logits take `CHUNK_BYTES`; at least 1."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(l / T)[token] per row of logits l, chunk by chunk.

    d logp / d h has the shape of h, so it is computed beside the forward and kept in place of the logits: backward is
    one multiplication, and nothing is computed twice. It is (onehot − softmax) · W / T where l = h Wᵀ, with the
    difference in float32: for a token that is all but certain, W[token] − softmax · W would be a difference of two
    rounded numbers, and mostly rounding.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: LmHead,
        tokens: torch.Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = hidden.shape[0]
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        ctx.dtype, slope = hidden.dtype, None
        if ctx.needs_input_grad[0]:
            slope = torch.empty_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            rows = None if slope is None else slope[part]
            logprobs[part], entropy[part] = _chunk(
                hidden[part], head, tokens[part, None], temperature, with_entropy, rows
            )
        ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(*([slope] if slope is not None else []))
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (grads[0][:, None] * slope).to(ctx.dtype), None, None, None, None, None


def _chunk(
    hidden: torch.Tensor,
    head: LmHead,
    token: torch.Tensor,
    temperature: float,
    with_entropy: bool,
    slope: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs and entropies [n] of all rows at once; fill `slope` [n, d], where it is wanted."""
    logits = head(hidden)
    bend = None if slope is None else head.bend(logits)
    if temperature != 1:
        logits /= temperature
    scaled = torch.log_softmax(logits, -1)
    del logits
    logprobs = scaled.gather(1, token)[:, 0]
    entropy = -scaled.exp().mul_(scaled).sum(1) if with_entropy else torch.zeros_like(logprobs)
    if slope is not None:
        uphill = scaled.exp_().neg_().scatter_(1, token, 0.0)  # d logp / d (l / T) = onehot − softmax
        uphill.scatter_(1, token, -uphill.sum(1, keepdim=True))  # 1 − p, which float32 does not round to 0
        if bend is not None:
            uphill *= bend
        slope.copy_(head.back(uphill).div_(temperature))
    return logprobs, entropy


def token_logprobs(
    hidden: torch.Tensor,
    head: LmHead,
    tokens: torch.Tensor,
    temperature: float,
    chunk: int | None,
    with_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probs, entropies) in nats, float32 [n]; gradients flow to `hidden` from the log-probs only.

    Args:
        hidden: [n, d] states after the final norm.
        head: the (frozen) LM head.
        tokens: [n] ids, int64.
        temperature: divides the logits.
        chunk: rows whose logits exist at one time; none: as many as take 16 MiB in float32.
        with_entropy: off, the entropies are zeros.
    """
    chunk = chunk or rows_per_chunk(len(head.weight))
    return _TokenLogProbs.apply(hidden, head, tokens, temperature, chunk, with_entropy)
