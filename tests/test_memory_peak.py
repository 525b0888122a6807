"""Memory that ran out is recognised in every wording of torch and of what it calls; nothing else is taken for it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from lora_rlhf.base.backend_check import reads_causally
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.checkpoint_folders import readable
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.memory_peak import device_answers, ran_out
from lora_rlhf.processes import words_for_the_lost
from lora_rlhf.terminal import run_recipe

OUT_OF_MEMORY = {
    "torch's allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the allocator, quoted": RuntimeError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CUDA": torch.AcceleratorError(
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/ for more "
        "information.\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    "ROCm": torch.AcceleratorError("HIP error: out of memory"),
    "the driver": RuntimeError("CUDA driver error: out of memory"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuSOLVER": RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    "cuDNN 8": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "NCCL": torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function "
        "failed.\nLast error:\nFailed to CUDA calloc async 6291456 bytes"
    ),
    "NCCL 2.27": torch.distributed.DistBackendError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"),
    "NVML": RuntimeError(
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1016, please report'
    ),
    "main memory": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "C++": RuntimeError("std::bad_alloc"),
    "Python": MemoryError(),
    "a mapped file": OSError(errno.ENOMEM, "Cannot allocate memory"),
}
OTHER_ERRORS = {
    "an illegal access": torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "a failed launch": torch.AcceleratorError("CUDA error: unspecified launch failure"),
    "registers": torch.AcceleratorError("CUDA error: too many resources requested for launch"),
    "shared memory": RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, ...)`"),
    "cuBLAS without a card": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"),
    "NCCL": torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
    "pinned": RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"),
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "what the package says itself": UserError("out of memory with ppo.micro_batch_size 1"),
    "somebody's words": ValueError("CUDA out of memory is what the row says"),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_memory_that_ran_out_is_recognised(error: Exception) -> None:
    assert ran_out(error)


@pytest.mark.parametrize("error", OTHER_ERRORS.values(), ids=OTHER_ERRORS)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not ran_out(error)


def test_torch_says_what_is_expected_when_main_memory_runs_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(caught.value)


def test_what_an_error_was_raised_from_counts_and_what_it_came_after_does_not() -> None:
    def raised(said: bool) -> Exception:
        try:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except torch.OutOfMemoryError as error:
                if said:
                    raise RuntimeError("the forward pass failed") from error
                raise RuntimeError("shapes differ")  # noqa: B904
        except RuntimeError as error:
            return error

    assert ran_out(raised(said=True)) and not ran_out(raised(said=False))
    circle = RuntimeError("one")
    circle.__cause__ = RuntimeError("other")
    circle.__cause__.__cause__ = circle
    assert not ran_out(circle)


# Whoever puts errors into words asks first


def fails_with(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_memory_that_runs_out_while_weights_are_quantised_is_no_damaged_model(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers keeps the error to itself and raises one that says nothing of memory."""
    plain = bitsandbytes.nn.Params4bit.to
    error = torch.AcceleratorError("CUDA error: out of memory")
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "to", fails_with(error))
    with pytest.raises(RuntimeError) as caught:
        load_causal_lm(make_config())
    assert ran_out(caught.value) and "out of memory" not in str(caught.value)
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "to", fails_with(RuntimeError("no kernel")))
    with pytest.raises(UserError, match="holds no model that transformers can load"):
        load_causal_lm(make_config())
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "to", plain)
    load_causal_lm(make_config())


@pytest.mark.parametrize("error", [OUT_OF_MEMORY["NCCL"], OUT_OF_MEMORY["CUDA"]], ids=["NCCL", "CUDA"])
def test_it_is_no_lost_process_no_damaged_file_and_no_faulty_backend(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for block in (words_for_the_lost(), readable(tmp_path / "file")):
        with pytest.raises(type(error)) as caught, block:
            raise error
        assert caught.value is error
    model = load_causal_lm(make_config())
    monkeypatch.setattr(model.model, "forward", fails_with(error))
    with pytest.raises(type(error)):
        reads_causally(model)


@pytest.mark.parametrize(
    "error", [OUT_OF_MEMORY["CUDA"], OUT_OF_MEMORY["a mapped file"]], ids=["CUDA", "a mapped file"]
)
def test_a_command_that_runs_out_of_memory_ends_in_words(error: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_recipe(fails_with(error), again="Nothing is lost.")
    printed = capfd.readouterr().out
    assert stop.value.code == 2
    assert "error: memory ran out (" in printed and "emory)" in printed and "Nothing is lost." in printed
    with pytest.raises(torch.AcceleratorError):
        run_recipe(fails_with(OTHER_ERRORS["an illegal access"]))


def test_a_card_that_no_longer_answers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", fails_with(OTHER_ERRORS["an illegal access"]))
    assert device_answers()  # CUDA is not in use here
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not device_answers()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert device_answers()
