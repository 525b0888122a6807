"""Part 2: one PPO step of the Mistral-7B configs, phase by phase, beside the planner and the card's own limits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from card_table import UPDATE
from shapes import Rates, rollout_floor, token_floor, update_flops

from card_parts.bench import Bench, Figures
from card_parts.models import config_of_size, random_causal_lm, step_config, step_trainer
from lora_rlhf.base.packing import batches_by_length
from lora_rlhf.config import RunConfig
from lora_rlhf.memory import GIB, usable_bytes
from lora_rlhf.memory_peak import reset_peak_memory, return_freed_memory
from lora_rlhf.memory_plan import peaks
from lora_rlhf.model_shape import NF4_BYTES, ModelShape, shape_of
from lora_rlhf.ppo.trainer import PpoTrainer

MAIN, SMALL = "mistral_7b_24gb.yaml", "mistral_7b_16gb.yaml"
PHASES = {"rollout": "_rollout", "score": "_scored", "update": "update"}
"""Phase of a step → the trainer's method that does it."""
TIMED_ROWS = 16
"""Answers of the update that a variant times; the rest is the same work again."""
VARIANTS = [(True, 4), (False, 2), (False, 4), (False, 16)]
"""Gradient checkpointing and micro-batch of the update's variants."""


def ppo(bench: Bench) -> Iterator[tuple[str, Figures]]:
    """Yield the figures of the step as configured, of parts of its update, and of whole steps of other settings.

    The first step, which warms up, is yielded for the case that there is no second one, which takes its place.
    """
    config = step_config(bench, MAIN, bench.cap_gib)
    meters: list[PhaseMeter] = []
    _ = bench.rates  # measured while no model stands: the buffers for it take 4 GiB

    def first_step() -> Figures:
        meters.append(PhaseMeter(bench, step_trainer(bench, config, random_causal_lm(bench, config_of_size(bench)))))
        return step_figures(bench, config, meters[0], bench.cap_gib) | {"step": 1}

    def second_step() -> Figures:
        return step_figures(bench, config, meters[0], bench.cap_gib) | {"step": 2}

    with bench.held_to(bench.cap_gib):
        first = bench.attempt(first_step)
        yield MAIN, first
        if "error" not in first:
            second = bench.attempt(second_step)
            if "error" in second:
                yield f"{MAIN}, second step", second
            else:
                yield MAIN, second | {"first_step_seconds": first["seconds"]["step"]}
                for checkpointing, micro in VARIANTS:
                    name = f"{UPDATE} micro-batches of {micro}, checkpointing {'on' if checkpointing else 'off'}"
                    yield name, bench.attempt(update_timer(bench, config, meters[0], checkpointing, micro), seconds=8)
    meters.clear()
    return_freed_memory()
    yield f"{MAIN}, value_model: head", bench.attempt(whole_step(bench, MAIN, bench.cap_gib, value_model="head"), 30)
    return_freed_memory()
    yield f"{SMALL} under 16 GiB", bench.attempt(whole_step(bench, SMALL, 16.0), 45)


class PhaseMeter:
    """Takes PPO steps and notes of each phase what it took; waits for the device before and after each.

    Attributes:
        seconds: of each phase of the last step.
        peaks: of each phase of the last step, by phase and kind.
        results: what each phase returned.
        metrics: of the last step.
    """

    def __init__(self, bench: Bench, trainer: PpoTrainer) -> None:
        self.bench, self.trainer = bench, trainer
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, Figures] = {}
        self.results: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        for phase, method in PHASES.items():
            setattr(trainer, method, self._metered(phase, getattr(trainer, method)))

    def _metered(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def metered(*given: Any) -> Any:
            self.bench.synchronize()
            reset_peak_memory(self.bench.device)
            started = time.perf_counter()
            self.results[phase] = work(*given)
            self.bench.synchronize()
            self.seconds[phase] = time.perf_counter() - started
            self.peaks[phase] = self.bench.peaks_gib()
            return self.results[phase]

        return metered

    def step(self) -> float:
        """Take a step; return its seconds.

        Raises:
            RuntimeError: it was skipped for NaN or infinity.
        """
        self.results = {}
        started = time.perf_counter()
        self.metrics = self.trainer.step()
        self.bench.synchronize()
        if "skipped" in self.metrics:
            raise RuntimeError(f"the step was skipped: {self.trainer.skip_reason}")
        return time.perf_counter() - started


def whole_step(bench: Bench, file: str, cap_gib: float | None, **ppo: Any) -> Callable[[], Figures]:
    """Return what measures one step of a config on a model of its own; the process has warmed up by then."""

    def measure() -> Figures:
        config = step_config(bench, file, cap_gib, **ppo)
        with bench.held_to(cap_gib):
            trainer = step_trainer(bench, config, random_causal_lm(bench, config_of_size(bench)))
            return step_figures(bench, config, PhaseMeter(bench, trainer), cap_gib)

    return measure


def step_figures(bench: Bench, config: RunConfig, meter: PhaseMeter, cap_gib: float | None) -> Figures:
    """Take a step and return all that is said of one."""
    total, s = meter.step(), config.ppo
    shape, rates = planned_shape(bench), bench.rates
    rollout, metrics = meter.results["rollout"], meter.metrics
    prompt = rollout.query_mask.sum(1).float().mean().item()
    answers = rollout.action_mask.sum(1)
    answer, longest = answers.float().mean().item(), int(answers.max())
    token = decoding_floor(shape, rates, s.batch_size, prompt + longest / 2)
    floor = rollout_floor(rates, shape.body, s.batch_size, prompt, longest, token)
    flops = update_flops(s, shape.body, head_weights(shape), prompt, answer)
    return {
        "seconds": meter.seconds | {"step": total},
        "peaks": meter.peaks,
        "planned_gib": planned_gib(bench, config, shape, cap_gib),
        "held_to_gib": cap_gib if bench.on_card else None,
        "gradient_checkpointing": s.gradient_checkpointing,
        "batch": s.batch_size,
        "batches_in_memory": meter.trainer.batches.sizes,
        "mean_prompt_tokens": prompt,
        "mean_answer_tokens": answer,
        "samples_per_second": s.batch_size / total,
        "rollout_tokens_per_second": s.batch_size * answer / meter.seconds["rollout"],
        "update_tokens_per_second": s.num_ppo_epochs * s.batch_size * (prompt + answer) / meter.seconds["update"],
        "update_model_flops": flops,
        "update_model_flops_utilisation": flops / meter.seconds["update"] / rates.matmul,
        "rollout_floor_seconds": floor,
        "rollout_share_of_floor": floor / meter.seconds["rollout"],
    } | {name: metrics[name] for name in AGREEMENT}


AGREEMENT = ("first_ratio_deviation", "sampler_kl", "sampler_max_difference", "policy_loss", "value_loss", "ended_rate")
"""Metrics of a step that say whether sampler and trainer agree."""


def planned_shape(bench: Bench) -> ModelShape:
    """Return the shape of the benchmark's model, as the planner counts it."""
    from transformers import AutoModelForCausalLM

    return shape_of(config_of_size(bench), AutoModelForCausalLM)


def planned_gib(bench: Bench, config: RunConfig, shape: ModelShape, cap_gib: float | None) -> dict[str, float]:
    """Return the planner's peak of each phase."""
    usable, on_cuda = usable_bytes(cap_gib if bench.on_card else None)
    plans = peaks(config, shape, on_cuda, usable)
    return {plan.name.partition(": ")[2]: plan.total / GIB for plan in plans if plan.name.startswith("ppo")}


def decoding_floor(shape: ModelShape, rates: Rates, rows: int, context: float) -> float:
    """Return the least seconds of one decoded token of all rows.

    Each 4-bit weight, the 16-bit LM head, and all keys and values are read once, or the products are done, whichever
    takes longer.
    """
    cache = rows * context * shape.layers * 2 * shape.key_width * 2
    read = shape.body * NF4_BYTES + 2 * head_weights(shape) + cache
    return token_floor(rates, read, shape.body + head_weights(shape), rows)


def head_weights(shape: ModelShape) -> int:
    """Return the weights of the LM head."""
    return shape.vocabulary * shape.hidden


def update_timer(
    bench: Bench, config: RunConfig, meter: PhaseMeter, checkpointing: bool, micro: int
) -> Callable[[], Figures]:
    """Return what times the gradients of some answers of the last step, and says what the whole update would take."""

    def measure() -> Figures:
        trainer, rollout, scored = meter.trainer, meter.results["rollout"], meter.results["score"]
        rows = next(batches_by_length(rollout.mask, torch.arange(len(rollout.texts), device=bench.device), TIMED_ROWS))
        advantages = torch.randn(rollout.action_mask.shape, device=bench.device)
        return_freed_memory()
        try:
            with checkpointing_set(trainer, checkpointing), trainer.base.training():
                for _ in range(2):  # the first warms up
                    reset_peak_memory(bench.device)
                    bench.synchronize()
                    started = time.perf_counter()
                    trainer._accumulate(rollout, scored, advantages, scored.values, rows, False, micro)
                    bench.synchronize()
                    took = time.perf_counter() - started
        finally:
            trainer.optimizer.zero_grad(set_to_none=True)
        share = rollout.mask[rows].sum().item() / rollout.mask.sum().item()
        return {
            "answers_timed": len(rows),
            "seconds_timed": took,
            "update_seconds": took / share * config.ppo.num_ppo_epochs,
            "extrapolated": "by tokens, from the longest answers; without the optimizer's own steps",
            **bench.peaks_gib(),
        }

    return measure


@contextlib.contextmanager
def checkpointing_set(trainer: PpoTrainer, on: bool) -> Iterator[None]:
    """Turn gradient checkpointing on or off inside the block."""
    base = trainer.base
    turn_on, turn_off = base.enable_gradient_checkpointing, base.causal_lm.gradient_checkpointing_disable
    (turn_on if on else turn_off)()
    try:
        yield
    finally:
        (turn_on if trainer.settings.gradient_checkpointing else turn_off)()
