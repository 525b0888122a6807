"""The files of a run, as they are while it is going on."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_to_mapping
from lora_rlhf.run import write_text

ARM = {
    "reward_mean": 0.1, "reward_sem": 0.01, "win_rate_vs_base": 0.5, "kl_to_base": 0.0, "ended_rate": 0.8,
    "bad_word_rate": 0.0, "n": 10,
}  # fmt: skip


def step(number: int, **values: float) -> dict[str, float]:
    """The metrics of a healthy step of 4 s."""
    return {
        "step": number, "reward": 0.1 * number, "score": 0.2, "kl": 1.0, "entropy": 1.5, "value_loss": 0.3,
        "ratio": 1.0, "clip_fraction": 0.02, "response_length": 20.0, "ended_rate": 0.9, "samples_per_second": 2.0,
        "peak_memory_gib": 3.0, "sampler_kl": 0.002,
        "seconds_rollout": 2.0, "seconds_score": 1.0, "seconds_update": 1.0,
    } | values  # fmt: skip


def lines_of(steps: list[dict[str, float]]) -> str:
    return "".join(json.dumps(metrics) + "\n" for metrics in steps)


def finish(run: Path, *stages: str) -> None:
    file = run / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {"seconds": {}}
    summary["seconds"] |= dict.fromkeys(stages, 12.5)
    if "compare" in stages:
        summary["arms"] = {"base": ARM, "plus": ARM}
        samples = {"prompts": ["Why?"], "base": ["compared base"], "plus": ["compared plus"]}
        write_text(run / "samples.json", json.dumps(samples))
    write_text(file, json.dumps(summary))


def begin(folder: Path) -> Path:
    """Begin a run of eight PPO steps in a folder."""
    folder.mkdir()
    config = RunConfig(output_dir=str(folder))
    config.ppo.total_steps = 8
    write_text(folder / "config.yaml", yaml.safe_dump(config_to_mapping(config)))
    return folder
