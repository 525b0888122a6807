"""What the tests of reward sources share."""

from __future__ import annotations

from typing import Any

import torch

from lora_rlhf.reward.sources import Answers, FunctionReward


def answers(*completions: str, **columns: list[Any]) -> Answers:
    """Answers to short dialogues; ids are random, of different lengths."""
    n, generator = len(completions), torch.Generator().manual_seed(0)
    prompts = [[{"role": "user", "content": f"question {i}" + " again" * i}] for i in range(n)]
    mask = torch.arange(9) >= torch.arange(n)[:, None]
    return Answers(torch.randint(5, 500, (n, 9), generator=generator), mask, prompts, list(completions), columns)


def numbers(name: str, values: Any, weight: float = 1.0) -> FunctionReward:
    """A source that gives `values`, whatever the answers."""
    return FunctionReward(lambda **_: values, name, weight)
