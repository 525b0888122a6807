"""The output directory of a run: whose it is, what it records, and what it may delete."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_command_line, config_from_file, config_to_mapping
from lora_rlhf.errors import UserError
from lora_rlhf.run import CONTENTS, LOCK, RESULTS, STAGES, RunDirectory, write_text


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda **fields: RunConfig(output_dir=str(tmp_path / "run"), **fields)


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != LOCK)


# Whose it is


def test_a_new_run_writes_its_resolved_config(config: Callable[..., RunConfig]) -> None:
    run = RunDirectory(config(seed=4))
    assert config_from_file(run / "config.yaml") == config(seed=4)
    assert files_of(run.path) == ["config.yaml"]


def test_the_same_config_goes_on(config: Callable[..., RunConfig]) -> None:
    run = RunDirectory(config())
    with run.stage("reward") as results:
        (run / "reward_adapter").mkdir()
        (run / "reward_adapter" / "adapter_model.safetensors").touch()
        results["reward_model"] = {"accuracy": 0.75}
    again = RunDirectory(config())
    assert again.finished("reward")
    assert not again.finished("ppo")
    assert again.summary["reward_model"] == {"accuracy": 0.75}


def test_a_run_goes_on_under_another_path_to_the_same_directory(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunDirectory(config()).stage("base"):
        pass
    monkeypatch.chdir(tmp_path)
    assert RunDirectory(RunConfig(output_dir="run")).finished("base")


def begun(config: RunConfig, *stages: str) -> RunDirectory:
    """A run with a finished stage."""
    run = RunDirectory(config)
    for stage in stages or ("base",):
        with run.stage(stage):
            if stage in RESULTS:
                (run / RESULTS[stage]).parent.mkdir()
                (run / RESULTS[stage]).touch()
    return run


def test_a_run_that_finished_nothing_may_be_corrected(config: Callable[..., RunConfig]) -> None:
    RunDirectory(config(seed=1))
    run = RunDirectory(config(seed=2))
    assert config_from_file(run / "config.yaml").seed == 2


def test_another_runs_directory_is_refused_naming_the_field(config: Callable[..., RunConfig]) -> None:
    run = begun(config(), "base", "ppo")
    before = (run / "config.yaml").read_bytes()
    other = config(seed=1)
    other.ppo.kl_coef = 0.5
    with pytest.raises(UserError) as error:
        RunDirectory(other)
    assert "ppo.kl_coef, seed" in str(error.value)
    assert "--overwrite_output_dir" in str(error.value)
    assert str(run.path) in str(error.value)
    assert (run / "config.yaml").read_bytes() == before


def test_settings_of_a_stage_that_is_not_finished_may_change(config: Callable[..., RunConfig]) -> None:
    """NaN in PPO asks for a smaller learning rate, not for another reward model."""
    run = begun(config(), "base", "reward")
    changed = config()
    changed.ppo.learning_rate = 1e-6
    RunDirectory(changed)
    assert config_from_file(run / "config.yaml").ppo.learning_rate == 1e-6
    changed.reward.learning_rate = 1e-6
    with pytest.raises(UserError, match="differs in reward.learning_rate"):
        RunDirectory(changed)


def test_what_no_number_depends_on_may_change(config: Callable[..., RunConfig]) -> None:
    run = begun(config(), "base", "reward")
    before = (run / "config.yaml").read_bytes()
    changed = config(save_steps=7, report_to="tensorboard")
    changed.reward.gradient_checkpointing = changed.ppo.gradient_checkpointing = True
    RunDirectory(changed)
    assert (run / "config.yaml").read_bytes() == before


def test_a_stage_whose_result_is_gone_is_not_finished(config: Callable[..., RunConfig]) -> None:
    run = begun(config(), "base", "reward", "merge")
    assert run.finished("reward") and run.finished("merge")
    (run / RESULTS["reward"]).unlink()
    assert run.finished("base") and run.finished("merge") and not run.finished("reward")


def test_results_without_a_config_are_nobodys(config: Callable[..., RunConfig]) -> None:
    run = begun(config(), "base", "reward")
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="holds results and no config.yaml"):
        RunDirectory(config(seed=7))
    assert not (run / "config.yaml").exists()


def test_a_long_list_of_differences_is_cut_and_counted(config: Callable[..., RunConfig]) -> None:
    begun(config(), "base", "ppo")
    other = config(seed=1, max_length=9, max_prompt_length=9, dtype="float32", backend="auto", load_in_4bit=False)
    other.ppo.kl_coef = 0.5
    with pytest.raises(UserError, match="and 2 more"):
        RunDirectory(other)


def test_a_run_of_a_version_with_other_fields_is_refused_naming_them(config: Callable[..., RunConfig]) -> None:
    run = begun(config(), "base", "ppo")
    mapping = config_to_mapping(config())
    mapping["ppo"]["old_field"] = 1
    write_text(run / "config.yaml", yaml.safe_dump(mapping))
    with pytest.raises(UserError, match=r"ppo\.old_field"):
        RunDirectory(config())


# What may be deleted


def test_overwriting_clears_only_what_is_the_runs_own(config: Callable[..., RunConfig]) -> None:
    run = RunDirectory(config())
    for name in CONTENTS:
        if "." in name:
            (run / name).write_text("old") if name != "config.yaml" else None
        else:
            (run / name).mkdir()
            (run / name / "adapter_config.json").write_text("old")
    (run / "notes.txt").write_text("mine")
    (run / "plots").mkdir()
    (run / "plots" / "own.png").write_text("mine")

    RunDirectory(config(seed=1, overwrite_output_dir=True))

    assert files_of(run.path) == ["config.yaml", "notes.txt", "plots", "plots/own.png"]
    assert config_from_file(run / "config.yaml").seed == 1


def test_a_run_that_overwrote_goes_on_without_the_option(config: Callable[..., RunConfig]) -> None:
    with RunDirectory(config(overwrite_output_dir=True)).stage("base"):
        pass
    assert RunDirectory(config()).finished("base")


@pytest.mark.parametrize("inside", ["summary.json", "merged/model.safetensors", "thesis.txt"])
def test_a_folder_that_is_no_run_is_not_cleared(config: Callable[..., RunConfig], tmp_path: Path, inside: str) -> None:
    path = tmp_path / "run" / inside
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(UserError, match="is no run"):
        RunDirectory(config(overwrite_output_dir=True))
    assert path.read_text() == "precious"
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_empty_folder_may_be_overwritten(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    RunDirectory(config(overwrite_output_dir=True))
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_clearing_does_not_follow_links_out_of_the_run(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = RunDirectory(config())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("precious")
    (run / "merged").symlink_to(tmp_path / "elsewhere")
    try:
        RunDirectory(config(overwrite_output_dir=True))
    except UserError as error:
        assert "merged" in str(error)
    assert (tmp_path / "elsewhere" / "weights").read_text() == "precious"


# What is recorded


def test_a_stage_records_results_seconds_and_versions(config: Callable[..., RunConfig]) -> None:
    run = RunDirectory(config())
    with run.stage("merge") as results:
        results["merge"] = {"target": "original"}
        assert not run.finished("merge")
    held = json.loads((run / "summary.json").read_text())
    assert held["merge"] == {"target": "original"}
    assert held["seconds"]["merge"] >= 0
    assert held["versions"].keys() >= {"lora-rlhf", "torch", "transformers", "peft", "trl"}


def test_later_stages_keep_what_earlier_ones_recorded(config: Callable[..., RunConfig]) -> None:
    run = RunDirectory(config())
    for stage in STAGES:
        with run.stage(stage) as results:
            results[f"of {stage}"] = stage
    assert set(run.summary["seconds"]) == set(STAGES)
    assert all(run.summary[f"of {stage}"] == stage for stage in STAGES)


@pytest.mark.parametrize("failure", [RuntimeError, UserError, KeyboardInterrupt])
def test_a_stage_that_fails_records_nothing(config: Callable[..., RunConfig], failure: type[BaseException]) -> None:
    run = RunDirectory(config())
    with run.stage("base"):
        pass
    before = (run / "summary.json").read_bytes()
    with pytest.raises(failure), run.stage("reward") as results:
        results["reward_model"] = {"accuracy": 1.0}
        raise failure("in the middle")
    assert (run / "summary.json").read_bytes() == before
    assert not RunDirectory(config()).finished("reward")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "summary.json", "old")

    def full(handle: int) -> None:
        os.ftruncate(handle, 2)
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_text(tmp_path / "summary.json", "new")
    assert (tmp_path / "summary.json").read_text() == "old"


# What is damaged or missing


@pytest.mark.parametrize("content", [b"", b'{"seconds": {', b"\xff\xfe", b"[]", b"3", b'{"seconds": 3}'])
def test_a_damaged_summary_is_named(config: Callable[..., RunConfig], content: bytes) -> None:
    run = RunDirectory(config())
    (run / "summary.json").write_bytes(content)
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        run.finished("reward")


@pytest.mark.parametrize("content", [b"", b"[", b"- 1", b"\xff\xfe\x00", b"seed: 2024-99-99", b"text"])
def test_a_damaged_config_is_named_and_left_alone(config: Callable[..., RunConfig], content: bytes) -> None:
    path = begun(config()) / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        RunDirectory(config())
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "stage", "recipe"),
    [
        ("reward_adapter/adapter_model.safetensors", "reward", "reward_lora.py"),
        ("instruct_adapter/adapter_model.safetensors", "instruct", "sft_lora.py"),
        ("policy_adapter/adapter_model.safetensors", "ppo", "ppo_lora.py"),
        ("merged", "merge", "merge_lora.py"),
    ],
)
def test_a_missing_artefact_names_the_recipe_to_run(
    config: Callable[..., RunConfig], name: str, stage: str, recipe: str
) -> None:
    run = RunDirectory(config())
    with pytest.raises(UserError) as error:
        run.needed(name, stage)
    assert f"has no {name}" in str(error.value)
    assert f"recipes/{recipe}" in str(error.value)
    assert (Path(__file__).parents[1] / "recipes" / recipe).is_file()

    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("")
    assert run.needed(name, stage) == run.path / name


def test_the_command_that_a_missing_artefact_names_belongs_to_the_same_run(config: Callable[..., RunConfig]) -> None:
    run = begun(config(seed=5))
    with pytest.raises(UserError) as error:
        run.needed("policy_adapter", "ppo")
    command = re.search(r"`python \S+ (.*?)`", str(error.value))
    assert command
    advised = config_from_command_line(None, shlex.split(command[1]))
    assert RunDirectory(advised).path == run.path


def test_an_output_directory_that_is_a_file_is_refused(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"output_dir: .*run cannot be written"):
        RunDirectory(config())
    assert (tmp_path / "run").read_text() == "a file"


def test_an_output_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="output_dir"):
        RunDirectory(RunConfig(output_dir=str(tmp_path / "file" / "run")))
