"""Which attention runs where gradients are taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def attention_for_gradients(model: Any) -> Iterator[None]:
    """Use transformers' plain attention inside the block where `model` is on the CPU; leave it alone elsewhere.

    Torch's fused attention has a slow backward on CPUs: a third of a PPO update at 70 tokens, on two cores.
    """
    before = model.config._attn_implementation
    if model.device.type != "cpu" or before != "sdpa":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
