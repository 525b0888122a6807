"""The rollout cache holds what transformers' growing one does."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, MistralConfig

from lora_rlhf.ppo.rollout_cache import rollout_cache

CONFIG = MistralConfig(num_hidden_layers=2, sliding_window=None)


def test_updates_and_dropped_rows_leave_the_same_keys_and_values() -> None:
    ours, theirs = rollout_cache(CONFIG, 8), DynamicCache(config=CONFIG)
    generator = torch.Generator().manual_seed(0)
    rows = 4
    for width, keep in ((4, None), (1, [0, 2, 3]), (1, [1]), (1, None), (1, None)):
        for layer in (0, 1):
            keys, values = torch.randn(2, rows, 3, width, 5, generator=generator)
            for one, other in zip(*(c.update(keys, values, layer) for c in (ours, theirs)), strict=True):
                assert torch.equal(one, other)
        if keep is not None:
            for cache in (ours, theirs):
                cache.reorder_cache(torch.tensor(keep))
            rows = len(keep)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_its_memory_is_taken_once() -> None:
    cache = rollout_cache(CONFIG, 8)
    one = torch.ones(2, 3, 1, 5)
    first, _ = cache.update(one, one, 0)
    second, _ = cache.update(one, one, 0)
    assert first.data_ptr() == second.data_ptr() and second.shape[2] == 2


@pytest.mark.parametrize(("window", "stock"), [(4, True), (8, False), (None, False)])
def test_a_window_shorter_than_the_rows_needs_transformers_own(window: int | None, stock: bool) -> None:
    config = MistralConfig(num_hidden_layers=2, sliding_window=window)
    assert isinstance(rollout_cache(config, 8), DynamicCache) is stock
