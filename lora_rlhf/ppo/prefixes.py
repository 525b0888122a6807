"""Given beginnings of answers: how PPO finds kinds of answers that the policy hardly ever samples by itself.

PPO makes likelier what it has sampled and what was good. A base model that declines one harmful request in a hundred
gives it nothing to learn declining from. So a share of a step's answers begin with the first tokens of the chosen
answer of their pair, and the policy goes on from there. The reward says whether that was good; nothing is imitated for
its own sake. The tokens that were given count as actions, with the probability that the policy gives them: the ratio
of a step begins at 1 for them too. The share falls to 0 over the run, so that what the policy ends with is its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def share_at(step: int, total: int, share: float) -> float:
    """Return the share of prefixed answers at `step` (from 0) of `total`: `share` at first, then linearly to 0."""
    return share * max(0.0, 1 - step / max(1, total - 1))


def drawn_prefixes(
    prefixes: Sequence[Sequence[int]], share: float, generator: torch.Generator
) -> list[list[int]] | None:
    """Return each row's prefix, or an empty one: about `share` of them are kept, drawn by `generator`."""
    if share <= 0:
        return None
    kept = torch.rand(len(prefixes), generator=generator) < share
    return [list(prefix) if keep else [] for prefix, keep in zip(prefixes, kept.tolist(), strict=True)]
