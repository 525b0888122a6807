"""Checkpoints with bytes changed at random are found out by the manifest, or refused in words where it was forged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainer_cases import MakeTrainer

from lora_rlhf.checkpoint_folders import MANIFEST, newest_checkpoint, write_checkpoint, write_manifest
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.ppo.checkpoint import read_state, restore_trainer, write_trainer
from lora_rlhf.ppo.trainer import PpoTrainer

FILES = (
    "state.json",
    "parameters.safetensors",
    "optimizer.safetensors",
    "within_limit.safetensors",
    "random.safetensors",
    "metrics.jsonl",
    MANIFEST,
)
Saved = tuple[PpoTrainer, RunConfig, Path]


@pytest.fixture
def saved(make_trainer: MakeTrainer, make_config: Callable[..., RunConfig], tmp_path: Path) -> Saved:
    trainer, config = make_trainer(), make_config()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps(trainer.step()) + "\n", encoding="utf-8")
    return (
        trainer,
        config,
        write_checkpoint(tmp_path / "ppo", 1, lambda half: write_trainer(trainer, config, metrics, half), 1),
    )


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Return `content` with a piece cut out, changed or put in; mostly near its beginning, where headers are."""
    start = data.draw(st.integers(0, min(len(content) - 1, 400)) | st.integers(0, len(content) - 1))
    end = min(len(content), start + data.draw(st.integers(0, 40)))
    piece = data.draw(st.binary(max_size=20) | st.sampled_from([b"null", b"-1", b'"', b"[[[[", b"1e999", b"{}"]))
    return content[:start] + piece + content[end:]


def fuzz_manifest(saved: Saved, data: st.DataObject) -> None:
    _, _, folder = saved
    file = folder / data.draw(st.sampled_from(FILES))
    before = file.read_bytes()
    changed = damaged(data, before)
    file.write_bytes(changed)
    found = newest_checkpoint(folder.parent, lambda text: None)
    file.write_bytes(before)
    if file.name == MANIFEST:  # it may have lost a file's line, or only white space
        return
    assert (found is None) == (changed != before)


def fuzz_content(saved: Saved, data: st.DataObject) -> None:
    trainer, config, folder = saved
    copy = folder.parent / "forged"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    file = copy / data.draw(st.sampled_from([name for name in FILES[:-2]]))
    file.write_bytes(damaged(data, file.read_bytes()))
    write_manifest(copy)
    try:
        restore_trainer(trainer, read_state(copy, config), copy)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    shutil.rmtree(copy)


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=60, suppress_health_check=QUIET)
@given(data=st.data())
def test_changed_bytes_are_found_out(saved: Saved, data: st.DataObject) -> None:
    fuzz_manifest(saved, data)


@settings(max_examples=40, suppress_health_check=QUIET)
@given(data=st.data())
def test_forged_checkpoints_are_refused_in_words(saved: Saved, data: st.DataObject) -> None:
    fuzz_content(saved, data)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=QUIET)
@given(data=st.data())
def test_a_thousand_changes_are_found_out(saved: Saved, data: st.DataObject) -> None:
    fuzz_manifest(saved, data)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=QUIET)
@given(data=st.data())
def test_a_thousand_forged_checkpoints_are_refused_in_words(saved: Saved, data: st.DataObject) -> None:
    fuzz_content(saved, data)
