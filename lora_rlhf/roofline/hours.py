"""Hours of each stage of a run on a named card, for texts of full length: at best, and at a realistic share of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from lora_rlhf.config import EMBEDDED, RunConfig, TrainerSettings
from lora_rlhf.errors import UserError
from lora_rlhf.reward.own_reward import trains_own_reward
from lora_rlhf.roofline.cards import Card
from lora_rlhf.roofline.phases import Phase, ppo_phases, supervised_phases

REALISTIC_SHARE = 0.5
"""Share of the best speed that is assumed of a real run. No card has been measured; on CPUs it was 0.1 to 0.4."""
LAUNCH_SECONDS = 6e-6
"""What the host takes at least to launch one kernel from PyTorch; a card that is faster waits for it."""
TRAINING_PAIRS = {
    "Anthropic/hh-rlhf:helpful-base": 43_835,
    "Anthropic/hh-rlhf:harmless-base": 42_537,
    EMBEDDED: 3541,
}
"""Pairs in the training split of the data sets that the shipped configs name, by their pages on the Hub."""


@dataclass(frozen=True)
class StageTime:
    """How long a stage takes on a card.

    Attributes:
        stage: its name.
        steps: optimizer steps, PPO steps, or batches of answers.
        seconds: of all steps at best: memory and arithmetic are busy all the time, and nothing else takes any.
        realistic_seconds: of all steps at `REALISTIC_SHARE`, or as long as launching the kernels takes.
    """

    stage: str
    steps: int
    seconds: float
    realistic_seconds: float


def training_pairs(config: RunConfig) -> int | None:
    """Return how many pairs the reward and SFT stages train on, at most; None where the data would have to be read."""
    sizes = [TRAINING_PAIRS.get(name) for name in config.dataset_name]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return config.max_train_pairs
    total = sum(known)
    if weights := config.dataset_weights:
        total = int(min(size * sum(weights) / weight for size, weight in zip(known, weights, strict=True)))
    return min(total, config.max_train_pairs or total)


def stage_times(config: RunConfig, card: Card, pairs: int | None = None) -> list[StageTime]:
    """Return the time of each stage; merging, which waits for a disk, is left out.

    Args:
        config: with `ppo.gradient_checkpointing` and `ppo.expand_weights` decided.
        card: that the run is on.
        pairs: that the reward and SFT stages train on. None means as many as are known of the data.

    Raises:
        UserError: the number of pairs is not known.
    """
    pairs = training_pairs(config) if pairs is None else pairs
    times = []
    trained: list[tuple[str, TrainerSettings, float]] = []
    if trains_own_reward(config.ppo.reward_sources):
        trained.append(("reward", config.reward, 1 + config.reward.contrast_share))
    if config.instruct_model_name_or_path is None:
        trained.append(("instruct", config.sft, 1.0))
    for stage, settings, extended in trained:
        together = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        if settings.max_steps < 0 and pairs is None:
            raise UserError(
                f"--pairs N is needed: {', '.join(config.dataset_name)} would have to be read to count them"
            )
        steps = settings.max_steps
        if steps < 0:
            steps = -(-round(settings.num_train_epochs * extended * (pairs or 0)) // together)
        times.append(_stage_time(stage, steps, supervised_phases(config, card, stage), card))
    s = config.ppo
    step = ppo_phases(config, card)
    rollout = [phase for phase in step if phase.stage == "rollout"]
    times.append(_stage_time("ppo: scale of the score", -(-s.normalization_samples // s.batch_size), rollout, card))
    times.append(_stage_time("ppo", s.total_steps, step, card))
    times.append(_stage_time("compare", 3 * -(-config.compare.num_prompts // s.batch_size), rollout, card))
    return times


def _stage_time(stage: str, steps: int, phases: Sequence[Phase], card: Card) -> StageTime:
    best = sum(phase.seconds(card) for phase in phases)
    realistic = sum(realistic_seconds(phase, card) for phase in phases)
    return StageTime(stage, steps, steps * best, steps * realistic)


def realistic_seconds(phase: Phase, card: Card) -> float:
    """Return what all repetitions of a phase take at `REALISTIC_SHARE`, or what launching their kernels takes."""
    launching = phase.times * sum(operation.kernels for operation in phase.operations) * LAUNCH_SECONDS
    return max(phase.seconds(card) / REALISTIC_SHARE, launching)


def hours_table(times: Sequence[StageTime], card: Card) -> Table:
    """Return the table of stages and their hours."""
    table = Table(title=f"hours on {card.name} at full length, by count and not measured", title_justify="left")
    for column in ("stage", "steps", "s per step, at best", "hours, at best", "hours, realistic"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for one in times:
        each = one.seconds / one.steps if one.steps else 0.0
        table.add_row(one.stage, f"{one.steps:,}", f"{each:.2f}", _hours(one.seconds), _hours(one.realistic_seconds))
    table.add_section()
    whole, realistic = sum(one.seconds for one in times), sum(one.realistic_seconds for one in times)
    table.add_row("whole run", "", "", _hours(whole), _hours(realistic))
    return table


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f}"


def times_as_json(times: Sequence[StageTime]) -> dict[str, Any]:
    """Return the stages' times as plain values, in seconds."""
    return {
        "stages": {one.stage: {k: v for k, v in asdict(one).items() if k != "stage"} for one in times},
        "seconds": sum(one.seconds for one in times),
        "realistic_seconds": sum(one.realistic_seconds for one in times),
        "realistic_share": REALISTIC_SHARE,
    }


def with_copy_decided(config: RunConfig, expand_weights: bool) -> RunConfig:
    """Return `config` with the working copy on or off, where the config leaves that open."""
    if config.ppo.expand_weights is not None:
        return config
    return replace(config, ppo=replace(config.ppo, expand_weights=expand_weights))
