"""What every suite is given: settings, arms, held-out prompts, judge, cache; and the shape of what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import Message
from lora_rlhf.data.preferences import PreferencePair
from lora_rlhf.data.safety_prompts import SafetyPrompt, safety_prompts
from lora_rlhf.evaluation.answers import GivenAnswers, given_answers
from lora_rlhf.evaluation.judge import Judge
from lora_rlhf.evaluation.loaded_arms import LoadedArm
from lora_rlhf.evaluation.result_cache import ResultCache
from lora_rlhf.evaluation.statistics import estimate, paired_difference
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.reward.sources import CombinedReward, run_reward
from lora_rlhf.terminal import progress

SUITES = ("general", "mt_bench", "moderation", "safety", "bad_words", "preference")

PACKAGE_SET = "package"
"""Name of the safety prompts that come with the package."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation is asked for; `recipes/evaluate.py --help` explains each."""

    output_dir: Path
    suites: tuple[str, ...] = SUITES
    limit: int | None = None
    local_tasks: Path | None = None
    mt_bench_questions: Path | None = None
    judge_base_url: str | None = None
    judge_model: str | None = None
    margin: float = 0.01
    referee: str | None = None
    bad_words_file: str | None = None
    safety_prompts: Path | None = None
    batch_size: int = 16
    max_new_tokens: int = 256
    seed: int = 0


class SuiteSkipped(Exception):
    """A suite that cannot run with what is at hand; its text says why, and what to give."""


@dataclass
class SuiteResult:
    """What a suite found.

    Attributes:
        tasks: task -> arm -> `arm_figures`.
        units: task -> what its values are, for people.
        notes: sentences that belong beside the figures.
        details: JSON-able material for figures and galleries.
    """

    tasks: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, task: str, unit: str, values: Mapping[str, Sequence[float]]) -> None:
        """Add a task given the values of each arm, item by item in one order for all arms."""
        self.tasks[task] = arm_figures(values)
        self.units[task] = unit


def arm_figures(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Return arm -> {value, stderr, n, difference}; the difference is to base, with its 95 % interval.

    Plus has `difference_to_instruct` too, where there is an Instruct.
    """
    figures = {}
    for arm, own in values.items():
        difference = None if arm == "base" or "base" not in values else paired_difference(own, values["base"])
        figures[arm] = {**asdict(estimate(own)), "difference": None if difference is None else asdict(difference)}
        if arm == "plus" and "instruct" in values:
            figures[arm]["difference_to_instruct"] = asdict(paired_difference(own, values["instruct"]))
    return figures


@dataclass
class Evaluation:
    """An evaluation that is going on.

    Attributes:
        settings: what was asked for.
        config: of the run, or of the loading of the named models.
        run: the run's directory; none where models were named without one.
        folder: where results are written.
        arms: by name, base first.
        pairs: held-out pairs, whose prompts are answered.
        cache: finished results.
        judge: none where none was given.
    """

    settings: EvaluationSettings
    config: RunConfig
    run: Path | None
    folder: Path
    arms: dict[str, LoadedArm]
    pairs: list[PreferencePair]
    cache: ResultCache
    judge: Judge | None
    _answers: dict[str, GivenAnswers] = field(default_factory=dict)
    _own_reward: CombinedReward | None = None

    @property
    def base_arm(self) -> LoadedArm:
        """The arm that others are compared with."""
        return self.arms["base"]

    @property
    def sampling(self) -> Sampling:
        """How held-out prompts are answered: as in PPO."""
        return Sampling.of(self.config.ppo)

    def held_out_answers(self) -> dict[str, GivenAnswers]:
        """Return each arm's answers to the held-out prompts, sampled once for all suites."""
        for name, arm in self.arms.items():
            if name not in self._answers:
                self._answers[name] = self.answers_of(arm)
        return self._answers

    def own_reward(self) -> CombinedReward:
        """Return the reward that the run's PPO maximised, loaded once for all suites."""
        assert self.run is not None
        if self._own_reward is None:
            self._own_reward = run_reward(self.config, self.base_arm.base, self.run)
        return self._own_reward

    def answers_of(self, arm: LoadedArm) -> GivenAnswers:
        """Return the answers of any arm to the held-out prompts."""
        return self.answers_to(arm, [pair.messages for pair in self.pairs])

    def answers_to(self, arm: LoadedArm, conversations: Sequence[Sequence[Message]]) -> GivenAnswers:
        """Return the answers of any arm to conversations that end with a user's turn."""
        size = self.config.ppo.batch_size
        with progress(f"answers: {arm.name}", len(conversations)) as report:
            return given_answers(arm, conversations, self.sampling, size, self.settings.seed, self.cache, report)

    def safety_sets(self) -> dict[str, list[SafetyPrompt]]:
        """Return the safety prompts by the name of their set: the package's, and those of a file that was named.

        `limit` bounds each label of each.
        """
        sets = {PACKAGE_SET: safety_prompts(None, self.settings.limit)}
        if self.settings.safety_prompts is not None:
            name = self.settings.safety_prompts.stem.replace(",", " ")
            name = f"{name} (file)" if name in sets else name
            sets[name] = safety_prompts(self.settings.safety_prompts, self.settings.limit)
        return sets
