"""Checkpoints that were quantised before they were saved: which can be a base, and how they compute in a run's dtype.

Their `config.json` says how they were quantised (`quantization_config`). What bitsandbytes holds in 4 bits, as NF4 or
FP4, with or without double quantisation, is loaded as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from lora_rlhf.errors import UserError

BASE_SETTING, INSTRUCT_SETTING = "model_name_or_path", "instruct_model_name_or_path"
"""The settings that name a run's base and its Instruct model; the first is meant where none is said."""
NEVER_QUANTIZED = ("lm_head", "score")
"""Modules that stay whole: log-probs and scores are computed from them."""
UNGATED_COPIES = {
    "mistralai/Mistral-7B-v0.1": "unsloth/mistral-7b-bnb-4bit",
    "mistralai/Mistral-7B-Instruct-v0.1": "unsloth/mistral-7b-instruct-v0.1-bnb-4bit",
}
"""Gated models on the Hub, and copies in 4 bits that anybody may download."""


def checked_quantization(
    source: str, held: Any, load_in_4bit: bool, dtype: str, setting: str = BASE_SETTING
) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint, fitted to a run: it computes in `dtype`, heads stay whole.

    Args:
        source: name of the model, for errors.
        held: what its `config.json` says.
        load_in_4bit: the run's setting.
        dtype: the run's setting; checkpoints name the one that they were made with.
        setting: that names the model, for errors.

    Raises:
        UserError: quantised in a way that adapters cannot be trained on here, or the run wants it whole.
    """
    if not isinstance(held, Mapping):
        raise UserError(f"{setting}: quantization_config in the config.json of {source} is no mapping")
    fields = dict(held)
    method = str(fields.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in fields else "an unknown method"))
    original = "name the model that it was made from"
    if method != "bitsandbytes":
        raise UserError(
            f"{setting}: {source} is quantised by {method[:40]}; only 16-bit weights and bitsandbytes' 4-bit "
            f"ones can be a base: {original}"
        )
    if fields.get("load_in_8bit") or not fields.get("load_in_4bit"):
        raise UserError(
            f"{setting}: {source} is quantised in 8 bits; only 16-bit weights and bitsandbytes' 4-bit ones "
            f"can be a base: {original}"
        )
    if not load_in_4bit and setting != BASE_SETTING:  # one of its other models is no reason to change a run
        raise UserError(f"{setting}: {source} holds 4-bit weights and no others, and load_in_4bit is false: {original}")
    if not load_in_4bit:
        raise UserError(
            f"load_in_4bit: {source} holds 4-bit weights and no others; set load_in_4bit: true, or {original}"
        )
    if (storage := str(fields.get("bnb_4bit_quant_storage") or "uint8")) != "uint8":
        raise UserError(
            f"{setting}: {source} keeps its 4-bit weights as {storage[:40]} (bnb_4bit_quant_storage), which "
            f"only sharded training reads: {original}"
        )
    whole = fields.get("llm_int8_skip_modules") or []
    if not isinstance(whole, list) or not all(re.fullmatch(r"[\w.-]+", str(name)) for name in whole):
        raise UserError(
            f"{setting}: llm_int8_skip_modules in the config.json of {source} is no list of names of modules"
        )
    fields["llm_int8_skip_modules"] = list(dict.fromkeys([*whole, *NEVER_QUANTIZED]))
    return fields | {"bnb_4bit_compute_dtype": dtype}


def compute_in(layer: Any, dtype: torch.dtype) -> None:
    """Let a 4-bit layer of bitsandbytes dequantise and multiply in `dtype`, whatever it was quantised from."""
    layer.compute_dtype = dtype
    layer.weight.quant_state.dtype = dtype


def is_quantized(published: Mapping[str, Any] | None, name: str) -> bool:
    """Return whether a linear layer is held in 4 bits.

    Args:
        published: `quantization_config` of the checkpoint, which may leave layers whole; None where we quantise.
        name: of the layer in the model.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    left_whole = (published or {}).get("llm_int8_skip_modules") or []
    return should_convert_module(name, [*left_whole, *NEVER_QUANTIZED])


def stored_precision(model: Any) -> str:
    """Return for people how a loaded model holds its weights: the kind of 4-bit numbers, or the dtype of whole ones."""
    states = (getattr(getattr(layer, "weight", None), "quant_state", None) for layer in model.modules())
    state = next((state for state in states if state is not None), None)
    if state is None:
        return str(model.dtype).removeprefix("torch.")
    return f"{state.quant_type.upper()}, {'double' if state.nested else 'single'} quantisation"
