"""What each stage of a run takes at its peak, predicted from the config and the model's shape alone.

Every part is counted in bytes: what stands (weights, adapters, gradients, optimizer, working copy), and what comes and
goes at the fullest moment (keys and values, activations, logits). Lengths are the longest that the config allows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lora_rlhf.base.loading import explained, resolved_model
from lora_rlhf.base.token_logprobs import CHUNK_BYTES
from lora_rlhf.config import RunConfig, TrainerSettings

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: 4 bits, an 8-bit scale for 64 of them, and a float32 one for 256 scales (double quantisation)."""
ADAM_BYTES = {"adam": 8.0, "paged_adam_8bit": 2.0}
"""Per trained parameter: two moments."""
PROCESS_BYTES = 690 * 2**20
"""On a CPU: resident memory of Python with torch, transformers, peft, datasets and oneDNN's kernels, no model."""
HEAP_SHARE = 1.5
"""On a CPU: what comes and goes takes this many times its size, for glibc's heap keeps holes between blocks."""
CONTEXT_BYTES = 600 * 2**20
"""What CUDA itself takes of a card, beside what torch allocates."""


@dataclass(frozen=True)
class LinearShape:
    """One linear layer: its number in the stack, its name in the layer, and its sizes."""

    layer: int
    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal language model.

    Attributes:
        linears: linear layers inside the transformer layers; these are what 4 bits hold.
        other: parameters outside of them: embeddings, norms, an LM head of its own.
        hidden: width of the states.
        heads: query heads.
        key_width: key heads times their width.
        query_width: query heads times their width.
        layers: transformer layers.
        vocabulary: rows of the LM head.
    """

    linears: tuple[LinearShape, ...]
    other: int
    hidden: int
    heads: int
    key_width: int
    query_width: int
    layers: int
    vocabulary: int

    @property
    def body(self) -> int:
        """Parameters of all linear layers."""
        return sum(one.inputs * one.outputs for one in self.linears)

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        return max(max(one.inputs, one.outputs) for one in self.linears)


def model_shape(config: RunConfig) -> ModelShape:
    """Return the shape of the run's base; only its config file is read.

    Raises:
        UserError: the model's config cannot be had.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolved_model(config.model_name_or_path)
    with explained(source, config):
        found = AutoConfig.from_pretrained(source, revision=config.model_revision, trust_remote_code=False)
    return shape_of(found, AutoModelForCausalLM)


def shape_of(config: Any, auto_class: Any) -> ModelShape:
    """Return the shape of the model that a transformers config describes, built without memory for its weights."""
    with torch.device("meta"):
        model = auto_class.from_config(config)
    linears = []
    for name, module in model.named_modules():
        place = re.search(r"\.(\d+)\.", name)
        if isinstance(module, torch.nn.Linear) and place:
            linears.append(LinearShape(int(place[1]), name.rpartition(".")[2], module.in_features, module.out_features))
    body = sum(one.inputs * one.outputs for one in linears)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        linears=tuple(linears),
        other=model.num_parameters() - body,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        key_width=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * width,
        query_width=config.num_attention_heads * width,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
    )


@dataclass
class StagePlan:
    """The predicted peak of one stage, by part, in bytes."""

    name: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """The peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Planner:
    """Predicts the peaks of a run's stages.

    Args:
        config: the run.
        shape: of its base.
        on_cuda: memory of a card (what torch allocates); else resident memory of the process.
        expand: whether there is a working copy; see `expands`.
    """

    config: RunConfig
    shape: ModelShape
    on_cuda: bool
    expand: bool

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return getattr(torch, self.config.dtype).itemsize

    @property
    def _held(self) -> float:
        return 1.0 if self.on_cuda else HEAP_SHARE

    def stages(self) -> list[StagePlan]:
        """Return the peaks, in the order of the stages."""
        c = self.config
        plans = [self._supervised("reward", c.reward, 2, 0)]
        if c.instruct_model_name_or_path is None:
            plans.append(self._supervised("instruct", c.sft, 1, self.shape.vocabulary))
        return [*plans, *self.ppo_stages()]

    def ppo_stages(self) -> list[StagePlan]:
        """Return the peaks of the three parts of a PPO step."""
        c, s = self.config, self.config.ppo
        longest = c.max_prompt_length + s.response_length
        standing = self._standing(adapters=2 if s.value_model == "head" else 3, trained=self._trained(), optim=s.optim)
        decoded = min(s.rollout_batch_size or s.batch_size, s.batch_size)
        scored = min(s.scoring_batch_size, s.batch_size)
        micro = min(s.micro_batch_size, s.batch_size // s.num_mini_batches)
        roles = (2 if s.value_model == "head" else 3) + 1
        cache = decoded * longest * self.shape.layers * 2 * self.shape.key_width * self.width
        rollout = {
            "keys and values": cache,
            "activations": self._passing(decoded, c.max_prompt_length),
            "logits": decoded * self.shape.vocabulary * (self.width + 12),
        }
        score = {
            "activations": self._passing(scored * (roles if s.mixed_adapter_scoring else 1), longest)
            + roles * scored * longest * self.shape.hidden * self.width
            + (s.batch_size * longest * self.shape.hidden * self.width if self._first_adapted() else 0),
            "logits": self._logits(scored * s.response_length, with_copy=True),
        }
        update = {
            "activations": self._kept(micro, longest, bool(s.gradient_checkpointing)),
            "logits": self._logits(micro * s.response_length, with_copy=False),
        }
        return [
            StagePlan("ppo: rollout", standing | rollout),
            StagePlan("ppo: score", standing | score),
            StagePlan("ppo: update", standing | {"gradients": 4 * self._trained()} | update),
        ]

    def _supervised(self, name: str, settings: TrainerSettings, answers: int, vocabulary: int) -> StagePlan:
        """Return the peak of a TRL stage; `answers` rows per example, and logits over `vocabulary` for each token."""
        rows = answers * settings.per_device_train_batch_size
        adapter = self.adapter_parameters()
        parts = self._standing(adapters=1, trained=adapter, optim="adam") | {"gradients": 4 * adapter}
        parts["activations"] = self._kept(rows, self.config.max_length, settings.gradient_checkpointing)
        if vocabulary:
            parts["logits"] = rows * self.config.max_length * vocabulary * (2 * self.width + 8)
        return StagePlan(name, parts)

    def _standing(self, adapters: int, trained: float, optim: str) -> dict[str, float]:
        per_weight = NF4_BYTES if self.config.load_in_4bit else self.width
        parts: dict[str, float] = {} if self.on_cuda else {"process": PROCESS_BYTES}
        parts["weights"] = self.shape.body * per_weight + self.shape.other * self.width
        parts["adapters"] = 4 * adapters * self.adapter_parameters()
        parts["optimizer"] = ADAM_BYTES[optim] * trained
        if self.expand:
            parts["working copy"] = self.shape.body * self.width
        return parts

    def adapter_parameters(self) -> int:
        """Return the parameters of one adapter."""
        return sum(self.config.lora.r * (one.inputs + one.outputs) for one in self.shape.linears if self._adapted(one))

    def _trained(self) -> int:
        return self.adapter_parameters() * (1 if self.config.ppo.value_model == "head" else 2)

    def _adapted(self, linear: LinearShape) -> bool:
        lora = self.config.lora
        return linear.name in lora.target_modules and (
            not lora.layers_to_transform or linear.layer in lora.layers_to_transform
        )

    def _first_adapted(self) -> int:
        return min((one.layer for one in self.shape.linears if self._adapted(one)), default=0)

    def _passing(self, rows: int, length: int) -> float:
        """Return what a pass without gradient holds at its fullest layer."""
        per_token = (4 * self.shape.hidden + 3 * self.shape.inner + 2 * self.shape.query_width) * self.width
        return self._held * rows * length * (per_token + self._attention(length, kept=False))

    def _kept(self, rows: int, length: int, checkpointing: bool) -> float:
        """Return what forward keeps for backward, and what backward holds beside it at its fullest layer."""
        s = self.shape
        tokens, layers = rows * length, s.layers - self._first_adapted()
        inputs = {one.name: one.inputs for one in s.linears if self._adapted(one)}
        first = max((inputs.get(name, 0) for name in ("q_proj", "k_proj", "v_proj")), default=0)
        second = max((inputs.get(name, 0) for name in ("gate_proj", "up_proj")), default=0)
        adapted = first + second + inputs.get("down_proj", 0) + self.config.lora.r * len(inputs)
        # two norm inputs; queries and what they gathered; keys and values; both halves of the gate
        numbers = 2 * s.hidden + 2 * s.query_width + 2 * s.key_width + 2 * s.inner + adapted
        one_layer = tokens * (numbers * self.width + self._attention(length, kept=True))
        backward = tokens * ((5 * s.inner + 4 * s.hidden) * self.width + self._attention(length, kept=False))
        kept = layers * tokens * s.hidden * self.width + one_layer if checkpointing else layers * one_layer
        return self._held * (kept + backward + tokens * s.hidden * (4 + self.width))

    def _attention(self, length: int, kept: bool) -> float:
        """Return bytes of attention per token: the scores of plain attention on a CPU; none of fused on CUDA."""
        if self.on_cuda:
            return 0
        return self.shape.heads * length * ((4 + self.width) if kept else (4 + 2 * self.width))

    def _logits(self, tokens: int, with_copy: bool) -> float:
        """Return what one chunk of logits takes: 16 bits, float32, log-softmax, and probabilities."""
        rows = self.config.ppo.logits_chunk_size or max(1, CHUNK_BYTES // (4 * self.shape.vocabulary))
        return min(rows, tokens) * self.shape.vocabulary * (8 + 2 * self.width + (4 if with_copy else 0))


def expands(config: RunConfig, shape: ModelShape, on_cuda: bool, free: float) -> bool:
    """Return whether a run with `free` bytes will hold a working copy, as RoleLayers.has_room_for_copy decides."""
    if not config.load_in_4bit or config.ppo.expand_weights is not None:
        return bool(config.ppo.expand_weights) and config.load_in_4bit
    without = Planner(config, shape, on_cuda, expand=False)
    standing = without._standing(3, without._trained(), config.ppo.optim)
    return free - sum(standing.values()) > 2 * shape.body * without.width


def peaks(config: RunConfig, shape: ModelShape, on_cuda: bool, free: float) -> list[StagePlan]:
    """Return the predicted peak of each stage on a device with `free` bytes."""
    return Planner(config, shape, on_cuda, expands(config, shape, on_cuda, free)).stages()


Change = tuple[str, Any]
"""A dotted field and its new value."""


def fitting_changes(config: RunConfig, shape: ModelShape, on_cuda: bool, free: float) -> list[Change] | None:
    """Return changes of settings, cheapest first, after which every stage fits into `free` bytes; none if nothing does.

    The result of training stays the same: only what trades time for memory is changed, and last the lengths.
    """
    changes: dict[str, Any] = {}
    for change in _ladder(config):
        if max(plan.total for plan in peaks(config, shape, on_cuda, free)) <= free:
            return list(changes.items())
        tight = max(peaks(config, shape, on_cuda, free), key=lambda plan: plan.total)
        for name, value in change(config, tight.name):
            config, changes[name] = _with(config, name, value), value
    fits = max(plan.total for plan in peaks(config, shape, on_cuda, free)) <= free
    return list(changes.items()) if fits else None


def _ladder(config: RunConfig) -> Iterator[Callable[[RunConfig, str], list[Change]]]:
    yield lambda c, _: [("ppo.expand_weights", False)] if c.ppo.expand_weights else []
    steps = 8
    for _ in range(steps):
        yield _smaller_batch
    yield lambda c, _: [
        (f"{section}.gradient_checkpointing", True)
        for section in ("reward", "sft", "ppo")
        if not getattr(c, section).gradient_checkpointing
    ]
    yield lambda c, _: [("ppo.optim", "paged_adam_8bit")] if c.ppo.optim == "adam" else []
    for _ in range(2):
        yield lambda c, _: [
            ("max_length", max(64, c.max_length // 2)),
            ("max_prompt_length", max(32, c.max_prompt_length // 2)),
            ("ppo.response_length", max(32, c.ppo.response_length // 2)),
        ]


def _smaller_batch(config: RunConfig, stage: str) -> list[Change]:
    """Return the batch of the tightest stage halved, with more gradient accumulation where the result needs it."""
    s = config.ppo
    if stage in ("reward", "instruct"):
        section = "sft" if stage == "instruct" else "reward"
        settings = getattr(config, section)
        size = settings.per_device_train_batch_size
        if size == 1:
            return []
        half = size // 2
        accumulated = settings.gradient_accumulation_steps * size // half
        return [
            (f"{section}.per_device_train_batch_size", half),
            (f"{section}.gradient_accumulation_steps", accumulated),
        ]
    field_name, size = {
        "ppo: rollout": ("rollout_batch_size", s.rollout_batch_size or s.batch_size),
        "ppo: score": ("scoring_batch_size", min(s.scoring_batch_size, s.batch_size)),
        "ppo: update": ("micro_batch_size", min(s.micro_batch_size, s.batch_size // s.num_mini_batches)),
    }[stage]
    return [(f"ppo.{field_name}", size // 2)] if size > 1 else []


def _with(config: RunConfig, name: str, value: Any) -> RunConfig:
    section, _, leaf = name.rpartition(".")
    if not section:
        return replace(config, **{leaf: value})
    return replace(config, **{section: replace(getattr(config, section), **{leaf: value})})
