"""Adapter folders: each adapter alone, with its head, in the very form that PEFT writes and loads."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lora_rlhf.config import LoraSettings
from lora_rlhf.errors import UserError, first_line
from lora_rlhf.memory_peak import ran_out

WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base_model.json"
MORE_THAN_LORA = (
    "use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config", "megatron_config",
    "layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip
"""Fields of PEFT's config under which a model computes more than x Wᵀ + s · (x Aᵀ) Bᵀ in its own layers."""
CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Ways to start an adapter (`init_lora_weights`) that take it out of the base, on which it is wrong then."""
HEAD_MODULES = {"classifier", "score"}
"""Names in `modules_to_save` under which PEFT saves the head of a reward model."""
_QUANTIFIED_GROUP, _MOST_QUANTIFIERS = re.compile(r"\)[*+{]"), 4
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
    raw = read_plain_config(folder)
    check_base(folder, raw, base)
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if name not in raw]:
        raise UserError(
            f"{folder / CONFIG} has no {', '.join(missing)}: PEFT's defaults would stand in for what it had"
        )
    _check_patterns(folder / CONFIG, raw)
    try:
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        if ran_out(error):
            raise
        raise UserError(f"{folder} cannot be read as an adapter: {first_line(error)[:300]}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise UserError(f"{folder / WEIGHTS} is damaged: {name[:200]!r} holds NaN, infinity or no fractions")
    _check_numbers(folder / CONFIG, config, tensors)
    head = tensors.pop(HEAD_KEY, None)
    if head is None and config.task_type == "SEQ_CLS":
        raise UserError(f"{folder / WEIGHTS} has no {HEAD_KEY}: the reward head is lost, so its scores would be noise")
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    config.init_lora_weights = True  # others compute start values, from the base or from files; ours are in `tensors`
    return config, tensors, head


def read_plain_config(folder: Path) -> dict[str, Any]:
    """Return what the config of an adapter folder holds; it needs no base, so that a run can look before it begins.

    Raises:
        UserError: not an adapter folder, or one whose adapter is more than LoRA on a base that stays as it is.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no adapter: it has no {name}")
    raw = _mapping(folder / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{folder}: only LoRA adapters can share the base, not {str(raw.get('peft_type'))[:40]!r}")
    other = [name for name in MORE_THAN_LORA if raw.get(name)] + ["bias"] * (raw.get("bias", "none") != "none")
    if other:
        raise UserError(f"{folder}: only plain LoRA can share the base; this adapter has {', '.join(other)}")
    saved = raw.get("modules_to_save") or []
    whole = [str(name)[:40] for name in (saved if isinstance(saved, list) else [saved]) if name not in HEAD_MODULES]
    if whole:
        raise UserError(
            f"{folder}: modules_to_save: the adapter brings {', '.join(whole)} whole, which all roles share in the "
            "base. Merge the adapter into its base and name the merged model, or train one without modules_to_save"
        )
    start = str(raw.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_THE_BASE):
        raise UserError(
            f"{folder}: init_lora_weights: {start[:40]} changed the base that the adapter was trained on. Convert the "
            "adapter with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    return raw


def check_base(folder: Path, raw_config: dict[str, Any], base: dict[str, Any]) -> None:
    """Raise `UserError` where the adapter in `folder` was trained on another base than `base`."""
    if (folder / BASE).is_file():
        trained_on = _mapping(folder / BASE)
        same = trained_on.get("fingerprint") == base["fingerprint"]
    else:  # written elsewhere: the name is all there is
        trained_on = {"name": raw_config.get("base_model_name_or_path")}
        same = Path(str(trained_on["name"])).name == Path(str(base["name"])).name
    if not same:
        name = " ".join(str(trained_on.get("name")).split())[:200]
        raise UserError(f"{folder} was trained on another base ({name}) than this run's ({base['name']})")


def _check_patterns(file: Path, raw: dict[str, Any]) -> None:
    """Raise `UserError` where PEFT would match module names against a pattern that may backtrack without end."""
    for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        held, by_pattern = raw.get(name) or [], name.endswith("_pattern") and name != "layers_pattern"
        if held and by_pattern != isinstance(held, dict):
            raise UserError(f"{file}: {name} is {type(held).__name__}, not {'a mapping' if by_pattern else 'names'}")
        for pattern in [held] if isinstance(held, str) else held if isinstance(held, list | dict) else [held]:
            if not isinstance(pattern, str):
                raise UserError(f"{file}: {name} holds {type(pattern).__name__}, not names of layers")
            if _QUANTIFIED_GROUP.search(pattern) or sum(map(pattern.count, "*+{")) > _MOST_QUANTIFIERS:
                raise UserError(f"{file}: {name} holds a pattern that could take for ever to match; name the layers")


def _check_numbers(file: Path, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Raise `UserError` where ranks are not those of the weights, or a scale is no number."""
    ranks: list[Any] = [config.r, *(config.rank_pattern or {}).values()]
    scales: list[Any] = [config.lora_alpha, *(config.alpha_pattern or {}).values()]
    most = max([tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name and tensor.dim()], default=0)
    for rank in ranks:  # beyond, memory would be asked for that no weights fill
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= most:
            raise UserError(f"{file}: r is {str(rank)[:40]!r}, and the weights have rank {most}")
    for scale in scales:
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not abs(scale) < float("inf"):
            raise UserError(f"{file}: lora_alpha is {str(scale)[:40]!r}, not a number")


def _mapping(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as an adapter's: {first_line(error)[:300]}") from None
    if not isinstance(held, dict):
        raise UserError(f"{file} cannot be read as an adapter's: it holds no JSON mapping")
    return held
