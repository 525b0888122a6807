"""One PPO step, ours and a peer's, interleaved on the same machine: seconds per stage, peak memory, and the floor.

    python benchmarks/ppo_step.py                       # ours alone: SmolLM2-135M in NF4, 16 answers of 48 tokens
    python benchmarks/ppo_step.py --peer trl            # and TRL 1.12's PPOTrainer, in a venv that this makes once
    python benchmarks/ppo_step.py --set mixed_adapter_scoring=true --rounds 3

Each contestant is a process of its own that takes a step when told, so that they never run at the same time; the
first step of each is not counted. Answers are as long as they may be, and all see the same prompts. The last line is
JSON: `speedup` is the peer's median seconds over ours, `memory_ratio` our peak over the peer's (of the step, not of
loading), `floor_ratio` our seconds over the floor, which follows from the measured bandwidth and matmul rate (see
shapes.py). Figures with `_head` in their name are those of ppo.value_model: head.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from shapes import floor_seconds, full_length, measured_rates, trainer_of_shape

from lora_rlhf.base.embedded import cache_folder
from lora_rlhf.base.loading import resolved_model
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_mapping, plain_yaml
from lora_rlhf.data.preferences import preference_pairs
from lora_rlhf.errors import UserError
from lora_rlhf.memory_peak import peak_memory_gib, reset_peak_memory
from lora_rlhf.terminal import console, note, run_recipe

HERE = Path(__file__).parent
PEER_VERSION = "trl==1.12.0"
STAGES = ("rollout", "score", "update")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="base: embedded, tiny, a folder or a Hub name [embedded]")
    parser.add_argument("--dtype", default="bfloat16", help="what ours computes in [bfloat16]")
    parser.add_argument("--batch", type=int, default=16, help="answers per step [16]")
    parser.add_argument("--prompt", type=int, default=40, help="tokens of each prompt [40]")
    parser.add_argument("--response", type=int, default=48, help="tokens of each answer [48]")
    parser.add_argument("--epochs", type=int, default=2, help="PPO epochs [2]")
    parser.add_argument("--micro", type=int, default=4, help="answers per forward-backward pass [4]")
    parser.add_argument("--scoring", type=int, default=16, help="answers per forward pass without gradient [16]")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, on all linear layers [16]")
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each [5]")
    parser.add_argument("--value_model", choices=["adapter", "head", "both"], default="both", help="of ours [both]")
    parser.add_argument("--peer", choices=["trl"], help="run a peer on the same work")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a ppo field of ours")
    parser.add_argument("--cap_gib", type=float, help="CUDA: refuse memory beyond this, as a smaller card would")
    parser.add_argument("--worker", choices=["adapter", "head"], help=argparse.SUPPRESS)
    return parser.parse_args()


def shaped_config(given: argparse.Namespace, value_model: str) -> RunConfig:
    """Return the config of the shape on the command line."""
    ppo = {
        "total_steps": 1000, "batch_size": given.batch, "num_ppo_epochs": given.epochs, "num_mini_batches": 1,
        "micro_batch_size": given.micro, "scoring_batch_size": given.scoring, "response_length": given.response,
        "learning_rate": 1e-5, "normalization_samples": max(2, given.batch), "max_kl": None, "update_kl_limit": None,
        "value_model": value_model,
    }  # fmt: skip
    for pair in given.set:
        name, _, value = pair.partition("=")
        ppo[name] = plain_yaml(value)
    values = {
        "model_name_or_path": given.model, "dtype": given.dtype, "dataset_name": ["embedded"], "ppo": ppo,
        "lora": {"r": given.rank, "lora_alpha": 2 * given.rank}, "seed": 0,
    }  # fmt: skip
    return config_from_mapping(values, "command line")


def work(given: argparse.Namespace) -> None:
    """Be one contestant: a step for each line on standard input, a line of JSON after it."""
    cap_memory(given.cap_gib)
    config = shaped_config(given, given.worker)
    trainer = trainer_of_shape(config, given.prompt)
    device = trainer.base.device
    floor = floor_seconds(trainer, given.prompt, measured_rates(device, trainer.base.compute_dtype))
    print(json.dumps({"ready": True, "floor": floor}), flush=True)
    while sys.stdin.readline():
        reset_peak_memory(device)
        started = time.perf_counter()
        metrics = trainer.step()
        seconds = time.perf_counter() - started
        stages = {stage: metrics[f"seconds_{stage}"] for stage in STAGES}
        print(json.dumps({**stages, "seconds": seconds, "peak_gib": peak_memory_gib(device)}), flush=True)


def cap_memory(gib: float | None) -> None:
    """Hold this process to `gib` of CUDA memory."""
    if gib and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / whole))


class Contestant:
    """A process that takes one step at a time."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name, self.rounds, self.floor = name, list[dict[str, float]](), dict[str, float]()
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self.floor = self._answer().get("floor", {})

    def step(self) -> dict[str, float]:
        """Let it take one step; return what it says of it."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        raise UserError(f"{self.name} ended: {(self.log.read().strip().splitlines() or ['no output'])[-1]}")


def peer_python(requirement: str) -> Path:
    """Return the Python of a virtual environment that holds the peer, making it once in the cache."""
    folder = cache_folder() / "peers" / requirement
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        note(f"making a virtual environment with {requirement}, once: {folder}")
        pinned = [line for line in (HERE.parent / "constraints.txt").read_text().splitlines() if "==" in line]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "constraints.txt").write_text("\n".join(p for p in pinned if not p.startswith("trl==")) + "\n")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", "-c", str(folder / "constraints.txt"), requirement]
        subprocess.run([*install, "torch", "transformers", "peft", "bitsandbytes", "datasets", "rich"], check=True)
        (folder / "ready").touch()
    return python


def contestants(given: argparse.Namespace, folder: Path) -> list[Contestant]:
    """Start all that take part."""
    names = ["adapter", "head"] if given.value_model == "both" else [given.value_model]
    ours = [sys.executable, str(HERE / "ppo_step.py"), *sys.argv[1:], "--worker"]
    started = [Contestant(f"ours, value {name}", [*ours, name]) for name in names]
    if given.peer:
        python = peer_python(PEER_VERSION)
        config = shaped_config(given, "adapter")
        tokenizer = load_tokenizer(config)
        pairs, _ = preference_pairs(config, tokenizer, "train")
        prompts = folder / "prompts.json"
        prompts.write_text(json.dumps(full_length(pairs, tokenizer, given.prompt)))
        shape = {name: getattr(given, name) for name in ("rank", "batch", "micro", "scoring", "response", "epochs")}
        words = [f"--{name}={value}" for name, value in shape.items()]
        words += [f"--cap_gib={given.cap_gib}"] if given.cap_gib else []
        model = resolved_model(given.model)
        command = [str(python), str(HERE / "peers" / "trl_ppo.py"), "--model", model, "--prompts", str(prompts), *words]
        started.append(Contestant(PEER_VERSION.replace("==", " "), command))
    return started


def figures(taking_part: list[Contestant]) -> dict[str, float]:
    """Return what the last line says."""
    peer = next((c for c in taking_part if c.name.startswith("trl")), None)
    found: dict[str, float] = {}
    for one in taking_part:
        if one is peer:
            continue
        suffix = "_head" if one.name.endswith("head") and one is not taking_part[0] else ""
        seconds = median(r["seconds"] for r in one.rounds)
        peak = max(r["peak_gib"] for r in one.rounds)
        if peer:
            found[f"speedup{suffix}"] = median(r["seconds"] for r in peer.rounds) / seconds
            found[f"memory_ratio{suffix}"] = peak / max(r["peak_gib"] for r in peer.rounds)
        found |= {f"seconds{suffix}": seconds, f"peak_gib{suffix}": peak}
        found[f"floor_ratio{suffix}"] = seconds / sum(one.floor.values())
    if peer:
        found["peer_seconds"] = median(r["seconds"] for r in peer.rounds)
        found["peer_peak_gib"] = max(r["peak_gib"] for r in peer.rounds)
    return {name: round(value, 4) for name, value in found.items()}


def table(taking_part: list[Contestant]) -> Table:
    """Return the table of all stages."""
    shown = Table(title="seconds per PPO step", title_justify="left")
    for column in ("who", "stage", "median", "min", "max", "floor", "x floor", "peak GiB"):
        shown.add_column(column, justify="left" if column in ("who", "stage") else "right")
    for one in taking_part:
        for stage in (*STAGES, "seconds"):
            took = [r[stage] for r in one.rounds]
            floor = one.floor.get(stage, sum(one.floor.values()))
            least = [f"{floor:.2f}", f"{median(took) / floor:.1f}"] if floor else ["", ""]
            peak = f"{max(r['peak_gib'] for r in one.rounds):.2f}" if stage == "seconds" else ""
            name, label = (one.name, stage) if stage == STAGES[0] else ("", stage)
            row = [f"{median(took):.2f}", f"{min(took):.2f}", f"{max(took):.2f}", *least, peak]
            shown.add_row(name, "whole step" if label == "seconds" else label, *row, end_section=stage == "seconds")
    return shown


def main() -> None:
    given = arguments()
    if given.worker:
        work(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        taking_part = contestants(given, Path(folder))
        try:
            for number in range(given.rounds + 1):
                for one in taking_part:
                    result = one.step()
                    note(f"  round {number}: {one.name} {result['seconds']:.2f} s, peak {result['peak_gib']:.2f} GiB")
                    if number:  # the first step warms up
                        one.rounds.append(result)
        finally:
            for one in taking_part:
                one.close()
    console.print(table(taking_part))
    print(json.dumps(figures(taking_part)))


if __name__ == "__main__":
    run_recipe(main)
