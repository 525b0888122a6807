"""Original weights are read from whatever files transformers loads, one at a time; quantised files have none."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.original_weights import INDEX, WHOLE, NoOriginalWeights, OriginalWeights, check_merge_target
from lora_rlhf.config import MergeSettings, RunConfig
from lora_rlhf.errors import UserError

NAME = "model.layers.1.mlp.up_proj.weight"
SHAPE = torch.Size((128, 64))
MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def opened(make_config: MakeConfig, folder: Path) -> Callable[..., OriginalWeights]:
    def open_it(shapes: dict[str, torch.Size] | None = None) -> OriginalWeights:
        return OriginalWeights(make_config(model_name_or_path=str(folder)), shapes or {NAME: SHAPE}, "model")

    return open_it


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("layout", ["one file", "shards", "no prefix", "with prefix"])
def test_a_tensor_is_that_of_the_file(opened: Callable[..., OriginalWeights], folder: Path, layout: str) -> None:
    expected = load_file(folder / "model.safetensors")
    names = {name: tensor.shape for name, tensor in expected.items()}
    if layout == "shards":
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    if layout == "no prefix":
        renamed(folder, lambda name: name.removeprefix("model."))
    if layout == "with prefix":
        names = {name.removeprefix("model."): shape for name, shape in names.items()}
    original = opened(names)
    for name in names:
        same = name if name in expected else f"model.{name}"
        assert torch.equal(original.read(name), expected[same])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_a_file_is_mapped_no_longer_than_its_tensor_is_used(
    opened: Callable[..., OriginalWeights], folder: Path
) -> None:
    original = opened()
    tensor: Any = original.read(NAME)
    assert tensor.isfinite().all()
    del tensor
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_a_base_that_is_published_in_4_bits_has_none(
    make_config: MakeConfig, opened: Callable[..., OriginalWeights], folder: Path
) -> None:
    load_causal_lm(make_config()).save_pretrained(folder)
    with pytest.raises(NoOriginalWeights, match=rf"{NAME} in quantised form alone \(U8"):
        opened()
    config = make_config(model_name_or_path=str(folder))
    check_merge_target(config)  # dequantized, which it can be
    config.merge = MergeSettings(target="original")
    with pytest.raises(UserError, match=r"merge.target: .* quantised as it is published.*merge.target: dequantized"):
        check_merge_target(config)


def test_an_unquantised_base_can_have_either_target(make_config: MakeConfig) -> None:
    check_merge_target(make_config(merge=MergeSettings(target="original")))


def test_a_missing_tensor_is_named(opened: Callable[..., OriginalWeights], folder: Path) -> None:
    renamed(folder, lambda name: name.replace("up_proj", "upward"))
    with pytest.raises(NoOriginalWeights, match=f"hold no {NAME}"):
        opened()


@pytest.mark.parametrize("lost", ["model.safetensors", "a shard"])
def test_missing_files_are_named(opened: Callable[..., OriginalWeights], folder: Path, lost: str) -> None:
    if lost == "a shard":
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
        lost = sorted(path.name for path in folder.glob("model-*.safetensors"))[1]
    (folder / lost).unlink()
    with pytest.raises(NoOriginalWeights, match=f"has no {lost}"):
        opened()


@pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
def test_torn_files_are_refused_in_one_line(opened: Callable[..., OriginalWeights], folder: Path, kept: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:kept])
    with pytest.raises(UserError, match=str(folder)) as error:
        opened()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused_in_one_line(
    opened: Callable[..., OriginalWeights], folder: Path, content: str
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=str(folder)) as error:
        opened()
    assert len(str(error.value).splitlines()) == 1


class Bomb:
    """An object whose unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", [WHOLE, INDEX, "config.json"])
def test_a_pickle_in_place_of_a_file_runs_nothing(
    make_config: MakeConfig, opened: Callable[..., OriginalWeights], folder: Path, tmp_path: Path, name: str
) -> None:
    if name == INDEX:
        (folder / WHOLE).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "code_has_run")))
    config = make_config(model_name_or_path=str(folder), merge=MergeSettings(target="original"))
    with pytest.raises(UserError, match=str(folder)):
        check_merge_target(config) if name == "config.json" else opened()
    assert not (tmp_path / "code_has_run").exists()
