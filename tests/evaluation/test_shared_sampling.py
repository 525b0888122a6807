"""An evaluation by two real processes, which share the sampling of answers, finds what one finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from judge_server import JudgeServer, plausible_verdict
from launched_runs import accelerate, free_port, launched, log_of

Recipe = Callable[..., tuple[int, str]]


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    with JudgeServer(plausible_verdict) as server:
        yield server


@pytest.mark.slow
def test_two_processes_evaluate_as_one(recipe: Recipe, run_folder: Path, tmp_path: Path, judge: JudgeServer) -> None:
    questions = [
        {"question_id": i, "category": c, "turns": [f"Tell me {i}.", "Shorter."]}
        for i, c in enumerate(["writing", "math", "stem"])
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    options = ["--suites", "mt_bench", "moderation", "bad_words", "preference", "--limit", "7", "--max_new_tokens", "8"]
    options += ["--mt_bench_questions", str(tmp_path / "questions.jsonl"), "--batch_size", "2"]
    options += ["--judge_base_url", judge.base_url, "--judge_model", "stand-in"]
    for name in ("one", "two"):
        shutil.copytree(run_folder, tmp_path / name, ignore=shutil.ignore_patterns("merged", "value_adapter"))
    status, printed = recipe("evaluate.py", *options, "--output_dir", str(tmp_path / "one"))
    assert status == 0, printed
    two = launched(tmp_path / "two", accelerate("two_gpus", free_port()), *options, recipe="recipes/evaluate.py")
    assert two.wait(timeout=200) == 0, log_of(tmp_path / "two")
    assert log_of(tmp_path / "two").count("the report is") == 1
    found = [json.loads((tmp_path / name / "evaluation" / "results.json").read_text()) for name in ("one", "two")]
    for results in found:
        del results["settings"]["output_dir"]
    assert found[0]["suites"].keys() == {"mt_bench", "moderation", "bad_words", "preference"}
    assert found[1] == found[0]
    caches = [{file.name for file in (tmp_path / name / "evaluation" / "cache").iterdir()} for name in ("one", "two")]
    assert caches[0] == caches[1]


@pytest.mark.slow
def test_a_judge_that_is_not_there_is_said_before_any_sampling(run_folder: Path, tmp_path: Path) -> None:
    """Both processes end, the second one without waiting for ever."""
    shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("merged", "value_adapter"))
    options = ["--suites", "moderation", "--limit", "3", "--judge_model", "/nowhere/at/all"]
    run = launched(tmp_path / "run", accelerate("two_gpus", free_port()), *options, recipe="recipes/evaluate.py")
    assert run.wait(timeout=120) != 0
    log = log_of(tmp_path / "run")
    assert log.count("error: --judge_model: no folder /nowhere/at/all") == 1, log
    assert "sampled by 2 processes" not in log and not any((tmp_path / "run" / "evaluation" / "cache").glob("*"))
