"""PPO learns: a reward whose optimum is known is reached within seconds on the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import POLICY, REFERENCE, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import prompt_ids
from lora_rlhf.data.preferences import PreferencePair
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.ppo.rollout import sampled_answers
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.reward.sources import Answers, CombinedReward

LENGTH = 4
PAIRS = [PreferencePair((("user", text),), "good", "bad") for text in ("hi", "why?", "what now", "tell me")]
SETTINGS = {
    "total_steps": 20, "batch_size": 64, "micro_batch_size": 64, "num_ppo_epochs": 2, "num_mini_batches": 2,
    "learning_rate": 2e-2, "response_length": LENGTH, "missing_eos_penalty": 0.0, "kl_coef": 0.0, "max_kl": None,
    "temperature": 0.4,  # at 1, the frozen head of the tiny model cannot give a token more than about half
}  # fmt: skip


@dataclass
class TokenCount:
    """Pays 1 for each occurrence of one token in the answer: `LENGTH` at most, when every token is that one."""

    token: int
    name: str = "count"
    weight: float = 1.0

    def scores(self, answers: Answers) -> torch.Tensor:
        hits = (answers.ids == self.token) & answers.mask
        return hits[:, -LENGTH - 1 :].sum(1).float()  # EOS is read behind them


@pytest.mark.parametrize(
    ("seed", "dtype", "fast_paths"),
    [
        (0, "float32", {"expand_weights": True}),
        (1, "float32", {"expand_weights": True}),
        (2, "float32", {"expand_weights": True}),
        (0, "float32", {"expand_weights": False, "sampler_correction": None}),
        (1, "float32", {"value_model": "head"}),
        (2, "float32", {"mixed_adapter_scoring": True, "gradient_checkpointing": True, "rollout_batch_size": 24}),
        pytest.param(0, "bfloat16", {}, marks=pytest.mark.slow),
        *(pytest.param(seed, "float16", {}, marks=pytest.mark.slow) for seed in range(3)),
    ],
)
def test_ppo_learns_to_say_what_is_paid_for(
    make_config: Callable[..., RunConfig], tokenizer: Any, seed: int, dtype: str, fast_paths: dict[str, Any]
) -> None:
    config = make_config(ppo=SETTINGS | fast_paths, dtype=dtype)
    torch.manual_seed(seed)
    base = SharedBase(load_causal_lm(config), lora_config(config.lora), getattr(torch, dtype))
    prompts = [prompt_ids(tokenizer, pair.messages) for pair in PAIRS] * 32
    sampling = Sampling(LENGTH, config.ppo.temperature)

    def said(role: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sampled_answers(base, role, prompts, sampling, tokenizer, generator).response_ids

    # Paid is a token that the base says now and then.
    paid = int(torch.bincount(said(REFERENCE).flatten()).argsort(descending=True)[seed])
    assert 0.01 < (said(POLICY) == paid).float().mean() < 0.1

    trainer = PpoTrainer(base, tokenizer, PAIRS, CombinedReward([TokenCount(paid)]), config.ppo, seed)
    for _ in range(config.ppo.total_steps):
        assert "skipped" not in trainer.step()
    assert (said(POLICY) == paid).float().mean() >= 0.9
    assert (said(REFERENCE) == paid).float().mean() < 0.1
