"""Evaluate base, Instruct and Plus as the paper does, and write pages that show it.

    python recipes/evaluate.py --output_dir runs/embedded
    python recipes/evaluate.py --output_dir runs/embedded --suites bad_words general --limit 200 --local_tasks FOLDER
    python recipes/evaluate.py --output_dir runs/named --models base=NAME instruct=NAME plus=ADAPTER_FOLDER

Every suite runs that can with what is at hand; the others are named with what they need:
  general      lm-eval's tasks from the Hub, or JSONL files from --local_tasks; is ability kept within --margin?
  mt_bench     two-turn questions (--mt_bench_questions), graded by a judge
  moderation   ability, correctness and safety of answers to the held-out prompts, graded by a judge
  safety       does it decline what is harmful, and answer what only looks so? (--safety_prompts adds XSTest's file)
  bad_words    probability of bad words at each layer and by word, and the share of answers that hold one
  preference   reward, win rates (also length-controlled), KL, and a referee that PPO never saw

The judge is an OpenAI-compatible endpoint (--judge_base_url and --judge_model; the key is read from
LORA_RLHF_JUDGE_API_KEY or OPENAI_API_KEY) or a local model (--judge_model alone). Results are kept in
OUTPUT_DIR/evaluation by what they depend on: the same command repeats nothing, and goes on after an interruption.
Several GPUs: `accelerate launch --config_file recipes/launch/two_gpus.yaml recipes/evaluate.py …`. They share the
sampling of answers; what is measured on answers, and general ability, is the first one's work.
Writes evaluation/results.json, report.md, report.html (self-contained) and the figures as PNGs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_rlhf.config_file import config_from_file
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.context import SUITES, EvaluationSettings
from lora_rlhf.evaluation.evaluate import evaluate
from lora_rlhf.evaluation.report import claims_table, write_report
from lora_rlhf.terminal import console, note, run_recipe


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--output_dir",
        type=Path,
        default=Path("runs/embedded"),
        help="the run; results go to its evaluation/ [%(default)s]",
    )
    add("--suites", nargs="+", choices=SUITES, default=SUITES, help="which suites [all]")
    add("--limit", type=int, help="at most so many items per task and held-out prompts [all; compare.num_prompts]")
    add("--models", nargs="+", metavar="ARM=NAME", help="arms in place of the run's: Hub names, folders, LoRA adapters")
    add("--config", type=Path, help="config of --models without a run: data, template, lengths [package defaults]")
    add("--local_tasks", type=Path, help="folder of JSONL files: id, question, choices, answer (or a worked answer)")
    add(
        "--margin",
        type=float,
        default=0.01,
        help="accuracy that may be lost for ability to count as kept [%(default)s]",
    )
    add("--mt_bench_questions", type=Path, help="JSONL: question_id, category, turns, and reference where there is one")
    add("--max_new_tokens", type=int, default=256, help="longest answer to an mt_bench question [%(default)s]")
    add(
        "--judge_base_url",
        help="endpoint, up to /chat/completions: https://api.openai.com/v1, http://127.0.0.1:8000/v1",
    )
    add("--judge_model", help="the judge's name there; without --judge_base_url a Hub name or folder")
    add("--referee", help="reward model for the preference suite [two adapters trained on held-out pairs]")
    add("--bad_words_file", help="one word per line [the package's print-safe list]")
    add(
        "--safety_prompts",
        type=Path,
        help="JSONL with XSTest's columns prompt and label, measured beside the package's own safety prompts",
    )
    add("--batch_size", type=int, default=16, help="rows in one pass; changes memory [%(default)s]")
    add("--seed", type=int, default=0, help="seed of the sampled answers [%(default)s]")
    return parser


def main() -> None:
    given = vars(arguments().parse_args())
    named, file = given.pop("models"), given.pop("config")
    if (given["limit"] is not None and given["limit"] < 1) or given["batch_size"] < 1 or given["max_new_tokens"] < 1:
        raise UserError("--limit, --batch_size and --max_new_tokens are at least 1")
    if not 0 < given["margin"] < 1:
        raise UserError(
            f"--margin is a share of accuracy above 0 and below 1 (0.01 is one point), not {given['margin']}"
        )
    for pair in named or ():
        if "=" not in pair:
            raise UserError(f"--models: {pair!r} is not ARM=NAME; write base=NAME plus=FOLDER")
    models = dict(pair.split("=", 1) for pair in named) if named else None
    settings = EvaluationSettings(**{**given, "suites": tuple(given["suites"])})
    results = evaluate(settings, models, config_from_file(file) if file else None)
    if not results:  # this is not the first of several processes
        return
    folder = settings.output_dir / "evaluation"
    write_report(results, folder)
    if results["claims"]:
        console.print(claims_table(results))
    note(f"the report is {folder / 'report.html'} (and report.md, results.json, *.png)")


if __name__ == "__main__":
    run_recipe(main)
