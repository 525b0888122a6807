"""The phases of a PPO step and of the two TRL stages, counted on shapes for a card.

Everything is as large as the config allows: prompts and answers have their greatest length, and one prompt of a batch
is padded on the left, as there always is one. What repeats is counted once and multiplied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_rlhf.base.shared import POLICY, REWARD
from lora_rlhf.config import RunConfig, TrainerSettings
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.ppo.rollout import Rollout, sampled_answers
from lora_rlhf.ppo.scoring import Scored, scored_by_roles
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.roofline.cards import Card
from lora_rlhf.roofline.operations import META, Operation, OperationCounter
from lora_rlhf.roofline.shapes_only import NoText, fused_4bit, fused_attention, shapes_trainer


@dataclass(frozen=True)
class Phase:
    """A part of a stage that is repeated.

    Attributes:
        stage: rollout, score, update, reward or instruct.
        name: what it does.
        operations: of one repetition.
        times: repetitions in one step of the stage.
        peak_bytes: most memory that is allocated at one time, weights and adapters among it.
        syncs: how often the host waits for the card in one repetition, by the operation that makes it wait.
    """

    stage: str
    name: str
    operations: list[Operation]
    times: float
    peak_bytes: int
    syncs: Counter[str]

    def seconds(self, card: Card) -> float:
        """Return the least seconds that all repetitions take on a card."""
        return self.times * sum(one.seconds(card.bandwidth, card.matmul) for one in self.operations)


class PhaseCounter:
    """Counts phases of a run on shapes.

    Args:
        config: of the run, with gradient checkpointing and the working copy decided.
        card: decides which of bitsandbytes' kernels are used.
    """

    def __init__(self, config: RunConfig, card: Card) -> None:
        self.config, self.card, self.counter = config, card, OperationCounter(fused_4bit(card))
        self.phases: list[Phase] = []
        self.trainer: PpoTrainer = self.prepare(lambda: shapes_trainer(config))

    def count(self, stage: str, name: str, times: float, work: Callable[[], Any]) -> Any:
        """Do `work` on shapes and add it as a phase; return what it returns."""
        self.counter.clear()
        result = self.prepare(work)
        self._add(stage, name, times)
        return result

    def prepare(self, work: Callable[[], Any]) -> Any:
        """Do `work` on shapes, of which only the memory counts; return what it returns."""
        with self.counter, fused_attention(self.card):
            return work()

    def _add(self, stage: str, name: str, times: float) -> None:
        counter = self.counter
        self.phases.append(Phase(stage, name, counter.operations, times, counter.peak, counter.syncs))
        counter.clear()


def ppo_phases(config: RunConfig, card: Card) -> list[Phase]:
    """Return the phases of one PPO step.

    Args:
        config: with `ppo.gradient_checkpointing` and `ppo.expand_weights` decided.
        card: that it is counted for.
    """
    counting = PhaseCounter(config, card)
    _count_rollout(counting)
    _count_score(counting)
    _count_update(counting)
    return counting.phases


class _EnoughTokens(Exception):
    """Ends a decoding loop whose further tokens would cost what those before did."""


def _count_rollout(counting: PhaseCounter) -> None:
    """Count prefill, and decoded tokens as the mean of the first and the last one: a token's cost grows evenly."""
    config, s = counting.config, counting.config.ppo
    together = min(s.rollout_batch_size or s.batch_size, s.batch_size)
    batches = s.batch_size / together
    prompt, answer = config.max_prompt_length, s.response_length
    tokens = batches * (answer - 1) / 2
    _count_passes(
        counting, together, prompt, answer, [("preparation", 1), ("prefill", batches), ("first token", tokens)]
    )
    _count_passes(counting, together, prompt + answer - 2, 3, [None, None, ("last token", tokens)])


def _count_passes(
    counting: PhaseCounter, rows: int, prompt: int, answer: int, kept: Sequence[tuple[str, float] | None]
) -> None:
    """Count what comes before the first pass of the decoder, and its first passes.

    Args:
        counting: gets the phases.
        rows: prompts that are answered together.
        prompt: their tokens; the first has one less, and so is padded.
        answer: most tokens of an answer.
        kept: name and repetitions of each part; None where it is not kept.
    """
    base, trunk, s = counting.trainer.base, counting.trainer.base.trunk, counting.config.ppo
    sampling = replace(Sampling.of(s), response_length=answer, batch_size=None)
    prompts = [[1] * (prompt - 1), *([[1] * prompt] * (rows - 1))]
    plain, parts = trunk.forward, iter(kept)

    def forward(*args: Any, **kwargs: Any) -> Any:
        part = next(parts, None)
        if part is not None:
            counting._add("rollout", *part)
        counting.counter.clear()
        if part == kept[-1]:
            raise _EnoughTokens
        return plain(*args, **kwargs)

    trunk.forward = forward
    counting.counter.clear()
    try:
        with counting.counter, fused_attention(counting.card):
            sampled_answers(base, POLICY, prompts, sampling, NoText(), torch.Generator())
    except _EnoughTokens:
        pass
    finally:
        del trunk.forward


def _count_score(counting: PhaseCounter) -> None:
    """Count one batch of scoring by all roles, the working copy apart."""
    trainer, s = counting.trainer, counting.config.ppo
    if s.expand_weights:
        counting.count("score", "working copy", 1, lambda: trainer.base.layers._make_copies(None))
    together = min(s.scoring_batch_size, s.batch_size)
    rollout = counting.prepare(lambda: full_rollout(counting.config, together))
    counting.count(
        "score", "policy, reference, reward and value of a batch", s.batch_size / together,
        lambda: scored_by_roles(trainer.base, rollout, trainer.reward, s, 0.0),
    )  # fmt: skip


def _count_update(counting: PhaseCounter) -> None:
    """Count one micro-batch of policy and value, forward and backward, and one step of the optimizer."""
    trainer, s = counting.trainer, counting.config.ppo
    micro = min(s.micro_batch_size, s.batch_size // s.num_mini_batches)
    everything = [p for own in trainer.parameters.values() for p in own]
    # Adam's two moments are made once, in the run's first step
    moments = counting.prepare(lambda: [[torch.zeros_like(p) for p in everything] for _ in "mv"])
    rollout, scored, advantages, returns = counting.prepare(lambda: _to_learn_from(counting.config, micro))

    def learn() -> None:
        with trainer.base.training():
            rows = torch.arange(micro, device=META)
            trainer._accumulate(rollout, scored, advantages, returns, rows, False, micro)

    def step() -> None:
        gradients = [p.grad for p in everything if p.grad is not None]
        for parameters in trainer.parameters.values():
            own = [p.grad for p in parameters if p.grad is not None]
            norms = torch._foreach_norm(own)  # what clip_grad_norm_ calls on a card, and refuses to on shapes
            torch._foreach_mul_(own, s.max_grad_norm / torch.linalg.vector_norm(torch.stack(norms)))
        steps = [torch.zeros((), device=META) for _ in everything]
        torch._fused_adam_(  # type: ignore[call-overload]
            everything, gradients, *moments, [], steps, lr=1e-5, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-5,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    counting.count("update", "micro-batch", s.num_ppo_epochs * s.batch_size / micro, learn)
    with torch.no_grad():
        counting.count("update", "clipping and Adam", s.num_ppo_epochs * s.num_mini_batches, step)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.base.layers.give_up_copy()


def _ones(*size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.long, device=META)


def full_rollout(config: RunConfig, rows: int) -> Rollout:
    """Return `rows` answers of the greatest length to prompts of the greatest length; all ids are 1.

    To be called inside an `OperationCounter`, which makes whole numbers real.
    """
    ids, answers = _ones(rows, config.max_prompt_length), _ones(rows, config.ppo.response_length)
    text, ended = _ones(rows, config.ppo.response_length + 1), torch.zeros(rows, dtype=torch.bool, device=META)
    logprobs = torch.zeros(answers.shape, device=META)
    return Rollout(
        ids, ids.bool(), answers, answers.bool(), text, text.bool(), ended, ended, logprobs, ~ended, texts=[""] * rows
    )


def _to_learn_from(config: RunConfig, rows: int) -> tuple[Rollout, Scored, torch.Tensor, torch.Tensor]:
    answer = config.ppo.response_length

    def numbers(width: int) -> torch.Tensor:
        return torch.zeros((rows, width), device=META)

    scored = Scored(numbers(answer), numbers(answer), numbers(answer), numbers(answer + 1), torch.zeros(rows), {})
    return full_rollout(config, rows), scored, numbers(answer), numbers(answer + 1)


def supervised_phases(config: RunConfig, card: Card, stage: str) -> list[Phase]:
    """Return the phases of one optimizer step of reward (`stage` "reward") or SFT training ("instruct").

    It is counted on our own forward pass, through the layers that TRL's trainers are given too.
    """
    settings: TrainerSettings = config.reward if stage == "reward" else config.sft
    checkpointing = replace(config.ppo, gradient_checkpointing=settings.gradient_checkpointing)
    counting = PhaseCounter(replace(config, ppo=checkpointing), card)
    base, role = counting.trainer.base, REWARD if stage == "reward" else POLICY
    rows = settings.per_device_train_batch_size * (2 if stage == "reward" else 1)

    def learn() -> None:
        ids = _ones(rows, config.max_length)
        mask = ids.bool()
        base.set_trainable(role, True)
        with base.training():
            states = base.hidden(role, ids, mask)
            if stage == "reward":
                loss = base.head_outputs(REWARD, states[:, -1]).sum()
            else:
                loss = base.response_logprobs(states, ids, mask[:, 1:], 1.0, None, with_entropy=False)[0].sum()
            loss.backward()

    if config.ppo.expand_weights and config.load_in_4bit:
        counting.prepare(lambda: base.layers._make_copies(None))  # once for all steps, so that it is in none of them
    counting.count(stage, "micro-batch", settings.gradient_accumulation_steps, learn)
    return counting.phases
