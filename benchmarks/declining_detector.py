"""Train and measure the detector of declining answers (lora_rlhf/evaluation/declining.py).

    python benchmarks/declining_detector.py FOLDER/xstest_labelled_answers.jsonl            # measure
    python benchmarks/declining_detector.py FOLDER/xstest_labelled_answers.jsonl --write    # and write the weights

Three sources of answers whose label is known: those of Mistral-7B-Instruct-v0.1 to XSTest that people labelled (columns
`prompt`, `completion`, `label`: 1_full_compliance, 2_full_refusal, 3_partial_refusal); those that were written for the
package's safety prompts and held-out pairs; and those of the embedded base and of a Plus of it, labelled by reading
(labelled_answers.jsonl), which decline nothing and are clumsy enough to mislead a detector. None of them is in a pair
that a run's own reward model is trained on. Measured in five folds over prompts: no answer is judged by a detector that
has seen an answer to its prompt. What small models answered to the package's safety prompts is never trained on, so
that a base is judged there as any other arm. Needs scikit-learn, which the `eval` extra brings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from lora_rlhf.data.rows import dataset_rows
from lora_rlhf.data.safety_prompts import PACKAGE_FILE
from lora_rlhf.evaluation.declining import FILE, GRADES, ngram_features, ngrams_of
from lora_rlhf.terminal import console, note

FOLDS = 5
FEWEST_PROMPTS = 4
"""An n-gram counts that is in answers to so many prompts: the others tell of a prompt rather than of declining."""
STRENGTH = 5.0
"""Inverse weight of the ridge on the classifier's weights."""
LABELS = {"1_full_compliance": "none", "2_full_refusal": "full", "3_partial_refusal": "partial"}
LABELLED, WRITTEN = "answers of Mistral-7B-Instruct, labelled by people", "answers written for the package"
SMALL = "answers of the embedded base and a Plus of it, labelled by reading"
SOURCES = (LABELLED, WRITTEN, SMALL)
SMALL_FILE = Path(__file__).parent / "labelled_answers.jsonl"


@dataclass(frozen=True)
class Labelled:
    """An answer with its label; `group` names its prompt, and where the package wrote it, its look-alike too."""

    source: str
    group: str
    answer: str
    grade: str
    only_tested: bool = False


def labelled_answers(file: Path) -> Iterator[Labelled]:
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield Labelled(LABELLED, row["prompt"], row["completion"], LABELS[row["label"]])


def written_answers() -> Iterator[Labelled]:
    for line in PACKAGE_FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["label"] == "unsafe":  # its look-alike has the same texts
            for name, grade in (("declines", "full"), ("answers", "none")):
                yield from (Labelled(WRITTEN, row["topic"], text, grade) for text in row[name])
    seen = set()
    for row in dataset_rows("embedded", "test"):
        declined = {"harmless": "chosen", "look-alike": "rejected"}.get(row["kind"])
        for side in ("chosen", "rejected"):
            text, grade = row[side][0]["content"], "full" if side == declined else "none"
            told = grade == "full" or row["flaw"] in ("complies", "refuses")  # a lecture neither declines nor helps
            if declined and told and text not in seen:
                seen.add(text)
                yield Labelled(WRITTEN, row["topic"], text, grade)


def answers_of_small_models() -> Iterator[Labelled]:
    topics = {json.loads(line)["topic"] for line in PACKAGE_FILE.read_text(encoding="utf-8").splitlines()}
    for line in SMALL_FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield Labelled(SMALL, row["topic"], row["answer"], row["grade"], only_tested=row["topic"] in topics)


def all_answers(labelled: Path) -> list[Labelled]:
    return [*labelled_answers(labelled), *written_answers(), *answers_of_small_models()]


def fold(group: str) -> int:
    return int(hashlib.sha256(group.encode()).hexdigest(), 16) % FOLDS


def trained(rows: Sequence[Labelled]) -> dict[str, Any]:
    """Return the weights: idf and one weight per grade of each n-gram, and a bias per grade."""
    rows = [row for row in rows if not row.only_tested]
    prompts = defaultdict(set)
    for row in rows:
        for ngram in ngrams_of(row.answer):
            prompts[ngram].add(row.group)
    total = len({row.group for row in rows})
    idf = {
        n: [math.log((1 + total) / (1 + len(groups))) + 1]
        for n, groups in sorted(prompts.items())
        if len(groups) >= FEWEST_PROMPTS
    }
    fit = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=5000)
    fit.fit(_matrix(rows, idf), [GRADES.index(row.grade) for row in rows])
    weights = zip(idf, idf.values(), fit.coef_.T, strict=True)
    ngrams = {n: [round(own[0], 3), *(round(float(w), 3) for w in columns)] for n, own, columns in weights}
    return {"bias": [round(float(b), 3) for b in fit.intercept_], "ngrams": ngrams}


def _matrix(rows: Sequence[Labelled], ngrams: dict[str, list[float]]) -> csr_matrix:
    place = {ngram: i for i, ngram in enumerate(ngrams)}
    features = [ngram_features(row.answer, ngrams) for row in rows]
    ends = np.cumsum([0, *map(len, features)])
    columns = [place[ngram] for own in features for ngram in own]
    return csr_matrix(([v for own in features for v in own.values()], columns, ends), shape=(len(rows), len(place)))


def predicted(model: dict[str, Any], rows: Sequence[Labelled]) -> list[str]:
    """Return the grade of each answer by the rule of `declining_grade`."""
    weights = np.array([own[1:] for own in model["ngrams"].values()])
    logits = _matrix(rows, model["ngrams"]) @ weights + np.array(model["bias"])
    shares = np.exp(logits - logits.max(1, keepdims=True))
    declining = shares[:, 1:].sum(1) > shares[:, 0]
    return [GRADES[1 + row[1:].argmax()] if yes else "none" for yes, row in zip(declining, shares, strict=True)]


def measured(rows: Sequence[Labelled]) -> dict[str, Any]:
    """Return each source's confusion matrix and balanced accuracy of declining or not, over held-out folds."""
    found: dict[str, list[list[int]]] = {source: np.zeros((3, 3), int).tolist() for source in SOURCES}
    for held_out in range(FOLDS):
        model = trained([row for row in rows if fold(row.group) != held_out])
        tested = [row for row in rows if fold(row.group) == held_out]
        for row, grade in zip(tested, predicted(model, tested), strict=True):
            found[row.source][GRADES.index(row.grade)][GRADES.index(grade)] += 1
    return {source: {"confusion": matrix, **_accuracy(np.array(matrix))} for source, matrix in found.items()}


def _accuracy(matrix: Any) -> dict[str, float | None]:
    """Return what is found of the declining answers and passed of the others; None where a source has none."""
    declining, complying = matrix[1:], matrix[0]
    passed = complying[0] / complying.sum()
    found = declining[:, 1:].sum() / declining.sum() if declining.any() else None
    return {
        "balanced_accuracy": None if found is None else round(float(found + passed) / 2, 4),
        "declining_found": None if found is None else round(float(found), 4),
        "complying_passed": round(float(passed), 4),
        "n": int(matrix.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labelled", type=Path, help="JSONL of labelled answers: prompt, completion, label")
    parser.add_argument("--write", action="store_true", help=f"write the weights to {FILE.name}")
    given = parser.parse_args()
    rows = all_answers(given.labelled)
    found = measured(rows)
    for source, own in found.items():
        said = f"passes {own['complying_passed']:.1%} of what complies"
        if own["declining_found"] is not None:
            said += f", finds {own['declining_found']:.1%} of what declines ({own['balanced_accuracy']:.3f} balanced)"
        table = Table(title=f"{source}, n = {own['n']}: {said}", title_justify="left")
        for column in ("labelled", *GRADES):
            table.add_column(column, justify="right")
        for grade, line in zip(GRADES, own["confusion"], strict=True):
            table.add_row(grade, *map(str, line))
        console.print(table)
    if given.write:
        model = {"measured": found, **trained(rows)}
        FILE.write_text(json.dumps(model, indent=0, sort_keys=False, ensure_ascii=True) + "\n", encoding="utf-8")
        note(f"{FILE}: {len(model['ngrams'])} n-grams")


if __name__ == "__main__":
    main()
