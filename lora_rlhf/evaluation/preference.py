"""The preference suite: reward, wins, KL and length on held-out prompts, and signs of over-optimisation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_rlhf.checkpoint_folders import step_folders
from lora_rlhf.data.preferences import PreferencePair
from lora_rlhf.evaluation.answers import GivenAnswers, kl_to_base
from lora_rlhf.evaluation.context import Evaluation, SuiteResult, SuiteSkipped
from lora_rlhf.evaluation.loaded_arms import LoadedArm, digest, folder_fingerprint
from lora_rlhf.evaluation.rewards import Reading, find_referee, own_probes, own_reading
from lora_rlhf.evaluation.statistics import Difference, estimate, over_optimised, paired_difference, win_rates
from lora_rlhf.reward.probes import passes, probes_in_words

SNAPSHOT = "snapshot"
"""Role under which a run's policy at an earlier step is played."""


def preference_suite(evaluation: Evaluation, all_pairs: Sequence[PreferencePair]) -> SuiteResult:
    """Return what reward models say of the arms' answers to held-out prompts, and how far the arms went from base.

    Args:
        evaluation: the arms, and the pairs whose prompts are answered.
        all_pairs: every held-out pair, for the training of a referee.

    Raises:
        SuiteSkipped: there is neither a run's reward nor a referee.
    """
    answers = evaluation.held_out_answers()
    own, referee = own_reading(evaluation), find_referee(evaluation, all_pairs)
    if own is None and referee is None:
        raise SuiteSkipped("it needs a run with a reward adapter, or --referee NAME")
    result = SuiteResult()
    readings: dict[str, Reading] = {}
    probes = result.details["probes"] = {}
    if own is not None:
        readings["reward"] = own
        if (probed := own_probes(evaluation)) is not None:
            probes["reward"] = probed
        result.notes.append("reward: the model that PPO maximised; it judges its own pupil.")
    if referee is not None:
        readings["referee"], probes["referee"] = referee.reading, referee.probes
        right = result.details["referee_accuracy"] = referee.accuracy
        result.notes.append(
            f"referee, which PPO never saw: {referee.name}; right on {right['value']:.0%} [{right['low']:.0%}, "
            f"{right['high']:.0%}] of {right['n']} pairs it had not seen"
            + ("." if right["low"] > 0.5 else ": no better than chance, so that its figures say nothing.")
        )
    else:
        result.notes.append("No referee: there are too few held-out pairs to train one, and --referee names none.")
    for name, of_reading in probes.items():
        verdict = "passes" if passes(of_reading) else "fails, so that no claim rests on it"
        result.notes.append(f"Safety probes of the {name}: {probes_in_words(of_reading)}: it {verdict}.")
    for name, read in readings.items():
        scores = {arm: read(given) for arm, given in answers.items()}
        unit = "standard deviations of the reference" if name == "reward" else "standard deviations of base's answers"
        result.add(name, unit, scores)
        result.details[f"wins_by_{name}"] = {arm: _wins(scores, answers, arm) for arm in answers if arm != "base"}
    for arm, given in answers.items():
        kl = _kl(evaluation, evaluation.arms[arm], given)
        if kl is not None:
            result.tasks.setdefault("kl_to_base", {})[arm] = {**asdict(estimate(kl)), "difference": None}
    result.units["kl_to_base"] = "nats per answer"
    result.add("length", "words per answer", {arm: given.lengths for arm, given in answers.items()})
    result.add("ended", "share of answers", {arm: [float(e) for e in given.ended] for arm, given in answers.items()})
    if "plus" in answers and len(readings) == 2:
        result.details["over_optimised"] = _verdict(result)
    if evaluation.run is not None and "plus" in answers:
        result.details["curve"] = reward_over_kl(evaluation, readings)
    return result


def _wins(scores: dict[str, list[float]], answers: dict[str, GivenAnswers], arm: str) -> dict[str, Any]:
    pairs = zip(scores[arm], scores["base"], strict=True)
    wins = [1.0 if own > base else 0.5 if own == base else 0.0 for own, base in pairs]
    return asdict(win_rates(wins, answers[arm].lengths, answers["base"].lengths))


def _kl(evaluation: Evaluation, arm: LoadedArm, given: GivenAnswers) -> list[float] | None:
    temperature = evaluation.sampling.temperature
    key = {
        "what": "kl", "arm": arm.fingerprint, "base": evaluation.base_arm.fingerprint, "temperature": temperature,
        "rows": given.fingerprint,
    }  # fmt: skip
    return evaluation.cache.result(key, lambda: kl_to_base(arm, evaluation.base_arm, given, temperature))


def _verdict(result: SuiteResult) -> dict[str, Any]:
    own, referee = (Difference(**result.tasks[name]["plus"]["difference"]) for name in ("reward", "referee"))
    if result.details["referee_accuracy"]["low"] <= 0.5:
        return {"value": None, "text": "cannot tell: the referee is no better than chance"}
    found = over_optimised(own, referee)
    text = {
        True: "over-optimised: the reward that PPO maximised rose, the referee's did not rise with it",
        False: "not over-optimised: the referee's reward rose too",
        None: "cannot tell at this number of prompts whether the policy is over-optimised",
    }[found]
    return {"value": found, "text": text}


def reward_over_kl(evaluation: Evaluation, readings: dict[str, Reading]) -> list[dict[str, Any]]:
    """Return, for base, every kept policy of the run and Plus: step, KL, and each reading's difference to base."""
    answers = evaluation.held_out_answers()
    of_base = {name: read(answers["base"]) for name, read in readings.items()}
    points = [{"step": 0, "kl": 0.0, **{n: {"value": 0.0, "low": 0.0, "high": 0.0} for n in readings}}]
    for step, arm in snapshot_arms(evaluation):
        points.append(_point(evaluation, arm, step, evaluation.answers_of(arm), readings, of_base))
    assert evaluation.run is not None
    plus = _point(evaluation, evaluation.arms["plus"], last_step(evaluation.run), answers["plus"], readings, of_base)
    return [*points, plus]


def _point(
    evaluation: Evaluation,
    arm: LoadedArm,
    step: int,
    given: GivenAnswers,
    readings: dict[str, Reading],
    of_base: dict[str, list[float]],
) -> dict[str, Any]:
    kl = _kl(evaluation, arm, given)
    found: dict[str, Any] = {"step": step, "kl": None if kl is None else sum(kl) / len(kl)}
    for name, read in readings.items():
        difference = paired_difference(read(given), of_base[name])
        found[name] = {"value": difference.value, "low": difference.low, "high": difference.high}
    return found


def snapshot_arms(evaluation: Evaluation) -> Iterator[tuple[int, LoadedArm]]:
    """Yield (step, arm) of the policies that the run kept on the way, each played until the next one is asked for."""
    assert evaluation.run is not None
    base = evaluation.base_arm
    for step, folder in sorted(step_folders(evaluation.run / "policy_snapshots")):
        if SNAPSHOT in base.base.configs:
            base.base.replace_adapter(SNAPSHOT, folder)
        else:
            base.base.load_adapter(SNAPSHOT, folder)
        content = digest(base.fingerprint, folder_fingerprint(folder))
        yield step, LoadedArm(f"step {step}", base.base, SNAPSHOT, base.tokenizer, content)


def last_step(run: Path) -> int:
    """Return the PPO step that left the run's policy: the last one, or the one before that which PPO went back to."""
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return int(last["back_to_step"]) - 1 if "back_to_step" in last else int(last["step"])
