"""Which loss SFT runs with."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from trl import SFTTrainer

from lora_rlhf import instruct


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_fused_loss_needs_both_cuda_and_triton(monkeypatch: pytest.MonkeyPatch, kind: str, triton: bool) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> object:
        return (SimpleNamespace() if triton else None) if name == "triton" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(instruct, "device", lambda: torch.device(kind))
    assert (instruct._sft_trainer_class() is SFTTrainer) == (kind == "cuda" and triton)
