"""Part 4: what torch's profiler sees of one decoded token and of one micro-batch: kernels, and when the card waits."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from card_parts.bench import NO_CARD, Bench, Figures
from card_parts.models import config_of_size, mixed_prompts, random_causal_lm, step_config, step_trainer
from card_parts.ppo import MAIN
from lora_rlhf.base.shared import POLICY
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.ppo.rollout import Rollout, sampled_answers
from lora_rlhf.ppo.scoring import Scored
from lora_rlhf.ppo.trainer import PpoTrainer

MOST_KERNELS = 15
"""Kernels that are listed, those that take longest first."""
WAITS = ("Synchronize", "cudaMemcpy", "cudaLaunch", "cuLaunch")
"""Calls of CUDA that are counted: waiting, copying, launching."""


def profiled(bench: Bench) -> Iterator[tuple[str, Figures]]:
    """Yield the profile of one decoded token of a padded batch, and that of one micro-batch of the update."""
    config = step_config(bench, MAIN, bench.cap_gib)
    rows, context, _ = bench.size.decoded
    with bench.held_to(bench.cap_gib):
        trainer = step_trainer(bench, config, random_causal_lm(bench, config_of_size(bench)))
        base, third = trainer.base, ThirdToken(bench)
        handle = base.trunk.register_forward_pre_hook(third)
        sampling = Sampling(4, 1.0, tuple(config.ppo.stop_strings), expand_weights=False)
        prompts, generator = mixed_prompts(bench, context)[:rows], torch.Generator().manual_seed(0)
        sampled_answers(base, POLICY, prompts, sampling, bench.tokenizer, generator)
        handle.remove()
        yield "one decoded token", third.profile.figures() | {"rows": rows, "context": context}
        micro, prompt, answer = config.ppo.micro_batch_size, config.max_prompt_length, config.ppo.response_length
        yield "one micro-batch", micro_batch(bench, trainer, micro, prompt, answer).figures() | {
            "rows": micro, "tokens": prompt + answer, "gradient_checkpointing": config.ppo.gradient_checkpointing,
        }  # fmt: skip


class Profile:
    """A stretch of work under torch's profiler, which slows the host, and the time of the same without it.

    Attributes:
        wall: seconds under the profiler.
        plain_wall: seconds of the same work just before, without it.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.on_card
        self.profiler = torch.profiler.profile(activities=activities)
        self.wall, self.plain_wall = 0.0, 0.0

    def start(self) -> None:
        """Begin, when the device has done all that came before."""
        self.bench.synchronize()
        self.profiler.start()
        self.wall = time.perf_counter()

    def stop(self) -> None:
        """End, when the device has done it."""
        self.bench.synchronize()
        self.wall = time.perf_counter() - self.wall
        self.profiler.stop()

    def figures(self) -> Figures:
        """Return counts, times and the longest kernels."""
        events = list(self.profiler.events())
        on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        on_device = [e for e in on_device if not getattr(e, "is_user_annotation", False)]
        on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
        calls = Counter(e.name for e in on_host if any(word in e.name for word in WAITS))
        found: Figures = {"wall_ms": 1e3 * self.plain_wall, "wall_ms_under_profiler": 1e3 * self.wall}
        if not on_device:
            return found | {"not_measured": "the profiler saw no kernels" if self.bench.on_card else NO_CARD}
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in on_device]
        return found | device_figures(spans, self.plain_wall) | {"cuda_calls": dict(calls)}


def device_figures(spans: Iterable[tuple[str, float, float]], plain_wall: float) -> Figures:
    """Return what the device did, and the share of the time in which it did nothing.

    The profiler slows the host that launches kernels, not the kernels: idle is what they leave of the same work's time
    without the profiler.

    Args:
        spans: name, start and end of each kernel and copy, in microseconds.
        plain_wall: seconds of the same work without the profiler.
    """
    ordered = sorted(spans, key=lambda span: span[1])
    busy, until, total, count = 0.0, ordered[0][1], Counter[str](), Counter[str]()
    for name, start, end in ordered:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
        total[name[:100]] += end - start  # type: ignore[assignment]
        count[name[:100]] += 1
    span = until - ordered[0][1]
    longest = [{"name": n, "count": count[n], "ms": t / 1e3} for n, t in total.most_common(MOST_KERNELS)]
    return {
        "kernels": len(ordered),
        "device_busy_ms": busy / 1e3,
        "device_idle_share": 1 - busy / 1e6 / plain_wall,
        "device_idle_share_under_profiler": (span - busy) / span,
        "longest_kernels": longest,
    }


class ThirdToken:
    """A hook on the trunk that profiles from its third call to its fourth: one decoded token, bookkeeping included.

    The token before, from the second call to the third, is timed without the profiler.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.profile, self.calls, self.began = bench, Profile(bench), 0, 0.0

    def __call__(self, *_: Any) -> None:
        """Take a call."""
        self.calls += 1
        if self.calls == 2:
            self.bench.synchronize()
            self.began = time.perf_counter()
        elif self.calls == 3:
            self.bench.synchronize()
            self.profile.plain_wall = time.perf_counter() - self.began
            self.profile.start()
        elif self.calls == 4:
            self.profile.stop()


def micro_batch(bench: Bench, trainer: PpoTrainer, rows: int, prompt: int, answer: int) -> Profile:
    """Return the profile of one micro-batch, policy and value, after one that warms up and one that is timed."""
    rollout, scored = made_up_rollout(bench, rows, prompt, answer), made_up_scores(bench, rows, answer)
    profile = Profile(bench)
    everyone, advantages = torch.arange(rows, device=bench.device), torch.randn((rows, answer), device=bench.device)

    def work() -> object:
        return trainer._accumulate(rollout, scored, advantages, scored.values, everyone, False, rows)

    with trainer.base.training():
        profile.plain_wall = bench.seconds_of(work, rounds=1)
        profile.start()
        work()
    profile.stop()
    return profile


def made_up_rollout(bench: Bench, rows: int, prompt: int, answer: int) -> Rollout:
    """Return random answers of full length."""

    def drawn(width: int) -> torch.Tensor:
        return torch.randint(5, bench.size.vocabulary, (rows, width), device=bench.device)

    def real(width: int) -> torch.Tensor:
        return torch.ones((rows, width), dtype=torch.bool, device=bench.device)

    text, ended = drawn(answer + 1), torch.zeros(rows, dtype=torch.bool, device=bench.device)
    logprobs = torch.zeros((rows, answer), device=bench.device)
    return Rollout(
        drawn(prompt), real(prompt), text[:, :-1], real(answer), text, real(answer + 1), ended, ended, logprobs,
        ~ended, [""] * rows,
    )  # fmt: skip


def made_up_scores(bench: Bench, rows: int, answer: int) -> Scored:
    """Return the scores of such answers."""
    old, reference, entropy = torch.full((3, rows, answer), -10.0, device=bench.device)
    values, score = torch.zeros((rows, answer + 1), device=bench.device), torch.zeros(rows, device=bench.device)
    return Scored(old, reference, entropy, values, score, {})
