"""Loading a trained model back: an adapter on its 4-bit base, or a merged model, from the Hub or from a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from lora_rlhf.base.adapters import BASE, CONFIG, base_identity, read_adapter
from lora_rlhf.base.devices import with_fast_dtype
from lora_rlhf.base.loading import explained, load_causal_lm
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_file
from lora_rlhf.errors import UserError
from lora_rlhf.merge import set_generation
from lora_rlhf.ppo.decoding import Sampling

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "config.yaml")
"""What is downloaded of a repository: nothing that could hold code."""


def load_plus(
    name: str | Path, revision: str | None = None, load_in_4bit: bool | None = None, base: str | None = None
) -> tuple[Any, Any]:
    """Return (model, tokenizer): a plain transformers or PEFT model in eval mode, and the chat template it learnt.

    Weights are read from safetensors only, and no code from a repository is run.

    Args:
        name: repository on the Hub, a folder of an adapter or of a merged model, or the output directory of a run.
        revision: branch, tag or commit of the repository.
        load_in_4bit: NF4 or 16 bits; none: an adapter's base as the run had it (NF4 where that is not known), and a
            merged model in the 16 bits it was written in, since NF4 would round what was learnt.
        base: the adapter's base, where it was a folder of its own: Hub name or folder.

    Raises:
        UserError: not there, no access, no adapter or model, or an adapter of another base.
    """
    folder = _folder(str(name), revision)
    config = with_fast_dtype(replace(_config(folder), backend="transformers", output_dir=str(folder)))
    if not (folder / CONFIG).is_file():
        quantized = False if load_in_4bit is None else load_in_4bit
        config = replace(config, load_in_4bit=quantized, model_revision=None, chat_template=None)
        return load_causal_lm(config, str(folder)), load_tokenizer(config, str(folder))
    if load_in_4bit is not None:
        config = replace(config, load_in_4bit=load_in_4bit)
    config = _with_base(config, folder, base)
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(config, str(folder) if own else None)
    model = load_causal_lm(config)
    if read_adapter(folder, base_identity(model))[2] is not None:
        raise UserError(f"{name} is a reward adapter, which scores and does not answer; load a policy adapter")
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    plain = model.get_base_model()
    set_generation(plain.generation_config, plain.config, tokenizer, Sampling.of(config.ppo))
    return model, tokenizer


def _folder(name: str, revision: str | None) -> Path:
    """Return the folder with the files of `name`: its own, its policy adapter's, or the download's."""
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "policy_adapter" / CONFIG).is_file():
            return path / "policy_adapter"
        if not any((path / file).is_file() for file in (CONFIG, "config.json")):
            raise UserError(f"{name} holds no adapter ({CONFIG}), no model (config.json) and no run (policy_adapter/)")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"no folder {name}")
    from huggingface_hub import snapshot_download

    with explained(name, RunConfig(model_revision=revision)):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    if not any((folder / file).is_file() for file in (CONFIG, "config.json")):
        raise UserError(f"{name} on the Hub holds no adapter ({CONFIG}) and no model (config.json)")
    return folder


def _config(folder: Path) -> RunConfig:
    """Return the config of the run that left `folder`; the package's where there is none."""
    for place in (folder, *folder.resolve().parents[:2]):
        if all((place / name).is_file() for name in ("config.yaml", "summary.json")):  # others have a config.yaml too
            return config_from_file(place / "config.yaml")
    return RunConfig(model_name_or_path="")


def _with_base(config: RunConfig, folder: Path, base: str | None) -> RunConfig:
    """Return `config` with the base that the adapter in `folder` needs."""
    if base is not None:
        return replace(config, model_name_or_path=base, model_revision=None)
    name: str | None = config.model_name_or_path
    revision = config.model_revision
    if not name:  # an adapter that another program made
        held = _mapping(folder / CONFIG)
        name, revision = held.get("base_model_name_or_path"), held.get("revision")
        if (folder / BASE).is_file():
            name = _mapping(folder / BASE).get("name")
    if not name or not isinstance(name, str):
        raise UserError(f"{folder / CONFIG} does not name the base model; give it: load_plus(..., base=NAME)")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(
            f"the adapter's base model was a local folder, {name}, which is not here: give load_plus(..., base=FOLDER)"
        )
    return replace(config, model_name_or_path=name, model_revision=revision)


def _mapping(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise UserError(f"{file} is damaged: it holds no JSON mapping")
    return held
