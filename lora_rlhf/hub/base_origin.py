"""Where a run's base model comes from, told to people elsewhere: its name without local paths, and its licence."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import httpx
import yaml

from lora_rlhf.config import EMBEDDED, TINY

Kind = Literal["hub", "embedded", "tiny", "folder"]

EMBEDDED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the embedded model's 4-bit GGUF was made from; its weights are near these, and not the same."""

LICENCES = {
    EMBEDDED: "apache-2.0",
    TINY: "apache-2.0",
    EMBEDDED_HUB_NAME: "apache-2.0",
    "HuggingFaceTB/SmolLM2-135M": "apache-2.0",
    "mistralai/Mistral-7B-v0.1": "apache-2.0",
    "mistralai/Mistral-7B-Instruct-v0.1": "apache-2.0",
}
"""Licences of the models that come with the package or that its configs name."""

_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})")
_FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".gz", ".jinja", ".txt", ".py")


@dataclass(frozen=True)
class Licence:
    """A licence as a model card's front matter states it: the Hub's identifier, and a name and link for `other`."""

    identifier: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class BaseOrigin:
    """A base model as it is called elsewhere.

    Attributes:
        kind: on the Hub, built by the package (embedded, tiny), or a folder that only its owner has.
        name: what `load_plus` resolves: Hub name, `embedded`, `tiny`, or `./FOLDER`.
        hub_name: the model on the Hub that it is, or is made from; none for tiny and folders.
        revision: of the model on the Hub, where the run names one.
        licence: none where it could not be found.
        published_type: `nf4` or `fp4`, of a model that is published in 4 bits; None where its weights are whole.
    """

    kind: Kind
    name: str
    hub_name: str | None
    revision: str | None
    licence: Licence | None
    published_type: str | None = None


def base_origin(name: str, revision: str | None, ask_hub: bool) -> BaseOrigin:
    """Return the origin of the model that a config calls `name`.

    Args:
        name: `model_name_or_path`.
        revision: `model_revision`.
        ask_hub: read the licence and how the weights are stored from the Hub where nothing here knows them.
    """
    if name == EMBEDDED:
        return BaseOrigin("embedded", name, EMBEDDED_HUB_NAME, None, Licence(LICENCES[name]))
    if name == TINY:
        return BaseOrigin("tiny", name, None, None, Licence(LICENCES[name]))
    folder = Path(name).expanduser()
    if snapshot := _SNAPSHOT.search(name):
        name, revision = f"{snapshot[1]}/{snapshot[2]}", snapshot[3]
    elif is_local(name):
        kind = _published_type(folder / "config.json")
        return BaseOrigin("folder", portable_name(name), None, None, _licence_in(folder / "README.md"), kind)
    if name in LICENCES:
        licence: Licence | None = Licence(LICENCES[name])
    else:
        card = _file_on_hub(name, "README.md", revision, ask_hub)
        licence = None if card is None else _licence_in(card)
    here = folder / "config.json"  # of a snapshot in a cache, maybe another one than this process's
    kind = _published_type(here if here.is_file() else _file_on_hub(name, "config.json", revision, ask_hub))
    return BaseOrigin("hub", name, name, revision, licence, kind)


def is_local(name: str) -> bool:
    """Return whether a model, data set or file is one of this machine's own, not the package's or the Hub's."""
    if name in (EMBEDDED, TINY):
        return False
    whole = name.partition(":")[0]
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or whole.count("/") > 1
        or whole.endswith(_FILE_SUFFIXES)
        or Path(name).exists()
        or Path(whole).exists()
    )


def portable_name(name: str) -> str:
    """Return `name` as it may be published: of something local, only the last part, written `./PART`."""
    if not is_local(name):
        return name
    if "\\" in name:
        return f"./{PureWindowsPath(name).name}"
    whole, colon, part = name.partition(":")
    return f"./{PurePosixPath(whole).name}{colon}{part}"


def _file_on_hub(name: str, file: str, revision: str | None, ask_hub: bool) -> Path | None:
    """Return a file of a model on the Hub: the one that was downloaded before, or where `ask_hub` a fresh download."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        held = try_to_load_from_cache(name, file, revision=revision)
        if not isinstance(held, str) and ask_hub:
            held = hf_hub_download(name, file, revision=revision)
    except (OSError, httpx.HTTPError, HFValidationError):  # no such file, no access or no network: it is not known
        return None
    return Path(held) if isinstance(held, str) else None


def _published_type(config: Path | None) -> str | None:
    """Return in which 4-bit type a model's config.json says that it is stored; None where it says nothing of it."""
    try:
        held = json.loads(config.read_text(encoding="utf-8"))["quantization_config"] if config else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(held, dict) or not held.get("load_in_4bit"):
        return None
    return "nf4" if held.get("bnb_4bit_quant_type") == "nf4" else "fp4"  # which bitsandbytes takes where none is named


def _licence_in(card: Path) -> Licence | None:
    """Return the licence in the front matter of a model card; none where there is none that can be read."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    try:
        fields: Any = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, ValueError):
        return None
    stated = fields.get("license") if isinstance(fields, dict) else None
    if isinstance(stated, list) and len(stated) == 1:
        stated = stated[0]
    if not isinstance(stated, str):
        return None
    name, link = (fields.get(key) for key in ("license_name", "license_link"))
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", stated):  # no identifier: the Hub would refuse the card
        stated, name = "other", re.sub(r"[^a-z0-9.]+", "-", stated.lower()).strip("-") or "unknown"
    return Licence(stated, name if isinstance(name, str) else None, link if isinstance(link, str) else None)
