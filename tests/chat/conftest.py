"""A comparison of three arms whose adapters have random, non-zero weights, so that each answers otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_rlhf.base.shared import INSTRUCT, POLICY, REFERENCE, REWARD, SharedBase
from lora_rlhf.chat.comparison import ChatComparison
from lora_rlhf.evaluation.loaded_arms import LoadedArm
from lora_rlhf.reward.sources import AdapterReward, CombinedReward

ROLES = {"base": REFERENCE, "instruct": INSTRUCT, "plus": POLICY}


@pytest.fixture
def base(make_base: Callable[..., SharedBase]) -> SharedBase:
    return make_base(roles=(REWARD, INSTRUCT))


@pytest.fixture
def comparison(base: SharedBase, tokenizer: Any) -> ChatComparison:
    arms = {name: LoadedArm(name, base, role, tokenizer, name) for name, role in ROLES.items()}
    return ChatComparison(arms, CombinedReward([AdapterReward(base)]), context=256, most_tokens=64)
