"""What one setting of PPO changes: runs that differ from finished ones in it alone, on the same reward adapters.

    python recipes/direct_rlhf_lora.py --output_dir runs/0 && ...  # finished runs, of other seeds
    python benchmarks/ppo_settings.py runs/0 runs/1 runs/2 --out results/settings             # hours on two cores
    python benchmarks/ppo_settings.py runs/0 runs/1 runs/2 --out results/settings --settings epsilon head --steps 12

Each setting is changed alone, once for each finished run: with that run's seed, data and reward adapter. The policy
then answers the run's held-out prompts with the run's own sampling, whatever it was trained with. Reward is in standard
deviations of the base's own answers, as in the run's compare stage; the objective is the reward less kl_coef times the
KL, which is what PPO maximises. Both are given for each run, and as the mean difference to unchanged settings with its
standard error over the runs. A result is kept in the folder of --out and not made again: several of these commands can
fill one folder, and one that was ended goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from lora_rlhf.base.shared import POLICY
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import PpoSettings, RunConfig
from lora_rlhf.config_file import config_from_file
from lora_rlhf.data.preferences import preference_pairs
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.arms import role_answers
from lora_rlhf.memory import with_checkpointing_decided
from lora_rlhf.ppo import optimization
from lora_rlhf.ppo.model_check import loaded_base
from lora_rlhf.ppo.trainer import Metrics, PpoTrainer
from lora_rlhf.reward.sources import CombinedReward, reward_sources, score_scales
from lora_rlhf.run import write_text
from lora_rlhf.terminal import console, note, progress, run_recipe

UNCHANGED = "unchanged"
EPSILON = "epsilon"
CHANGES: dict[str, Callable[[PpoSettings], dict[str, Any]]] = {
    UNCHANGED: lambda s: {},
    EPSILON: lambda s: {},  # no setting: 1e-8 in place of `optimization.ADAM_EPSILON`
    "head": lambda s: {"value_model": "head"},
    "half_rate": lambda s: {"learning_rate": s.learning_rate / 2},
    "double_rate": lambda s: {"learning_rate": s.learning_rate * 2},
    "warmup": lambda s: {"warmup_ratio": 0.03},
    "double_value_rate": lambda s: {"value_learning_rate": 2 * (s.value_learning_rate or s.learning_rate)},
    "value_warmup": lambda s: {"value_warmup_steps": round(s.total_steps / 20) or 1},
    "double_batch": lambda s: {"batch_size": s.batch_size * 2, "total_steps": s.total_steps // 2},
    "temperature": lambda s: {"temperature": 1.0},
}
"""By name: the settings that differ. A doubled batch has as many minibatches, and half the steps: as many answers."""
FIGURES = ("reward", "kl", "objective", "ended", "value_loss")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps the results")
    parser.add_argument("--settings", nargs="+", default=list(CHANGES), choices=CHANGES, help="which to change [all]")
    parser.add_argument("--steps", type=int, help="PPO steps of each [as many as the finished run had]")
    return parser.parse_args()


def changed(config: RunConfig, name: str, steps: int | None) -> RunConfig:
    """Return the config of a run with one changed setting, and another number of PPO steps where one is given."""
    ppo = replace(config.ppo, total_steps=steps or config.ppo.total_steps)
    return replace(config, ppo=replace(ppo, **CHANGES[name](ppo)))


def trained(run: Path, name: str, steps: int | None) -> dict[str, Any]:
    """Return the figures of PPO with one changed setting on the reward adapter of `run`."""
    own = config_from_file(run / "config.yaml")
    config = with_checkpointing_decided(changed(own, name, steps))
    tokenizer = load_tokenizer(config)
    train, _ = preference_pairs(config, tokenizer, "train")
    held_out, _ = preference_pairs(config, tokenizer, "test")
    base = loaded_base(config)
    reward = CombinedReward(reward_sources(config, base, run / "reward_adapter"))
    epsilon = optimization.ADAM_EPSILON
    try:
        if name == EPSILON:
            optimization.ADAM_EPSILON = 1e-8
        trainer = PpoTrainer(base, tokenizer, train, reward, config.ppo, config.seed)
    finally:
        optimization.ADAM_EPSILON = epsilon
    metrics: list[Metrics] = []
    started = time.perf_counter()
    with progress(f"{name}, {run.name}: PPO steps", config.ppo.total_steps) as report:
        while trainer.step_count < config.ppo.total_steps and not trainer.stopped_early:
            metrics.append(trainer.step())
            report(trainer.step_count)
    seconds = (time.perf_counter() - started) / len(metrics)
    reward.scales = score_scales(run)
    answers = role_answers(base, POLICY, tokenizer, held_out[: own.compare.num_prompts], reward, own, own.seed)
    last = metrics[-max(1, len(metrics) // 4) :]
    score, kl = answers.score.mean().item(), answers.kl_to_base.mean().item()
    return {
        "reward": score,
        "kl": kl,
        "objective": score - own.ppo.kl_coef * kl,
        "ended": answers.ended.float().mean().item(),
        "value_loss": fmean(m["value_loss"] for m in last if "value_loss" in m),
        "steps": config.ppo.total_steps,
        "seconds_per_step": seconds,
        "stopped_early": trainer.stopped_early,
        "metrics": metrics,
    }


def kept(file: Path) -> dict[str, Any]:
    """Return the figures in a file of results. Raises `UserError` where it has none."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no file of results: {error}. Delete it to have it made again") from None


def check_kept(file: Path, run: Path, name: str, steps: int | None) -> None:
    """Raise `UserError` where the result in `file` is of another number of steps than is asked for."""
    made, asked = kept(file).get("steps"), changed(config_from_file(run / "config.yaml"), name, steps).ppo.total_steps
    if made != asked:
        raise UserError(
            f"{file} is of {made} steps and not of {asked}: choose another --out, or the --steps that it was made with"
        )


def results_in(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return all figures in a folder of results: by name of the changed setting, then by name of the run."""
    names = [name for name in CHANGES if (folder / name).is_dir()]
    return {name: {file.stem: kept(file) for file in sorted((folder / name).glob("*.json"))} for name in names}


def difference(figures: dict[str, dict[str, Any]], unchanged: dict[str, dict[str, Any]], figure: str) -> str:
    """Return the mean difference to the unchanged settings over the runs that have both, ± its standard error."""
    apart = [figures[run][figure] - unchanged[run][figure] for run in figures if run in unchanged]
    if not apart:
        return ""
    spread = f" ± {stdev(apart) / len(apart) ** 0.5:.3f}" if len(apart) > 1 else ""
    return f"{fmean(apart):+.3f}{spread}"


def table_of(results: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Return the table: for each setting the figures of each run, and their difference to the unchanged ones."""
    table = Table(title="PPO with one changed setting", title_justify="left")
    for column in ("setting", "run"):
        table.add_column(column, no_wrap=True)
    for column in (*FIGURES, "s/step"):
        table.add_column(column.replace("_", " "), justify="right")
    for name, figures in results.items():
        for run, one in figures.items():
            row = [f"{one[figure]:.3f}" for figure in FIGURES]
            stopped = " (stopped early)" if one["stopped_early"] else ""
            table.add_row(name, run + stopped, *row, f"{one['seconds_per_step']:.1f}")
        if name != UNCHANGED:
            apart = [difference(figures, results.get(UNCHANGED, {}), figure) for figure in FIGURES]
            table.add_row(name, "difference", *apart, "", style="bold")
        table.add_section()
    return table


def check_runs(runs: Sequence[Path]) -> None:
    """Raise `UserError` for a folder that holds no finished run, or for two of one name."""
    for run in runs:
        for name, stage in (("config.yaml", "base"), ("score_scales.json", "ppo")):
            if not (run / name).is_file():
                raise UserError(f"{run / name} is missing: this wants the folder of a run whose {stage} stage is done")
    if len({run.resolve().name for run in runs}) < len(runs):
        raise UserError("two of the runs have folders of one name, by which results are kept; rename one")


def main() -> None:
    given = arguments()
    check_runs(given.runs)
    files = {
        (run, name): given.out / name / f"{run.resolve().name}.json" for run in given.runs for name in given.settings
    }
    for (run, name), file in files.items():
        if file.exists():
            check_kept(file, run, name, given.steps)
    for (run, name), file in files.items():  # run by run: what is ended early has every setting for the first ones
        if not file.exists():
            figures = trained(run, name, given.steps)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(figures, indent=1) + "\n")
            note(f"{name}, {run.name}: " + ", ".join(f"{figure} {figures[figure]:.3f}" for figure in FIGURES))
    results = results_in(given.out)
    console.print(table_of(results))
    short = {
        name: {run: {figure: one[figure] for figure in FIGURES} for run, one in figures.items()}
        for name, figures in results.items()
    }
    print(json.dumps(short))


if __name__ == "__main__":
    run_recipe(main)
