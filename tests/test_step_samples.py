"""Sample answers on the way: written line by line, cut on resume, and read whatever a crash left."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lora_rlhf.step_samples import (
    STEP_SAMPLES,
    StepSamples,
    append_samples,
    drop_samples_from,
    last_samples,
    step_samples_table,
)


def append(run: Path, step: int, answer: str = "an answer") -> None:
    append_samples(run, step, [f"prompt {step}", "second"], [answer, "other"], [0.5 * step, -1.0])


def steps_in(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / STEP_SAMPLES).read_text().splitlines()]


def test_each_step_is_a_line_and_the_last_is_read_back(tmp_path: Path) -> None:
    rows = append_samples(tmp_path, 1, ["Why?"], ["Because.\n\u2028 é"], [1.25])
    assert rows == [{"prompt": "Why?", "answer": "Because.\n\u2028 é", "reward": 1.25}]
    append(tmp_path, 5)
    assert steps_in(tmp_path) == [1, 5]
    assert last_samples(tmp_path) == StepSamples(
        5,
        [
            {"prompt": "prompt 5", "answer": "an answer", "reward": 2.5},
            {"prompt": "second", "answer": "other", "reward": -1.0},
        ],
    )


def test_a_line_is_on_disk_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    seen = []
    for step in range(1, 30):
        writer = threading.Thread(target=append, args=(tmp_path, step))
        writer.start()
        writer.join()
        held = last_samples(tmp_path)
        seen.append(held.step if held else None)
    assert seen == list(range(1, 30))


def test_texts_and_rewards_of_unequal_number_are_refused_and_leave_no_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        append_samples(tmp_path, 1, ["one"], ["a", "b"], [0.0])
    assert last_samples(tmp_path) is None


def test_nothing_written_is_no_samples_and_nothing_to_drop(tmp_path: Path) -> None:
    assert last_samples(tmp_path) is None
    drop_samples_from(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_resume_drops_its_steps_and_a_torn_line(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        append(tmp_path, step)
    with (tmp_path / STEP_SAMPLES).open("a") as file:
        file.write('{"step": 8, "samples": [{"pro')
    assert (samples := last_samples(tmp_path)) and samples.step == 6
    drop_samples_from(tmp_path, 5)
    assert steps_in(tmp_path) == [2, 4]
    append(tmp_path, 6, "anew")
    assert steps_in(tmp_path) == [2, 4, 6]
    assert (samples := last_samples(tmp_path)) and samples.rows[0]["answer"] == "anew"


def test_what_is_kept_is_kept_as_it_was(tmp_path: Path) -> None:
    append(tmp_path, 1, 'quotes " and \u2028 and \\n')
    append_samples(tmp_path, 2, ["p"], ["not finite"], [float("nan")])
    before = (tmp_path / STEP_SAMPLES).read_bytes()
    append(tmp_path, 3)
    drop_samples_from(tmp_path, 3)
    assert (tmp_path / STEP_SAMPLES).read_bytes() == before


@given(garbage=st.lists(st.binary(max_size=40) | st.sampled_from([b'{"step": 1}', b"[[", b"null", b'{"samples": 3}'])))
def test_garbage_lines_are_passed_over(garbage: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.mktemp("run")
    append(run, 3)
    with (run / STEP_SAMPLES).open("ab") as file:
        file.write(b"\n".join(garbage))
    samples = last_samples(run)
    assert samples is not None and samples.step == 3
    drop_samples_from(run, 9)
    assert steps_in(run) == [3]


def shown(samples: StepSamples, most: int = 3) -> str:
    console = Console(width=90, force_terminal=False)
    with console.capture() as capture:
        console.print(step_samples_table(samples, most))
    return capture.get()


def test_the_table_shows_answers_with_their_rewards_up_to_a_number() -> None:
    rows = [{"prompt": f"p{i}", "answer": f"[bold]a{i}", "reward": i / 4} for i in range(5)]
    text = shown(StepSamples(7, rows), most=2)  # type: ignore[arg-type]
    assert "step 7" in text
    assert "[bold]a1" in text and "+0.25" in text
    assert "a2" not in text


def test_an_answer_cannot_steer_the_terminal() -> None:
    text = shown(StepSamples(1, [{"prompt": "p\x07", "answer": "\x1b[2J\x1b]0;title\x07 \udc80 end", "reward": 0.0}]))
    assert "\x1b" not in text and "\x07" not in text and "\udc80" not in text
    assert "end" in text
