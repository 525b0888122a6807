"""recipes/evaluate.py on a finished run with a real judge server: what it leaves, and that it repeats nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, plausible_verdict
from recipe_runs import assert_one_line_of_error

Recipe = Callable[..., tuple[int, str]]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    def verdict(text: str) -> str:
        given = plausible_verdict(text)
        return given if "[[" in given or "{" in given else "Rating: [[5]]"  # the stand-in declines now and then

    with JudgeServer(verdict) as server:
        yield server


@pytest.fixture
def finished(run_folder: Path, tmp_path: Path) -> Path:
    """A finished run of the tiny config, to be written to."""
    shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("merged", "value_adapter"))
    return tmp_path / "run"


@pytest.fixture
def material(tmp_path: Path) -> tuple[Path, Path]:
    """(a folder of local tasks, a file of two-turn questions)."""
    (tmp_path / "tasks").mkdir()
    rows = [{"id": str(i), "question": f"Which is {i}?", "choices": ["a", f"{i}", "b"], "answer": 1} for i in range(5)]
    (tmp_path / "tasks" / "numbers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = [
        {"question_id": i, "category": c, "turns": [f"Tell me {i}.", "Shorter."]}
        for i, c in enumerate(["writing", "math", "stem"])
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return tmp_path / "tasks", tmp_path / "questions.jsonl"


def results_in(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation" / "results.json").read_text())


def test_every_suite_runs_once_and_a_second_run_repeats_nothing(
    recipe: Recipe, finished: Path, material: tuple[Path, Path], judge: JudgeServer
) -> None:
    tasks, questions = material
    options = ["--output_dir", str(finished), "--local_tasks", str(tasks), "--mt_bench_questions", str(questions)]
    options += [
        "--judge_base_url",
        judge.base_url,
        "--judge_model",
        "stand-in",
        "--limit",
        "6",
        "--max_new_tokens",
        "8",
    ]
    status, printed = recipe("evaluate.py", *options)
    assert status == 0, printed
    results, folder = results_in(finished), finished / "evaluation"
    assert list(results["suites"]) == ["general", "mt_bench", "moderation", "safety", "bad_words", "preference"]
    assert results["skipped"] == {} and list(results["arms"]) == ["base", "instruct", "plus"]
    for suite in results["suites"].values():
        for task, arms in suite["tasks"].items():
            assert set(arms) == {"base", "instruct", "plus"} and task in suite["units"]
            for name, figures in arms.items():
                assert figures["stderr"] >= 0 and figures["n"] > 0
                assert (figures["difference"] is None) == (name == "base" or task == "kl_to_base")
    assert results["suites"]["general"]["tasks"]["numbers"]["base"]["n"] == 5
    assert [point["step"] for point in results["suites"]["preference"]["details"]["curve"]] == [0, 1, 2, 3]
    for name in ("general", "mt_bench", "moderation", "safety", "bad_words", "preference"):
        assert (folder / f"{name}.png").read_bytes()[:8] == PNG
    assert "Evaluation" in (folder / "report.md").read_text()
    assert len({(row["claim"]) for row in results["claims"]}) == 5

    asked, kept = len(judge.requests), {f: f.stat().st_mtime_ns for f in (folder / "cache").iterdir()}
    assert asked >= 15  # equal conversations are asked about once
    status, printed = recipe("evaluate.py", *options)
    assert status == 0, printed
    again = results_in(finished)
    assert len(judge.requests) == asked
    assert {f: f.stat().st_mtime_ns for f in (folder / "cache").iterdir()} == kept
    counts = again.pop("judge_counts"), results.pop("judge_counts")
    assert again == results and counts[0]["requests"] == 0


def test_without_judge_and_questions_the_rest_runs_and_says_what_is_missing(recipe: Recipe, finished: Path) -> None:
    status, printed = recipe(
        "evaluate.py", "--output_dir", str(finished), "--suites", "mt_bench", "moderation", "preference", "--limit", "4"
    )
    assert status == 0, printed
    results = results_in(finished)
    assert results["skipped"]["mt_bench"].startswith("it needs the questions: --mt_bench_questions FILE")
    # two suites read the run's reward, of other answers each
    assert len(results["suites"]["preference"]["details"]["curve"]) == 4
    assert "cannot tell ability, correctness and safety apart" in results["suites"]["moderation"]["notes"][0]
    assert "Not run: it needs the questions" in (finished / "evaluation" / "report.html").read_text()


def test_named_models_need_no_run(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    status, printed = recipe(
        "evaluate.py", "--output_dir", str(tmp_path / "named"), "--suites", "bad_words", "preference", "--limit", "3",
        "--config", str(finished / "config.yaml"), "--models", "base=tiny", f"plus={finished / 'policy_adapter'}",
    )  # fmt: skip
    assert status == 0, printed
    results = results_in(tmp_path / "named")
    assert list(results["arms"]) == ["base", "plus"]
    assert list(results["suites"]) == ["bad_words"]
    assert results["skipped"]["preference"].startswith("it needs a run with a reward adapter, or --referee")


def test_help_teaches_every_suite(recipe: Recipe) -> None:
    status, printed = recipe("evaluate.py", "--help")
    assert status == 0 and "python recipes/evaluate.py --output_dir" in printed
    for suite in ("general", "mt_bench", "moderation", "safety", "bad_words", "preference"):
        assert f"\n  {suite} " in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output_dir", "nowhere"], "nowhere holds no run (no config.yaml); make one with"),
        (["--models", "plus"], "--models: 'plus' is not ARM=NAME"),
        (["--models", "base=tiny", "pluss=x"], "an arm is one of base, instruct, plus, not 'pluss'"),
        (["--mt_bench_questions", "no.jsonl"], "--mt_bench_questions: no.jsonl cannot be read"),
        (["--local_tasks", "nowhere"], "nowhere"),
        (["--bad_words_file", "no.txt"], "no.txt cannot be read"),
        (["--judge_base_url", "http://127.0.0.1:1/v1"], "--judge_model NAME is missing"),
        (["--limit", "0"], "at least 1"),
        (["--margin", "1"], "0.01 is one point"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_any_work(recipe: Recipe, options: list[str], said: str) -> None:
    assert_one_line_of_error(*recipe("evaluate.py", *options), said)


@pytest.mark.slow
def test_a_judge_that_is_not_there_costs_no_finished_work(recipe: Recipe, finished: Path, material: Any) -> None:
    options = ["--output_dir", str(finished), "--limit", "2", "--suites", "general", "moderation"]
    options += ["--local_tasks", str(material[0]), "--judge_base_url", "http://127.0.0.1:9/v1", "--judge_model", "x"]
    status, printed = recipe("evaluate.py", *options)
    assert_one_line_of_error(status, printed, "--judge_base_url", "127.0.0.1:9")
    assert list(results_in(finished)["suites"]) == ["general"]
