"""Which settings to change so that a run fits, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lora_rlhf.config import SECTIONS, RunConfig
from lora_rlhf.memory_plan import expands, peaks
from lora_rlhf.model_shape import ModelShape

Change = tuple[str, Any]
"""A dotted field and its new value."""

MOST_CHANGES = 64
"""Settings are halved at most so often, which no card needs."""


def fitting_changes(config: RunConfig, shape: ModelShape, on_cuda: bool, free: float) -> list[Change] | None:
    """Return changes of settings, cheapest first, after which every stage fits into `free` bytes; none if nothing does.

    The result of training stays the same: only what trades time for memory is changed. The lengths, which do change
    it, come last.
    """
    changes: dict[str, Any] = {}
    for _ in range(MOST_CHANGES):
        tight = max(peaks(config, shape, on_cuda, free), key=lambda plan: plan.total)
        if tight.total <= free:
            return list(changes.items())
        copied = expands(config, shape, on_cuda, free)
        step = next((step for step in _steps(config, tight.name, on_cuda, copied) if step), [])
        if not step:
            return None
        for name, value in step:
            config, changes[name] = changed(config, name, value), value
    return None


def _steps(config: RunConfig, stage: str, on_cuda: bool, copied: bool) -> Iterator[list[Change]]:
    """Yield what could be done for the tightest stage, the cheapest first; an empty list where it is done already."""
    s = config.ppo
    section = {"reward": "reward", "instruct": "sft", "ppo: update": "ppo"}.get(stage)
    yield [("ppo.expand_weights", False)] if copied else []
    yield _smaller_batch(config, stage, least=2)
    if section and not getattr(config, section).gradient_checkpointing:
        yield [(f"{section}.gradient_checkpointing", True)]
    yield _smaller_batch(config, stage, least=1)
    yield [("ppo.optim", "paged_adam_8bit")] if on_cuda and stage.startswith("ppo") and s.optim == "adam" else []
    yield [("ppo.response_length", s.response_length // 2)] if s.response_length >= 64 else []
    yield [("max_prompt_length", config.max_prompt_length // 2)] if config.max_prompt_length >= 64 else []
    yield [("max_length", config.max_length // 2)] if config.max_length >= 128 else []


def _smaller_batch(config: RunConfig, stage: str, least: int) -> list[Change]:
    """Return about half the batch of a stage; gradient accumulation makes up for it where the result needs it."""
    s = config.ppo
    if stage in ("reward", "instruct"):
        section = SECTIONS[stage]
        settings = getattr(config, section)
        size = settings.per_device_train_batch_size
        together = size * settings.gradient_accumulation_steps
        smaller = next((n for n in range(size // 2, least - 1, -1) if together % n == 0), None)
        if smaller is None:
            return []
        return [
            (f"{section}.per_device_train_batch_size", smaller),
            (f"{section}.gradient_accumulation_steps", together // smaller),
        ]
    sizes = {
        "ppo: rollout": ("rollout_batch_size", min(s.rollout_batch_size or s.batch_size, s.batch_size)),
        "ppo: score": ("scoring_batch_size", min(s.scoring_batch_size, s.batch_size)),
        "ppo: update": ("micro_batch_size", min(s.micro_batch_size, s.batch_size // s.num_mini_batches)),
        "compare": ("rollout_batch_size", min(s.rollout_batch_size or s.batch_size, s.batch_size)),
    }
    name, size = sizes.get(stage, ("", 1))
    return [(f"ppo.{name}", size // 2)] if size // 2 >= least else []


def changed(config: RunConfig, name: str, value: Any) -> RunConfig:
    """Return `config` with another value of a dotted field."""
    section, _, leaf = name.rpartition(".")
    if not section:
        return replace(config, **{leaf: value})
    return replace(config, **{section: replace(getattr(config, section), **{leaf: value})})
