"""The shape of a model, as its config describes it; that of the models in the shipped configs needs no network."""

from __future__ import annotations

from typing import Any

from lora_rlhf.base.loading import model_config
from lora_rlhf.config import EMBEDDED, RunConfig

MISTRAL_7B: dict[str, Any] = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "sliding_window": 4096, "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
SHIPPED = {
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.1": MISTRAL_7B,
    "HuggingFaceTB/SmolLM2-135M": SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2_135M,
    EMBEDDED: SMOLLM2_135M,
}
"""What decides on shapes in the `config.json` of each model on the Hub; `embedded` is SmolLM2-135M-Instruct."""


def shape_config(config: RunConfig) -> Any:
    """Return a transformers config with the shape of the run's base; nothing else of the model is read.

    Raises:
        UserError: the model's config cannot be had, or its weights are quantised in a way that cannot be a base.
    """
    from transformers import AutoConfig

    if config.model_revision is None and (known := SHIPPED.get(config.model_name_or_path)):
        return AutoConfig.for_model(**known)
    return model_config(config)
