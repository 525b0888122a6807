"""A PPO trainer on the tiny base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from trainer_cases import MakeTrainer

from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.data.preferences import PreferencePair
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.processes import Processes
from lora_rlhf.reward.sources import AdapterReward, CombinedReward, FunctionReward, RewardSource, ScoreScale

PROMPTS = ["hi", "tell me a joke", "why?", "what is the sea made of", "a b c d e f g"]
PAIRS = [PreferencePair((("user", text),), "good", "bad") for text in PROMPTS]


@pytest.fixture
def make_trainer(
    make_config: Callable[..., RunConfig], make_base: Callable[..., SharedBase], tokenizer: Any
) -> MakeTrainer:
    """A trainer whose policy and reward adapter are random and whose model often says EOS; keywords set `ppo`."""

    def make(
        function: Callable[..., Any] | None = None, seed: int = 0, scales: dict[str, ScoreScale] | None = None,
        weight: float = 1.0, model: str | None = None, processes: Processes | None = None, dtype: str = "float32",
        **ppo: Any,
    ) -> PpoTrainer:  # fmt: skip
        config = make_config(ppo={"normalization_samples": 8, "learning_rate": 1e-3} | ppo, dtype=dtype)
        config = replace(config, model_name_or_path=model or config.model_name_or_path)
        torch.manual_seed(seed)
        base = make_base(config, roles=(REWARD,))
        with torch.no_grad():
            base.lm_head.weight[tokenizer.eos_token_id] *= 8
        source: RewardSource = AdapterReward(base, weight=weight, batch=3)
        if function:
            source = FunctionReward(function, "function", weight)
        reward = CombinedReward([source], dict(scales or {}))
        return PpoTrainer(base, tokenizer, PAIRS, reward, config.ppo, seed, processes)

    return make
