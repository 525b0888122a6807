"""Trackers: what arrives, nothing twice after a resume, and a run that goes on when one fails."""

from __future__ import annotations

import importlib
import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.tracking import FOLDER, tracker

STAND_IN = '''
"""Stands in for wandb and Trackio: every call becomes a line in a file."""
import json, os

def said(*what):
    with open(os.environ["STAND_IN_CALLS"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class Run:
    url, offline = "http://tracker/run", False
    def log(self, values, step=None):
        if step == int(os.environ.get("STAND_IN_FAILS_AT", 0)):
            raise ConnectionError("no\\nnetwork")
        said("log", step, values)
    def finish(self):
        said("finish")

class Table(dict):
    def __init__(self, columns=None, data=None, dataframe=None):
        super().__init__(columns=columns, data=data)

class Settings:
    mode = os.environ.get("WANDB_MODE", "online")
class Setup:
    settings = Settings()

def setup():
    return Setup()

def login(prompt, verify):
    return bool(os.environ.get("WANDB_API_KEY"))

def init(**options):
    if os.environ.get("STAND_IN_NO_START"):
        raise TimeoutError("nobody answers")
    said("init", {key: options[key] for key in sorted(options)})
    return Run()
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make the stand-in the package of a name; return a function that does, and gives a reader of its calls."""
    calls, packages = tmp_path / "calls", tmp_path / "packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("STAND_IN_CALLS", str(calls))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    held: dict[str, Any] = {n: sys.modules.pop(n) for n in ("wandb", "trackio") if n in sys.modules}

    def install(name: str) -> Any:
        (packages / f"{name}.py").write_text(STAND_IN)
        importlib.invalidate_caches()
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    yield install
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)
    sys.modules.update(held)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my run"
    folder.mkdir()
    return folder


def log_steps(report_to: str, run: Path, steps: range, close: bool = True) -> None:
    """Log steps as PPO does: numbers each step, answers every second one."""
    to = tracker(report_to, run, RunConfig(seed=7))
    for step in steps:
        to.log(step, {"step": step, "kl": step / 4, "score/reward": 1.0})
        if step % 2 == 0:
            to.table(step, [{"prompt": "a|b\n<i>", "answer": f"answer {step}", "reward": 0.5}])
    if close:
        to.close()


# Which tracker


def test_none_does_nothing_and_leaves_nothing(run: Path) -> None:
    log_steps("none", run, range(1, 4))
    assert list(run.iterdir()) == []


def test_another_name_is_refused_with_those_that_there_are(run: Path) -> None:
    with pytest.raises(UserError, match="report_to is one of none, tensorboard, wandb, trackio, not 'mlflow'"):
        tracker("mlflow", run, RunConfig())


@pytest.mark.parametrize("report_to", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_with_its_command(
    report_to: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{report_to} is not installed: pip install {report_to}"):
        tracker(report_to, run, RunConfig())
    assert list(run.iterdir()) == []


def test_no_tracker_and_no_torch_is_imported_before_it_is_asked_for(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lora_rlhf import RunConfig\n"
        "from lora_rlhf.tracking import tracker\n"
        f"to = tracker('none', Path({str(run)!r}), RunConfig()); to.log(1, {{'kl': 1.0}}); to.close()\n"
        "print([n for n in ('torch', 'accelerate', 'wandb', 'trackio', 'tensorboard') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# What arrives, and nothing twice


@pytest.mark.parametrize("report_to", ["wandb", "trackio"])
def test_numbers_and_answers_arrive_and_a_resume_repeats_none(report_to: str, run: Path, stand_in: Any) -> None:
    calls = stand_in(report_to)
    log_steps(report_to, run, range(1, 5), close=False)  # as a kill leaves it
    log_steps(report_to, run, range(3, 7))  # from the checkpoint after step 2
    said = calls()
    numbers = [(call[1], call[2]) for call in said if call[0] == "log" and "samples" not in call[2]]
    assert numbers == [(step, {"ppo/kl": step / 4, "ppo/score/reward": 1.0}) for step in range(1, 7)]
    answers = [(call[1], call[2]["samples"]) for call in said if call[0] == "log" and "samples" in call[2]]
    columns = ["prompt", "answer", "reward"]
    assert answers == [
        (step, {"columns": columns, "data": [["a|b\n<i>", f"answer {step}", 0.5]]}) for step in (2, 4, 6)
    ]
    first, second = (call[1] for call in said if call[0] == "init")
    assert first == second  # the same run is gone on with
    assert first["resume"] == "allow" and first["project"] == "lora_rlhf"
    assert first["config"]["seed"] == 7
    assert said[-1] == ["finish"]


def test_wandb_keeps_its_files_in_the_run_and_its_waits_short(run: Path, stand_in: Any) -> None:
    calls = stand_in("wandb")
    log_steps("wandb", run, range(1, 2))
    options = calls()[0][1]
    assert options["dir"] == str(run / FOLDER)
    assert options["name"] == "my run"
    assert options["settings"]["console"] == "off"
    assert 0 < options["settings"]["init_timeout"] <= 60 and 0 < options["settings"]["finish_timeout"] <= 60


def test_two_runs_are_two_runs(run: Path, tmp_path: Path, stand_in: Any) -> None:
    calls = stand_in("trackio")
    other = tmp_path / "other" / "my run"
    other.mkdir(parents=True)
    for folder in (run, other):
        log_steps("trackio", folder, range(1, 2))
    first, second = (call[1]["name"] for call in calls() if call[0] == "init")
    assert first != second


@pytest.mark.parametrize("held", ["", "{", "[]", '{"id": 1, "step": 1e999}', '{"step": 2}'])
def test_a_damaged_note_of_what_was_sent_begins_anew(held: str, run: Path, stand_in: Any) -> None:
    calls = stand_in("trackio")
    (run / FOLDER).mkdir()
    (run / FOLDER / "trackio.json").write_text(held)
    log_steps("trackio", run, range(1, 2))
    assert [call[1] for call in calls() if call[0] == "log"] == [1]


def test_wandb_without_a_login_is_refused_before_the_run(
    run: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("wandb")
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(UserError, match="`wandb login`, or set WANDB_MODE=offline"):
        tracker("wandb", run, RunConfig())


def test_wandb_offline_needs_no_login(run: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in("wandb")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_steps("wandb", run, range(1, 3))
    assert [call[1] for call in calls() if call[0] == "log"] == [1, 2, 2]


# A run goes on


@pytest.mark.parametrize("report_to", ["wandb", "trackio"])
def test_a_tracker_that_fails_in_the_middle_is_dropped_and_said_once(
    report_to: str, run: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(report_to)
    monkeypatch.setenv("STAND_IN_FAILS_AT", "3")
    log_steps(report_to, run, range(1, 8))
    assert [call[1] for call in calls() if call[0] == "log"] == [1, 2, 2]
    printed = capsys.readouterr().out
    assert printed.count("goes on without it") == 1
    assert f"{report_to} failed at step 3 (no network)" in printed
    monkeypatch.delenv("STAND_IN_FAILS_AT")
    log_steps(report_to, run, range(2, 5))  # what did not arrive is sent when the run is resumed
    assert [call[1] for call in calls() if call[0] == "log"] == [1, 2, 2, 3, 4, 4]


def test_a_tracker_that_does_not_start_is_dropped(
    run: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in("wandb")
    monkeypatch.setenv("STAND_IN_NO_START", "1")
    log_steps("wandb", run, range(1, 4))
    assert calls() == []
    assert capsys.readouterr().out.count("nobody answers") == 1


def test_a_folder_that_cannot_be_written_drops_the_tracker(
    run: Path, stand_in: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in("trackio")
    (run / FOLDER).write_text("a file where the folder goes")
    log_steps("trackio", run, range(1, 4))
    assert capsys.readouterr().out.count("goes on without it") == 1


# The real ones, where they are installed


def test_tensorboard_shows_every_step_once_after_a_resume(run: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    log_steps("tensorboard", run, range(1, 5), close=False)
    log_steps("tensorboard", run, range(3, 7))
    held = EventAccumulator(str(run / FOLDER))
    held.Reload()

    def steps(tag: str) -> list[int]:
        return [event.step for event in held.Tensors(tag)]

    assert steps("ppo/kl") == steps("ppo/score/reward") == list(range(1, 7))
    values = [event.tensor_proto.float_val[0] for event in held.Tensors("ppo/kl")]
    assert values == [step / 4 for step in range(1, 7)]
    assert steps("samples/text_summary") == [2, 4, 6]
    text = held.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[2] == "| a&#124;b<br>&lt;i&gt; | answer 2 | +0.50 |"
    assert b"seed: 7" in held.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_a_full_disk_drops_tensorboard_and_not_the_run(run: Path) -> None:
    pytest.importorskip("tensorboard")
    code = f"""
import resource, signal
from pathlib import Path
from lora_rlhf import RunConfig
from lora_rlhf.tracking import tracker
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
to = tracker("tensorboard", Path({str(run)!r}), RunConfig())
to.log(1, {{"kl": 1.0}})
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
for step in range(2, 400):
    to.log(step, {{"kl": 1.0}})
to.close()
print("step", step)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("goes on without it") == 1
    assert done.stdout.endswith("step 399\n")


def wandb_records(file: Path) -> Iterator[bytes]:
    """Yield the records of a wandb file: blocks of 32 KiB, in each pieces after checksum, length and kind."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_offline_holds_every_step_once_under_one_id(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (range(1, 5), range(3, 7)):
        log_steps("wandb", run, steps)
        time.sleep(1.1)  # wandb names its folders by the second
    ids, kl = set(), []
    for file in sorted((run / FOLDER / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            for item in record.history.item:
                if "ppo/kl" in (item.key, *item.nested_key):
                    kl.append((record.history.step.num, json.loads(item.value_json)))
    assert len(ids) == 1
    assert kl == [(step, step / 4) for step in range(1, 7)]


def test_trackio_holds_every_step_once(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; from test_tracking import log_steps\n"
        f"log_steps('trackio', Path({str(run)!r}), range(*map(int, sys.argv[1:])))"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"}
    for steps in (("1", "5"), ("3", "7")):
        subprocess.run([sys.executable, "-c", code, *steps], env=environment, check=True, cwd=Path(__file__).parents[1])
    (database,) = (tmp_path / "trackio").glob("lora_rlhf*.db")
    rows = sqlite3.connect(database).execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert len({name for name, *_ in rows}) == 1
    numbers = [(step, json.loads(metrics)["ppo/kl"]) for _, step, metrics in rows if b"ppo/kl" in metrics]
    assert numbers == [(step, step / 4) for step in range(1, 7)]
    assert [step for _, step, metrics in rows if b"answer" in metrics] == [2, 4, 6]
