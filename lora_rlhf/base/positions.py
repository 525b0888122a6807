"""Whether a model has as many positions as the longest text that a run gives it, counted in the base's tokens."""

from __future__ import annotations

from typing import Any

from lora_rlhf.base.prequantized import BASE_SETTING
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError

PIECES = 8
"""By how many tokens at most the reward reads an answer longer than it was sampled: one that a stop string or the end
of the text cuts in two is read in pieces."""
STRETCHED = ("linear", "dynamic", "yarn")
"""Kinds of rotary embeddings whose config may count the positions before they are stretched by its factor."""


def most_positions(hf_config: Any) -> int | None:
    """Return how many tokens a text may have; None where the model does not count them."""
    positions = getattr(hf_config, "max_position_embeddings", None) or getattr(hf_config, "max_seq_len", None)
    if not isinstance(positions, int):
        return None
    rope = getattr(hf_config, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    stretched = rope.get("rope_type") in STRETCHED and isinstance(rope.get("factor"), int | float)
    return int(positions * rope["factor"]) if stretched else positions


def check_positions(config: RunConfig, hf_config: Any, setting: str = BASE_SETTING) -> None:
    """Raise `UserError` where the run's lengths exceed the positions of a model.

    Models with a table of positions fail beyond its end, in the middle of a run; the others were never trained there.

    Args:
        config: the run's.
        hf_config: transformers' own of the model.
        setting: that names the model. Pairs are trained on the run's base alone.
    """
    positions = most_positions(hf_config)
    if positions is None:
        return
    has = f"and {hf_config.model_type} ({setting}) has {positions} positions"
    prompt, answer = config.max_prompt_length, config.ppo.response_length
    longest = prompt + answer + PIECES + 1
    if longest > positions:
        raise UserError(
            f"max_prompt_length: prompts of {prompt} tokens, answers of {answer} (ppo.response_length), {PIECES} to "
            f"spare and EOS make {longest}, {has}: set smaller ones, or choose another model"
        )
    if setting == BASE_SETTING and config.max_length > positions:
        raise UserError(
            f"max_length: pairs take up to {config.max_length} tokens, {has}: set max_length: {positions}, or choose "
            "another model"
        )
