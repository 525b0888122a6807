"""Fixtures: a tiny Mistral in a folder, configs for it, shared bases with all four roles, and a whole run of it."""

from __future__ import annotations

import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")
torch.set_num_threads(1)  # on tiny models, more threads only wait for each other

from recipe_runs import ROOT, TINY, as_process

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.embedded import build_tiny_model
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import REWARD, VALUE, SharedBase
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import CompareSettings, LoraSettings, PpoSettings, RunConfig


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their number: gzip writes the time into its own, and every process must see the same names."""
    return f"{argname} of {len(val)}" if isinstance(val, bytes) else None


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model cache of the test session's own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LORA_RLHF_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Mistral with a tokenizer and the ChatML template."""
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_model(folder)
    return folder


@pytest.fixture
def make_config(tiny_folder: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A config of the tiny model in float32; keywords replace fields, `ppo` takes a mapping."""

    def make(ppo: dict[str, Any] | None = None, **fields: Any) -> RunConfig:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "model_name_or_path": str(tiny_folder),
            "dtype": "float32",
            "lora": LoraSettings(r=4, lora_alpha=8),
            "compare": CompareSettings(num_safety_prompts=2),
            "ppo": PpoSettings(**({"batch_size": 4, "micro_batch_size": 2, "response_length": 8} | (ppo or {}))),
        }
        return RunConfig(**(defaults | fields))

    return make


@pytest.fixture
def tokenizer(make_config: Callable[..., RunConfig]) -> Any:
    return load_tokenizer(make_config())


@pytest.fixture
def make_base(make_config: Callable[..., RunConfig]) -> Callable[..., SharedBase]:
    """A shared base with policy and `roles`; every adapter and head has random, non-zero weights."""

    def make(config: RunConfig | None = None, seed: int = 0, roles: tuple[str, ...] = (REWARD, VALUE)) -> SharedBase:
        config = config or make_config()
        base = SharedBase(load_causal_lm(config), lora_config(config.lora), getattr(torch, config.dtype))
        for role in roles:
            base.new_adapter(role, lora_config(config.lora), trainable=role == VALUE)
        base.set_trainable("policy", True)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for role in ("policy", *roles):
                for parameter in base.parameters(role):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return base

    return make


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Run a recipe in this process, which saves seconds of imports; return its status and all it printed."""
    monkeypatch.chdir(ROOT)
    levels = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}

    def run(name: str, *options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"recipes/{name}", *options])
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(f"recipes/{name}", run_name="__main__")
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capfd.readouterr()
        return status, printed.out + printed.err

    yield run
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session")
def whole_run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The output directory of the whole pipeline with the tiny config, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, as_process("direct_rlhf_lora.py", *TINY, "--output_dir", str(folder))


@pytest.fixture
def run_folder(whole_run: tuple[Path, Any]) -> Path:
    return whole_run[0]
