"""Whether a model has as many positions as the longest text that a run gives it."""

from __future__ import annotations

from typing import Any

from lora_rlhf.base.prequantized import BASE_SETTING
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError

STOP_STRING_TOKENS = 8
"""By how many tokens the reward may read an answer longer than it was sampled: one that a stop string cuts in two is
read as several."""


def check_positions(config: RunConfig, hf_config: Any, setting: str = BASE_SETTING) -> None:
    """Raise `UserError` where the run's lengths exceed the positions of a model.

    Models with a table of positions fail beyond its end, in the middle of a run; the others were never trained there.

    Args:
        config: the run's.
        hf_config: transformers' own of the model.
        setting: that names the model. Pairs are trained on the run's base alone.
    """
    positions = getattr(hf_config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return
    has = f"and {hf_config.model_type} ({setting}) has {positions} positions"
    prompt, answer = config.max_prompt_length, config.ppo.response_length
    longest = prompt + answer + 1 + (STOP_STRING_TOKENS if config.ppo.stop_strings else 0)
    if longest > positions:
        raise UserError(
            f"max_prompt_length: prompts of {prompt} tokens and answers of {answer} (ppo.response_length) take up to "
            f"{longest} tokens with their end, {has}: set smaller ones, or choose another model"
        )
    if setting == BASE_SETTING and config.max_length > positions:
        raise UserError(
            f"max_length: pairs take up to {config.max_length} tokens, {has}: set max_length: {positions}, or choose "
            "another model"
        )
