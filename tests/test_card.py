"""The benchmark for cards runs whole on a CPU, and keeps what it has whatever happens to it."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import card
import card_parts.bench as bench_part
import torch
from card_parts.bench import SIZES, Bench, Figures
from card_parts.ppo import MAIN
from card_table import NOT_YET, tables

from lora_rlhf.errors import UserError

RUN: Figures = {"device": "CPU", "size": "tiny", "cap_gib": 24.0, "date": "2026-12-01"}
WHY_NOT = ("not_measured", "skipped")


def command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / "card.py"), "--size", "tiny", *words]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(*words: str) -> None:
    """Run the command in this process, which has imported all that it needs; the log sees file descriptor 1 alone."""
    with (
        pytest.MonkeyPatch.context() as patched,
        open(1, "w", closefd=False) as descriptor,
        contextlib.redirect_stdout(descriptor),
    ):
        patched.setattr(sys, "argv", ["card.py", "--size", "tiny", *words])
        card.main()


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "card.json").read_text(encoding="utf-8"))


def numbers(figures: Any) -> Iterator[float]:
    for value in figures.values() if isinstance(figures, dict) else figures if isinstance(figures, list) else [figures]:
        if isinstance(value, dict | list):
            yield from numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield value


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(SIZES["tiny"], torch.device("cpu"), 24.0, time.monotonic() + 600, tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every part."""
    out = tmp_path_factory.mktemp("card")
    run("--out", str(out), "--cap_gib", "24", "--budget", "100000")  # seconds since this process began
    return out


def test_every_part_has_figures_or_says_why_not(whole: Path) -> None:
    parts = result(whole)["parts"]
    assert list(parts) == list(card.PARTS)
    for name, part in parts.items():
        assert part["status"] == "done" and part["figures"], name
        for what, figures in part["figures"].items():
            reasons = [figures[word] for word in WHY_NOT if word in figures]
            assert "error" not in figures, (name, what, figures)
            assert reasons or list(numbers(figures)) or name == "limits", (name, what)
            assert all(len(reason.split()) > 2 for reason in reasons), (name, what)
            assert all(math.isfinite(number) for number in numbers(figures)), (name, what)


def test_whole_steps_report_seconds_peaks_and_shares(whole: Path) -> None:
    figures = result(whole)["parts"]["ppo"]["figures"]
    steps = {name: f for name, f in figures.items() if name.startswith("mistral")}
    assert len(steps) == 3 and steps[MAIN]["step"] == 2 and steps[MAIN]["first_step_seconds"] > 0
    for f in steps.values():
        assert sum(f["seconds"][phase] for phase in ("rollout", "score", "update")) <= f["seconds"]["step"]
        assert all(f["peaks"][phase]["allocated_gib"] > 0 < f["planned_gib"][phase] for phase in f["peaks"])
        assert 0 < f["rollout_share_of_floor"] < 1 and 0 < f["update_model_flops_utilisation"] < 1
        assert f["mean_answer_tokens"] > 5  # of 6
    assert len([name for name in figures if name.startswith("update in micro-batches")]) == 4


def test_what_is_right_on_a_cpu_is_right(whole: Path) -> None:
    parts = result(whole)["parts"]
    said = [
        inner["right"]
        for part in ("correctness", "training")
        for figures in parts[part]["figures"].values()
        for inner in (figures, *figures.values())
        if isinstance(inner, dict) and "right" in inner
    ]
    assert len(said) >= 10 and all(said)


def test_the_arms_of_the_recipe_are_there(whole: Path) -> None:
    figures = result(whole)["parts"]["embedded"]["figures"]
    assert {"base", "instruct", "plus"} == figures["arms"].keys()
    assert {f"{name} stage" for name in ("base", "reward", "instruct", "ppo", "merge", "compare")} < figures.keys()


def test_lines_hold_what_the_whole_holds_and_the_log_is_kept(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "card.jsonl").read_text(encoding="utf-8").splitlines()]
    of_parts: dict[str, Figures] = {}
    for line in lines:
        if "what" in line:
            of_parts.setdefault(line["part"], {})[line["what"]] = line["figures"]
    assert of_parts == {name: part["figures"] for name, part in result(whole)["parts"].items()}
    assert "correctness: done" in (whole / "card.log").read_text(encoding="utf-8")
    assert sum(file.stat().st_size for file in whole.iterdir()) < 2**20


def test_a_cpu_makes_no_table(whole: Path) -> None:
    assert tables([result(whole)]) == NOT_YET


def test_nothing_begins_that_the_budget_has_no_room_for(tmp_path: Path) -> None:
    run("--out", str(tmp_path), "--budget", "1", "--parts", "decode", "limits")
    parts = result(tmp_path)["parts"]
    assert list(parts) == ["limits", "decode"]
    assert all(part["status"] == "skipped" and "are left" in part["reason"] for part in parts.values())


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("--out", str(tmp_path), "--parts", "limits", "ppo", "decode"), text=True, cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and '"part": "ppo"' not in read(tmp_path / "card.jsonl"):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    parts = result(tmp_path)["parts"]
    assert process.returncode == 130 and "is kept" in printed, printed
    assert parts["limits"]["status"] == "done" and parts["ppo"]["status"] == "stopped" and parts["ppo"]["figures"]
    assert "decode" not in parts


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def test_a_part_that_fails_leaves_the_others_alone(tmp_path: Path, bench: Bench) -> None:
    def broken(_: Bench) -> Iterator[tuple[str, Figures]]:
        """Break."""
        yield "first", {"ms": 1.0}
        raise ValueError("the second one broke")

    def sound(_: Bench) -> Iterator[tuple[str, Figures]]:
        """Go on."""
        yield "third", {"rate": math.inf}

    record = card.Record(tmp_path, RUN)
    card.run_parts({"broken": card.Planned(broken, 1), "sound": card.Planned(sound, 1)}, bench, record)
    parts = result(tmp_path)["parts"]
    assert parts["broken"]["status"] == "failed" and parts["broken"]["figures"] == {"first": {"ms": 1.0}}
    assert parts["broken"]["error"] == "ValueError: the second one broke"
    assert parts["sound"]["status"] == "done" and parts["sound"]["figures"] == {"third": {"rate": "inf"}}


def part_of(*yielded: tuple[str, Figures], error: Exception | None = None) -> card.Planned:
    """Return a part that yields these figures, and then fails where there is an error."""

    def part(_: Bench) -> Iterator[tuple[str, Figures]]:
        yield from yielded
        if error:
            raise error

    return card.Planned(part, 1)


def ran(tmp_path: Path, bench: Bench, **parts: card.Planned) -> dict[str, Any]:
    """Return all parts in the folder after a run of some."""
    card.run_parts(parts, bench, card.Record(tmp_path, RUN))
    return result(tmp_path)["parts"]


def test_a_second_run_adds_to_the_first_and_replaces_what_it_measures_again(tmp_path: Path, bench: Bench) -> None:
    ran(tmp_path, bench, one=part_of(("n", {"is": 1})), two=part_of(("n", {"is": 2}), ("before", {"is": 2})))
    parts = ran(tmp_path, bench, two=part_of(("n", {"is": 3})))
    assert {name: part["figures"] for name, part in parts.items()} == {"one": {"n": {"is": 1}}, "two": {"n": {"is": 3}}}


def test_a_part_without_new_figures_leaves_those_of_the_earlier_run(tmp_path: Path, bench: Bench) -> None:
    """Broken at once, skipped, or not measurable: the part stays what it was, and the lines tell of the other tries."""
    before = ran(tmp_path, bench, one=part_of(("n", {"is": 1})))
    assert ran(tmp_path, bench, one=part_of(error=ValueError("broke at once"))) == before
    bench.deadline = time.monotonic()
    assert ran(tmp_path, bench, one=part_of(("n", {"is": 2}))) == before
    bench.deadline = time.monotonic() + 60
    assert ran(tmp_path, bench, one=part_of(("m", {"not_measured": "the model is not here"}))) == before
    lines = [json.loads(line) for line in read(tmp_path / "card.jsonl").splitlines()]
    assert [line["status"] for line in lines if "status" in line] == ["done", "failed", "skipped", "done"]


def test_a_part_that_fails_half_way_keeps_the_rest_of_the_earlier_run(tmp_path: Path, bench: Bench) -> None:
    ran(tmp_path, bench, one=part_of(("n", {"is": 1}), ("m", {"is": 1})))
    one = ran(tmp_path, bench, one=part_of(("n", {"is": 2}), error=ValueError("broke")))["one"]
    assert one["status"] == "failed" and one["error"] == "ValueError: broke"
    assert one["figures"] == {"n": {"is": 2}, "m": {"is": 1}}
    one = ran(tmp_path, bench, one=part_of(("n", {"is": 3}), ("m", {"skipped": "no time is left"})))["one"]
    assert one["status"] == "done" and "error" not in one
    assert one["figures"] == {"n": {"is": 3}, "m": {"is": 1}}


@pytest.mark.parametrize("changed", [{"device": "Other Card"}, {"size": "mistral"}, {"cap_gib": 16.0}])
def test_figures_of_other_conditions_are_not_mixed(tmp_path: Path, bench: Bench, changed: Figures) -> None:
    before = ran(tmp_path, bench, one=part_of(("n", {"is": 1})))
    with pytest.raises(UserError, match=f"one run has {next(iter(changed))} .* choose another --out"):
        card.Record(tmp_path, RUN | changed)
    assert result(tmp_path) == {"run": RUN, "parts": before}
    first, second = ({"run": RUN | {"device": "Card"} | more, "parts": {}} for more in ({}, changed))
    with pytest.raises(UserError, match="do not belong in one table"):
        tables([first, second])


def test_a_lost_card_leaves_the_other_parts_to_a_new_process(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> Figures:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def losing(bench: Bench) -> Iterator[tuple[str, Figures]]:
        """Lose it."""
        yield "before", {"is": 1}
        monkeypatch.setattr(card, "device_answers", lambda: False)
        monkeypatch.setattr(bench_part, "device_answers", lambda: False)
        yield "never", bench.attempt(lost)

    parts = {"first": card.Planned(losing, 1), "second": part_of(("n", {})), "third": part_of(("n", {}))}
    assert card.run_parts(parts, bench, card.Record(tmp_path, RUN)) == ["second", "third"]
    first = result(tmp_path)["parts"]
    assert list(first) == ["first"] and first["first"]["figures"] == {"before": {"is": 1}}
    assert "illegal memory access" in first["first"]["error"] and first["first"]["status"] == "failed"


def test_a_new_process_measures_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(
        sys, "argv", ["card.py", "--out", "results", "--parts", "ppo", "decode", "trl", "--budget", "9"]
    )
    monkeypatch.setattr(os, "execv", lambda _, words: started.append(words))
    card.start_again(["trl"])
    assert started[0][1] == card.__file__
    monkeypatch.setattr(sys, "argv", started[0][1:])
    given = card.arguments()
    assert (given.parts, given.budget, given.out) == (["trl"], 9.0, Path("results"))


def test_the_log_ends_though_a_process_still_holds_it_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "TEE_SECONDS", 0.5)
    started = time.monotonic()
    with card.logged(tmp_path / "log"):
        os.write(1, b"printed\n")
        process = subprocess.Popen(["sleep", "60"])
    process.kill()
    process.wait()
    assert time.monotonic() - started < 30
    assert read(tmp_path / "log") == "printed\n"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"gguf_parts": [Path("half")]}, "--gguf_parts: no file half"),
        ({"peer_path": Path("nowhere")}, "--peer_path: no folder nowhere"),
        ({"cap_gib": 1.0}, "--cap_gib: 1 GiB are too few"),
        ({"out": ROOT / "LICENSE" / "out"}, "--out: .* cannot be made"),
        pytest.param(
            {"size": "mistral"}, "--size mistral needs a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_any_work(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    given = {"size": "tiny", "out": tmp_path, "gguf_parts": [], "peer_path": None, "cap_gib": None} | changed
    with pytest.raises(UserError, match=said):
        card.checked_device(argparse.Namespace(**given))


# -- the table ---------------------------------------------------------------------------------------------------------


def test_a_table_is_made_of_what_was_measured(whole: Path) -> None:
    measured = result(whole)
    measured["run"]["device"] = "Some Card"
    measured["parts"]["ppo"]["figures"]["update in micro-batches of 16, checkpointing off"] = {
        "error": "OutOfMemoryError: CUDA out of memory"
    }
    text = tables([measured])
    step = measured["parts"]["ppo"]["figures"][MAIN]["seconds"]["step"]
    assert text.startswith("Some Card, torch ") and "held to 24 GiB" in text
    assert f"**{step:.1f}**" in text and "| out of memory |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def table_of(*files: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / "benchmarks" / "card_table.py"), *map(str, files)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_a_step_that_failed_has_a_row_that_says_why() -> None:
    parts = {"ppo": {"status": "done", "figures": {MAIN: {"error": "OutOfMemoryError: CUDA out of memory"}}}}
    rows = [line for line in tables([{"run": RUN | {"device": "Card"}, "parts": parts}]).splitlines() if "|" in line]
    assert rows[-1].startswith(f"| {MAIN} | out of memory |") and len({row.count("|") for row in rows}) == 1


@pytest.mark.skipif((ROOT / "benchmarks" / "results").exists(), reason="there are results")
def test_without_a_result_file_nothing_has_been_measured() -> None:
    done = table_of()
    assert done.returncode == 0 and done.stdout.strip() == NOT_YET


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read: No such file"), ("half", "is no result"), ('{"run": {}, "parts": []}', "is no result")],
)
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "named.json"
    if content is not None:
        file.write_text(content)
    done = table_of(file)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert "named.json" in done.stdout and said in " ".join(done.stdout.split())
