"""Where a run's base model comes from, told to people elsewhere: its name without local paths, and its licence."""

from __future__ import annotations

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
    """

    kind: Kind
    name: str
    hub_name: str | None
    revision: str | None
    licence: Licence | None


def base_origin(name: str, revision: str | None, ask_hub: bool) -> BaseOrigin:
    """Return the origin of the model that a config calls `name`.

    Args:
        name: `model_name_or_path`.
        revision: `model_revision`.
        ask_hub: read the licence from the model's card on the Hub where nothing here knows it.
    """
    if name == EMBEDDED:
        return BaseOrigin("embedded", name, EMBEDDED_HUB_NAME, None, Licence(LICENCES[name]))
    if name == TINY:
        return BaseOrigin("tiny", name, None, None, Licence(LICENCES[name]))
    if snapshot := _SNAPSHOT.search(name):
        name, revision = f"{snapshot[1]}/{snapshot[2]}", snapshot[3]
    elif is_local(name):
        return BaseOrigin("folder", portable_name(name), None, None, _licence_in(Path(name).expanduser() / "README.md"))
    licence = Licence(LICENCES[name]) if name in LICENCES else _licence_on_hub(name, revision, ask_hub)
    return BaseOrigin("hub", name, name, revision, licence)


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


def _licence_on_hub(name: str, revision: str | None, ask_hub: bool) -> Licence | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        held = try_to_load_from_cache(name, "README.md", revision=revision)
        if not isinstance(held, str) and ask_hub:
            held = hf_hub_download(name, "README.md", revision=revision)
    except (OSError, httpx.HTTPError, HFValidationError):  # no card, no access or no network: then it is not known
        return None
    return _licence_in(Path(held)) if isinstance(held, str) else None


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
