"""The judge behind an endpoint: what is asked again, what ends a run, what is kept, and where the key never is."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, Scripted

from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.judge import HttpJudge, Verdict, api_key_from_environment
from lora_rlhf.evaluation.judge_prompts import parse_grade

KEY = "sk-very-secret-0123456789"
GOOD = Scripted("Rating: [[7]]")
SEVEN = Verdict(7.0, "Rating: [[7]]", None)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def seven(text: str) -> str:
    return "Rating: [[7]]"


@pytest.fixture
def waits() -> list[float]:
    """The waits between attempts, in seconds, which the tests do not wait for."""
    return []


@pytest.fixture
def judge_of(tmp_path: Path, waits: list[float]) -> Callable[..., HttpJudge]:
    def make(server: JudgeServer | str, **settings: Any) -> HttpJudge:
        url = server if isinstance(server, str) else server.base_url
        defaults = {"api_key": KEY, "sleep": waits.append, "concurrency": 1}
        return HttpJudge(url, "stand-in", tmp_path / "replies.jsonl", **(defaults | settings))

    return make


JudgeOf = Callable[..., HttpJudge]


def counted(judge: HttpJudge) -> dict[str, int]:
    return {what: n for what, n in judge.counts.items() if n}


# -- good answers -----------------------------------------------------------------------------------------------------


def test_the_request_is_the_one_of_the_openai_interface(judge_of: JudgeOf) -> None:
    text = "hé 🙂 \ud83d"  # half a pair too, which JSON may hold and UTF-8 may not
    with JudgeServer(seven) as server:
        assert judge_of(server.base_url + "//", max_tokens=99).replies([ask(text)], parse_grade) == [SEVEN]
    assert server.requests == [{"model": "stand-in", "messages": ask(text), "temperature": 0, "max_tokens": 99}]
    assert server.keys == [f"Bearer {KEY}"]


def test_many_at_once_come_back_in_order(judge_of: JudgeOf) -> None:
    def slower_for_the_first(text: str) -> None:
        time.sleep(0.3 if int(text) < 4 else 0.02)

    with JudgeServer(lambda text: text + " [[5]]", before=slower_for_the_first) as server:
        judge, done = judge_of(server, concurrency=4), list[int]()
        verdicts = judge.replies([ask(str(i)) for i in range(24)], parse_grade, done.append)
    assert [verdict.reply for verdict in verdicts] == [f"{i} [[5]]" for i in range(24)]
    assert done == list(range(25))
    assert 2 <= server.most_at_once <= 4


def test_equal_conversations_are_asked_once(judge_of: JudgeOf) -> None:
    with JudgeServer(seven) as server:
        assert judge_of(server, concurrency=4).replies([ask("a"), ask("b"), ask("a")], parse_grade) == [SEVEN] * 3
    assert sorted(server.texts) == ["a", "b"]


# -- faults that pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (Scripted(status=429, headers={"Retry-After": "7"}), "rate limited"),
        (Scripted("Rating: [[1]]", delay_s=1.0), "time-outs"),
        (Scripted(status=408), "time-outs"),
        (Scripted("Rating: [[1]]", cut_after=20), "dropped connections"),
        (Scripted("Rating: [[1]]", cut_after=0), "dropped connections"),
        (Scripted(status=500, body=b"<html>oh no"), "server errors"),
        (Scripted(status=503), "server errors"),
        (Scripted(body=b'{"choices": [{"message": {"content": "Rating: [[1]'), "malformed responses"),
        (Scripted(body=b""), "malformed responses"),
        (Scripted(body=b"\xff\xfe"), "malformed responses"),
        (Scripted(body=b"[1]"), "malformed responses"),
        (Scripted(body=b'{"choices": []}'), "malformed responses"),
        (Scripted(body=b'{"error": {"message": "busy"}}'), "malformed responses"),
        (Scripted(body=b'{"choices": [{"message": {"content": null}}]}'), "malformed responses"),
        (Scripted(body=b"not gzip", headers={"Content-Encoding": "gzip"}), "malformed responses"),
        (Scripted("A fine answer."), "unparseable verdicts"),
    ],
)
def test_a_fault_that_may_pass_is_tried_again_and_counted(
    fault: Scripted, what: str, judge_of: JudgeOf, waits: list[float]
) -> None:
    with JudgeServer(script=[GOOD, fault, fault, GOOD]) as server:
        judge = judge_of(server, timeout_s=0.4 if fault.delay_s else 60)
        assert judge.replies([ask("a"), ask("b")], parse_grade) == [SEVEN, SEVEN]
    assert server.texts == ["a", "b", "b", "b"]
    assert counted(judge) == {"requests": 4, "retries": 2, what: 2}
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("fault", "problem", "reply"),
    [
        (Scripted("Hm."), "unparseable", "Hm."),
        (Scripted(status=429), "no answer: rate limited", None),
        (Scripted(status=502), "no answer: server error 502", None),
        (Scripted(body=b"{}"), "no answer: malformed response", None),
        (Scripted("x", cut_after=9), "no answer: dropped connection", None),
        (Scripted("x", delay_s=1.0), "no answer: time-out", None),
    ],
)
def test_what_never_passes_is_a_verdict_without_a_score(
    fault: Scripted, problem: str, reply: str | None, judge_of: JudgeOf, tmp_path: Path
) -> None:
    with JudgeServer(seven, script=[fault] * 3) as server:
        judge = judge_of(server, attempts=3, timeout_s=0.4 if fault.delay_s else 60)
        assert judge.replies([ask("a"), ask("b")], parse_grade) == [Verdict(None, reply, problem), SEVEN]
        again = judge_of(server)  # what had no score is asked for again by the next run
        assert again.replies([ask("a"), ask("b")], parse_grade) == [SEVEN, SEVEN]
    assert server.texts == ["a", "a", "a", "b", "a"]


def test_a_reply_without_a_verdict_is_not_lost_behind_later_faults(judge_of: JudgeOf) -> None:
    with JudgeServer(script=[Scripted("Hm."), Scripted(status=500)]) as server:
        verdicts = judge_of(server, attempts=2).replies([ask("a")], parse_grade)
    assert verdicts == [Verdict(None, "Hm.", "unparseable")]


def test_waits_double_with_a_little_chance(judge_of: JudgeOf, waits: list[float]) -> None:
    with JudgeServer(script=[Scripted(status=500)] * 8) as server:
        judge_of(server, attempts=8).replies([ask("a")], parse_grade)
    for wait, least in zip(waits, [1, 2, 4, 8, 16, 32, 60], strict=True):
        assert least <= wait <= 1.25 * least


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        ("86400", 60, 60),
        ("9" * 400, 60, 60),
        (format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True), 60, 60),
        (format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True), 0, 0),
        ("soon", 1, 1),  # says nothing: the wait is our own
        ("-5", 1, 1),
        ("", 1, 1),
    ],
    ids=["seven", "none", "a day", "for ever", "tomorrow", "yesterday", "a word", "negative", "empty"],
)
def test_retry_after_is_honoured_up_to_a_minute(
    header: str, least: float, most: float, judge_of: JudgeOf, waits: list[float]
) -> None:
    with JudgeServer(script=[Scripted(status=429, headers={"Retry-After": header}), GOOD]) as server:
        assert judge_of(server).replies([ask("a")], parse_grade) == [SEVEN]
    (wait,) = waits
    assert least <= wait <= 1.25 * most


def test_retry_after_may_be_a_date(judge_of: JudgeOf, waits: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    with JudgeServer(script=[Scripted(status=429, headers={"Retry-After": date}), GOOD]) as server:
        judge_of(server).replies([ask("a")], parse_grade)
    assert 20 < waits[0] <= 37.5


# -- faults that end a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "todo"),
    [
        (401, "JUDGE_API_KEY"),
        (403, "OPENAI_API_KEY"),
        (404, "--judge_model"),
        (400, "not take"),
        (307, "--judge_base_url"),
    ],
)
def test_a_refusal_ends_the_run_and_says_what_to_do(status: int, todo: str, judge_of: JudgeOf) -> None:
    refusal = Scripted(status=status, body=b'{"error": {"message": "because   of the\\nmoon"}}')
    with (
        JudgeServer(seven, script=[GOOD, refusal]) as server,
        pytest.raises(UserError, match=rf"answers {status}: .*{todo}.*because of the moon") as caught,
    ):
        judge_of(server).replies([ask("a"), ask("b")], parse_grade)
    assert server.base_url in str(caught.value)
    with JudgeServer(seven) as server:
        judge_of(server).replies([ask("a"), ask("b")], parse_grade)
    assert server.texts == ["b"]  # the reply before the refusal was kept


def test_a_refusal_stops_what_is_not_begun_and_what_waits(judge_of: JudgeOf) -> None:
    script = [Scripted(status=429, headers={"Retry-After": "60"}), Scripted(status=401, delay_s=0.2)]
    with JudgeServer(seven, script=script, before=lambda text: time.sleep(0.1)) as server:
        begun = time.monotonic()
        with pytest.raises(UserError, match="401"):
            judge_of(server, concurrency=2, sleep=None).replies([ask(str(i)) for i in range(100)], parse_grade)
    assert time.monotonic() - begun < 10
    assert len(server.requests) < 100


def test_a_judge_that_is_not_there_is_named_and_replies_are_kept(judge_of: JudgeOf, waits: list[float]) -> None:
    with JudgeServer(seven) as server:
        judge_of(server).replies([ask("a")], parse_grade)
    judge = judge_of(server)
    with pytest.raises(UserError, match=rf"{server.base_url}.*--judge_base_url"):
        judge.replies([ask("a"), ask("b")], parse_grade)
    assert counted(judge) == {"from file": 1, "requests": 5, "retries": 4, "refused connections": 5}
    with JudgeServer(seven) as server:
        assert judge_of(server).replies([ask("a"), ask("b")], parse_grade) == [SEVEN, SEVEN]
    assert server.texts == ["b"]


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "ftp://host/v1", "file:///etc/passwd", "http://", "http://[::1", "https:///v1"]
)
def test_only_http_addresses_are_taken(url: str, judge_of: JudgeOf) -> None:
    with pytest.raises(UserError, match="judge_base_url: .*http"):
        judge_of(url)


@pytest.mark.parametrize("url", [f"http://me:{KEY}@host/v1", f"http://host/v1?key={KEY}", f"http://host/v1#{KEY}"])
def test_an_address_with_a_secret_in_it_is_refused_and_not_shown(url: str, judge_of: JudgeOf) -> None:
    with pytest.raises(UserError, match="host and path") as caught:
        judge_of(url)
    assert KEY not in str(caught.value)


# -- the reply file ---------------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from lora_rlhf.evaluation.judge import HttpJudge
from lora_rlhf.evaluation.judge_prompts import parse_grade
judge = HttpJudge(sys.argv[1], "stand-in", Path(sys.argv[2]), sys.argv[3], concurrency=3)
judge.replies([[{"role": "user", "content": f"question {i}"}] for i in range(20)], parse_grade)
"""


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_a_killed_run_asks_next_time_only_for_what_is_missing(judge_of: JudgeOf, tmp_path: Path) -> None:
    answered, gate, file = threading.Semaphore(7), threading.Event(), tmp_path / "replies.jsonl"

    def stall_after_seven(text: str) -> None:
        if not gate.is_set() and not answered.acquire(blocking=False):
            gate.wait(60)

    questions = [f"question {i}" for i in range(20)]
    with JudgeServer(lambda text: f"{text}: [[{1 + int(text[9:]) % 10}]]", before=stall_after_seven) as server:
        child = subprocess.Popen([sys.executable, "-c", CHILD, server.base_url, str(file), KEY])
        until = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < until and lines(file) < 7:
            time.sleep(0.02)
        assert child.poll() is None
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        gate.set()
        kept = [json.loads(line)["reply"].partition(":")[0] for line in file.read_text().splitlines()]
        before = len(server.requests)
        judge = judge_of(server, concurrency=3)
        verdicts = judge.replies([ask(question) for question in questions], parse_grade)
    assert len(kept) == 7
    assert sorted(server.texts[before:]) == sorted(set(questions) - set(kept))
    assert counted(judge) == {"from file": 7, "requests": 13}
    assert [verdict.parsed for verdict in verdicts] == [1.0 + i % 10 for i in range(20)]


def test_a_torn_line_costs_one_question_and_no_other(judge_of: JudgeOf, tmp_path: Path) -> None:
    file, questions = tmp_path / "replies.jsonl", [ask(text) for text in ("a", "b", "c", "d")]
    with JudgeServer(lambda text: f"{text} é🙂\u2028\ud83d [[7]]") as server:
        first = judge_of(server).replies(questions[:3], parse_grade)
        file.write_bytes(file.read_bytes()[:-9])
        for asked in (["c", "d"], []):  # the torn line stands in the middle of the file the second time
            judge, before = judge_of(server), len(server.requests)
            verdicts = judge.replies(questions, parse_grade)
            assert server.texts[before:] == asked
            assert verdicts[:3] == first and [verdict.parsed for verdict in verdicts] == [7.0] * 4
    assert lines(file) == 5


@pytest.mark.parametrize(
    "line", [b"\n", b"null\n", b"[1]\n", b'{"key": 1, "reply": "x"}\n', b'{"key": "k"}\n', b"\xff\n"]
)
def test_lines_that_are_no_replies_are_passed_over(line: bytes, judge_of: JudgeOf, tmp_path: Path) -> None:
    (tmp_path / "replies.jsonl").write_bytes(line)
    with JudgeServer(seven) as server:
        assert judge_of(server).replies([ask("a")], parse_grade) == [SEVEN]
        assert judge_of(server).replies([ask("a")], parse_grade) == [SEVEN]
    assert server.texts == ["a"]


def test_another_model_or_conversation_is_another_reply(judge_of: JudgeOf, tmp_path: Path) -> None:
    with JudgeServer(seven) as server:
        judge_of(server).replies([ask("a")], parse_grade)
        HttpJudge(server.base_url, "other", tmp_path / "replies.jsonl", None).replies([ask("a")], parse_grade)
        judge_of(server).replies([ask("a ")], parse_grade)
    assert server.texts == ["a", "a", "a "]


def test_a_reply_file_that_cannot_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read"):
        HttpJudge("http://127.0.0.1:9/v1", "stand-in", tmp_path, None)


# -- the key ----------------------------------------------------------------------------------------------------------


def with_locals(error: Exception) -> str:
    """The traceback with the variables of each frame, as some loggers print it; the test's own frame knows the key."""
    assert error.__traceback__
    frames = traceback.TracebackException(type(error), error, error.__traceback__.tb_next, capture_locals=True)
    return "".join(frames.format())


def test_the_key_is_in_no_file_log_error_or_repr(
    judge_of: JudgeOf, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    told = []
    echoes = [
        Scripted(status=401, body=json.dumps({"error": {"message": "x" * 290 + f" wrong key {KEY}"}}).encode()),
        Scripted(status=403, body=f"<p>{KEY}</p>".encode()),
        Scripted(status=400, body=json.dumps({"error": KEY}).encode()),
        Scripted(f"You are {KEY}: [[7]]", headers={"X-Request": "1"}),
        Scripted(f"I know {KEY}"),
        Scripted(body=KEY.encode()),
        Scripted(status=500, body=KEY.encode()),
    ]
    for echo in echoes:
        with JudgeServer(script=[echo]) as server:
            judge = judge_of(server, attempts=1)
            try:
                told.append(repr(judge.replies([ask(f"question {len(told)}")], parse_grade)))
            except UserError as error:
                told.append("".join(traceback.format_exception(error)) + with_locals(error))
            assert server.keys == [f"Bearer {KEY}"]
    with pytest.raises(UserError) as caught:
        judge_of(server).replies([ask("nobody is there")], parse_grade)
    told += ["".join(traceback.format_exception(caught.value)), repr(judge), str(judge), capfd.readouterr()]
    told += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert "POST" in caplog.text and "You are [key]: [[7]]" in told[-1]  # something was logged and written
    assert "very-secret" not in caplog.text + str(told)


def test_no_key_is_no_header_and_a_placeholder_leaves_replies_alone(judge_of: JudgeOf) -> None:
    with JudgeServer(seven) as server:
        assert judge_of(server, api_key=None).replies([ask("a")], parse_grade) == [SEVEN]
        assert judge_of(server, api_key="7").replies([ask("b")], parse_grade) == [SEVEN]
    assert server.keys == [None, "Bearer 7"]


@pytest.mark.parametrize("key", [KEY + "\n", "schlüssel-" + KEY, KEY + " x", "\x7f" + KEY])
def test_a_key_that_no_header_carries_is_refused_unseen(key: str, judge_of: JudgeOf) -> None:
    with pytest.raises(UserError, match="key") as caught:
        judge_of("http://127.0.0.1:9/v1", api_key=key)
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORA_RLHF_JUDGE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert api_key_from_environment() is None
    monkeypatch.setenv("OPENAI_API_KEY", " second\n")
    assert api_key_from_environment() == "second"
    monkeypatch.setenv("LORA_RLHF_JUDGE_API_KEY", "")
    assert api_key_from_environment() == "second"
    monkeypatch.setenv("LORA_RLHF_JUDGE_API_KEY", "first")
    assert api_key_from_environment() == "first"
