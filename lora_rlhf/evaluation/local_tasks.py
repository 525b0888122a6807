"""lm-eval tasks made on the fly from a folder of JSONL files: multiple choice, blanks to fill, and sums to work out."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_rlhf.data.bad_rows import BadRow, check_characters
from lora_rlhf.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

TASK_METRIC: Mapping[str, str] = {
    "hellaswag": "acc_norm", "piqa": "acc_norm", "openbookqa": "acc_norm", "arc_challenge": "acc_norm",
    "gsm8k": "exact_match", "bbh": "exact_match",
}  # fmt: skip
"""The metric that stands for a task, by lm-eval's name for it; `acc` for every task that is not listed.

`acc_norm` divides the log-likelihood of a choice by its characters, so that short choices win nothing."""

WORKED_PROMPT = 'Work the answer out step by step. Write the final number alone after "####", as in "#### 10".\n\n'
WORKED_GENERATION = {"until": ["Question:"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 200}
"""Greedy. No stop at an empty line: chat models write one before they come to the number."""

BLANK = re.compile(r"(?<!\w)_(?!\w)")
NUMBER = re.compile(r"(?<!\w)-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def local_tasks(folder: Path) -> list[ConfigurableTask]:
    """Return a task per `.jsonl` file of `folder`, in the order of their names; a task is called as its file.

    A line is an object with `id`, `question` and `answer`. With `choices`, a list of strings, `answer` is the 0-based
    index of the right one; without, it is a worked solution that ends in `####` and a number. Where each question of a
    file has exactly one lone `_` with text after it, the choices are put into the blank, and the text after it is what
    is scored (partial evaluation: Trinh & Le 2018, arXiv 1806.02847; lm-eval's winogrande).

    An empty wrong choice is left out, since nothing of it can be scored; how many were is in the task's
    `config.metadata["empty_choices_left_out"]`.

    Raises:
        UserError: lm-eval is not installed, no such file, or a line that is not as above.
    """
    if not folder.is_dir():
        raise UserError(f"local_tasks: no folder {folder}")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"local_tasks: no .jsonl file in {folder}")
    docs = {file.stem: _file_docs(file) for file in files}
    with quiet_lm_eval():
        from lm_eval.api.task import ConfigurableTask

        return [ConfigurableTask(config=_task_config(name, rows)) for name, rows in docs.items()]


def final_number(text: str) -> str:
    """Return the number after the first `####`, or else the last number of `text`; empty where there is none.

    Without commas, `$`, trailing dots and trailing zeros of a fraction, so that equal numbers are equal texts.
    """
    _, marked, rest = text.partition("####")
    numbers = NUMBER.findall(rest if marked else text)
    if not numbers:
        return ""
    number = numbers[0 if marked else -1].replace(",", "").replace("$", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Hold back lm-eval's log and progress bars inside the block.

    Raises:
        UserError: lm-eval is not installed.
    """
    import datasets

    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the general tasks need lm-eval ({error}): pip install -c constraints.txt -e '.[eval]'"
        ) from None
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # its progress bars cannot be turned off, and it asks git, which complains, in a process of its own
        with contextlib.redirect_stderr(io.StringIO()), _no_standard_error():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _no_standard_error() -> Iterator[None]:
    """Send what this process and its children write to file descriptor 2 nowhere, inside the block."""
    sys.stderr.flush()
    held, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(held, 2)
        os.close(held)
        os.close(nowhere)


def _task_config(name: str, docs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return lm-eval's config of a task."""
    import datasets

    table = datasets.Dataset.from_list(list(docs))
    common = {"task": name, "custom_dataset": lambda **_: {"test": table}, "test_split": "test", "num_fewshot": 0}
    common["metadata"] = {"empty_choices_left_out": sum(doc.get("left_out", 0) for doc in docs)}
    if "choices" not in docs[0]:
        return common | {
            "output_type": "generate_until",
            "doc_to_text": _worked_prompt,
            "doc_to_target": _worked_target,
            "generation_kwargs": dict(WORKED_GENERATION),
            "process_results": _worked_outcome,
            "metric_list": [_mean("exact_match")],
        }
    if all(_has_blank(doc["question"]) for doc in docs):
        return common | {
            "output_type": "multiple_choice",
            "doc_to_text": _answer_index,
            "doc_to_choice": _filled_beginnings,
            "doc_to_target": _ending,
            "metric_list": [_mean("acc")],
        }
    return common | {
        "output_type": "multiple_choice",
        "doc_to_text": _question_prompt,
        "doc_to_choice": _choices,
        "doc_to_target": _answer_index,
        "metric_list": [_mean("acc"), _mean("acc_norm")],
    }


# Functions, not templates: lm-eval would read a `{{` in a question as its own.


def _question_prompt(doc: Mapping[str, Any]) -> str:
    return f"Question: {doc['question'].strip()}\nAnswer:"


def _choices(doc: Mapping[str, Any]) -> list[str]:
    return doc["choices"]


def _answer_index(doc: Mapping[str, Any]) -> int:
    return doc["answer"]


def _worked_prompt(doc: Mapping[str, Any]) -> str:
    return WORKED_PROMPT + _question_prompt(doc)


def _worked_target(doc: Mapping[str, Any]) -> str:
    return final_number(doc["answer"])


def _worked_outcome(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(final_number(results[0]) == final_number(doc["answer"]))}


def _filled_beginnings(doc: Mapping[str, Any]) -> list[str]:
    before, _ = BLANK.split(doc["question"])
    return [before + choice for choice in doc["choices"]]


def _ending(doc: Mapping[str, Any]) -> str:
    _, after = BLANK.split(doc["question"])
    return after.strip()


def _has_blank(question: str) -> bool:
    parts = BLANK.split(question)
    return len(parts) == 2 and bool(parts[1].strip())


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


# -- reading ----------------------------------------------------------------------------------------------------------


def _file_docs(file: Path) -> list[dict[str, Any]]:
    """Return the checked lines of a file; blank lines do not count."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"local_tasks: {file} cannot be read: {error}") from None
    docs = [_doc(line, f"local_tasks: {file}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not docs:
        raise UserError(f"local_tasks: {file} is empty")
    with_choices = ["choices" in doc for doc in docs]
    if len(set(with_choices)) > 1:
        first, other = (with_choices.index(kind) + 1 for kind in (True, False))
        raise UserError(
            f"local_tasks: {file} mixes two kinds: question {first} has `choices`, question {other} has none; "
            "put them into two files"
        )
    return docs


def _doc(line: str, where: str) -> dict[str, Any]:
    """Return what a task needs of one line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object but {type(row).__name__}")
    try:
        check_characters(row)
    except BadRow as problem:
        raise UserError(f"{where}: {problem}") from None
    for field in ("id", "question", "answer"):
        if field not in row:
            raise UserError(f"{where}: field `{field}` is missing")
    question, answer, choices = row["question"], row["answer"], row.get("choices")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: field `question` is not a text")
    doc = {"id": str(row["id"]), "question": question, "answer": answer}
    if choices is None:
        if not isinstance(answer, str) or "####" not in answer or not final_number(answer):
            raise UserError(
                f"{where}: field `answer` is not a worked answer that ends in `#### ` and a number "
                "(or field `choices` is missing)"
            )
        return doc
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{where}: field `choices` is not a list of texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UserError(f"{where}: field `answer` is {answer!r}, not an index from 0 to {len(choices) - 1}")
    if not choices[answer].strip():
        raise UserError(f"{where}: field `answer` points to an empty choice")
    filled = [choice for choice in choices if choice.strip()]
    if len(filled) < 2:
        raise UserError(f"{where}: field `choices` has {len(filled)} that is not empty, and needs two at least")
    before = sum(bool(choice.strip()) for choice in choices[:answer])
    return doc | {"choices": filled, "answer": before, "left_out": len(choices) - len(filled)}
