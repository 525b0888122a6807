"""The arms that are evaluated: base, Instruct and Plus of a run, or any models and adapters that are named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_rlhf.base.loading import explained, resolved_model
from lora_rlhf.base.prequantized import BASE_SETTING, INSTRUCT_SETTING
from lora_rlhf.base.shared import REFERENCE, SharedBase
from lora_rlhf.base.tokenizer import checked_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.ppo.model_check import loaded_base

ARMS = ("base", "instruct", "plus")
"""In the order of every table and figure."""
TITLES = {"base": "base", "instruct": "Instruct", "plus": "Plus"}
"""How an arm is called in tables and figures."""


@dataclass(frozen=True)
class LoadedArm:
    """A model that answers: a role on a shared base. An arm that is another whole model is the reference on its own.

    Attributes:
        name: base, instruct or plus.
        base: what the role is played on; arms that are adapters share one.
        role: who answers.
        tokenizer: with the arm's own chat template.
        fingerprint: of all weights and settings that its numbers depend on.
    """

    name: str
    base: SharedBase
    role: str
    tokenizer: Any
    fingerprint: str


def run_arms(config: RunConfig, run: Path) -> dict[str, LoadedArm]:
    """Return the arms of the run in `run`.

    Raises:
        UserError: the run has no policy adapter (or no instruct arm) yet.
    """
    named = {"base": config.model_name_or_path, "plus": str(run / "policy_adapter")}
    named["instruct"] = config.instruct_model_name_or_path or str(run / "instruct_adapter")
    for adapter in (named["plus"], *([] if config.instruct_model_name_or_path else [named["instruct"]])):
        if not (Path(adapter) / "adapter_model.safetensors").is_file():
            raise UserError(
                f"{run} has no finished {Path(adapter).name}: run `python recipes/direct_rlhf_lora.py --output_dir "
                f"{run}` to its end first, or name models and adapters in its place (see --help)"
            )
    return named_arms(config, named)


def named_arms(config: RunConfig, names: Mapping[str, str]) -> dict[str, LoadedArm]:
    """Return arms by name; each is a Hub name, a folder with a model, or a folder or Hub name of a LoRA adapter.

    Args:
        config: how models are loaded; its model is replaced by `names["base"]`.
        names: base and any of instruct and plus.

    Raises:
        UserError: an unknown arm, no base, or a model or adapter that cannot be loaded.
    """
    for name in names:
        if name not in ARMS:
            raise UserError(f"--models: an arm is one of {', '.join(ARMS)}, not {name!r}; write base=NAME plus=FOLDER")
    if "base" not in names:
        raise UserError("--models: base is missing; write base=NAME instruct=NAME plus=FOLDER")
    settings = {arm: f"--models: {arm}" for arm in names}
    if names["base"] == config.model_name_or_path:
        settings["base"] = BASE_SETTING
    if names.get("instruct") == config.instruct_model_name_or_path:
        settings["instruct"] = INSTRUCT_SETTING
    config = replace(config, model_name_or_path=names["base"])
    tokenizer = checked_tokenizer(config, setting=settings["base"])
    shared = loaded_base(config, None, settings["base"], mixed=True)
    content = model_fingerprint(names["base"], config)
    arms = {"base": LoadedArm("base", shared, REFERENCE, tokenizer, content)}
    for name in [arm for arm in ARMS if arm in names and arm != "base"]:
        folder = adapter_folder(names[name])
        if folder is None:
            own = checked_tokenizer(config, names[name], settings[name])
            own_content = model_fingerprint(names[name], config)
            other = loaded_base(config, names[name], settings[name], mixed=True)
            arms[name] = LoadedArm(name, other, REFERENCE, own, own_content)
            continue
        shared.load_adapter(name, folder)
        arms[name] = LoadedArm(name, shared, name, tokenizer, digest(content, folder_fingerprint(folder)))
    return {name: arms[name] for name in ARMS if name in arms}


def adapter_folder(name: str) -> Path | None:
    """Return the folder of an adapter that is a folder here or on the Hub; none where `name` is a whole model."""
    if Path(name).is_dir():
        return Path(name) if (Path(name) / "adapter_config.json").is_file() else None
    if name in ("embedded", "tiny") or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return None
    from huggingface_hub import file_exists, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        if not file_exists(name, "adapter_config.json"):
            return None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return None  # loading it as a model says what is wrong
    with explained(name, RunConfig()):
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))


def model_fingerprint(name: str, config: RunConfig) -> str:
    """Return a digest of a model's weights (by content where they are files here) and of how it is loaded."""
    folder = Path(resolved_model(name))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        held = try_to_load_from_cache(name, "config.json", revision=config.model_revision)
        folder = Path(held).parent if isinstance(held, str) else folder
    content = folder_fingerprint(folder) if folder.is_dir() else f"{name}@{config.model_revision}"
    return digest(content, str(config.load_in_4bit), config.dtype, str(config.chat_template))


def folder_fingerprint(folder: Path) -> str:
    """Return a digest of the safetensors and the config of a model or adapter."""
    parts = []
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json"), *folder.glob("*.jinja")]):
        real = file.resolve()
        if len(real.name) == 64 and real.parent.name == "blobs":  # the Hub's cache names large files by their hash
            parts.append(f"{file.name}:{real.name}")
        else:
            with file.open("rb") as content:
                parts.append(f"{file.name}:{hashlib.file_digest(content, 'sha256').hexdigest()}")
    return digest(*parts)


def digest(*parts: str) -> str:
    """Return the SHA-256 of texts, in hex."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
