"""Fuzzed configs: files of changed bytes, mappings of any shape, command lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import yaml
from fuzz_inputs import EDITS, Bench, Target, edited, garbage, outcome
from hypothesis import strategies as st
from recipe_runs import ROOT

from lora_rlhf.config import LoraSettings, RunConfig
from lora_rlhf.config_file import config_from_command_line, config_from_file, config_from_mapping, config_to_mapping
from lora_rlhf.errors import UserError

FIELDS = sorted(config_to_mapping(RunConfig())) + sorted(config_to_mapping(RunConfig())["ppo"])
YAML = (ROOT / "recipes/configs/tiny.yaml").read_bytes()
RESOLVED = yaml.safe_dump(config_to_mapping(RunConfig())).encode()


def sound_config(read: Callable[[], RunConfig]) -> RunConfig | None:
    found = outcome(read)
    if isinstance(found, UserError):
        return None
    mapping = config_to_mapping(found)
    assert repr(config_from_mapping(mapping, "again")) == repr(found)
    return found


def config_bytes(bench: Bench, case: Any) -> None:
    content = edited(*case)
    path = bench.file("config.yaml", content)
    found = sound_config(lambda: config_from_file(path))
    if found is not None:  # what the text says is what is taken
        said = yaml.safe_load(content.decode("utf-8-sig")) or {}
        assert isinstance(said, dict)
        assert said.keys() <= config_to_mapping(found).keys()
        assert "seed" not in said or found.seed == int(float(said["seed"]))


def config_shape(bench: Bench, values: Any) -> None:
    path = bench.file("config.yaml", yaml.safe_dump(values).encode("utf-8", "replace"))
    sound_config(lambda: config_from_file(path))


def command_line(bench: Bench, words: list[str]) -> None:
    try:
        found = sound_config(lambda: config_from_command_line("A recipe.", words))
    except SystemExit as stop:
        assert stop.code == 0
        assert any(word.startswith(("-h", "--help")) for word in words)
        return
    if found is not None:
        names = {word[2:].split("=")[0].rpartition(".")[2] for word in words if word.startswith("--") and word != "--"}
        assert names <= {*FIELDS, "config", *(f.name for f in dataclasses.fields(LoraSettings))}


WORDS = st.lists(
    st.sampled_from([f"--{name}" for name in (*config_to_mapping(RunConfig()), "ppo.kl_coef", "ppo.reward_sources")])
    | st.builds("--{}={}".format, st.sampled_from(["seed", "dtype", "ppo.gamma", "lora.r"]), st.text(max_size=6))
    | st.sampled_from(["--", "-", "--seedd", "--config", "[", "{a: *b}", "&a [*a]", "none", "1", "\ud800", "!!map"])
    | st.text(max_size=6),
    max_size=5,
)  # fmt: skip


TARGETS: dict[str, Target] = {
    "config: bytes": (st.tuples(st.sampled_from([YAML, RESOLVED]), EDITS), config_bytes),
    "config: shape": (
        st.dictionaries(st.sampled_from(FIELDS), garbage(*FIELDS), max_size=4) | garbage(*FIELDS),
        config_shape,
    ),
    "command line": (WORDS, command_line),
}
