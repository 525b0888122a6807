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
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["torch's allocator", "CUDA", "cuBLAS", "CPU"],
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


def test_a_card_that_no_longer_answers_ends_the_run_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying again would fail with another error, which says nothing of memory."""
    batches, tried = BatchSizes(PpoSettings(micro_batch_size=8)), []
    monkeypatch.setattr("lora_rlhf.ppo.batch_sizes.device_answers", lambda: False)

    def work(size: int) -> None:
        tried.append(size)
        raise torch.AcceleratorError("CUDA error: out of memory")

    with pytest.raises(UserError, match=r"this process has to be started again\. The same command goes on"):
        batches.within_memory("micro_batch_size", work)
    assert tried == [8]


@pytest.mark.parametrize(
    ("name", "owner", "attribute"),
    [
        ("rollout_batch_size", trainer_module, "sampled_answers"),
        ("scoring_batch_size", trainer_module, "scored_by_roles"),
        ("micro_batch_size", None, "_accumulate"),
    ],
)
def test_a_step_that_ran_out_of_memory_ends_like_one_that_did_not(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, owner: Any, attribute: str
) -> None:
    settings = {
        "batch_size": 4, "micro_batch_size": 4, "scoring_batch_size": 4, "num_ppo_epochs": 2, "expand_weights": False,
    }  # fmt: skip
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


def test_a_working_copy_is_given_up_before_a_batch_shrinks(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, pressed = (make_trainer(expand_weights=True) for _ in range(2))
    expected, sizes = calm.step(), dict(pressed.batches.sizes)
    whole = pressed._accumulate

    def on_a_small_card(*args: Any) -> Any:
        result = whole(*args)
        if any(frozen.copy is not None for frozen in pressed.base.layers.frozen.values()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(pressed, "_accumulate", on_a_small_card)
    found = pressed.step()
    assert pressed.batches.sizes == sizes and pressed.sampling.expand_weights is False
    assert found["policy_loss"] == pytest.approx(expected["policy_loss"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA driver error: out of memory")]
)
def test_a_working_copy_that_finds_no_room_is_done_without(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trainer = make_trainer(expand_weights=True)
    rolled, copies = trainer._rollout, trainer.base.layers.working_copy

    def full(folded_role: str | None = None) -> Any:
        if folded_role is None:
            raise error
        return copies(folded_role)

    monkeypatch.setattr(trainer.base.layers, "working_copy", full)
    assert trainer.step()["step"] == 1 and rolled is not None and trainer.sampling.expand_weights is False


def test_a_reward_function_is_called_once_however_often_scoring_is_tried(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        calls.append(len(completions))
        return [float(len(c[0]["content"])) for c in completions]

    trainer = make_trainer(counted, batch_size=4, scoring_batch_size=4, expand_weights=False)
    calls.clear()
    whole = trainer_module.scored_by_roles

    def on_a_small_card(*args: Any) -> Any:
        result = whole(*args)
        if trainer.batches.sizes["scoring_batch_size"] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(trainer_module, "scored_by_roles", on_a_small_card)
    trainer.step()
    assert calls == [4] and trainer.batches.sizes["scoring_batch_size"] == 1
