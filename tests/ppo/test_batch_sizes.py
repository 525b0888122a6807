"""Out of memory: the batch shrinks for good, the step goes on with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_rlhf.config import PpoSettings
from lora_rlhf.errors import UserError
from lora_rlhf.ppo import trainer as trainer_module
from lora_rlhf.ppo.batch_sizes import BatchSizes


def test_sizes_are_no_larger_than_the_batch() -> None:
    found = BatchSizes(PpoSettings(batch_size=8, num_mini_batches=2, micro_batch_size=16, scoring_batch_size=32)).sizes
    assert found == {"rollout_batch_size": 8, "scoring_batch_size": 8, "micro_batch_size": 4}


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["cuda", "cpu"],
)
def test_the_size_is_halved_until_the_work_is_done_and_stays(error: Exception) -> None:
    batches, tried = BatchSizes(PpoSettings(batch_size=64, micro_batch_size=8)), []

    def work(size: int) -> str:
        tried.append(size)
        if size > 2:
            raise error
        return "done"

    assert batches.within_memory("micro_batch_size", work) == "done" and tried == [8, 4, 2]
    assert batches.sizes["micro_batch_size"] == 2


def test_at_size_1_the_run_ends_with_advice_and_other_errors_pass() -> None:
    batches = BatchSizes(PpoSettings(micro_batch_size=1))

    def full(size: int) -> None:
        raise torch.OutOfMemoryError

    def broken(size: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(UserError, match=r"ppo.micro_batch_size 1; `python -m lora_rlhf.memory`"):
        batches.within_memory("micro_batch_size", full)
    with pytest.raises(RuntimeError, match="shapes differ"):
        batches.within_memory("micro_batch_size", broken)


@pytest.mark.parametrize(
    ("name", "owner", "attribute"),
    [
        ("rollout_batch_size", trainer_module, "sampled_answers"),
        ("scoring_batch_size", trainer_module, "scored_rollout"),
        ("micro_batch_size", None, "_accumulate"),
    ],
)
def test_a_step_that_ran_out_of_memory_ends_like_one_that_did_not(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, owner: Any, attribute: str
) -> None:
    settings = {"batch_size": 4, "micro_batch_size": 4, "scoring_batch_size": 4, "num_ppo_epochs": 2}
    calm, pressed = (make_trainer(**settings) for _ in range(2))
    expected = [calm.step() for _ in range(2)]
    owner = owner or pressed
    whole = getattr(owner, attribute)

    def on_a_small_card(*args: Any) -> Any:
        result = whole(*args)  # fails late: random numbers are drawn and gradients are there
        if pressed.batches.sizes[name] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(owner, attribute, on_a_small_card)
    found = [pressed.step() for _ in range(2)]
    assert pressed.batches.sizes[name] == 2
    for one, other in zip(found, expected, strict=True):
        measures = ("seconds", "samples_per", "peak", "sampler_max", "first_ratio")  # of time, memory and rounding
        kept = [k for k in one if not k.startswith(measures)]
        assert {k: one[k] for k in kept} == pytest.approx({k: other[k] for k in kept}, rel=1e-4, abs=1e-5)
    for role, parameters in calm.parameters.items():
        for one, other in zip(parameters, pressed.parameters[role], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
