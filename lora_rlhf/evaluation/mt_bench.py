"""The mt_bench suite (paper, Figures 2 and 3): two-turn questions, graded turn by turn and against base.

Method: Zheng et al. 2023, arXiv 2306.05685; sampling temperatures by category are theirs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_rlhf.data.bad_rows import BadRow, check_characters
from lora_rlhf.data.chat import Message
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.answers import given_answers
from lora_rlhf.evaluation.context import Evaluation, EvaluationSettings, SuiteResult, SuiteSkipped
from lora_rlhf.evaluation.judge import Judge
from lora_rlhf.evaluation.judge_prompts import (
    grade_conversation,
    pairwise_conversation,
    parse_grade,
    parse_preference,
)
from lora_rlhf.evaluation.loaded_arms import TITLES, LoadedArm
from lora_rlhf.evaluation.statistics import wilson_interval
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.terminal import progress

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Of the categories that are not answered greedily."""
GREEDY = 1e-3
"""Temperature at which the likeliest token is drawn."""


Grades = dict[str, list[tuple[float, float]]]
"""Arm -> (first, second) turn's grade of each question."""


@dataclass(frozen=True)
class Question:
    """A question of two turns."""

    number: str
    category: str
    turns: tuple[str, str]
    references: tuple[str | None, str | None]


def read_questions(file: Path) -> list[Question]:
    """Return the questions of a JSONL file in MT-Bench's format: question_id, category, turns (two), and reference.

    Raises:
        UserError: the file cannot be read, or a line is no question; names file, line and field.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut texts at other breaks
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--mt_bench_questions: {file} cannot be read: {error}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--mt_bench_questions: {file}, line {number} is no JSON: {error}") from None
        turns = row.get("turns") if isinstance(row, dict) else None
        if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(t, str) and t.strip() for t in turns):
            raise UserError(f"--mt_bench_questions: {file}, line {number}: `turns` is a list of two texts")
        references = row.get("reference") or [None, None]
        if (
            not isinstance(references, list)
            or len(references) != 2
            or any(not isinstance(reference, str | None) for reference in references)
        ):
            raise UserError(f"--mt_bench_questions: {file}, line {number}: `reference` is a list of two texts")
        try:
            check_characters(row)
        except BadRow as problem:
            raise UserError(f"--mt_bench_questions: {file}, line {number}: {problem}") from None
        name = str(row.get("question_id", number))
        questions.append(Question(name, str(row.get("category", "other")), tuple(turns), tuple(references)))
    if not questions:
        raise UserError(f"--mt_bench_questions: {file} holds no question")
    return questions


def mt_bench_suite(evaluation: Evaluation) -> SuiteResult:
    """Return grades by turn and category, win rates against base with positions swapped, and a gallery.

    Raises:
        SuiteSkipped: no questions or no judge are given.
    """
    judge = evaluation.judge
    if evaluation.settings.mt_bench_questions is None:
        raise SuiteSkipped("it needs the questions: --mt_bench_questions FILE")
    if judge is None:
        raise SuiteSkipped("it needs a judge: --judge_model NAME, with --judge_base_url URL for one that is served")
    questions = asked_questions(evaluation.settings)
    answers = {name: two_turn_answers(evaluation, arm, questions) for name, arm in evaluation.arms.items()}
    result = SuiteResult(notes=[f"Judge: {judge.name}."])
    given = {name: _grades(judge, name, questions, texts) for name, texts in answers.items()}
    unread = ", ".join(f"{name} {sum(turn is None for pair in arm for turn in pair)}" for name, arm in given.items())
    read = {
        name: {i: (first, second) for i, (first, second) in enumerate(arm) if first is not None and second is not None}
        for name, arm in given.items()
    }
    whole = sorted(set.intersection(*(set(arm) for arm in read.values())))
    grades: Grades = {name: [arm[i] for i in whole] for name, arm in read.items()}
    result.notes.append(f"Grades that could not be had or read, out of {2 * len(questions)} per arm: {unread}.")
    if not whole:
        raise SuiteSkipped(f"{judge.name} gave no grade that can be read")
    for task, score in (
        ("score", lambda pair: fmean(pair)), ("first_turn", lambda pair: pair[0]), ("second_turn", lambda pair: pair[1])
    ):  # fmt: skip
        result.add(task, "grade, 1 to 10", {name: [score(pair) for pair in arm] for name, arm in grades.items()})
    graded = [questions[i] for i in whole]
    categories = {
        category: {
            name: fmean(fmean(pair) for q, pair in zip(graded, arm, strict=True) if q.category == category)
            for name, arm in grades.items()
        }
        for category in dict.fromkeys(q.category for q in graded)
    }
    against = {name: _against_base(judge, name, questions, answers) for name in answers if name != "base"}
    for name, found in against.items():
        result.notes.append(
            f"{TITLES[name]} against base: wins {found['wins']:g} of {found['n']} (a tie counts half), "
            f"{found['win_rate']:.0%} [{found['low']:.0%}, {found['high']:.0%}]; the two orders agree in "
            f"{found['agreement']:.0%}; {found['unread']} verdicts could not be had or read."
            if found["n"] else f"{TITLES[name]} against base: no verdict could be read."
        )  # fmt: skip
    result.details = {"categories": categories, "against_base": against, "gallery": []}
    if "plus" in grades:
        said = {name: [arm[i] for i in whole] for name, arm in answers.items()}
        result.details["gallery"] = gallery(graded, said, grades)
    return result


def asked_questions(settings: EvaluationSettings) -> list[Question]:
    """Return the questions of the file that is given, as many as the limit lets."""
    assert settings.mt_bench_questions is not None
    return spread(read_questions(settings.mt_bench_questions), settings.limit)


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return at most `limit` questions, evenly spaced, so that every category has some."""
    if limit is None or limit >= len(questions):
        return list(questions)
    return [questions[i * len(questions) // limit] for i in range(limit)]


def two_turn_answers(evaluation: Evaluation, arm: LoadedArm, questions: Sequence[Question]) -> list[list[str]]:
    """Return [questions][2] answers; the second turn reads the arm's own first answer."""
    texts: dict[int, list[str]] = {i: [] for i in range(len(questions))}
    with progress(f"mt_bench: answers of {arm.name}", 2 * len(questions)) as report:
        done = 0
        for temperature in sorted({TEMPERATURES.get(q.category, GREEDY) for q in questions}):
            members = [i for i, q in enumerate(questions) if TEMPERATURES.get(q.category, GREEDY) == temperature]
            sampling = replace(_sampling(evaluation), temperature=temperature)
            for turn in (0, 1):
                dialogues = [_dialogue(questions[i], texts[i], turn) for i in members]
                given = given_answers(
                    arm, dialogues, sampling, evaluation.settings.batch_size, evaluation.settings.seed, evaluation.cache
                )
                for i, text in zip(members, given.texts, strict=True):
                    texts[i].append(text)
                done += len(members)
                report(done)
    return list(texts.values())


def _sampling(evaluation: Evaluation) -> Sampling:
    return replace(evaluation.sampling, response_length=evaluation.settings.max_new_tokens)


def _dialogue(question: Question, answered: Sequence[str], turn: int) -> list[Message]:
    messages: list[Message] = []
    for i in range(turn):
        messages += [{"role": "user", "content": question.turns[i]}, {"role": "assistant", "content": answered[i]}]
    return [*messages, {"role": "user", "content": question.turns[turn]}]


def _grades(
    judge: Judge, name: str, questions: Sequence[Question], texts: Sequence[Sequence[str]]
) -> list[tuple[float | None, float | None]]:
    """Return (first, second) turn's grade of each question; none where there is no verdict."""
    dialogues = [
        grade_conversation(list(q.turns), list(answers), turn, q.references[turn - 1])
        for q, answers in zip(questions, texts, strict=True)
        for turn in (1, 2)
    ]
    with progress(f"mt_bench: grades of {name}", len(dialogues)) as report:
        verdicts = [verdict.parsed for verdict in judge.replies(dialogues, parse_grade, report)]
    return list(zip(verdicts[::2], verdicts[1::2], strict=True))


def _against_base(
    judge: Judge, name: str, questions: Sequence[Question], answers: dict[str, list[list[str]]]
) -> dict[str, Any]:
    """Return the wins against base; a win counts where both orders agree, else the question is a tie."""
    own, base = answers[name], answers["base"]
    orders = [(own, base), (base, own)]
    dialogues = [
        pairwise_conversation(list(q.turns), list(first[i]), list(second[i]))
        for first, second in orders for i, q in enumerate(questions)
    ]  # fmt: skip
    with progress(f"mt_bench: {name} against base", len(dialogues)) as report:
        found = [verdict.parsed for verdict in judge.replies(dialogues, parse_preference, report)]
    n = len(questions)
    straight = [{"A": 1.0, "B": 0.0, "tie": 0.5}[v] if v else None for v in found[:n]]
    swapped = [{"A": 0.0, "B": 1.0, "tie": 0.5}[v] if v else None for v in found[n:]]
    both = [(a, b) for a, b in zip(straight, swapped, strict=True) if a is not None and b is not None]
    if not both:
        return {"n": 0, "unread": 2 * n}
    wins = sum(a if a == b else 0.5 for a, b in both)
    low, high = wilson_interval(wins, len(both))
    return {
        "wins": wins, "n": len(both), "win_rate": wins / len(both), "low": low, "high": high,
        "agreement": fmean(float(a == b) for a, b in both), "unread": sum(v is None for v in found),
    }  # fmt: skip


def gallery(
    questions: Sequence[Question], answers: dict[str, list[list[str]]], grades: Grades, each: int = 2
) -> list[dict[str, Any]]:
    """Return side-by-side cases: where Plus gains most on base, where it loses most, and the median case."""
    gains = [fmean(plus) - fmean(base) for plus, base in zip(grades["plus"], grades["base"], strict=True)]
    order = sorted(range(len(questions)), key=gains.__getitem__)
    kinds: dict[int, str] = {}
    for kind, members in (
        ("largest win", [i for i in order[::-1][:each] if gains[i] > 0]),
        ("largest loss", [i for i in order[:each] if gains[i] < 0]),
        ("typical", order[len(order) // 2 :][:1]),
    ):
        for i in members:
            kinds.setdefault(i, kind)
    return [
        {
            "kind": kind, "category": questions[i].category, "question": list(questions[i].turns),
            "answers": {name: arm[i] for name, arm in answers.items()},
            "grades": {name: list(arm[i]) for name, arm in grades.items()},
        }
        for i, kind in kinds.items()
    ]  # fmt: skip
