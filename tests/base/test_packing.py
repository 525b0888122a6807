"""Padding is not computed, and rows of like length share a batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_rlhf.base.packing import batches_by_length, states_without_padding


class RunningSums:
    """A causal trunk whose state is the sum of the ids so far and the position; notes the shape it was given."""

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.shape = tuple(input_ids.shape)
        sums, positions = input_ids.cumsum(1).float(), position_ids.expand_as(input_ids).float()
        return SimpleNamespace(last_hidden_state=torch.stack([sums, positions], -1))


def test_states_come_back_to_where_the_tokens_stand_and_the_model_sees_no_wider_than_needed() -> None:
    ids = torch.tensor([[9, 1, 2, 9, 3], [9, 9, 4, 5, 9]])
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 1, 0]], dtype=torch.bool)
    trunk = RunningSums()
    states = states_without_padding(trunk, ids, mask)
    assert trunk.shape == (2, 3)
    assert states[..., 0].tolist() == [[0, 1, 3, 0, 6], [0, 0, 4, 9, 0]]
    assert states[..., 1].tolist() == [[0, 0, 1, 0, 2], [0, 0, 0, 1, 0]]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_of_nothing_but_padding_gives_zeros(rows: int) -> None:
    states = states_without_padding(RunningSums(), torch.ones(rows, 4, dtype=torch.long), torch.zeros(rows, 4).bool())
    assert states.shape == (rows, 4, 2) and not states.any()


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=9), st.integers(1, 4), st.data())
def test_batches_hold_every_row_once_from_long_to_short(bits: list[list[bool]], size: int, data: st.DataObject) -> None:
    mask = torch.tensor(bits)
    rows = torch.tensor(data.draw(st.permutations(range(len(bits)))))[: data.draw(st.integers(1, len(bits)))]
    batches = list(batches_by_length(mask, rows, size))
    assert sorted(torch.cat(batches).tolist()) == sorted(rows.tolist())
    assert all(len(batch) == size for batch in batches[:-1]) and 0 < len(batches[-1]) <= size
    lengths = mask.sum(1)[torch.cat(batches)].tolist()
    assert lengths == sorted(lengths, reverse=True)
