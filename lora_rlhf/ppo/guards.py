"""What stops a step, or the run, before it does harm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from lora_rlhf.config import PpoSettings
from lora_rlhf.errors import NotFinite, UserError

WHAT_TO_CHANGE = "a smaller ppo.learning_rate, a larger ppo.kl_coef, or dtype: float32 may help"


@dataclass
class Guards:
    """How many steps in a row went wrong, and in which way."""

    skipped: int = 0
    stopped_updates: int = 0

    def note_skipped(self, settings: PpoSettings, step: int, reason: str) -> None:
        """Count a step that was skipped.

        Raises:
            UserError: it was one too many in a row.
        """
        self.skipped += 1
        if settings.max_skipped_steps is not None and self.skipped > settings.max_skipped_steps:
            raise UserError(
                f"PPO step {step}: {reason}, and so it was in the {self.skipped - 1} steps before: {WHAT_TO_CHANGE}. "
                "The batches are in skipped/, and metrics.jsonl shows how it came about"
            )

    def note_taken(self, settings: PpoSettings, update_stopped: bool) -> str | None:
        """Count a step that was taken; return why the run should end, or none.

        Args:
            settings: with the limit.
            update_stopped: whether the policy had moved further than `update_kl_limit` before the step's passes ended.
        """
        self.skipped = 0
        self.stopped_updates = self.stopped_updates + 1 if update_stopped else 0
        limit = settings.max_stopped_updates
        if limit is None or self.stopped_updates < limit:
            return None
        return (
            f"the policy moved further than ppo.update_kl_limit {settings.update_kl_limit:g} within "
            f"{self.stopped_updates} steps in a row"
        )


@dataclass(frozen=True)
class Answered:
    """The last step's prompts (as numbers of the training pairs), answers and scores; none of them where it failed.

    Attributes:
        chosen: which pairs.
        texts: the answers.
        scores: normalised; empty where there are none.
        random_state: of the sampling generator, uint8, before the step drew from it.
        order: of the prompts to come, before the step took its own.
    """

    chosen: list[int]
    texts: list[str]
    scores: list[float]
    random_state: torch.Tensor
    order: list[int]


def check_finite(**tensors: torch.Tensor) -> None:
    """Raise `NotFinite`, with the name, where a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"{name.replace('_', ' ')} is NaN or infinite")


def opening_share(texts: Sequence[str]) -> float:
    """Return the share of answers that begin with the three words with which most of them begin, in any case."""
    openings = Counter(" ".join(text.lower().split()[:3]) for text in texts)
    return max(openings.values()) / len(texts)


def repetition(ids: torch.Tensor, mask: torch.Tensor, width: int = 3) -> float:
    """Return the share of an answer's n-grams that it has said before, averaged over answers.

    Args:
        ids: [answers, R] tokens.
        mask: [answers, R], true for real tokens.
        width: n of the n-grams.
    """
    shares = []
    for row, real in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        grams = [tuple(row[i : i + width]) for i in range(int(real) - width + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return fmean(shares)
