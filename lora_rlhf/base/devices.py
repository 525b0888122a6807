"""Where models run, and what that device can do, asked before anything is loaded."""

from __future__ import annotations

import functools

import torch

from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.terminal import note

AMPERE = (8, 0)
"""Compute capability of the first NVIDIA cards that multiply bfloat16 numbers."""
MAKERS = {"mps": "Apple", "xpu": "Intel"}


def device() -> torch.device:
    """Return where models run: the first CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check_device(config: RunConfig) -> None:
    """Refuse a dtype that the card only emulates; say once where a GPU is there that is not used.

    Torch counts emulation as support (`is_bf16_supported`), so the compute capability is asked.

    Raises:
        UserError: bfloat16 on a card that has none.
    """
    _name_unused_gpu()
    here = device()
    if here.type != "cuda" or torch.version.hip or config.dtype != "bfloat16":
        return
    capability = torch.cuda.get_device_capability(here)
    if capability < AMPERE:
        raise UserError(
            f"dtype: {torch.cuda.get_device_name(here)} has no bfloat16 (compute capability "
            f"{capability[0]}.{capability[1]}; it came with 8.0): every product would be emulated, at many times the "
            "time. Set dtype: float16, which such cards are fast in"
        )


@functools.cache
def _name_unused_gpu() -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type != "cuda":
        maker = MAKERS.get(accelerator.type, "other")
        note(
            f"the GPU of this machine ({maker}, {accelerator.type}) is not used: lora_rlhf runs on CUDA and on CPUs, "
            "and nothing of it has been tested elsewhere. Everything runs on the CPU"
        )
