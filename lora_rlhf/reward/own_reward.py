"""Whether a run trains a reward of its own: asked by its stages and by all that foresee or watch them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def trains_own_reward(reward_sources: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a run with these `ppo.reward_sources` trains a reward adapter.

    It does where there are none, or where one of them has no path and so stands for the run's own adapter.
    """
    return not reward_sources or any(not source.get("path") for source in reward_sources)
