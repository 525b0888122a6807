"""Whether a model from another backend can be trusted with packed rows: causal where no mask is given."""

from __future__ import annotations

from typing import Any

import torch

from lora_rlhf.base.trunk import trunk_of
from lora_rlhf.memory_peak import ran_out

IDS, PREFIX = 12, 7
"""Tokens that are read, and those of them that are read alone."""


@torch.no_grad()
def reads_causally(causal_lm: Any) -> bool:
    """Return whether the trunk gives a prefix, without a mask, the states that it has in the whole.

    That is how PPO calls it on packed rows. What samples is checked by the `sampler_kl` of every step.
    """
    trunk = trunk_of(causal_lm)
    device = causal_lm.get_input_embeddings().weight.device
    ids = torch.arange(5, 5 + IDS, device=device)[None]
    places = torch.arange(IDS, device=device)[None]
    try:
        whole, prefix = (
            trunk(input_ids=ids[:, :n], position_ids=places[:, :n], use_cache=False).last_hidden_state.float()
            for n in (IDS, PREFIX)
        )
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
        if ran_out(error):
            raise
        return False
    expected = whole[:, :PREFIX]
    return prefix.shape == expected.shape and bool((prefix - expected).norm() <= 0.05 * expected.norm())
