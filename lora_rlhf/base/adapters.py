"""Adapter folders: each adapter alone, with its head, in the very form that PEFT writes and loads."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lora_rlhf.config import LoraSettings
from lora_rlhf.errors import UserError

WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base_model.json"
MORE_THAN_LORA = ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config", "megatron_config")
"""Fields of PEFT's config under which a layer computes more than x Wᵀ + s · (x Aᵀ) Bᵀ."""
HEAD_KEY = "base_model.model.score.weight"


def lora_config(settings: LoraSettings, task_type: str = "CAUSAL_LM") -> LoraConfig:
    """Return PEFT's config of the run's adapters; no dropout, in any role (DESIGN of PPO: ratios must start at 1)."""
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        target_modules=list(settings.target_modules),
        layers_to_transform=settings.layers_to_transform or None,
        lora_dropout=0.0,
        bias="none",
        task_type=task_type,
    )


def base_identity(causal_lm: Any) -> dict[str, Any]:
    """Return the base's name and a fingerprint of its shape and first embeddings, the same in 4 and in 16 bits."""
    config = causal_lm.config
    rows = causal_lm.get_input_embeddings().weight[:64].detach().to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256(rows.view(torch.uint8).numpy().tobytes())
    digest.update(f"{config.hidden_size},{config.num_hidden_layers},{config.vocab_size}".encode())
    return {"name": config._name_or_path, "fingerprint": digest.hexdigest()[:16]}


def write_adapter(
    folder: Path, config: LoraConfig, weights: dict[str, torch.Tensor], head: torch.Tensor | None, base: dict[str, Any]
) -> None:
    """Write one adapter; with a head [1, hidden] it is a SEQ_CLS adapter, else a CAUSAL_LM one."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    if head is not None:
        tensors[HEAD_KEY] = head.detach().to("cpu").contiguous().clone()
    written = copy.deepcopy(config)
    written.base_model_name_or_path = base["name"]
    written.inference_mode = True
    written.task_type = "CAUSAL_LM" if head is None else "SEQ_CLS"
    written.modules_to_save = None if head is None else ["classifier", "score"]
    written.save_pretrained(str(folder))
    (folder / BASE).write_text(json.dumps(base, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: Path, base: dict[str, Any]) -> tuple[LoraConfig, dict[str, torch.Tensor], torch.Tensor | None]:
    """Return (config, LoRA weights, head or None) of an adapter folder.

    Raises:
        UserError: not an adapter folder, not LoRA, torn, or trained on another base than `base`.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no adapter: it has no {name}")
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if raw.get("peft_type") != "LORA":
            raise UserError(f"{folder}: only LoRA adapters can share the base, not {raw.get('peft_type')}")
        if other := [name for name in MORE_THAN_LORA if raw.get(name)]:
            raise UserError(f"{folder}: only plain LoRA can share the base; this adapter has {', '.join(other)}")
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder} cannot be read as an adapter: {error}") from None
    check_base(folder, raw, base)
    head = tensors.pop(HEAD_KEY, None)
    if head is None and config.task_type == "SEQ_CLS":
        raise UserError(f"{folder / WEIGHTS} has no {HEAD_KEY}: the reward head is lost, so its scores would be noise")
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    return config, tensors, head


def check_base(folder: Path, raw_config: dict[str, Any], base: dict[str, Any]) -> None:
    """Raise `UserError` where the adapter in `folder` was trained on another base than `base`."""
    if (folder / BASE).is_file():
        trained_on = json.loads((folder / BASE).read_text(encoding="utf-8"))
        same = trained_on.get("fingerprint") == base["fingerprint"]
    else:  # written elsewhere: the name is all there is
        trained_on = {"name": raw_config.get("base_model_name_or_path")}
        same = Path(str(trained_on["name"])).name == Path(str(base["name"])).name
    if not same:
        raise UserError(
            f"{folder} was trained on another base ({trained_on.get('name')}) than this run's ({base['name']})"
        )
