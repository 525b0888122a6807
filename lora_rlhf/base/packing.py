"""Rows of different lengths in one tensor, and forward passes that do not compute the padding between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, mask) [rows, longest], padded on the left."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = True
    return ids.to(device), mask.to(device)


def right_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, at_least: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, mask) [rows, longest or `at_least`, whichever is more], padded on the right."""
    ids, mask = left_padded([row[::-1] for row in rows], pad, device)
    missing = max(at_least - ids.shape[1], 0)
    widened = torch.nn.functional.pad
    return widened(ids.flip(1), (0, missing), value=pad), widened(mask.flip(1), (0, missing), value=False)


def states_without_padding(
    trunk: Any, ids: torch.Tensor, mask: torch.Tensor, embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the states after the final norm [batch, length, d], 0 where masked; padding may be anywhere.

    The model sees rows as wide as the most real tokens of any of them, with padding only at their ends. Causal
    attention never looks there, so it needs no mask, and positions (0, 1, 2, ... per row) are cumsum(mask) - 1.

    Args:
        trunk: a causal transformer without its LM head.
        ids: [batch, length].
        mask: [batch, length], true for real tokens.
        embeds: [batch, length, d] what enters the first layer in place of the embeddings of `ids`.
    """
    counts = mask.sum(1)
    width = max(int(counts.max()), 1)
    front = torch.arange(width, device=ids.device) < counts[:, None]
    given = ids if embeds is None else embeds
    packed = given.new_zeros((len(ids), width, *given.shape[2:]))
    packed[front] = given[mask]
    inputs = {"input_ids" if embeds is None else "inputs_embeds": packed}
    positions = torch.arange(width, device=ids.device)[None]
    states = trunk(**inputs, position_ids=positions, use_cache=False).last_hidden_state
    out = states.new_zeros((*ids.shape, states.shape[-1]))
    out[mask] = states[front]
    return out


def batches_by_length(mask: torch.Tensor, rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Yield `rows` in batches of `size`, rows of like length together, the longest (most memory) first.

    Args:
        mask: [batch, length], true for real tokens.
        rows: [n] indices into the batch.
        size: rows per batch.
    """
    yield from rows[mask[rows].sum(1).argsort(descending=True, stable=True)].split(size)
