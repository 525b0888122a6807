"""The weights of the base as they were before quantisation, read from its own files one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from lora_rlhf.base.loading import explained, model_config, resolved_model
from lora_rlhf.base.text_part import published_names
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")
"""Types, as safetensors names them, of weights that are not quantised."""


class NoOriginalWeights(UserError):
    """The base's files do not hold its weights unquantised; the text says why."""


class OriginalWeights:
    """The unquantised weights of some layers, on disk.

    Args:
        config: names the base.
        shapes: name of each wanted tensor in the plain model → its shape.
        prefix: what stands before the names of the trunk's tensors; files may have it where the model has none, and
            the other way round.

    Raises:
        NoOriginalWeights: a tensor is missing, quantised, or of another shape.
        UserError: the files cannot be read.
    """

    def __init__(self, config: RunConfig, shapes: Mapping[str, torch.Size], prefix: str) -> None:
        self._source, self._config = resolved_model(config.model_name_or_path), config
        self._places: dict[str, tuple[Path, str]] = {}
        found = {}
        with explained(self._source, config):
            for file in safetensors_files(self._source, config.model_revision) if shapes else ():
                with safe_open(file, "pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 - it is no mapping
                        part = opened.get_slice(key)
                        found[key] = file, part.get_dtype(), torch.Size(part.get_shape())
        for name, shape in shapes.items():
            keys = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}", *published_names(name))
            key = next((key for key in keys if key in found), None)
            if key is None:
                raise NoOriginalWeights(f"the safetensors files of {self._source} hold no {name}")
            file, kind, held = found[key]
            if kind not in PLAIN_TYPES or held != shape:
                raise NoOriginalWeights(f"{self._source} holds {name} in quantised form alone ({kind}, {list(held)})")
            self._places[name] = file, key

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU, in the type of its file; the file is mapped until the tensor is dropped."""
        file, key = self._places[name]
        with explained(self._source, self._config), safe_open(file, "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(key)
        return tensor


def safetensors_files(source: str, revision: str | None) -> list[Path]:
    """Return the files that hold the weights of a model folder, or of a Hub model that was loaded before."""
    whole = _local_file(source, WHOLE, revision)
    if whole is not None:
        return [whole]
    index = _local_file(source, INDEX, revision)
    if index is None:
        raise NoOriginalWeights(f"{source} has no {WHOLE} and no {INDEX}")
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    found = {name: _local_file(source, name, revision) for name in sorted(names)}
    if missing := [name for name, file in found.items() if file is None]:
        raise NoOriginalWeights(f"{source} has no {missing[0]}, which its {INDEX} names")
    return [file for file in found.values() if file is not None]


def _local_file(source: str, name: str, revision: str | None) -> Path | None:
    from transformers.utils import cached_file

    try:
        found = cached_file(source, name, revision=revision, local_files_only=True)
    except OSError:
        return None
    return None if found is None else Path(found)


def check_merge_target(config: RunConfig) -> None:
    """Raise `UserError` where a base that is published in 4 bits shall be merged into its original weights."""
    if config.merge.target != "original":
        return
    if getattr(model_config(config), "quantization_config", None) is not None:
        raise UserError(
            f"merge.target: {config.model_name_or_path} is quantised as it is published, so that there are no original "
            "weights to merge into: set merge.target: dequantized, or name the model that it was made from"
        )
