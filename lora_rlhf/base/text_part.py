"""The text model inside a model that also takes images: its config, and where its weights are in the model's files."""

from __future__ import annotations

import re
from typing import Any

from lora_rlhf.errors import UserError

TEXT_WEIGHTS = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""Names of tensors, as models with images are published, → names in the text model."""


def published_names(name: str) -> tuple[str, ...]:
    """Return how files call a tensor of the text model that a model with images holds: `TEXT_WEIGHTS` backwards."""
    return f"language_model.{name}", re.sub(r"^model\.", "model.language_model.", name)


def text_config(found: Any, source: str, setting: str) -> Any:
    """Return the config of the text model inside `found`, or `found` where that is a text model.

    Args:
        found: transformers' config of a model.
        source: the model's name, for errors.
        setting: that names the model, for errors.

    Raises:
        UserError: transformers has no causal language model for the text part, or none for the model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(found, "is_encoder_decoder", False):
        raise UserError(f"{setting}: {source} ({found.model_type}) has an encoder: choose a causal language model")
    text = getattr(found, "text_config", None)
    if text is None:
        if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(
                f"{setting}: {source} ({found.model_type}) is no causal language model that transformers knows: choose "
                "one that is"
            )
        return found
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{setting}: {source} ({found.model_type}) takes more than text, and transformers has no causal language "
            f"model for its text part alone ({text.model_type}): choose a text model"
        )
    text._name_or_path = found._name_or_path
    if (quantized := getattr(found, "quantization_config", None)) is not None:
        text.quantization_config = quantized
    return text
