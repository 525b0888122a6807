"""benchmarks/ppo_settings.py: what it changes, what it keeps, and what it makes of the figures of several runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from ppo_settings import CHANGES, EPSILON, UNCHANGED, changed, check_kept, check_runs, difference

from lora_rlhf.config import PpoSettings, RunConfig
from lora_rlhf.config_file import config_from_file
from lora_rlhf.errors import UserError

EMBEDDED_CONFIG = ROOT / "recipes" / "configs" / "embedded.yaml"


def differing(first: RunConfig, second: RunConfig) -> set[str]:
    names = (field.name for field in fields(PpoSettings))
    return {name for name in names if getattr(first.ppo, name) != getattr(second.ppo, name)}


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in (UNCHANGED, EPSILON, "double_batch")])
def test_each_change_is_of_one_setting(name: str) -> None:
    config = config_from_file(EMBEDDED_CONFIG)
    assert len(differing(changed(config, UNCHANGED, None), changed(config, name, None))) == 1


def test_a_doubled_batch_gives_as_many_answers_and_minibatches_a_step() -> None:
    config = config_from_file(EMBEDDED_CONFIG)
    before, after = changed(config, UNCHANGED, 12).ppo, changed(config, "double_batch", 12).ppo
    assert (before.batch_size * before.total_steps, before.num_mini_batches) == (
        after.batch_size * after.total_steps,
        after.num_mini_batches,
    )
    assert (after.batch_size, after.total_steps) == (128, 6)


def test_the_difference_is_taken_run_by_run() -> None:
    unchanged = {"0": {"reward": 1.0}, "1": {"reward": 3.0}, "2": {"reward": 9.0}}
    figures = {"0": {"reward": 1.5}, "1": {"reward": 4.5}}
    assert difference(figures, unchanged, "reward") == "+1.000 ± 0.500"  # 0.5 and 1.5: sd 0.707, over √2
    assert difference({"0": {"reward": 0.0}}, unchanged, "reward") == "-1.000"
    assert difference({"7": {"reward": 0.0}}, unchanged, "reward") == ""


def test_a_result_of_another_length_is_not_taken_for_this_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(EMBEDDED_CONFIG.read_text())
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"steps": 24}))
    check_kept(file, run, UNCHANGED, None)
    with pytest.raises(UserError, match="is of 24 steps and not of 12: choose another --out, or the --steps"):
        check_kept(file, run, UNCHANGED, 12)
    file.write_text("{")
    with pytest.raises(UserError, match="is no file of results: .* Delete it"):
        check_kept(file, run, UNCHANGED, None)


def test_runs_are_finished_and_have_names_of_their_own(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    with pytest.raises(UserError, match=r"score_scales\.json is missing: .* a run whose ppo stage is done"):
        check_runs(folders)
    for folder in folders:
        (folder / "score_scales.json").touch()
    check_runs(folders[:1])
    with pytest.raises(UserError, match="folders of one name"):
        check_runs(folders)


@pytest.mark.slow
def test_a_result_is_made_once(run_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/ppo_settings.py", str(run_folder), "--out", str(tmp_path), "--steps", "1"]
    printed = []
    for names in (["unchanged"], ["unchanged", "head"]):
        done = subprocess.run([*command, "--settings", *names], capture_output=True, text=True, cwd=ROOT, check=True)
        printed.append(json.loads(done.stdout.splitlines()[-1]))
    name = run_folder.name
    assert printed[1]["unchanged"] == printed[0]["unchanged"]
    assert printed[1].keys() == {"unchanged", "head"}
    figures = printed[1]["head"][name]
    kl_coef = config_from_file(run_folder / "config.yaml").ppo.kl_coef
    assert figures["objective"] == pytest.approx(figures["reward"] - kl_coef * figures["kl"])
