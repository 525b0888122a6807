"""The moderation suite (paper, Figure 1): answers judged on general ability, correctness and safety."""

from __future__ import annotations

from lora_rlhf.evaluation.context import Evaluation, SuiteResult, SuiteSkipped
from lora_rlhf.evaluation.judge_prompts import moderation_conversation, parse_moderation
from lora_rlhf.evaluation.rewards import own_scores
from lora_rlhf.terminal import progress

CRITERIA = ("general ability", "answer correctness", "safety")


def moderation_suite(evaluation: Evaluation) -> SuiteResult:
    """Return the grades of each arm's answers to the held-out prompts; a prompt counts where all arms have grades.

    Raises:
        SuiteSkipped: neither a judge nor a reward model is at hand.
    """
    answers, result = evaluation.held_out_answers(), SuiteResult()
    if evaluation.judge is None:
        scores = own_scores(evaluation)
        if scores is None:
            raise SuiteSkipped("it needs a judge (--judge_model, --judge_base_url) or a run with a reward adapter")
        result.add("reward", "standard deviations of the reference", scores)
        result.notes.append(
            "No judge was given: the figure is the run's own reward model, the one that PPO maximised. It speaks of "
            "helpful and harmless answers as one, and cannot tell ability, correctness and safety apart."
        )
        return result
    grades: dict[str, list[dict[str, float] | None]] = {}
    for name, given in answers.items():
        dialogues = [
            moderation_conversation(pair.messages, text)
            for pair, text in zip(evaluation.pairs, given.texts, strict=True)
        ]
        with progress(f"moderation: {name}", len(dialogues)) as report:
            grades[name] = [v.parsed for v in evaluation.judge.replies(dialogues, parse_moderation, report)]
    whole = [i for i in range(len(evaluation.pairs)) if all(arm[i] is not None for arm in grades.values())]
    missing = ", ".join(f"{name} {sum(grade is None for grade in arm)}" for name, arm in grades.items())
    result.notes.append(f"Judge: {evaluation.judge.name}. Answers without a verdict: {missing}.")
    if not whole:
        raise SuiteSkipped(f"{evaluation.judge.name} gave no verdict that can be read")
    for criterion in CRITERIA:
        result.add(
            criterion,
            "grade, 1 to 10",
            {name: [arm[i][criterion] for i in whole] for name, arm in grades.items()},  # type: ignore[index]
        )
    return result
