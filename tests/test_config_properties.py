"""What holds for any config, however it is written: a RunConfig or a UserError, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora_rlhf.config import PpoSettings, RunConfig
from lora_rlhf.config_file import (
    config_from_command_line,
    config_from_file,
    config_from_mapping,
    config_to_mapping,
    differing_fields,
)
from lora_rlhf.errors import UserError


def command_line(*words: str) -> RunConfig:
    return config_from_command_line("A recipe.", words)


NAMES = sorted({f.name for f in dataclasses.fields(RunConfig)} | {f.name for f in dataclasses.fields(PpoSettings)})
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["1e-4", "k2", "none"])
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | SCALARS, v, max_size=4)
)
MAPPINGS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES, max_size=4)


@settings(max_examples=300, deadline=None)
@given(MAPPINGS)
def test_any_mapping_gives_a_config_or_a_user_error(values: dict[str, Any]) -> None:
    try:
        config = config_from_mapping(values, "fuzz")
    except UserError as error:
        assert str(error).startswith("fuzz: ")
    else:
        assert config_from_mapping(config_to_mapping(config), "again") == config


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(config_to_mapping(RunConfig())["ppo"])), SCALARS | st.lists(SCALARS, max_size=3))
def test_any_value_of_any_ppo_field_gives_a_config_or_a_user_error(name: str, value: Any) -> None:
    try:
        assert isinstance(config_from_mapping({"ppo": {name: value}}, "fuzz"), RunConfig)
    except UserError as error:
        assert "ppo." in str(error)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60) | st.text("seedppo:{}[]-!&*#'\"|>%@`~?,. \n\t0129xb_e", max_size=60))
@example("seed: 1")
def test_any_text_gives_a_config_or_a_user_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fuzz.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        assert isinstance(config_from_file(path), RunConfig)
    except UserError as error:
        assert str(path) in str(error)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(
        ["seed", "ppo.kl_coef", "ppo.adaptive_kl", "ppo.max_kl", "ppo.stop_strings", "dtype", "output_dir"]
    ),
    st.text(max_size=12),
)
def test_any_word_on_the_command_line_gives_a_config_or_a_user_error(dotted: str, word: str) -> None:
    try:
        assert isinstance(command_line(f"--{dotted}={word}"), RunConfig)
    except UserError as error:
        assert dotted in str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**32 - 1),
            "output_dir": st.text(min_size=1, max_size=20).filter(str.strip),  # blank ones are refused
            "dataset_name": st.lists(st.text(max_size=8), min_size=1, max_size=3),
            "load_in_4bit": st.booleans(),
            "ppo": st.fixed_dictionaries(
                {},
                optional={
                    "kl_coef": st.floats(0, 1e9),
                    "max_kl": st.none() | st.floats(0, 1e9),
                    "stop_strings": st.lists(st.text(min_size=1, max_size=8), max_size=3),
                },
            ),
        },
    )
)
def test_a_config_survives_the_way_through_mapping_and_yaml(tmp_path: Path, values: dict[str, Any]) -> None:
    config = config_from_mapping(values, "here")
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(config_to_mapping(config)), encoding="utf-8")
    assert config_from_file(path) == config


def test_the_resolved_mapping_names_every_field() -> None:
    mapping = config_to_mapping(RunConfig())
    assert set(mapping) == {f.name for f in dataclasses.fields(RunConfig)}
    assert set(mapping["ppo"]) == {f.name for f in dataclasses.fields(PpoSettings)}


def test_differing_fields_are_dotted_names() -> None:
    one, other = config_to_mapping(RunConfig()), config_to_mapping(RunConfig(seed=1, ppo=PpoSettings(kl_coef=1.0)))
    assert differing_fields(one, other) == ["ppo.kl_coef", "seed"]
    assert differing_fields(one, one) == []
