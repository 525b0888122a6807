"""The folder that is pushed to the Hub: what a finished run left, without anything that is this machine's own."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_file, config_to_mapping
from lora_rlhf.errors import UserError
from lora_rlhf.hub.base_origin import BaseOrigin, base_origin, portable_name
from lora_rlhf.hub.claims import evaluation_claims
from lora_rlhf.hub.model_card import CardFacts, Kind, model_card
from lora_rlhf.run import run_summary, write_text

RUN_FILE = "run.json"
"""In the repository: which run it holds, and the SHA-256 of every file as it was pushed."""

STAGES_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "adapter": ("ppo", "compare"),
    "merged": ("ppo", "merge", "compare"),
    "reward": ("reward",),
}
FOLDER_OF_KIND: dict[Kind, str] = {"adapter": "policy_adapter", "merged": "merged", "reward": "reward_adapter"}
STAGE_OF_FOLDER = {"policy_adapter": "ppo", "merged": "merge", "reward_adapter": "reward"}
RUN_FILES: dict[Kind, tuple[str, ...]] = {
    "adapter": ("metrics.jsonl", "summary.json", "curves.png"),
    "merged": ("metrics.jsonl", "summary.json", "curves.png"),
    "reward": ("summary.json",),
}
ADAPTER_WEIGHTS, ADAPTER_CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base_model.json"
MODEL_SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt")
NOT_OF_TOKENIZER = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class HubFolder:
    """What goes into one repository.

    Attributes:
        path: the folder.
        kind: policy adapter, merged model or reward adapter.
        tag: `run-` and 12 hex digits that follow from what training left: weights, config, metrics.
        card: the text of its README.md.
        files: path in the repository -> SHA-256; all but `RUN_FILE`, which holds them.
        origin: of the base model.
    """

    path: Path
    kind: Kind
    tag: str
    card: str
    files: dict[str, str]
    origin: BaseOrigin

    def sizes(self) -> dict[str, int]:
        """Return path in the repository -> bytes, of every file."""
        return {name: (self.path / name).stat().st_size for name in sorted([*self.files, RUN_FILE])}

    def is_content(self, name: str, oid: str | None) -> bool:
        """Return whether the content of a file is what git-LFS calls by the SHA-256 `oid`, or git by a SHA-1."""
        if oid is None:
            return False
        if len(oid) == 64:
            return oid == (self.files.get(name) or _sha256(self.path / name))
        return oid == _blob_id(self.path / name)


@dataclass(frozen=True)
class FinishedRun:
    """A run that is finished as far as a push needs it: its directory, config and summary."""

    path: Path
    config: RunConfig
    summary: dict[str, Any]

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def hub_folder(output_dir: Path, kind: Kind, repo_id: str, ask_hub: bool) -> HubFolder:
    """Write OUTPUT_DIR/hub/KIND anew and return it.

    Args:
        output_dir: a finished run.
        kind: what of it.
        repo_id: the repository that the card speaks of.
        ask_hub: read the base's licence from the Hub where nothing here knows it.

    Raises:
        UserError: no run there, a stage of it is not finished, what a stage left is gone, or its evaluation's results
            are malformed.
    """
    run, claims = finished_run(output_dir, kind), evaluation_claims(output_dir)
    origin = base_origin(run.config.model_name_or_path, run.config.model_revision, ask_hub)
    target = run / "hub" / kind
    half = target.with_name(f".{kind}.part")
    try:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        _put_model(run, kind, origin, half)
        for name in RUN_FILES[kind]:
            if (run / name).is_file():
                _put(run / name, half / name)
        config = portable_config(run.config, origin)
        text = yaml.safe_dump(config_to_mapping(config), sort_keys=False, allow_unicode=True)
        write_text(half / "config.yaml", text)
        card = model_card(CardFacts(repo_id, kind, config, origin, run.summary, claims))
        write_text(half / "README.md", card)
        files = {path.name: _sha256(path) for path in sorted(half.iterdir())}
        tag = run_tag(kind, files)
        held = {"lora_rlhf": version("lora-rlhf"), "run": tag, "kind": kind, "files": files}
        write_text(half / RUN_FILE, json.dumps(held, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        half.rename(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    return HubFolder(target, kind, tag, card, files, origin)


def finished_run(output_dir: Path, kind: Kind) -> FinishedRun:
    """Return the run in `output_dir` after making sure that it has what a push of `kind` needs."""
    if not (output_dir / "config.yaml").is_file():
        raise UserError(
            f"--output_dir: {output_dir} holds no run (no config.yaml); make one with "
            f"`python recipes/direct_rlhf_lora.py --output_dir {shlex.quote(str(output_dir))}`"
        )
    run = FinishedRun(output_dir, config_from_file(output_dir / "config.yaml"), run_summary(output_dir))
    options = " ".join(
        f"--{name} {shlex.quote(str(path))}"
        for name, path in (("config", output_dir / "config.yaml"), ("output_dir", output_dir))
    )
    for stage in STAGES_OF_KIND[kind]:
        if stage not in run.summary.get("seconds", {}):
            asked = {"merged": "--merged: ", "reward": "--reward_repo_id: "}.get(kind, "")
            raise UserError(
                f"{asked}{output_dir} is unfinished: its {stage} stage is missing. Run `python recipes/{stage}_lora.py "
                f"{options}` first, or direct_rlhf_lora.py, which runs every stage"
            )
    folder = FOLDER_OF_KIND[kind]
    needed = ("config.json",) if kind == "merged" else (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
    for name in needed:
        if not (run / folder / name).is_file():
            raise UserError(
                f"{output_dir} has no {folder}/{name}, though its {STAGE_OF_FOLDER[folder]} stage is finished: put "
                f"back what was deleted, or make the run anew: `python recipes/direct_rlhf_lora.py {options} "
                "--overwrite_output_dir`"
            )
    return run


def portable_config(config: RunConfig, origin: BaseOrigin) -> RunConfig:
    """Return `config` as it may be published: every path of this machine cut to `./` and its last part."""
    instruct, template = config.instruct_model_name_or_path, config.chat_template
    words, prompts = config.compare.bad_words_file, config.compare.safety_prompts
    sources = [
        source | {"path": portable_name(str(source["path"]))} if "path" in source else source
        for source in config.ppo.reward_sources
    ]
    return replace(
        config,
        output_dir=".",
        overwrite_output_dir=False,
        model_name_or_path=origin.name,
        model_revision=origin.revision,
        instruct_model_name_or_path=instruct and portable_name(instruct),
        chat_template=template and portable_name(template),
        dataset_name=[portable_name(name) for name in config.dataset_name],
        ppo=replace(config.ppo, reward_sources=sources),
        compare=replace(
            config.compare,
            bad_words_file=words and portable_name(words),
            safety_prompts=prompts and portable_name(prompts),
        ),
    )


def run_tag(kind: Kind, files: dict[str, str]) -> str:
    """Return the tag of a run: it follows from weights, config and metrics, not from the card."""
    made = [f"{name}:{files[name]}" for name in sorted(files) if name.endswith((".safetensors", "metrics.jsonl"))]
    return "run-" + hashlib.sha256("\n".join([kind, files["config.yaml"], *made]).encode()).hexdigest()[:12]


def _put_model(run: FinishedRun, kind: Kind, origin: BaseOrigin, into: Path) -> None:
    source = run / FOLDER_OF_KIND[kind]
    if kind == "merged":
        for path in _model_files(source):
            _put(path, into / path.name)
        return
    _put(source / ADAPTER_WEIGHTS, into / ADAPTER_WEIGHTS)
    adapter = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    # stock PEFT reads this name, so that it is the Hub's wherever there is one
    adapter |= {"base_model_name_or_path": origin.hub_name or origin.name, "revision": origin.revision}
    write_text(into / ADAPTER_CONFIG, json.dumps(adapter, indent=2, sort_keys=True) + "\n")
    if (source / BASE).is_file():
        base = json.loads((source / BASE).read_text(encoding="utf-8")) | {"name": origin.name}
        write_text(into / BASE, json.dumps(base, indent=1) + "\n")
    if (run / "merged" / "tokenizer_config.json").is_file():
        for path in _model_files(run / "merged"):
            if path.name not in NOT_OF_TOKENIZER and ".safetensors" not in path.name:
                _put(path, into / path.name)
    else:  # imports torch, which takes seconds
        from lora_rlhf.base.tokenizer import load_tokenizer

        load_tokenizer(run.config).save_pretrained(into)


def _model_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.name.endswith(MODEL_SUFFIXES) and not p.name.startswith(".")]


def _put(source: Path, target: Path) -> None:
    """Give `target` the content of `source`, without a second copy of large weights where the disk allows it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _blob_id(path: Path) -> str:
    head = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: head).hexdigest()
