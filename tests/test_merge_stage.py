"""The merge stage: what it leaves with and without original weights, shards, and what memory it takes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import ROOT, TINY, assert_one_line_of_error
from transformers import pipeline

from lora_rlhf.base import shard_files
from lora_rlhf.base.embedded import build_tiny_model
from lora_rlhf.base.original_weights import NoOriginalWeights
from lora_rlhf.run import run_summary

Recipe = Callable[..., tuple[int, str]]


@pytest.fixture
def unmerged(run_folder: Path, tmp_path: Path) -> Path:
    """A run whose merge stage has yet to come."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    shutil.rmtree(folder / "merged")
    summary = run_summary(folder)
    del summary["seconds"]["merge"], summary["merge"]
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def four_bits(cache: Path, tmp_path: Path, make_config: Callable[..., Any]) -> Path:
    """The tiny model as it is published in 4 bits."""
    from lora_rlhf.base.loading import load_causal_lm
    from lora_rlhf.base.tokenizer import load_tokenizer

    config = make_config()
    load_causal_lm(config).save_pretrained(tmp_path / "4 bits")
    load_tokenizer(config).save_pretrained(tmp_path / "4 bits")
    return tmp_path / "4 bits"


def merge(recipe: Recipe, folder: Path, *options: str) -> tuple[int, str]:
    return recipe("merge_lora.py", *TINY, "--output_dir", str(folder), *options)


@pytest.mark.parametrize("target", ["original", "dequantized"])
def test_both_drifts_are_measured_and_one_model_is_kept(
    recipe: Recipe, unmerged: Path, run_folder: Path, target: str
) -> None:
    status, printed = merge(recipe, unmerged, "--merge.target", target)
    assert status == 0, printed
    ours, whole = (run_summary(folder)["merge"] for folder in (unmerged, run_folder))
    assert ours == whole | {"target": target} and list(ours["drift"]) == ["original", "dequantized"]
    same = (unmerged / "merged/model.safetensors").read_bytes() == (
        run_folder / "merged/model.safetensors"
    ).read_bytes()
    assert same == (target == "dequantized")


def test_a_base_without_original_weights_is_merged_into_the_dequantized_ones_alone(
    recipe: Recipe, unmerged: Path, run_folder: Path, four_bits: Path
) -> None:
    """The run goes on with its base as it is published in 4 bits, which holds the very same weights."""
    config = (unmerged / "config.yaml").read_text()
    (unmerged / "config.yaml").write_text(config.replace("path: tiny", f"path: {four_bits}", 1))
    options = ["--model_name_or_path", str(four_bits)]
    refused = merge(recipe, unmerged, *options, "--merge.target", "original")
    assert_one_line_of_error(*refused, "merge.target:", "quantised as it is published", "merge.target: dequantized")
    status, printed = merge(recipe, unmerged, *options)
    assert status == 0, printed
    assert re.search(r"not measured: .*4 bits holds \S+ in quantised form alone \(U8", " ".join(printed.split())), (
        printed
    )
    drift = run_summary(run_folder)["merge"]["drift"]["dequantized"]
    assert run_summary(unmerged)["merge"] == {"target": "dequantized", "drift": {"dequantized": drift}}
    ours, whole = (folder / "merged/model.safetensors" for folder in (unmerged, run_folder))
    assert ours.read_bytes() == whole.read_bytes()
    assert "quantization_config" not in json.loads((unmerged / "merged/config.json").read_text())


def test_files_that_hold_no_original_weights_are_found_out_in_the_first_stage(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise NoOriginalWeights("its files hold no up_proj")

    monkeypatch.setattr("lora_rlhf.stages.original_weights", none)
    options = ["--output_dir", str(tmp_path / "run"), "--merge.target", "original"]
    refused = recipe("direct_rlhf_lora.py", *TINY, *options)
    assert_one_line_of_error(*refused, "merge.target: its files hold no up_proj", "set merge.target: dequantized")
    assert run_summary(tmp_path / "run") == {}


def test_a_target_that_the_published_base_cannot_have_is_refused_before_any_work(
    recipe: Recipe, four_bits: Path, tmp_path: Path
) -> None:
    options = ["--model_name_or_path", str(four_bits), "--merge.target", "original"]
    refused = recipe("direct_rlhf_lora.py", *TINY, *options, "--output_dir", str(tmp_path / "run"))
    assert_one_line_of_error(*refused, "merge.target:", "quantised as it is published", "merge.target: dequantized")
    assert not (tmp_path / "run").exists()


def test_a_large_model_is_left_in_shards_and_chats(
    recipe: Recipe, unmerged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "SHARD_BYTES", 100_000)
    status, printed = merge(recipe, unmerged)
    assert status == 0, printed
    names = {path.name for path in (unmerged / "merged").iterdir()}
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names
    assert len([name for name in names if name.startswith("model-")]) > 2
    chat = pipeline("text-generation", model=str(unmerged / "merged"))
    assert isinstance(chat([{"role": "user", "content": "Hi"}])[0]["generated_text"][-1]["content"], str)
    assert merge(recipe, unmerged)[1].count("done before") == 1


MEASURED = """
import sys
from pathlib import Path
import torch
from lora_rlhf import memory_plan, model_shape
from lora_rlhf.base import shard_files
from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import POLICY, SharedBase
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.memory_peak import peak_memory_gib, reset_peak_memory, return_freed_memory
from lora_rlhf.merge import MergedWeights, original_weights, write_merged
from lora_rlhf.ppo.decoding import Sampling

shard_files.SHARD_BYTES = memory_plan.SHARD_BYTES = 2**24
config = RunConfig(model_name_or_path=sys.argv[1])
tokenizer = load_tokenizer(config)
base = SharedBase(load_causal_lm(config), lora_config(config.lora), torch.bfloat16)
merged = {"original": MergedWeights(base, original_weights(base, config)), "dequantized": MergedWeights(base)}
inputs = torch.arange(64)[None]
with torch.no_grad(), base.autocast(), merged["original"].in_place():
    base.trunk(inputs)  # oneDNN's kernels are there from now on
return_freed_memory()
reset_peak_memory(base.device)
before = peak_memory_gib(base.device)
for target, weights in merged.items():
    with torch.no_grad(), base.autocast(), weights.in_place():
        base.trunk(inputs)
    write_merged(weights, tokenizer, Sampling(8, 1.0, (), False), Path(sys.argv[1], target))
planner = memory_plan.Planner(config, model_shape.model_shape(config), on_cuda=False, expand=False)
print(peak_memory_gib(base.device) - before, planner.merge_bytes() / 2**30, weights.total_bytes / 2**30)
"""


@pytest.mark.slow
def test_merging_takes_no_more_memory_than_the_planner_says(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, hidden_size=1024, num_hidden_layers=12, vocab_size=4096, heads=(8, 4))
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    taken, planned, whole = map(float, done.stdout.split())
    holes = 1 / 8  # GiB, which glibc's heap keeps between blocks as small as these
    assert planned + holes < whole  # so that a model in memory would not pass
    assert taken < planned + holes
