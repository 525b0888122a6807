"""Two readings of an answer: the reward that PPO maximised, and a referee that PPO never saw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch

from lora_rlhf.config import RunConfig
from lora_rlhf.data.preferences import PreferencePair, prompts_and_columns
from lora_rlhf.data.safety_prompts import LABELS, safety_prompts
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.answers import GivenAnswers, as_read_by_reward
from lora_rlhf.evaluation.context import Evaluation
from lora_rlhf.evaluation.loaded_arms import adapter_folder, digest, folder_fingerprint, model_fingerprint
from lora_rlhf.evaluation.statistics import wilson_interval
from lora_rlhf.reward.probes import probed
from lora_rlhf.reward.sources import (
    OWN_ADAPTER,
    AdapterReward,
    Answers,
    RewardSource,
    reward_sources,
    score_scales,
    source_entries,
)
from lora_rlhf.reward.training import train_reward_adapter
from lora_rlhf.terminal import note
from lora_rlhf.trl_trainer import checkpoints_beside

Reading = Callable[[GivenAnswers], list[float]]
"""Gives a number to each answer to the held-out prompts."""

SMALLEST_FOLD, FEWEST_STEPS, MOST_EPOCHS = 16, 30, 6
"""Of a referee's training: pairs per fold, optimizer steps aimed at, passes over the fold at most."""


@dataclass
class Referee:
    """A reward model that PPO never saw.

    Attributes:
        name: what it is, for people.
        reading: its numbers, in standard deviations of base's own answers.
        right: for each held-out pair that it was not trained on, whether it orders the two answers as people did.
        probes: what `lora_rlhf.reward.probes.probed` found.
    """

    name: str
    reading: Reading
    right: list[bool]
    probes: dict[str, dict[str, float]]

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of pairs ordered right: {value, low, high, n}, with Wilson's 95 % interval."""
        low, high = wilson_interval(sum(self.right), len(self.right))
        return {"value": fmean(self.right), "low": low, "high": high, "n": len(self.right)}


def own_reading(evaluation: Evaluation) -> Reading | None:
    """Return the run's own reward, in standard deviations of the reference; none where no run is evaluated."""
    run, config = evaluation.run, evaluation.config
    if run is None or not (run / "score_scales.json").is_file():
        return None
    identity = _own_identity(config, run)

    def read(given: GivenAnswers) -> list[float]:
        def scored() -> list[float]:
            return evaluation.own_reward().scores(_read(evaluation, given))[0].tolist()

        key = {"what": "reward", "sources": identity, **_rows(evaluation, given)}
        return evaluation.cache.result(key, scored)

    return read


def own_scores(evaluation: Evaluation) -> dict[str, list[float]] | None:
    """Return `own_reading` of every arm's answers; none where no run is evaluated."""
    read = own_reading(evaluation)
    return read and {name: read(given) for name, given in evaluation.held_out_answers().items()}


def find_referee(evaluation: Evaluation, all_pairs: Sequence[PreferencePair]) -> Referee | None:
    """Return the referee that was named, else one trained on held-out pairs; none where there are too few of those.

    The trained one is two: each learns from one half of the held-out pairs, which the run's reward model has not seen
    either, with another seed, and reads the answers to the prompts of the other half.
    """
    if evaluation.settings.referee:
        source = _named_source(evaluation, evaluation.settings.referee)
        reading = _in_base_units(evaluation, [source], lambda pair: 0)
        ordered = _ordered_right(evaluation, source, all_pairs)
        return Referee(evaluation.settings.referee, reading, ordered, _referee_probes(evaluation, [source]))
    folds = folds_by_prompt(all_pairs)
    parts = [[p for p in all_pairs if folds[p.prompt] == fold] for fold in (0, 1)]
    if min(map(len, parts)) < SMALLEST_FOLD:
        return None
    config, base = evaluation.config, evaluation.base_arm.base
    batch = config.ppo.scoring_batch_size
    sources: list[RewardSource] = []
    right: list[bool] = []
    for fold, pairs in enumerate(parts):
        folder = _trained(evaluation, referee_config(config, len(pairs), fold), pairs, fold)
        role = f"referee_{fold}"
        base.load_adapter(role, folder)
        sources.append(AdapterReward(base, role, folder_fingerprint(folder), batch=batch))
        right += _ordered_right(evaluation, sources[-1], parts[1 - fold])
    reading = _in_base_units(evaluation, sources, lambda pair: 1 - folds[pair.prompt])
    name = f"two reward adapters, each trained on half of the {len(all_pairs)} held-out pairs and read on the other"
    return Referee(name, reading, right, _referee_probes(evaluation, sources))


def own_probes(evaluation: Evaluation) -> dict[str, dict[str, float]] | None:
    """Return what the safety probes find of the reward that the run's PPO maximised, scaled and weighed as there.

    None where a function is part of it: functions may want columns that the probes do not have.
    """
    run, entries = evaluation.run, source_entries(evaluation.config)
    if run is None or any(entry.kind == "function" for entry in entries):
        return None
    identity = _own_identity(evaluation.config, run)
    return _probes(evaluation, identity, lambda answers: evaluation.own_reward().scores(answers)[0])


def _own_identity(config: RunConfig, run: Path) -> list[Any]:
    """Return what the scores of the run's own reward depend on: its adapter, the scales and the sources."""
    adapter = run / OWN_ADAPTER
    scales = {name: asdict(scale) for name, scale in score_scales(run).items()}
    return [folder_fingerprint(adapter) if adapter.is_dir() else "", scales, config.ppo.reward_sources]


def _referee_probes(evaluation: Evaluation, sources: Sequence[RewardSource]) -> dict[str, dict[str, float]]:
    """Return what the safety probes find of a referee; of several adapters, of the one that does worse on each kind."""
    each = [_probes(evaluation, [source.name], source.scores) for source in sources]
    return {label: min((found[label] for found in each), key=lambda share: share["low"]) for label in LABELS}


def _probes(
    evaluation: Evaluation, identity: list[Any], score: Callable[[Answers], torch.Tensor]
) -> dict[str, dict[str, float]]:
    """Return what the package's safety prompts find of a score, which `identity` tells from all others."""
    prompts = safety_prompts(None, evaluation.settings.limit)

    def scores(pairs: Sequence[PreferencePair]) -> tuple[list[float], list[float]]:
        messages, columns = prompts_and_columns(pairs)
        sides = []
        for texts in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs]):
            given = GivenAnswers(texts, [True] * len(pairs), [], [])
            sides.append(score(as_read_by_reward(evaluation.base_arm, messages, given, columns)).tolist())
        return sides[0], sides[1]

    base, rows = evaluation.base_arm.fingerprint, digest(*map(repr, prompts))
    key = {"what": "probes", "of": identity, "base": base, "prompts": rows}
    return evaluation.cache.result(key, lambda: probed(prompts, scores))


def _ordered_right(evaluation: Evaluation, source: RewardSource, pairs: Sequence[PreferencePair]) -> list[bool]:
    """Return for each pair whether the source scores the chosen answer above the rejected one."""
    prompts, columns = prompts_and_columns(pairs)

    def ordered() -> list[bool]:
        sides = []
        for texts in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs]):
            given = GivenAnswers(texts, [True] * len(pairs), [], [])
            sides.append(source.scores(as_read_by_reward(evaluation.base_arm, prompts, given, columns)))
        return (sides[0] > sides[1]).tolist()

    rows = digest(*map(repr, pairs))
    base = evaluation.base_arm.fingerprint
    return evaluation.cache.result({"what": "right", "source": source.name, "base": base, "pairs": rows}, ordered)


def folds_by_prompt(pairs: Sequence[PreferencePair]) -> dict[Any, int]:
    """Return the half (0 or 1) of each prompt: equal prompts are never in both."""
    return {prompt: i % 2 for i, prompt in enumerate(dict.fromkeys(pair.prompt for pair in pairs))}


def referee_config(config: RunConfig, pairs: int, fold: int) -> RunConfig:
    """Return the run's reward training with a seed of its own, and as many passes as a small half needs."""
    reward = config.reward
    steps = (
        pairs * (1 + reward.contrast_share) / reward.per_device_train_batch_size / reward.gradient_accumulation_steps
    )
    epochs = min(MOST_EPOCHS, max(reward.num_train_epochs, FEWEST_STEPS / steps))
    return replace(config, seed=config.seed + 1000 + fold, reward=replace(reward, num_train_epochs=epochs))


def _trained(evaluation: Evaluation, config: RunConfig, pairs: Sequence[PreferencePair], fold: int) -> Path:
    """Return the folder of a referee's adapter, trained where it is not there yet."""
    what = json.dumps([asdict(config.reward), asdict(config.lora), config.seed, [asdict(pair) for pair in pairs]])
    folder = evaluation.folder / "referee" / digest(evaluation.base_arm.fingerprint, what)[:16]
    if not (folder / "adapter_model.safetensors").is_file():
        note(f"  referee {fold + 1} of 2: a reward adapter on {len(pairs)} held-out pairs")
        train_reward_adapter(config, evaluation.base_arm.tokenizer, pairs, folder)
    shutil.rmtree(checkpoints_beside(folder), ignore_errors=True)
    return folder


def _named_source(evaluation: Evaluation, name: str) -> RewardSource:
    base, config, folder = evaluation.base_arm.base, evaluation.config, adapter_folder(name)
    if folder is not None:
        base.load_adapter("referee", folder)
        if "referee" not in base.heads:
            raise UserError(f"--referee: {name} has no reward head; a SEQ_CLS adapter is wanted")
        return AdapterReward(base, "referee", folder_fingerprint(folder))
    only = replace(config, ppo=replace(config.ppo, reward_sources=[{"kind": "model", "path": name}]))
    source = reward_sources(only, base, Path())[0]
    source.name = model_fingerprint(name, config)
    return source


def _in_base_units(
    evaluation: Evaluation, sources: Sequence[RewardSource], judge_of: Callable[[PreferencePair], int]
) -> Reading:
    """Return a reading by the source that `judge_of` picks for a prompt, scaled by its scores of base's answers."""
    which = [judge_of(pair) for pair in evaluation.pairs]

    def raw(given: GivenAnswers) -> list[float]:
        def scored() -> list[float]:
            answers = _read(evaluation, given)
            rows = torch.tensor(which, device=answers.ids.device)
            scores = torch.zeros(len(which), device=answers.ids.device)
            for i, source in enumerate(sources):
                if (rows == i).any():
                    scores = torch.where(rows == i, source.scores(answers), scores)
            return scores.tolist()

        names = [source.name for source in sources]
        return evaluation.cache.result(
            {"what": "referee", "sources": names, "which": which, **_rows(evaluation, given)}, scored
        )

    of_base = raw(evaluation.held_out_answers()["base"])
    scales = {}
    for i in set(which):
        own = [score for score, judge in zip(of_base, which, strict=True) if judge == i]
        scales[i] = (fmean(own), max(pstdev(own), 1e-6))
    return lambda given: [(s - scales[i][0]) / scales[i][1] for s, i in zip(raw(given), which, strict=True)]


def _read(evaluation: Evaluation, given: GivenAnswers) -> Answers:
    prompts, columns = prompts_and_columns(evaluation.pairs)
    return as_read_by_reward(evaluation.base_arm, prompts, given, columns)


def _rows(evaluation: Evaluation, given: GivenAnswers) -> dict[str, Any]:
    prompts = [pair.messages for pair in evaluation.pairs]
    return {"base": evaluation.base_arm.fingerprint, "rows": digest(json.dumps([prompts, given.texts]))}
