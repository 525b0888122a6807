"""The whole evaluation: arms, suites, and results.json, from which the report is made.

Where several processes are launched, they share the sampling of all answers that the suites will read, first of all: to
held-out prompts (of the policies that a run kept too) and to mt_bench questions. The suites then run in the first
process alone: general abilities, judges, lens, rewards, KL and the training of referees are not split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lora_rlhf.base.devices import with_fast_dtype
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_file
from lora_rlhf.data.preferences import PreferencePair, preference_pairs
from lora_rlhf.data.safety_prompts import safety_prompts
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.ability import general_suite
from lora_rlhf.evaluation.arms import bad_words
from lora_rlhf.evaluation.bad_words import bad_words_suite
from lora_rlhf.evaluation.claims import claims
from lora_rlhf.evaluation.context import SUITES, Evaluation, EvaluationSettings, SuiteResult, SuiteSkipped
from lora_rlhf.evaluation.judge import HttpJudge, Judge, LocalJudge, api_key_from_environment
from lora_rlhf.evaluation.loaded_arms import named_arms, run_arms
from lora_rlhf.evaluation.local_tasks import local_tasks
from lora_rlhf.evaluation.moderation import moderation_suite
from lora_rlhf.evaluation.mt_bench import asked_questions, mt_bench_suite, read_questions, two_turn_answers
from lora_rlhf.evaluation.preference import preference_suite, snapshot_arms
from lora_rlhf.evaluation.result_cache import ResultCache
from lora_rlhf.evaluation.safety import safety_suite
from lora_rlhf.processes import Processes
from lora_rlhf.run import package_versions, write_text
from lora_rlhf.terminal import console, heading, note


def evaluate(
    settings: EvaluationSettings, models: Mapping[str, str] | None = None, config: RunConfig | None = None
) -> dict[str, Any]:
    """Run the suites, write `evaluation/results.json` after each, and return its content.

    Of several processes that were launched, all but the first return nothing, {}, when the answers are sampled.

    Args:
        settings: what is asked for.
        models: arms by name in place of the run's.
        config: of the models' loading and the held-out prompts, where `settings.output_dir` holds no run.

    Raises:
        UserError: whatever is wrong with the run, the files or the models, before a suite begins.
    """
    _check_files(settings)
    processes = Processes()
    console.quiet = not processes.is_main
    processes.meet()
    run = settings.output_dir if (settings.output_dir / "config.yaml").is_file() else None
    if run is None and not models:
        raise UserError(
            f"--output_dir: {settings.output_dir} holds no run (no config.yaml); make one with "
            f"`python recipes/direct_rlhf_lora.py --output_dir {settings.output_dir}`, or name the arms with --models"
        )
    if run is not None:
        config = config_from_file(run / "config.yaml")
    config = with_fast_dtype(config or RunConfig())
    heading("arms", "loaded on one shared base where they are adapters")
    arms = named_arms(config, models) if models else run_arms(config, settings.output_dir)
    for arm in arms.values():
        note(f"  {arm.name}: {arm.role} on {arm.base.identity['name']}")
    pairs, counted = preference_pairs(config, arms["base"].tokenizer, "test")
    note(f"  held-out pairs: {counted}")
    folder = settings.output_dir / "evaluation"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {folder} cannot be written: {error.strerror}") from None
    evaluation = Evaluation(
        settings, config, None if models else run, folder, arms,
        pairs[: settings.limit or config.compare.num_prompts], ResultCache(folder / "cache"), judge=None,
    )  # fmt: skip
    if processes.is_main:  # a judge that cannot be loaded is said before hours of sampling
        with processes.alone():
            evaluation.judge = _judge(settings, config, folder)
    if processes.count > 1:
        _wait_for_judge(processes)
        _sample_together(evaluation, processes)
        if not processes.is_main:
            return {}
    with processes.alone():
        return _suites(evaluation, pairs)


def _wait_for_judge(processes: Processes) -> None:
    """Return when the first process has its judge; raise `UserError` where it ended without one."""
    if processes.is_main:
        processes.tell("judge", "loaded")
    else:
        processes.told("judge")


def _sample_together(evaluation: Evaluation, processes: Processes) -> None:
    """Let the processes share the sampling of what the suites will read; the first one's cache holds it then."""
    settings = evaluation.settings
    shared = replace(evaluation, cache=ResultCache(evaluation.cache.folder, processes), _answers={})
    heading("answers", f"sampled by {processes.count} processes")
    with processes.connected():
        if {"moderation", "bad_words", "preference"} & set(settings.suites):
            shared.held_out_answers()
        if "safety" in settings.suites:
            for prompts in shared.safety_sets().values():
                for arm in evaluation.arms.values():
                    shared.answers_to(arm, [prompt.messages for prompt in prompts])
        if "preference" in settings.suites and evaluation.run is not None:
            for _, arm in snapshot_arms(shared):
                shared.answers_of(arm)
        if "mt_bench" in settings.suites and settings.mt_bench_questions and settings.judge_model:
            questions = asked_questions(settings)
            for arm in evaluation.arms.values():
                two_turn_answers(shared, arm, questions)


def _suites(evaluation: Evaluation, pairs: list[PreferencePair]) -> dict[str, Any]:
    makers: dict[str, Callable[[], SuiteResult]] = {
        "general": lambda: general_suite(evaluation),
        "mt_bench": lambda: mt_bench_suite(evaluation),
        "moderation": lambda: moderation_suite(evaluation),
        "safety": lambda: safety_suite(evaluation),
        "bad_words": lambda: bad_words_suite(evaluation),
        "preference": lambda: preference_suite(evaluation, pairs),
    }
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(evaluation.settings).items()}
    results: dict[str, Any] = {
        "arms": {arm.name: {"fingerprint": arm.fingerprint} for arm in evaluation.arms.values()},
        "prompts": len(evaluation.pairs), "settings": settings, "suites": {}, "skipped": {}, "claims": [],
        "versions": package_versions(),
    }  # fmt: skip
    for name in [suite for suite in SUITES if suite in evaluation.settings.suites]:
        heading(name, TITLES[name])
        try:
            results["suites"][name] = asdict(makers[name]())
        except SuiteSkipped as reason:
            results["skipped"][name] = str(reason)
            note(f"  skipped: {reason}")
        results["claims"] = claims(results["suites"])
        if evaluation.judge is not None:
            results["judge_counts"] = dict(evaluation.judge.counts)
        write_text(evaluation.folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


TITLES = {
    "general": "general abilities, through lm-eval",
    "mt_bench": "two-turn questions, graded by a judge",
    "moderation": "general ability, correctness and safety of answers to held-out prompts",
    "safety": "declining what is harmful, and answering what only looks so",
    "bad_words": "bad words, layer by layer and in answers",
    "preference": "reward, wins, KL and length on held-out prompts",
}


def _check_files(settings: EvaluationSettings) -> None:
    """Raise `UserError` for whatever can be known to be wrong before anything is loaded."""
    bad_words(settings.bad_words_file)
    if "safety" in settings.suites:
        safety_prompts(settings.safety_prompts)
    if settings.mt_bench_questions is not None:
        read_questions(settings.mt_bench_questions)
    if settings.local_tasks is not None and "general" in settings.suites:
        local_tasks(settings.local_tasks)
    if settings.judge_base_url and not settings.judge_model:
        raise UserError("--judge_base_url: --judge_model NAME is missing: which model there is the judge?")


def _judge(settings: EvaluationSettings, config: RunConfig, folder: Path) -> Judge | None:
    replies = folder / "judge_replies.jsonl"
    if settings.judge_base_url:
        assert settings.judge_model is not None
        return HttpJudge(settings.judge_base_url, settings.judge_model, replies, api_key_from_environment())
    if settings.judge_model:
        tokenizer = load_tokenizer(config, settings.judge_model, "--judge_model")
        model = load_causal_lm(config, settings.judge_model, "--judge_model")
        judge = LocalJudge(model, tokenizer, replies)
        judge.name = settings.judge_model  # as it was given, not the folder that it was found in
        return judge
    return None
