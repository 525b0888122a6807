"""Where models run, and what that device can do, asked before anything is loaded."""

from __future__ import annotations

import functools
from dataclasses import replace

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

    Raises:
        UserError: bfloat16 on a card that has none.
    """
    _name_unused_gpu()
    if config.dtype == "bfloat16" and (card := _card_without_bfloat16()):
        raise UserError(
            f"dtype: {card}: every product would be emulated, at many times the time. Set dtype: float16, which such "
            "cards are fast in. A run that has finished a stage keeps its dtype: begin a new one in another "
            "output_dir, or go on with it on another card (the demo and recipes/evaluate.py take a finished run as it "
            "is)"
        )


def with_fast_dtype(config: RunConfig) -> RunConfig:
    """Return `config` with float16 in place of bfloat16 where the card only emulates that, and say so.

    It is for what is done with a finished run, maybe trained on another card: its models answer, and an evaluation
    trains referees of its own. The stages of a run keep the dtype that it began with: its figures belong together.
    """
    if config.dtype == "bfloat16" and (card := _card_without_bfloat16()):
        note(f"dtype: float16 in place of bfloat16: {card}")
        return replace(config, dtype="float16")
    return config


def _card_without_bfloat16() -> str | None:
    """Return the card's name and capability where it has no bfloat16, or none.

    Torch counts emulation as support (`is_bf16_supported`), so the compute capability is asked; AMD counts otherwise.
    """
    here = device()
    if here.type != "cuda" or torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(here)
    if capability >= AMPERE:
        return None
    number = ".".join(map(str, capability))
    return f"{torch.cuda.get_device_name(here)} has no bfloat16 (compute capability {number}; it came with 8.0)"


@functools.cache
def _name_unused_gpu() -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type != "cuda":
        maker = MAKERS.get(accelerator.type, "other")
        note(
            f"the GPU of this machine ({maker}, {accelerator.type}) is not used: lora_rlhf runs on CUDA and on CPUs, "
            "and nothing of it has been tested elsewhere. Everything runs on the CPU"
        )
