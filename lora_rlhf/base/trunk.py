"""Where a causal language model keeps its layers, without its LM head."""

from __future__ import annotations

from typing import Any


def trunk_name(causal_lm: Any) -> str:
    """Return the attribute of a transformers model that holds its layers; Llama-4 gives the name of none."""
    prefix: str = causal_lm.base_model_prefix
    return prefix if hasattr(causal_lm, prefix) else "model"


def trunk_of(causal_lm: Any) -> Any:
    """Return the layers of a transformers model: from token ids to the states after the final norm."""
    return getattr(causal_lm, trunk_name(causal_lm))
