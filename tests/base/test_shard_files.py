"""Shards are filled one after the other, none past its bound, and load as one model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_rlhf.base import shard_files
from lora_rlhf.base.shard_files import write_shards

TENSORS = {
    "a": torch.arange(100.0), "b": torch.arange(50.0), "large": torch.arange(300.0), "c": torch.arange(40.0),
    "d": torch.arange(90.0).to(torch.bfloat16), "e": torch.arange(7),
}  # fmt: skip
"""400, 200, 1200, 160, 180 and 56 bytes."""


def write(folder: Path, bound: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write the tensors; return in which order they were made, with the files that were there already."""
    monkeypatch.setattr(shard_files, "SHARD_BYTES", bound)
    order, counts = [], []

    def make(name: str) -> torch.Tensor:
        order.append(f"{name}{len(list(folder.glob('*.safetensors')))}")
        return TENSORS[name]

    write_shards({n: t.to("meta") for n, t in TENSORS.items()}, make, folder, counts.append)
    assert counts == list(range(1, len(TENSORS) + 1))
    return order


def test_a_small_model_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10_000, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    held = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(held[name], tensor) and held[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_a_large_one_is_written_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = write(tmp_path, 500, monkeypatch)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    by_file: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        by_file.setdefault(file, set()).add(name)
    assert {file: set(load_file(tmp_path / file)) for file in by_file} == by_file
    for file, names in by_file.items():
        size = sum(TENSORS[name].numel() * TENSORS[name].itemsize for name in names)
        assert size <= 500 or names == {"large"}
        assert (tmp_path / file).stat().st_size >= size
    assert sorted(by_file) == [f"model-{i + 1:05d}-of-{len(by_file):05d}.safetensors" for i in range(len(by_file))]
    assert index["metadata"] == {"total_parameters": 587, "total_size": 2196}
    assert len({made[-1] for made in order}) == len(by_file)  # a shard is on disk before the next one is begun


def test_a_tensor_is_cast_to_the_dtype_of_its_outline(tmp_path: Path) -> None:
    write_shards({"x": torch.empty(3, dtype=torch.bfloat16, device="meta")}, lambda _: torch.ones(3), tmp_path)
    assert load_file(tmp_path / "model.safetensors")["x"].dtype == torch.bfloat16
