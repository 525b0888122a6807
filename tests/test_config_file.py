"""Configs from YAML and from the command line: what is understood, and what the errors say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
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

CONFIGS = sorted((Path(__file__).parents[1] / "recipes" / "configs").glob("*.yaml"))


def command_line(*words: str) -> RunConfig:
    return config_from_command_line("A recipe.", words)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    """Write YAML text to a file and return its path."""

    def write(text: str) -> str:
        path = tmp_path / "some.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# What is understood


def test_no_options_give_the_defaults() -> None:
    assert command_line() == RunConfig()


def test_an_empty_file_gives_the_defaults(file: Any) -> None:
    assert config_from_file(file("# nothing but a comment\n")) == RunConfig()


def test_nested_yaml_fields_are_read(file: Any) -> None:
    config = config_from_file(file("seed: 3\nlora: {r: 4}\nppo:\n  kl_coef: 0.1\n  stop_strings: ['a', 'b']\n"))
    assert (config.seed, config.lora.r, config.ppo.kl_coef, config.ppo.stop_strings) == (3, 4, 0.1, ["a", "b"])
    assert config.ppo == dataclasses.replace(PpoSettings(), kl_coef=0.1, stop_strings=["a", "b"])


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfseed: 5\n")
    assert config_from_file(tmp_path / "bom.yaml").seed == 5


@pytest.mark.parametrize(
    ("words", "dotted", "value"),
    [
        (["--seed", "7"], "seed", 7),
        (["--seed=7"], "seed", 7),
        (["--ppo.kl_coef", "0.1"], "ppo.kl_coef", 0.1),
        (["--ppo.learning_rate", "1e-4"], "ppo.learning_rate", 1e-4),
        (["--reward.learning_rate", "2E-5"], "reward.learning_rate", 2e-5),
        (["--ppo.kl_horizon", "1e4"], "ppo.kl_horizon", 10_000),
        (["--reward.max_steps", "-1"], "reward.max_steps", -1),
        (["--load_in_4bit", "false"], "load_in_4bit", False),
        (["--load_in_4bit", "no"], "load_in_4bit", False),
        (["--ppo.adaptive_kl", "true"], "ppo.adaptive_kl", True),
        (["--ppo.adaptive_kl"], "ppo.adaptive_kl", True),
        (["--ppo.max_kl", "none"], "ppo.max_kl", None),
        (["--ppo.max_kl", "None"], "ppo.max_kl", None),
        (["--ppo.max_kl", "null"], "ppo.max_kl", None),
        (["--chat_template", "none"], "chat_template", None),
        (["--ppo.expand_weights", "none"], "ppo.expand_weights", None),
        (["--ppo.expand_weights", "true"], "ppo.expand_weights", True),
        (["--dataset_name", "one", "two"], "dataset_name", ["one", "two"]),
        (["--ppo.stop_strings"], "ppo.stop_strings", []),
        (["--lora.target_modules", "q_proj", "v_proj"], "lora.target_modules", ["q_proj", "v_proj"]),
        (["--output_dir", "2024"], "output_dir", "2024"),
        (["--ppo.kl_estimator", "k3"], "ppo.kl_estimator", "k3"),
        (
            ["--ppo.reward_sources", "{kind: adapter, path: A}", "{kind: model, path: B, weight: 0.5}"],
            "ppo.reward_sources",
            [{"kind": "adapter", "path": "A"}, {"kind": "model", "path": "B", "weight": 0.5}],
        ),
    ],
)
def test_command_line_words_mean_what_they_say(words: list[str], dotted: str, value: Any) -> None:
    found: Any = command_line(*words)
    for part in dotted.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_list_weights_on_the_command_line_are_numbers() -> None:
    config = command_line("--dataset_name", "a", "b", "--dataset_weights", "3", "1e-1")
    assert config.dataset_weights == [3.0, 0.1]


def test_the_command_line_lies_over_the_file(file: Any) -> None:
    config = command_line("--config", file("seed: 1\nppo: {kl_coef: 0.2, gamma: 0.9}\n"), "--ppo.kl_coef", "0.3")
    assert (config.seed, config.ppo.kl_coef, config.ppo.gamma) == (1, 0.3, 0.9)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_1e_4_in_yaml_is_a_number(file: Any, text: str) -> None:
    assert config_from_file(file(f"ppo: {{learning_rate: {text}}}")).ppo.learning_rate == 1e-4


def test_one_value_stands_for_a_list_of_one(file: Any) -> None:
    assert config_from_file(file("dataset_name: some/data")).dataset_name == ["some/data"]


@given(st.integers(-(2**63), 2**63))
def test_whole_numbers_are_kept_to_the_last_digit(number: int) -> None:
    assert config_from_mapping({"reward": {"max_steps": number}}, "here").reward.max_steps == number


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_of_the_recipes_loads_and_resolves(path: Path) -> None:
    config = config_from_file(path)
    given_fields = differing_fields(config_to_mapping(config), config_to_mapping(RunConfig()))
    assert given_fields, "a config that says nothing"
    assert command_line("--config", str(path)) == config
    assert config_from_mapping(config_to_mapping(config), "resolved") == config


def test_the_recipes_have_configs() -> None:
    assert {"tiny.yaml", "mistral_7b_24gb.yaml"} <= {path.name for path in CONFIGS}


def test_no_two_configs_of_the_recipes_write_to_the_same_place() -> None:
    folders = [config_from_file(path).output_dir for path in CONFIGS]
    assert len(folders) == len(set(folders))


def test_help_lists_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in (
        "--ppo.kl_coef",
        "--reward.learning_rate",
        "--merge.target",
        "--seed",
        "--config",
        f"[{PpoSettings().kl_coef}]",
    ):
        assert name in shown


# What the errors say


@pytest.mark.parametrize(
    ("text", "field", "nearest"),
    [
        ("sed: 1", "sed", "seed"),
        ("ppo: {kl_coeff: 0.1}", "ppo.kl_coeff", "kl_coef"),
        ("lora: {lora_aplha: 8}", "lora.lora_aplha", "lora_alpha"),
        ("datasetname: x", "datasetname", "dataset_name"),
    ],
)
def test_an_unknown_field_in_a_file_is_named_with_the_nearest_one(
    file: Any, text: str, field: str, nearest: str
) -> None:
    path = file(text)
    with pytest.raises(UserError) as error:
        config_from_file(path)
    assert path in str(error.value)
    assert f"unknown field {field};" in str(error.value)
    assert f"did you mean {nearest}?" in str(error.value)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("--ppo.kl_coeff", "ppo.kl_coef"),
        ("--ppo.kl_coeff=0.1", "ppo.kl_coef"),
        ("--kl_coef", "ppo.kl_coef"),
        ("--sed", "seed"),
        ("--reward.learning-rate", "reward.learning_rate"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest_one(word: str, nearest: str) -> None:
    with pytest.raises(UserError) as error:
        command_line(word, "0.1")
    assert f"unknown option {word.split('=')[0]};" in str(error.value)
    assert f"did you mean {nearest}?" in str(error.value)


def test_options_are_not_abbreviated() -> None:
    with pytest.raises(UserError, match="unknown option --ppo.kl_c;"):
        command_line("--ppo.kl_c", "0.1")


def test_a_field_unlike_any_other_gets_no_suggestion(file: Any) -> None:
    with pytest.raises(UserError) as error:
        config_from_file(file("xyzzy: 1"))
    assert "did you mean" not in str(error.value)


def test_a_stray_word_is_named() -> None:
    with pytest.raises(UserError, match="'stray'"):
        command_line("stray")


@pytest.mark.parametrize(
    ("values", "field", "what"),
    [
        ({"seed": "many"}, "seed", "a whole number"),
        ({"seed": 1.5}, "seed", "a whole number"),
        ({"seed": True}, "seed", "a whole number"),
        ({"seed": None}, "seed", "a whole number"),
        ({"seed": float("inf")}, "seed", "a whole number"),
        ({"ppo": {"kl_coef": "high"}}, "ppo.kl_coef", "a number"),
        ({"ppo": {"kl_coef": []}}, "ppo.kl_coef", "a number"),
        ({"ppo": {"kl_coef": 10**400}}, "ppo.kl_coef", "a number"),
        ({"ppo": {"max_kl": False}}, "ppo.max_kl", "a number"),
        ({"load_in_4bit": 1}, "load_in_4bit", "true or false"),
        ({"load_in_4bit": "true"}, "load_in_4bit", "true or false"),
        ({"output_dir": ["a"]}, "output_dir", "text"),
        ({"output_dir": True}, "output_dir", "text"),
        ({"dataset_name": [["a"]]}, "dataset_name[0]", "text"),
        ({"dataset_weights": ["x"]}, "dataset_weights[0]", "a number"),
        ({"ppo": 3}, "ppo", "a section"),
        ({"ppo": ["kl_coef"]}, "ppo", "a section"),
        ({"ppo": {"reward_sources": ["adapter"]}}, "ppo.reward_sources[0]", "a mapping"),
        ({"dtype": "float64"}, "dtype", "bfloat16, float16, float32"),
        ({"dtype": []}, "dtype", "bfloat16, float16, float32"),
        ({"merge": {"target": "orignal"}}, "merge.target", "did you mean original?"),
    ],
)
def test_a_wrong_type_names_the_field_and_what_it_takes(values: dict[str, Any], field: str, what: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_mapping(values, "some.yaml")
    assert str(error.value).startswith(f"some.yaml: {field} is ")
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("lora.r", 0),
        ("ppo.total_steps", 0),
        ("ppo.batch_size", -1),
        ("ppo.response_length", 0),
        ("ppo.temperature", 0),
        ("ppo.temperature", float("inf")),
        ("ppo.learning_rate", -1e-4),
        ("ppo.kl_coef", float("nan")),
        ("ppo.kl_coef", -0.1),
        ("ppo.vf_coef", -0.1),
        ("ppo.missing_eos_penalty", float("inf")),
        ("ppo.stop_string_penalty", -0.1),
        ("ppo.stop_string_penalty", 1.1),
        ("ppo.gamma", 1.01),
        ("ppo.lam", -0.1),
        ("ppo.warmup_ratio", -0.5),
        ("ppo.warmup_ratio", 1),
        ("ppo.value_warmup_steps", -1),
        ("ppo.value_warmup_steps", 200),
        ("ppo.stop_strings", ["x", ""]),
        ("ppo.normalization_samples", 1),
        ("ppo.num_mini_batches", 3),
        ("compare.num_prompts", 0),
        ("compare.num_safety_prompts", 0),
        ("ppo.prefix_tokens", 0),
        ("ppo.prefix_share", -0.1),
        ("ppo.prefix_share", 1.1),
        ("merge.drift_prompts", 0),
        ("dataset_name", []),
        ("output_dir", " "),
        ("dataset_weights", [1, 2]),
        ("dataset_weights", [0]),
        ("dataset_weights", [float("nan")]),
        ("max_train_pairs", 0),
        ("max_train_pairs", -1),
        ("max_eval_pairs", 0),
        ("ppo.value_learning_rate", -1.0),
        ("reward.weight_decay", -0.1),
        ("ppo.max_skipped_steps", -1),
        ("sft.max_skipped_steps", -1),
        ("ppo.max_stopped_updates", 0),
        ("reward.warmup_ratio", 2.0),
        ("seed", 10**30),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(dotted: str, value: Any) -> None:
    section, _, name = dotted.rpartition(".")
    with pytest.raises(UserError) as error:
        config_from_mapping({section: {name: value}} if section else {name: value}, "some.yaml")
    assert str(error.value).startswith("some.yaml: ")
    assert dotted in str(error.value)


def test_an_output_dir_in_the_home_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert config_from_mapping({"output_dir": "~/runs/x"}, "some.yaml").output_dir == "/home/someone/runs/x"


def test_a_missing_file_is_named_with_the_nearest_one(file: Any) -> None:
    near = file("seed: 1")
    with pytest.raises(UserError) as error:
        command_line("--config", near.replace("some", "sme"))
    assert "no file" in str(error.value)
    assert f"did you mean {near}?" in str(error.value)


def test_a_file_in_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*away"):
        config_from_file(tmp_path / "away" / "x.yaml")


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        config_from_file(tmp_path)


@pytest.mark.parametrize("text", ["ppo: [1, 2", "a: b: c", "\tseed: 1", "seed: 'open", "%", "- 1\n- 2", "only text"])
def test_what_is_no_yaml_mapping_is_refused_by_file_name(file: Any, text: str) -> None:
    path = file(text)
    with pytest.raises(UserError) as error:
        config_from_file(path)
    assert path in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"seed: \xff\xfe\x00")
    with pytest.raises(UserError, match=r"x\.yaml"):
        config_from_file(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    "text", ["seed: 2024-99-99", "seed: 0x_", "seed: !!int many", "a: !!bool maybe", "a: " + 3000 * "["]
)
def test_yaml_that_trips_its_reader_is_refused_by_file_name(file: Any, text: str) -> None:
    path = file(text)
    with pytest.raises(UserError) as error:
        config_from_file(path)
    assert path in str(error.value)


@pytest.mark.parametrize("words", [["--seed", "2024-99-99"], ["--dataset_weights", "["], ["--ppo.reward_sources", "{"]])
def test_words_that_trip_the_yaml_reader_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match=words[0].removeprefix("--")):
        command_line(*words)


def test_a_wrong_word_on_the_command_line_is_not_blamed_on_the_file(file: Any) -> None:
    path = file("seed: 1")
    with pytest.raises(UserError, match="seed") as error:
        command_line("--config", path, "--seed", "many")
    assert not str(error.value).startswith(path)


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "object:os.mkdir", "name:os.mkdir"])
def test_a_python_tag_is_refused_and_runs_nothing(file: Any, tmp_path: Path, tag: str) -> None:
    path = file(f"seed: !!python/{tag} ['{tmp_path / 'made'}']")
    with pytest.raises(UserError) as error:
        config_from_file(path)
    assert path in str(error.value)
    assert not (tmp_path / "made").exists()


def test_a_python_tag_on_the_command_line_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        command_line("--seed", f"!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    assert not (tmp_path / "made").exists()


def test_a_kl_horizon_below_the_batch_and_a_bound_of_nothing_are_refused() -> None:
    """With a horizon of an eighth of the batch, one step could make a reward of the KL penalty."""
    with pytest.raises(UserError, match=r"ppo\.kl_horizon \(8\) is below ppo\.batch_size \(64\)"):
        config_from_mapping({"ppo": {"adaptive_kl": True, "kl_horizon": 8}}, "file.yaml")
    config_from_mapping({"ppo": {"adaptive_kl": True, "kl_horizon": 64}}, "file.yaml")
    config_from_mapping({"ppo": {"kl_horizon": 8}}, "file.yaml")
    for bound in (0, -1, float("inf")):
        with pytest.raises(UserError, match=r"ppo\.score_clip is above 0, or none"):
            config_from_mapping({"ppo": {"score_clip": bound}}, "file.yaml")
    assert config_from_mapping({"ppo": {"score_clip": None}}, "file.yaml").ppo.score_clip is None
