"""Which examples are whose, and which GPU is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import RewardConfig

from lora_rlhf.shared_steps import own_examples
from lora_rlhf.trl_trainer import on_own_device


def test_micro_batches_are_dealt_out_whole_where_all_get_as_many() -> None:
    sizes = [4, 4, 4, 1]
    owners = [[rank for rank in (0, 1) if own_examples(4 * i, n, i, 4, rank, 2)] for i, n in enumerate(sizes)]
    assert owners == [[0], [1], [0], [1]]
    assert own_examples(8, 4, 2, 4, 0, 2) == [0, 1, 2, 3]


def test_examples_are_dealt_out_one_after_another_else() -> None:
    """Three micro-batches of 3, 3 and 2: the examples 0 to 7 of the step by turns."""
    found = [[own_examples(3 * i, n, i, 3, rank, 2) for i, n in enumerate([3, 3, 2])] for rank in (0, 1)]
    assert found == [[[0, 2], [1], [0]], [[1], [0, 2], [1]]]
    assert own_examples(0, 1, 0, 1, 1, 2) == []  # nothing for the second process


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 4))
def test_every_example_is_one_processs_and_the_shares_are_even(sizes: list[int], count: int) -> None:
    before = [sum(sizes[:i]) for i in range(len(sizes))]
    taken = [
        [(i, j) for i, n in enumerate(sizes) for j in own_examples(before[i], n, i, len(sizes), rank, count)]
        for rank in range(count)
    ]
    assert sorted(example for own in taken for example in own) == [
        (i, j) for i, n in enumerate(sizes) for j in range(n)
    ]
    if len(sizes) % count:
        assert max(map(len, taken)) - min(map(len, taken)) <= 1
    else:
        assert len({len({i for i, _ in own}) for own in taken}) == 1


def test_a_trainer_stays_on_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone, the arguments turn to the first GPU, and use both. This process is on the second of two."""
    now = torch.device("cuda", 1)

    def set_device(device: torch.device) -> None:
        nonlocal now
        now = torch.device(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now.index)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    arguments = on_own_device(lambda: RewardConfig(output_dir="unused", bf16=False, per_device_train_batch_size=3))
    assert (arguments.device, now, arguments.n_gpu) == (torch.device("cuda", 1), torch.device("cuda", 1), 1)
    assert arguments.train_batch_size == 3
