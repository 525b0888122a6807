"""What the benchmarks share: a PPO trainer of a given shape whose answers never end early, and its floor."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm, load_tokenizer
from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.data.preferences import PreferencePair, preference_pairs
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.reward.sources import AdapterReward, CombinedReward


class Endless:
    """A tokenizer whose EOS no model can sample, so that every answer is as long as it may be."""

    eos_token_id = -1

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def full_length(pairs: list[PreferencePair], tokenizer: Any, width: int) -> list[list[int]]:
    """Return prompts of exactly `width` tokens, made of the embedded prompts."""
    stream = [i for pair in pairs for i in tokenizer(pair.prompt[-1][1], add_special_tokens=False)["input_ids"]]
    stream = stream * (1 + width * len(pairs) // len(stream))
    return [stream[k * width : (k + 1) * width] for k in range(len(pairs))]


def trainer_of_shape(config: RunConfig, prompt_length: int) -> PpoTrainer:
    """Return a trainer with all four roles (a random reward adapter), prompts of one length and endless answers."""
    tokenizer = load_tokenizer(config)
    pairs, _ = preference_pairs(config, tokenizer, "train")
    torch.manual_seed(config.seed)
    base = SharedBase(load_causal_lm(config), lora_config(config.lora), getattr(torch, config.dtype))
    base.new_adapter(REWARD, lora_config(config.lora), trainable=False)
    with torch.no_grad():
        base.heads[REWARD].weight.normal_(std=0.02)  # type: ignore[operator]
    source = AdapterReward(base, batch=config.ppo.scoring_batch_size)
    trainer = PpoTrainer(base, tokenizer, pairs, CombinedReward([source]), config.ppo, config.seed)
    trainer.tokenizer, trainer.prompt_ids = Endless(tokenizer), full_length(pairs, tokenizer, prompt_length)
    return trainer


@dataclass(frozen=True)
class Rates:
    """What this machine does at best.

    Attributes:
        bandwidth: bytes read per second from memory that no cache holds.
        matmul: floating-point operations per second of a large product of two 16-bit (or 32-bit) matrices.
    """

    bandwidth: float
    matmul: float


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure the device: best of several reads of 256 MiB, and of several products of 2048 x 2048 matrices."""
    data = torch.ones(2**28 // 4, dtype=torch.float32, device=device)
    left, right = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    read = min(_seconds(data.sum, device) for _ in range(7))
    product = min(_seconds(lambda: left @ right.T, device) for _ in range(7))
    return Rates(data.numel() * 4 / read, 2 * 2048**3 / product)


def _seconds(work: Any, device: torch.device) -> float:
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def floor_seconds(trainer: PpoTrainer, prompt_length: int, rates: Rates) -> dict[str, float]:
    """Return the least seconds of each stage of a PPO step at the measured rates.

    Rollout: every token step reads each weight once in 16 bits, or does its products, whichever takes longer; before
    it the prompts pass once. Score: one forward pass per role. Update: a forward pass, and a backward one that costs as
    much (the base takes no gradient of its own), for policy and value. The LM head counts on answer tokens alone.
    """
    base, s = trainer.base, trainer.settings
    head = base.lm_head.weight.numel()
    body = sum(m.in_features * m.out_features for m in base.trunk.modules() if hasattr(m, "in_features"))
    adapted = {id(m.get_base_layer()) for m in base.trunk.modules() if hasattr(m, "get_base_layer")}
    doubled = sum(m.in_features * m.out_features for m in base.trunk.modules() if id(m) in adapted)
    lora = sum(p.numel() for n, p in base.trunk.named_parameters() if "lora_" in n)
    body -= doubled + lora  # an adapted layer is seen twice above: itself, and what it wraps
    width = torch.finfo(base.compute_dtype).bits // 8
    answers, tokens = s.batch_size * s.response_length, s.batch_size * (prompt_length + s.response_length)
    step = max(width * (body + head) / rates.bandwidth, 2 * (body + head) * s.batch_size / rates.matmul)
    prefill = 2 * body * s.batch_size * prompt_length / rates.matmul
    trained = 1 if s.value_model == "head" else 2
    scored = 2 * body * tokens * (trained + 2) + 2 * 2 * head * answers
    updated = s.num_ppo_epochs * (trained * 4 * body * tokens + 4 * head * answers)
    return {
        "rollout": prefill + s.response_length * step,
        "score": scored / rates.matmul,
        "update": updated / rates.matmul,
    }
