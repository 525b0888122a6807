"""What the benchmarks share: a PPO trainer of a given shape whose answers never end early, and its floor."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import PpoSettings, RunConfig
from lora_rlhf.data.preferences import PreferencePair, preference_pairs
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.reward.sources import AdapterReward, CombinedReward, ScoreScale


class Endless:
    """A tokenizer whose EOS no model can sample, so that every answer is as long as it may be."""

    eos_token_id = -1
    chat_template = None  # it may close a turn with a token that can be sampled

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
    trainer = trainer_on(base, config, tokenizer, pairs)
    trainer.tokenizer, trainer.prompt_ids = Endless(tokenizer), full_length(pairs, tokenizer, prompt_length)
    return trainer


def trainer_on(
    base: SharedBase, config: RunConfig, tokenizer: Any, pairs: list[PreferencePair], scale: ScoreScale | None = None
) -> PpoTrainer:
    """Return a trainer with all four roles on a base that has its policy; the reward adapter is random.

    Args:
        base: the shared base.
        config: of the run.
        tokenizer: of the base.
        pairs: training pairs.
        scale: of the reward; None means that it is measured now, in a rollout.
    """
    base.new_adapter(REWARD, lora_config(config.lora), trainable=False)
    with torch.no_grad():
        base.heads[REWARD].weight.normal_(std=0.02)  # type: ignore[operator]
    source = AdapterReward(base, batch=config.ppo.scoring_batch_size)
    reward = CombinedReward([source], {source.name: scale} if scale else {})
    return PpoTrainer(base, tokenizer, pairs, reward, config.ppo, config.seed)


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
    token = token_floor(rates, width * (body + head), body + head, s.batch_size)
    scored = 2 * body * tokens * (_trained_roles(s) + 2) + 2 * 2 * head * answers
    return {
        "rollout": rollout_floor(rates, body, s.batch_size, prompt_length, s.response_length, token),
        "score": scored / rates.matmul,
        "update": update_flops(s, body, head, prompt_length, s.response_length) / rates.matmul,
    }


def rollout_floor(rates: Rates, body: float, rows: int, prompt: float, answer: float, token: float) -> float:
    """Return the least seconds of a rollout: prompts at the rate of products, then `answer` tokens of `token` each.

    Args:
        rates: of the device.
        body: weights outside embedding and LM head.
        rows: answers.
        prompt: mean tokens of a prompt.
        answer: tokens of the longest answer.
        token: least seconds of one decoded token of all rows.
    """
    return 2 * body * rows * prompt / rates.matmul + answer * token


def token_floor(rates: Rates, read: float, weights: float, rows: int) -> float:
    """Return the least seconds of one decoded token: `read` bytes are read, or the products done, if that is longer."""
    return max(read / rates.bandwidth, 2 * weights * rows / rates.matmul)


def update_flops(settings: PpoSettings, body: float, head: float, prompt: float, answer: float) -> float:
    """Return the floating-point operations that an update cannot do without.

    The frozen base takes no gradient of its own, so backward costs as much as forward. What checkpointing computes
    again does not count; nor, being a few percent, do attention's own products and the adapters'. The LM head counts on
    answers alone.

    Args:
        settings: of PPO.
        body: weights outside embedding and LM head.
        head: weights of the LM head.
        prompt: mean tokens of a prompt.
        answer: mean tokens of an answer.
    """
    of_answer = _trained_roles(settings) * 4 * body * (prompt + answer) + 4 * head * answer
    return settings.num_ppo_epochs * settings.batch_size * of_answer


def _trained_roles(settings: PpoSettings) -> int:
    """Return how many adapters learn: the policy's, and the value's unless it is only a head."""
    return 2 if settings.trains_value_adapter else 1
