"""Which layers an adapter may stand on: linear ones inside the transformer, for those are what roles are played on."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.known_shapes import shape_config
from lora_rlhf.base.layer_names import cannot_adapt, check_no_experts, linear_names
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError

SETTING = "lora.target_modules"


def check_target_modules(config: RunConfig) -> None:
    """Refuse `lora.target_modules` that a run could not train, from the shape of its base alone.

    Raises:
        UserError: a layer has no such name, or is no linear layer of the transformer; or the model's config cannot be
            had.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about what is refused below
        causal_lm = AutoModelForCausalLM.from_config(shape_config(config), trust_remote_code=False)
        model = with_adapter(causal_lm, lora_config(config.lora), "policy")
    check_adapted_layers(model, causal_lm, SETTING)


def with_adapter(causal_lm: Any, config: LoraConfig, name: str) -> Any:
    """Return the PEFT model with a first adapter.

    Raises:
        UserError: PEFT finds no layer to adapt, or would adapt stacked experts.
    """
    wanted = sorted(config.target_modules or ())
    try:
        model = get_peft_model(causal_lm, config, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise cannot_adapt(causal_lm, wanted, error) from None
    check_no_experts(causal_lm, config, wanted)
    return model


def check_adapted_layers(model: nn.Module, causal_lm: Any, where: str) -> None:
    """Refuse adapters on layers that do not compute x Wᵀ + b by themselves, where they would be passed over in silence.

    Args:
        model: the PEFT model.
        causal_lm: the transformers model inside it.
        where: setting or folder that the adapters come from.

    Raises:
        UserError: an adapter stands on the LM head, on embeddings, on GPT-2's `Conv1D` or on bare parameters.
    """
    head = causal_lm.get_output_embeddings()
    head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    wrong: dict[str, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            if base is head or not isinstance(base, nn.Linear):
                last = name.removesuffix(".base_layer").rpartition(".")[2]
                wrong[last] = "the LM head" if base is head else type(base).__name__
    if wrong:
        which = ", ".join(f"{name} ({kind})" for name, kind in wrong.items())
        linear = ", ".join(linear_names(model))
        advice = (
            f"The linear layers of this model are {linear}"
            if linear
            else "This model has no linear layers: choose another base"
        )
        raise UserError(
            f"{where}: only linear layers (nn.Linear) of the transformer can be adapted here, not {which}. {advice}"
        )
