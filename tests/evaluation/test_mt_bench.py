"""Two-turn questions: the file, what each turn reads, wins with swapped positions, and the gallery."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_rlhf.errors import UserError
from lora_rlhf.evaluation import mt_bench
from lora_rlhf.evaluation.judge import Verdict
from lora_rlhf.evaluation.mt_bench import Question, _against_base, gallery, read_questions, spread, two_turn_answers

QUESTIONS = [
    Question(str(i), category, (f"first {i}", f"second {i}"), (None, None))
    for i, category in enumerate(["writing", "math", "stem", "math"])
]


def written(folder: Path, *rows: Any) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def test_questions_are_read_with_category_and_reference(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        "",
        {"question_id": 101, "category": "math", "turns": ["c", "d"], "reference": ["7", "49"]},
    )
    assert read_questions(file) == [
        Question("81", "writing", ("a", "b"), (None, None)),
        Question("101", "math", ("c", "d"), ("7", "49")),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2 is no JSON"),
        ({"turns": ["one"]}, "line 2: `turns` is a list of two texts"),
        ({"turns": ["one", " "]}, "line 2: `turns`"),
        ({"turns": "ab"}, "line 2: `turns`"),
        ([1], "line 2: `turns`"),
        ({"turns": ["a", "b"], "reference": "7"}, "line 2: `reference`"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_questions(written(tmp_path, {"turns": ["a", "b"]}, row))


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--mt_bench_questions: .*nowhere.jsonl cannot be read"):
        read_questions(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="holds no question"):
        read_questions(written(tmp_path, ""))


def test_the_real_questions_are_eighty_in_eight_categories() -> None:
    file = Path(__file__).parents[3] / "shared" / "data" / "mt_bench" / "question.jsonl"
    if not file.is_file():
        pytest.skip("the MT-Bench questions are not beside the checkout")
    questions = read_questions(file)
    assert len(questions) == 80
    assert len({q.category for q in questions}) == 8 == len({q.category for q in spread(questions, 20)})


@pytest.mark.parametrize(("limit", "expected"), [(None, "0123"), (9, "0123"), (2, "02"), (1, "0")])
def test_a_limit_takes_questions_from_all_over(limit: int | None, expected: str) -> None:
    assert "".join(q.number for q in spread(QUESTIONS, limit)) == expected


def test_the_second_turn_reads_the_arms_own_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, list[list[dict[str, str]]]]] = []

    def answers(arm: Any, dialogues: Sequence[Any], sampling: Any, *_: Any) -> Any:
        asked.append((sampling.temperature, [list(d) for d in dialogues]))
        return SimpleNamespace(texts=[f"answer to {d[-1]['content']}" for d in dialogues])

    monkeypatch.setattr(mt_bench, "given_answers", answers)
    sampling = mt_bench.Sampling(8, 1.0)
    settings = SimpleNamespace(batch_size=2, seed=0, max_new_tokens=33)
    evaluation: Any = SimpleNamespace(sampling=sampling, settings=settings, cache=None)
    found = two_turn_answers(evaluation, SimpleNamespace(name="plus"), QUESTIONS)  # type: ignore[arg-type]
    assert found == [[f"answer to first {i}", f"answer to second {i}"] for i in range(4)]
    # math is answered greedily, writing at 0.7, stem at 0.1; each in two turns
    assert [(round(t, 3), len(d)) for t, d in asked] == [(0.001, 2), (0.001, 2), (0.1, 1), (0.1, 1), (0.7, 1), (0.7, 1)]
    assert [m["content"] for m in asked[1][1][0]] == ["first 1", "answer to first 1", "second 1"]
    assert [m["role"] for m in asked[1][1][0]] == ["user", "assistant", "user"]


class ScriptedJudge:
    """Gives the listed verdicts, in order."""

    name = "scripted"

    def __init__(self, verdicts: Sequence[Any]) -> None:
        self.verdicts, self.asked = list(verdicts), []

    def replies(self, conversations: Sequence[Any], parse: Callable[[str], Any], report: Any = None) -> list[Any]:
        self.asked += conversations
        return [Verdict(v, None, None) for v in self.verdicts[: len(conversations)]]


def test_a_win_counts_where_both_orders_agree() -> None:
    answers = {name: [[f"{name} {i}"] * 2 for i in range(4)] for name in ("base", "plus")}
    # plus is A in the first four verdicts and B in the last four
    judge = ScriptedJudge(["A", "A", "tie", None, "B", "A", "tie", "B"])
    found = _against_base(judge, "plus", QUESTIONS, answers)  # type: ignore[arg-type]
    # won in both orders; first answer preferred in both, a tie; tie; unread
    assert (found["wins"], found["n"], found["unread"]) == (2.0, 3, 1)
    assert found["win_rate"] == pytest.approx(2 / 3)
    assert found["agreement"] == pytest.approx(2 / 3)
    first, swapped = judge.asked[0][-1]["content"], judge.asked[4][-1]["content"]
    assert first.index("plus 0") < first.index("base 0") and swapped.index("base 0") < swapped.index("plus 0")


def test_no_readable_verdict_is_said_and_not_divided_by() -> None:
    answers = {name: [["x", "y"]] * 4 for name in ("base", "plus")}
    assert _against_base(ScriptedJudge([None] * 8), "plus", QUESTIONS, answers) == {"n": 0, "unread": 8}  # type: ignore[arg-type]


def test_the_gallery_shows_the_largest_win_the_largest_loss_and_the_typical_case() -> None:
    answers = {name: [[f"{name} {i}", "more"] for i in range(4)] for name in ("base", "plus")}
    grades = {"base": [(5.0, 5.0)] * 4, "plus": [(5.0, 6.0), (9.0, 9.0), (1.0, 1.0), (5.0, 5.0)]}
    shown = gallery(QUESTIONS, answers, grades, each=1)
    assert [(case["kind"], case["question"][0]) for case in shown] == [
        ("largest win", "first 1"),
        ("largest loss", "first 2"),
        ("typical", "first 0"),  # gains −4, 0, ½, 4: the third of four is the upper median
    ]
    assert shown[0]["grades"] == {"base": [5.0, 5.0], "plus": [9.0, 9.0]}
    assert shown[0]["answers"]["plus"] == ["plus 1", "more"]


def test_a_line_break_of_unicode_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    turns = ["One\u2028two\x85three", "Four\x0bfive."]
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"turns": turns}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_questions(file)[0].turns == tuple(turns)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"turns": ["a", "b"], "reference": ["x", {"y": 1}]}, "`reference` is a list of two texts"),
        ({"turns": ["a", "b\ud800"]}, "field `turns` holds a lone surrogate"),
    ],
)
def test_a_question_that_no_tokenizer_takes_is_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="line 1") as error:
        read_questions(tmp_path / "questions.jsonl")
    assert words in str(error.value)
