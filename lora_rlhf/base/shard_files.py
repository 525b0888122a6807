"""Safetensors files of a model that is never in memory whole: shard by shard, as transformers names and loads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

SHARD_BYTES = 2**30
"""A shard holds no more than this, which is in main memory while it is filled; a larger tensor has one of its own."""


def write_shards(
    outlines: Mapping[str, torch.Tensor],
    make: Callable[[str], torch.Tensor],
    folder: Path,
    made: Callable[[int], object] = lambda _: None,
) -> None:
    """Write tensors to `model.safetensors`, or to numbered shards and `model.safetensors.index.json`.

    Args:
        outlines: name → a tensor on the meta device with the shape and dtype of the one to come.
        make: returns the tensor of a name; called once for each, in order.
        folder: exists.
        made: is told how many tensors were made, after each.
    """
    split = split_torch_state_dict_into_shards(dict(outlines), max_shard_size=SHARD_BYTES)
    count = 0
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            shard[name] = make(name).to("cpu", outlines[name].dtype).contiguous()
            count += 1
            made(count)
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        total = sum(outline.numel() for outline in outlines.values())
        index = {
            "metadata": {"total_parameters": total, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
