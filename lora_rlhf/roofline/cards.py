"""Graphics cards by name: memory, bandwidth and arithmetic as their makers state them."""

from __future__ import annotations

from dataclasses import dataclass

from lora_rlhf.base.devices import AMPERE
from lora_rlhf.errors import UserError


@dataclass(frozen=True)
class Card:
    """What a card's data sheet says of it.

    Attributes:
        name: as people call it.
        memory_gib: of its memory what PyTorch reports, less than its name says; the smallest of several reports.
        bandwidth: bytes per second between its memory and its multiprocessors.
        matmul: floating-point operations per second of dense 16-bit matrix products with float32 sums.
        multiprocessors: their number, on which bitsandbytes' choice of kernel depends.
        capability: CUDA compute capability (major, minor).
    """

    name: str
    memory_gib: float
    bandwidth: float
    matmul: float
    multiprocessors: int
    capability: tuple[int, int]

    def computes_in(self, dtype: str) -> bool:
        """Return whether its stated rate is that of a dtype: float32 has another, bfloat16 may be emulated."""
        return dtype == "float16" or (dtype == "bfloat16" and self.capability >= AMPERE)


CARDS = {
    "rtx3090": Card("RTX 3090", 23.6, 936e9, 71e12, 82, (8, 6)),
    "rtx4090": Card("RTX 4090", 23.6, 1008e9, 165.2e12, 128, (8, 9)),
    "rtx5090": Card("RTX 5090", 31.3, 1792e9, 209.5e12, 170, (12, 0)),
    "a10g": Card("A10G", 22.0, 600e9, 70e12, 80, (8, 6)),
    "l4": Card("L4", 22.0, 300e9, 121e12, 58, (8, 9)),
    "t4": Card("T4", 14.5, 320e9, 65e12, 40, (7, 5)),
    "a100": Card("A100 80 GB SXM", 79.1, 2039e9, 312e12, 108, (8, 0)),
    "h100": Card("H100 SXM", 79.1, 3350e9, 989e12, 132, (9, 0)),
}
"""Rates are those of NVIDIA's data sheets and architecture white papers, without sparsity."""


def card_named(name: str) -> Card:
    """Return the card of a name, case and punctuation aside.

    Raises:
        UserError: the name is not known; the known ones are listed.
    """
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    if plain not in CARDS:
        raise UserError(f"--card {name}: known cards are {', '.join(CARDS)}")
    return CARDS[plain]


def check_dtype(card: Card, dtype: str) -> None:
    """Raise `UserError` where a run's time in `dtype` cannot be counted for a card."""
    if dtype == "float32":
        raise UserError("--card: time is counted for products in 16 bits: add --dtype bfloat16 (or float16)")
    if not card.computes_in(dtype):
        raise UserError(f"--card: {card.name} has no {dtype}, and would emulate it: add --dtype float16")
