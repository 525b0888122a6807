"""Whether a model from another backend can be trusted: causal without a mask, decoding as it reads."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

IDS, PREFIX = 12, 7
"""Tokens that are read, and those of them that are read first."""


@torch.no_grad()
def reads_as_it_decodes(causal_lm: Any) -> bool:
    """Return whether the trunk gives a prefix the states it has in the whole, and a token the one it has when decoded.

    That is how PPO calls it: without a mask on packed rows, and with transformers' cache in rollouts.
    """
    trunk = getattr(causal_lm, causal_lm.base_model_prefix)
    device = causal_lm.get_input_embeddings().weight.device
    ids = torch.arange(5, 5 + IDS, device=device)[None]
    places = torch.arange(IDS, device=device)[None]
    cache = DynamicCache(config=trunk.config)
    try:
        whole = trunk(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
        first = trunk(
            input_ids=ids[:, :PREFIX], position_ids=places[:, :PREFIX], past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        rest = trunk(
            input_ids=ids[:, PREFIX : PREFIX + 1], position_ids=places[:, PREFIX : PREFIX + 1], past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # fmt: skip
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError):
        return False
    found = torch.cat([first, rest], 1).float()
    expected = whole[:, : PREFIX + 1].float()
    return found.shape == expected.shape and bool((found - expected).norm() <= 0.05 * expected.norm())
