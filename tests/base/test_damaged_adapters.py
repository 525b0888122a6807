"""An adapter folder with something wrong in it is refused by name, before memory or time is spent on it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_rlhf.base.adapters import CONFIG, HEAD_KEY, WEIGHTS, read_adapter
from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.errors import UserError


@pytest.fixture
def adapter(make_base: Callable[..., SharedBase], tmp_path: Path) -> tuple[SharedBase, Path]:
    """A base, and the folder of a sound reward adapter for it."""
    base = make_base(roles=(REWARD,))
    base.save_adapter(REWARD, tmp_path / "reward")
    return base, tmp_path / "reward"


def refused(adapter: tuple[SharedBase, Path], words: str) -> None:
    base, folder = adapter
    with pytest.raises(UserError) as error:
        base.load_adapter("again", folder)
    assert str(folder) in str(error.value) or "again" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert words in str(error.value)


def test_the_sound_adapter_is_read(adapter: tuple[SharedBase, Path]) -> None:
    base, folder = adapter
    base.load_adapter("again", folder)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters("again"), base.parameters(REWARD), strict=True))


CHANGED: list[tuple[dict[str, Any], str]] = [
    ({"r": 10**9}, "the weights have rank 4"),
    ({"r": "4"}, "the weights have rank 4"),
    ({"r": 2}, "does not fit this base"),
    ({"rank_pattern": {"q_proj": 10**9}}, "the weights have rank 4"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern is list, not a mapping"),
    ({"lora_alpha": None}, "not a number"),
    ({"lora_alpha": float("nan")}, "not a number"),
    ({"alpha_pattern": {"q_proj": "much"}}, "not a number"),
    ({"target_modules": r"(\w+)+$"}, "could take for ever"),
    ({"target_modules": ".*.*.*.*.*x"}, "could take for ever"),
    ({"exclude_modules": "(a|a)*b"}, "could take for ever"),
    ({"rank_pattern": {"(.+)+x": 4}}, "could take for ever"),
    ({"target_modules": {"q_proj": 1}}, "target_modules is dict, not names"),
    ({"target_modules": [["q_proj"]]}, "target_modules holds list"),
    ({"target_modules": "[a"}, "does not fit this base"),
    ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    ({"bias": "all"}, "bias"),
    ({"peft_type": ["LORA"]}, "only LoRA adapters"),
]


@pytest.mark.parametrize(("changed", "words"), CHANGED, ids=lambda value: str(value)[:40])
def test_a_config_with_a_wrong_field(adapter: tuple[SharedBase, Path], changed: dict[str, Any], words: str) -> None:
    file = adapter[1] / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    begun = time.monotonic()
    refused(adapter, words)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("name", ["r", "lora_alpha", "target_modules"])
def test_a_config_that_lost_a_field_is_not_filled_up_with_defaults(adapter: tuple[SharedBase, Path], name: str) -> None:
    file = adapter[1] / CONFIG
    held = json.loads(file.read_text())
    file.write_text(json.dumps({f"{key}_" if key == name else key: value for key, value in held.items()}))
    refused(adapter, f"has no {name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(adapter: tuple[SharedBase, Path], value: float) -> None:
    tensors = load_file(adapter[1] / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, adapter[1] / WEIGHTS)
    refused(adapter, "is damaged")


@pytest.mark.parametrize("shape", [(1, 1), (1,), (2, 64), ()])
def test_a_head_of_another_shape_is_not_stretched(adapter: tuple[SharedBase, Path], shape: tuple[int, ...]) -> None:
    tensors = load_file(adapter[1] / WEIGHTS)
    save_file(tensors | {HEAD_KEY: torch.ones(shape)}, adapter[1] / WEIGHTS)
    refused(adapter, f"the head of again is {list(shape)}")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000, '{"name": "a\\nb"}', "\udcff"])
@pytest.mark.parametrize("name", [CONFIG, "base_model.json"])
def test_a_file_that_holds_something_else(adapter: tuple[SharedBase, Path], name: str, content: str) -> None:
    (adapter[1] / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        read_adapter(adapter[1], adapter[0].identity)
    assert len(str(error.value).splitlines()) == 1
