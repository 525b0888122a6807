"""What each stage of a run takes at its peak, predicted from the config and the model's shape alone.

Every part is counted in bytes: what stands (weights, adapters, gradients, optimizer, working copy), and what comes and
goes at the fullest moment (keys and values, activations, logits). Lengths are the longest that the config allows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lora_rlhf.base.shard_files import SHARD_BYTES
from lora_rlhf.base.token_logprobs import rows_per_chunk
from lora_rlhf.config import RunConfig, TrainerSettings
from lora_rlhf.model_shape import LinearShape, ModelShape
from lora_rlhf.processes import BUCKET_BYTES, launched
from lora_rlhf.reward.own_reward import trains_own_reward

ADAM_BYTES = {"adam": 8.0, "paged_adam_8bit": 2.0}
"""Per trained parameter: two moments."""
PROCESS_BYTES = 690 * 2**20
"""On a CPU: resident memory of Python with torch, transformers, peft, datasets and oneDNN's kernels, no model."""
HEAP_SHARE = 1.5
"""On a CPU: what comes and goes takes this many times its size, for glibc's heap keeps holes between blocks."""
RESIDUAL_BYTES = 4
"""Of a number in the sum of the layers' outputs, whatever the compute dtype: see `keep_residuals_in_float32`."""
COPY_WITHIN_LIMIT = "copy within max_kl"
"""Name of a part: policy and value as `ppo.max_kl` may go back to them."""
CONTEXT_BYTES = 600 * 2**20
"""What CUDA itself takes of a card, beside what torch allocates."""


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
        processes: that share the run, one per GPU; as many as were launched.
    """

    config: RunConfig
    shape: ModelShape
    on_cuda: bool
    expand: bool
    processes: int = field(default_factory=launched)

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return getattr(torch, self.config.dtype).itemsize

    @property
    def _held(self) -> float:
        return 1.0 if self.on_cuda else HEAP_SHARE

    def stages(self) -> list[StagePlan]:
        """Return the peaks, in the order of the stages; of those that the run has."""
        c = self.config
        plans: list[StagePlan] = []
        if trains_own_reward(c.ppo.reward_sources):
            plans.append(self._supervised("reward", c.reward, 2, 0))
        if c.instruct_model_name_or_path is None:
            plans.append(self._supervised("instruct", c.sft, 1, self.shape.vocabulary))
        plans += self.ppo_stages()
        if not self.on_cuda:
            standing = self._standing(adapters=1, trained=0, optim="adam", expand=False)
            plans.append(StagePlan("merge", standing | {"16-bit weights": self.merge_bytes()}))
        if c.instruct_model_name_or_path is not None:  # the Instruct model beside the base, in 4 bits too
            rollout = next(plan for plan in plans if plan.name == "ppo: rollout").parts
            parts = {name: size for name, size in rollout.items() if name not in ("optimizer", COPY_WITHIN_LIMIT)}
            plans.append(StagePlan("compare", parts | {"weights": 2 * rollout["weights"]}))
        return plans

    def merge_bytes(self) -> float:
        """Return the main memory that merging takes beside the base: a shard, and one layer on its way into it.

        On a CPU the adapter is added to the layer's weight there too, in float32.
        """
        whole = (self.shape.body + self.shape.other) * self.width
        embeddings = self.shape.vocabulary * self.shape.hidden * self.width  # larger than a shard: one of its own
        layer = max(one.inputs * one.outputs for one in self.shape.linears) * (self.width + (0 if self.on_cuda else 4))
        return min(whole, max(SHARD_BYTES, embeddings)) + layer

    def standing_bytes(self) -> float:
        """Return what stands throughout PPO, without a working copy."""
        return sum(self._ppo_standing(expand=False).values())

    def copy_bytes(self) -> float:
        """Return what a working copy takes: of every layer in 4 bits, else of the adapted ones."""
        copied = [one for one in self.shape.linears if self.config.load_in_4bit or self._adapted(one)]
        return sum(one.inputs * one.outputs for one in copied) * self.width

    def ppo_stages(self) -> list[StagePlan]:
        """Return the peaks of the three parts of a PPO step."""
        c, s = self.config, self.config.ppo
        longest = c.max_prompt_length + s.response_length
        adapters = 3 if s.trains_value_adapter else 2
        standing = self._ppo_standing(self.expand)
        decoded = min(s.rollout_batch_size or s.batch_size, s.batch_size)
        scored = min(s.scoring_batch_size, s.batch_size)
        micro = min(s.micro_batch_size, s.batch_size // s.num_mini_batches)
        roles = adapters + 1
        cache = decoded * longest * self.shape.layers * 2 * self.shape.key_width * self.width
        rollout = self._cast_adapters(1) | {
            "keys and values": cache,
            "activations": self._passing(decoded, c.max_prompt_length),
            "logits": decoded * self.shape.vocabulary * 12.0,  # logits, probabilities, and their running sum
        }
        score = self._cast_adapters(adapters) | {
            "activations": self._passing(scored * (roles if s.mixed_adapter_scoring else 1), longest)
            + roles * scored * longest * self.shape.hidden * self.width
            + (s.batch_size * longest * self.shape.hidden * RESIDUAL_BYTES if self._first_adapted() else 0),
            "logits": self._logits(scored * s.response_length),
        }
        update = self._cast_adapters(0 if s.gradient_checkpointing else 1) | {
            "activations": self._kept(micro, longest, bool(s.gradient_checkpointing)),
            "logits": self._logits(micro * s.response_length),
        }
        return [
            StagePlan("ppo: rollout", standing | rollout),
            StagePlan("ppo: score", standing | score),
            StagePlan("ppo: update", standing | self._gradients(self._trained()) | update),
        ]

    def _supervised(self, name: str, settings: TrainerSettings, answers: int, vocabulary: int) -> StagePlan:
        """Return the peak of a TRL stage; `answers` rows per example, and logits over `vocabulary` for each token."""
        rows = answers * settings.per_device_train_batch_size
        adapter = self.adapter_parameters()
        parts = self._standing(1, adapter, "adam", self.expand and self.config.load_in_4bit)
        parts |= self._gradients(adapter)
        parts |= self._cast_adapters(0 if settings.gradient_checkpointing else 1)
        parts["activations"] = self._kept(rows, self.config.max_length, settings.gradient_checkpointing)
        if vocabulary:
            parts["logits"] = rows * self.config.max_length * vocabulary * (2 * self.width + 8)
        return StagePlan(name, parts)

    def _cast_adapters(self, adapters: int) -> dict[str, float]:
        """Return the copies of adapters in the compute dtype, which one pass after another uses."""
        size = adapters * self.adapter_parameters() * self.width
        return {"adapters in 16 bits": float(size)} if size and self.width < 4 else {}

    def _gradients(self, trained: int) -> dict[str, float]:
        """Return the gradients, and the part of them that is copied to be summed over processes."""
        parts = {"gradients": 4.0 * trained}
        return parts if self.processes == 1 else parts | {"sum of gradients": min(BUCKET_BYTES, 4.0 * trained)}

    def _ppo_standing(self, expand: bool) -> dict[str, float]:
        """Return what stands throughout PPO."""
        s = self.config.ppo
        parts = self._standing(3 if s.trains_value_adapter else 2, self._trained(), s.optim, expand)
        if s.max_kl is not None and not self.on_cuda:  # beside a card it is in main memory, where there is room
            parts[COPY_WITHIN_LIMIT] = 4.0 * self._trained()
        return parts

    def _standing(self, adapters: int, trained: float, optim: str, expand: bool) -> dict[str, float]:
        four_bit = self.config.load_in_4bit
        body = sum(n.inputs * n.outputs * (n.bytes_in_4_bits if four_bit else self.width) for n in self.shape.linears)
        parts: dict[str, float] = {} if self.on_cuda else {"process": PROCESS_BYTES}
        parts["weights"] = body + self.shape.other * self.width
        parts["adapters"] = 4 * adapters * self.adapter_parameters()
        parts["optimizer"] = ADAM_BYTES[optim] * trained
        if expand:
            parts["working copy"] = self.copy_bytes()
        return parts

    def adapter_parameters(self) -> int:
        """Return the parameters of one adapter."""
        return sum(self.config.lora.r * (one.inputs + one.outputs) for one in self.shape.linears if self._adapted(one))

    def _trained(self) -> int:
        return self.adapter_parameters() * (2 if self.config.ppo.trains_value_adapter else 1)

    def _adapted(self, linear: LinearShape) -> bool:
        lora = self.config.lora
        return linear.name in lora.target_modules and (
            not lora.layers_to_transform or linear.layer in lora.layers_to_transform
        )

    def _first_adapted(self) -> int:
        return min((one.layer for one in self.shape.linears if self._adapted(one)), default=0)

    def _passing(self, rows: int, length: int) -> float:
        """Return what a pass without gradient holds at its fullest layer."""
        numbers = 2 * self.shape.hidden + 3 * self.shape.inner + 2 * self.shape.query_width
        per_token = numbers * self.width + 2 * self.shape.hidden * RESIDUAL_BYTES
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
        backward: float = tokens * (5 * s.inner + 2 * s.hidden) * self.width
        backward += tokens * (2 * s.hidden * RESIDUAL_BYTES + self._attention(length, kept=False))
        kept = layers * tokens * s.hidden * RESIDUAL_BYTES + one_layer if checkpointing else layers * one_layer
        return self._held * (kept + backward + tokens * s.hidden * (4 + self.width))

    def _attention(self, length: int, kept: bool) -> float:
        """Return bytes of attention per token: the scores of plain attention on a CPU; none of fused on CUDA."""
        if self.on_cuda:
            return 0
        return self.shape.heads * length * ((4 + self.width) if kept else (4 + 2 * self.width))

    def _logits(self, tokens: int) -> float:
        """Return what one chunk of logits takes, in float32: logits, log-softmax, and the slope of a cap on them."""
        rows = self.config.ppo.logits_chunk_size or rows_per_chunk(self.shape.vocabulary)
        return 12.0 * min(rows, tokens) * self.shape.vocabulary


def expands(config: RunConfig, shape: ModelShape, on_cuda: bool, free: float) -> bool:
    """Return whether a run with `free` bytes will hold a working copy, as RoleLayers.expands decides."""
    if config.ppo.expand_weights is not None:
        return config.ppo.expand_weights
    without = Planner(config, shape, on_cuda, expand=False)
    return free - without.standing_bytes() > 2 * without.copy_bytes()


def peaks(config: RunConfig, shape: ModelShape, on_cuda: bool, free: float) -> list[StagePlan]:
    """Return the predicted peak of each stage on a device with `free` bytes."""
    return Planner(config, shape, on_cuda, expands(config, shape, on_cuda, free)).stages()
