"""Operations on shapes: what each one costs, when the host waits, and how much memory is allocated."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_rlhf.roofline.operations import META, Operation, OperationCounter


def shape(*size: int, dtype: torch.dtype = torch.bfloat16, learned: bool = False) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device=META, requires_grad=learned)


def test_a_product_costs_its_factors_its_result_and_two_operations_per_multiplication() -> None:
    with OperationCounter() as counter:
        shape(8, 32) @ shape(32, 16)
    assert counter.operations == [Operation("mm", "matrix products", 2 * (8 * 32 + 32 * 16 + 8 * 16), 2 * 8 * 32 * 16)]


def test_an_operation_takes_as_long_as_the_slower_of_its_bytes_and_its_arithmetic() -> None:
    limited_by_memory, limited_by_arithmetic = Operation("", "", 1000, 10), Operation("", "", 10, 1000)
    assert limited_by_memory.seconds(bandwidth=100, matmul=50) == 10
    assert limited_by_arithmetic.seconds(bandwidth=100, matmul=50) == 20


def test_elementwise_work_costs_what_is_read_and_written_and_a_view_costs_nothing() -> None:
    with OperationCounter() as counter:
        x = shape(4, 6)
        x.view(6, 4).transpose(0, 1)[:2]
        assert counter.operations == []
        x + shape(6)  # broadcast: six numbers are read
        x.mul_(2)
        x.float()
        x.copy_(shape(6))
        x.zero_()
    assert [(one.name, one.bytes) for one in counter.operations] == [
        ("add", 2 * (24 + 6 + 24)),
        ("mul_", 2 * (24 + 24)),
        ("_to_copy", 24 * 2 + 24 * 4),
        ("copy_", 2 * (6 + 24)),
        ("zero_", 2 * 24),
    ]


def test_an_expanded_tensor_is_read_where_it_lies() -> None:
    with OperationCounter() as counter:
        shape(4, 1).expand(4, 100).contiguous()
    assert [one.bytes for one in counter.operations] == [2 * (4 + 400)]


def test_a_four_bit_product_reads_half_a_byte_a_weight_where_the_card_multiplies_by_it_directly() -> None:
    for fused in (True, False):
        with OperationCounter(lambda *_, fused=fused: fused) as counter:
            counter._product_4bit(shape(3, 128), shape(64 * 64, 1, dtype=torch.uint8), (64, 128))
        weights, io = 64 * 128, 2 * 3 * (64 + 128)
        flops = sum(one.flops for one in counter.operations)
        assert flops == 2 * 3 * weights
        if fused:  # half a byte and a 64th for its scale
            assert [one.bytes for one in counter.operations] == [weights * 0.5 + weights / 64 + io]
        else:  # scales to float32, and their mean added; weights from 4 bits to 16; the product of these
            scales = weights / 64
            by_hand = [scales * (1 + 4 + 4 + 4), weights / 2 + 4 * scales + 2 * weights, 2 * weights + io]
            assert [one.bytes for one in counter.operations] == by_hand


def test_forward_and_backward_have_the_products_that_torch_counts() -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))
    with FlopCounterMode(display=False) as reference:
        net(torch.ones(8, 32)).sum().backward()
    with OperationCounter() as counter:
        net.to(META)(shape(8, 32, dtype=torch.float32)).sum().backward()
    assert sum(one.flops for one in counter.operations) == reference.get_total_flops() > 0


def test_whole_numbers_stay_real_and_lie_on_the_card_where_they_were_made_there() -> None:
    with OperationCounter() as counter:
        on_card = torch.arange(4, device=META)
        on_host = torch.arange(4)
        assert on_card.tolist() == [0, 1, 2, 3] and on_host.tolist() == [0, 1, 2, 3]
        assert counter.syncs == {"tolist": 1}
        assert int(on_card.max()) == 3 and int(on_host.max()) == 3
        assert bool((on_card > 2).any())
    assert counter.syncs == {"tolist": 1, "item": 2}
    assert "arange" in [one.name for one in counter.operations]


def test_a_mask_as_an_index_makes_the_host_wait_and_gives_the_true_number_of_rows() -> None:
    with OperationCounter() as counter:
        mask = torch.tensor([True, False, True, True]).to(META)
        assert shape(4, 8)[mask].shape == (3, 8)
    assert counter.syncs == {"index by a mask": 1}


def test_an_unknown_number_is_small_and_waited_for() -> None:
    with OperationCounter() as counter:
        assert 0 < shape(3).sum().item() < 1
        assert shape(3, 5).argmax(1).tolist() == [0, 0, 0]
    assert counter.syncs == {"item": 1, "tolist": 1}


def test_live_memory_falls_when_a_tensor_goes_and_the_peak_stays() -> None:
    with OperationCounter() as counter:
        first = torch.empty(1024, dtype=torch.float32, device=META)
        second = first + 1
        assert counter.live == 2 * 4096
        del second
        view = first[:10]
        del first
        assert counter.live == 4096, "a view keeps the whole"
        del view
    assert counter.live == 0 and counter.peak == 2 * 4096
    counter.clear()
    assert counter.peak == 0


def test_small_tensors_take_a_block_of_the_allocator() -> None:
    with OperationCounter() as counter:
        small = shape(3)
        assert counter.live == 512
        large = shape(257)
        assert counter.live == 512 + 1024
    del small, large


def test_what_is_kept_for_backward_is_live_until_then() -> None:
    with OperationCounter() as counter:
        weight = torch.zeros(256, 256, device=META, requires_grad=True)
        standing = counter.live
        out = (torch.zeros(64, 256, device=META) @ weight).relu().sum()
        kept = counter.live
        assert kept >= standing + 2 * 64 * 256 * 4, "the product's input and relu's result"
        out.backward()
        del out
        assert weight.grad is not None and counter.live == standing + 256 * 256 * 4


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_real_numbers_are_written_where_real_numbers_are_assigned(dtype: torch.dtype) -> None:
    with OperationCounter():
        table = torch.zeros((2, 3), dtype=dtype, device=META)
        table[torch.tensor([1], device=META), 2] = torch.ones(1, dtype=dtype, device=META)
        assert table.tolist() == [[0, 0, 0], [0, 0, 1]]
