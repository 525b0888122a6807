"""Part 7: the embedded recipe at length, stage by stage, and what its three arms came to."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from card_parts.bench import Bench, Figures
from card_parts.models import CONFIGS
from lora_rlhf.base.embedded import GGUF, GGUF_SHA256, convert_gguf, embedded_model_is_cached
from lora_rlhf.config import EMBEDDED, RunConfig
from lora_rlhf.config_file import config_from_file, config_from_mapping, config_to_mapping
from lora_rlhf.errors import UserError
from lora_rlhf.session import Session
from lora_rlhf.stages import (
    base_stage,
    compare_stage,
    instruct_stage,
    merge_stage,
    ppo_stage,
    reward_stage,
)

STAGES: dict[str, Callable[[Session], None]] = {
    "base": base_stage, "reward": reward_stage, "instruct": instruct_stage, "ppo": ppo_stage, "merge": merge_stage,
    "compare": compare_stage,
}  # fmt: skip
SHORT: dict[str, Any] = {"reward": {"max_steps": 1}, "sft": {"max_steps": 1}, "ppo": {"total_steps": 1, "snapshots": 0}}
"""Sections laid over the config of the tiny model."""


def embedded_run(bench: Bench) -> Iterator[tuple[str, Figures]]:
    """Yield the seconds of each stage as it ends, and the arms' figures."""
    output_dir = bench.folder / "embedded_run"
    if bench.size.name == "tiny":
        config = run_config("tiny.yaml", output_dir, SHORT)
    elif (model := embedded_model(bench)) is None:
        yield "run", {"not_measured": "the embedded model is not here: --gguf_parts names the files it is joined from"}
        return
    else:
        config = replace(run_config("embedded.yaml", output_dir, {}), model_name_or_path=model)
    started = time.perf_counter()
    session = Session.open(config)
    for name, stage in STAGES.items():
        began = time.perf_counter()
        stage(session)
        bench.synchronize()
        yield f"{name} stage", {"seconds": time.perf_counter() - began}
    summary = session.run.summary
    yield "run", {"seconds": time.perf_counter() - started, "ppo": summary["ppo"], "merge": summary["merge"]}
    yield "arms", summary["arms"]
    session.free_base()


def run_config(file: str, output_dir: Path, sections: dict[str, dict[str, Any]]) -> RunConfig:
    """Return a config of `recipes/configs` that writes to a folder, with fields of its sections replaced."""
    values = config_to_mapping(config_from_file(CONFIGS / file))
    values["output_dir"] = str(output_dir)
    for section, fields in sections.items():
        values[section] |= fields
    return config_from_mapping(values, file)


def embedded_model(bench: Bench) -> str | None:
    """Return what names the embedded model: a folder, made from the parts of its GGUF, or the cached one; else None.

    Raises:
        UserError: the parts, joined, are another file.
    """
    if not bench.gguf_parts:
        return EMBEDDED if embedded_model_is_cached() else None
    content = b"".join(part.read_bytes() for part in bench.gguf_parts)
    if hashlib.sha256(content).hexdigest() != GGUF_SHA256:
        raise UserError("--gguf_parts: joined in this order, the files are not the embedded model's GGUF")
    gguf, folder = bench.folder / "gguf" / Path(GGUF).name, bench.folder / "embedded_model"
    for made in (gguf.parent, folder):
        made.mkdir()
    gguf.write_bytes(content)
    convert_gguf(gguf, folder)
    return str(folder)
