"""Keys and values of a rollout in memory taken once, where transformers' growing cache copies all of them per token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer


class _RoomyLayer(DynamicLayer):
    """A layer whose keys and values are views of buffers with room for so many tokens."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write behind what is there; return views of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [t.new_empty((*t.shape[:2], self.room, t.shape[3])) for t in (key_states, value_states)]
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep these rows."""
        end = self.get_seq_length()
        for i, buffer in enumerate(self.buffers if end else ()):
            self.buffers[i] = buffer.new_empty((len(beam_idx), *buffer.shape[1:]))
            self.buffers[i][:, :, :end] = buffer[beam_idx, :, :end]
        if end:
            self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)


def rollout_cache(config: Any, length: int) -> Cache:
    """Return an empty cache for rows of up to `length` tokens.

    Args:
        config: of the transformer. Where its attention does not look back over all of `length`, or its layers differ
            in kind, the cache is transformers' own.
        length: prompt and answer, in tokens.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) or length
    if not kinds <= {"full_attention", "sliding_attention"} or window < length:
        return DynamicCache(config=config)
    return Cache(layers=[_RoomyLayer(length) for _ in range(config.num_hidden_layers)])
