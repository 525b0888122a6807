"""The safety suite: does an arm decline what is harmful, and answer what only looks so? Measured without any reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora_rlhf.data.safety_prompts import LABELS, SafetyPrompt
from lora_rlhf.evaluation.context import PACKAGE_SET, Evaluation, SuiteResult
from lora_rlhf.evaluation.declining import GRADES, declining_grade, measured_detector
from lora_rlhf.evaluation.judge_prompts import compliance_conversation, parse_compliance
from lora_rlhf.evaluation.loaded_arms import TITLES, LoadedArm
from lora_rlhf.evaluation.margins import role_reader, safe_margins
from lora_rlhf.terminal import progress

SHARE = "share of prompts"


def safety_suite(evaluation: Evaluation) -> SuiteResult:
    """Return decline rates, margins and, with a judge, harmful compliance, on look-alike pairs of prompts.

    - `decline_unsafe`, `decline_safe`: the share of prompts whose answer declines, wholly or in part, by a detector
      that is measured against people's labels. More is better on unsafe prompts, less on safe ones.
    - `margin_unsafe`, `margin_safe`, `safe_margin` (both): the share of prompts on which the arm gives the right kind
      of written answer a higher log-probability per token than the wrong kind; where the prompts have such answers.
    - `harmful_compliance`: how far answers to unsafe prompts help with the harm, 0 to 1, as a judge sees it.
    """
    result = SuiteResult(details={"grades": {}, "detector": measured_detector()})
    for name, prompts in evaluation.safety_sets().items():
        suffix = "" if name == PACKAGE_SET else f", {name}"
        answers = {
            arm.name: evaluation.answers_to(arm, [p.messages for p in prompts]).texts
            for arm in evaluation.arms.values()
        }
        _add_decline_rates(result, suffix, prompts, answers)
        if all(prompt.declines for prompt in prompts):
            _add_margins(result, suffix, prompts, evaluation)
        if evaluation.judge is not None:
            _add_compliance(result, suffix, prompts, answers, evaluation)
    result.notes += _detector_notes()
    if evaluation.judge is None:
        result.notes.append("No judge was given, so that nothing says how much harm a compliant answer would do.")
    return result


def _add_decline_rates(
    result: SuiteResult, suffix: str, prompts: Sequence[SafetyPrompt], answers: dict[str, list[str]]
) -> None:
    grades = {arm: [declining_grade(text) for text in texts] for arm, texts in answers.items()}
    for label in LABELS:
        rows = [i for i, prompt in enumerate(prompts) if prompt.label == label]
        declined = {arm: [float(of_arm[i] != "none") for i in rows] for arm, of_arm in grades.items()}
        result.add(f"decline_{label}{suffix}", SHARE, declined)
        counts = {arm: Counter(of_arm[i] for i in rows) for arm, of_arm in grades.items()}
        result.details["grades"][f"{label}{suffix}"] = {
            arm: {grade: own[grade] for grade in GRADES} for arm, own in counts.items()
        }


def _add_margins(result: SuiteResult, suffix: str, prompts: Sequence[SafetyPrompt], evaluation: Evaluation) -> None:
    right = {}
    for arm in evaluation.arms.values():
        right[arm.name] = [float(margin > 0) for margin in _margins(evaluation, arm, prompts)]
    for label in LABELS:
        rows = [i for i, prompt in enumerate(prompts) if prompt.label == label]
        result.add(f"margin_{label}{suffix}", SHARE, {arm: [own[i] for i in rows] for arm, own in right.items()})
    result.add(f"safe_margin{suffix}", f"{SHARE}, both kinds", right)


def _margins(evaluation: Evaluation, arm: LoadedArm, prompts: Sequence[SafetyPrompt]) -> list[float]:
    rows = [[prompt.messages, list(map(list, prompt.written))] for prompt in prompts]
    reader = role_reader(arm.base, arm.role, arm.tokenizer.pad_token_id, evaluation.settings.batch_size)
    return evaluation.cache.result(
        {"what": "margin", "arm": arm.fingerprint, "rows": rows}, lambda: safe_margins(prompts, arm.tokenizer, reader)
    )


def _add_compliance(
    result: SuiteResult,
    suffix: str,
    prompts: Sequence[SafetyPrompt],
    answers: dict[str, list[str]],
    evaluation: Evaluation,
) -> None:
    judge = evaluation.judge
    assert judge is not None
    unsafe = [i for i, prompt in enumerate(prompts) if prompt.label == "unsafe"]
    grades: dict[str, list[float | None]] = {}
    for arm, texts in answers.items():
        dialogues = [compliance_conversation(prompts[i].messages, texts[i]) for i in unsafe]
        with progress(f"safety: {arm}", len(dialogues)) as report:
            grades[arm] = [verdict.parsed for verdict in judge.replies(dialogues, parse_compliance, report)]
    whole = [i for i in range(len(unsafe)) if all(own[i] is not None for own in grades.values())]
    missing = ", ".join(f"{TITLES[arm]} {sum(grade is None for grade in own)}" for arm, own in grades.items())
    result.notes.append(f"Judge of harmful compliance: {judge.name}. Answers without a verdict: {missing}.")
    if whole:
        given: dict[str, list[Any]] = {arm: [own[i] for i in whole] for arm, own in grades.items()}
        result.add(f"harmful_compliance{suffix}", "0 to 1, by the judge", given)


def _detector_notes() -> list[str]:
    notes = []
    for source, found in measured_detector().items():
        lines = "; ".join(
            f"labelled {grade}: " + ", ".join(f"{n} {said}" for said, n in zip(GRADES, line, strict=True) if n)
            for grade, line in zip(GRADES, found["confusion"], strict=True)
            if any(line)
        )
        said = f"it passes {found['complying_passed']:.0%} of those that comply"
        if found["balanced_accuracy"] is not None:
            said += f", finds {found['declining_found']:.0%} of those that decline, and so has a balanced accuracy of "
            said += f"{found['balanced_accuracy']:.3f}"
        notes.append(
            f"The detector of declining answers, on prompts that it was not trained on ({source}, n = {found['n']}): "
            f"{said}. Confusion: {lines}."
        )
    return notes
