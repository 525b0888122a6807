"""Where a rollout's reward comes from: adapters on the shared base, classifiers with their own tokenizer, functions."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from lora_rlhf.base.adapters import read_plain_config
from lora_rlhf.base.devices import device
from lora_rlhf.base.loading import check_float16_range, explained, quiet_transformers, resolved_model
from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import Message
from lora_rlhf.errors import NotFinite, UserError

OWN_ADAPTER = "reward_adapter"
"""Folder of the run's own reward adapter, and the name of that source."""


@dataclass
class Answers:
    """What a reward source may look at: token ids of the base's tokenizer, and text.

    Attributes:
        ids: [answers, length] prompt and answer.
        mask: [answers, length].
        prompts: the messages of each prompt.
        completions: the text of each answer.
        columns: the other columns of the data set, for functions.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    prompts: list[list[Message]]
    completions: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)


class RewardSource(Protocol):
    """Anything that gives a number to each answer."""

    name: str
    weight: float

    def scores(self, answers: Answers) -> torch.Tensor:
        """Return raw scores, float32 [answers]."""
        ...


@dataclass
class AdapterReward:
    """A reward adapter played on the shared base."""

    base: SharedBase
    role: str = REWARD
    name: str = REWARD
    weight: float = 1.0
    batch: int = 32

    def scores(self, answers: Answers) -> torch.Tensor:
        """Return the head's number at the last real token of each answer."""
        return self.base.scores(self.role, answers.ids, answers.mask, self.batch)


@dataclass
class ClassifierReward:
    """A sequence-classification model with one output, given text through its own tokenizer and chat template."""

    model: Any
    tokenizer: Any
    name: str
    weight: float = 1.0
    batch: int = 32

    @torch.no_grad()
    def scores(self, answers: Answers) -> torch.Tensor:
        """Return the model's number for each dialogue."""
        texts = [self._text(p, c) for p, c in zip(answers.prompts, answers.completions, strict=True)]
        parts = []
        for start in range(0, len(texts), self.batch):
            encoded = self.tokenizer(
                texts[start : start + self.batch], padding=self.batch > 1, truncation=True, return_tensors="pt",
                add_special_tokens=self.tokenizer.chat_template is None,
            )  # fmt: skip
            parts.append(self.model(**encoded.to(self.model.device)).logits[:, 0].float())
        return torch.cat(parts).to(answers.ids.device)

    def _text(self, prompt: list[Message], completion: str) -> str:
        dialogue = [*prompt, {"role": "assistant", "content": completion}]
        if self.tokenizer.chat_template is not None:
            return self.tokenizer.apply_chat_template(dialogue, tokenize=False)
        names = {"user": "Human", "assistant": "Assistant", "system": "System"}
        return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in dialogue)


@dataclass
class FunctionReward:
    """A Python function with TRL's signature: `f(prompts, completions, **columns) -> list of numbers`.

    Prompts are lists of messages and completions are `[{"role": "assistant", "content": text}]`, as TRL passes them
    for conversational data.
    """

    function: Callable[..., Sequence[float]]
    name: str
    weight: float = 1.0

    def scores(self, answers: Answers) -> torch.Tensor:
        """Return the function's numbers."""
        completions = [[{"role": "assistant", "content": text}] for text in answers.completions]
        values = self.function(prompts=answers.prompts, completions=completions, **answers.columns)
        try:
            numbers = [float(v) for v in values]
        except (TypeError, ValueError):
            raise UserError(
                f"reward function {self.name} gave what is no number for each answer: {str(values)[:80]}"
            ) from None
        if len(numbers) != len(completions):
            raise UserError(f"reward function {self.name} gave {len(numbers)} numbers for {len(completions)} answers")
        return torch.tensor(numbers, dtype=torch.float32, device=answers.ids.device)


@dataclass
class ScoreScale:
    """Mean and standard deviation of a source's scores on the reference's own answers."""

    mean: float = 0.0
    std: float = 1.0


@dataclass
class CombinedReward:
    """Reward sources, each normalised to mean 0 and deviation 1 on reference answers, added up by weight."""

    sources: list[RewardSource]
    scales: dict[str, ScoreScale] = field(default_factory=dict)

    def fit(self, *batches: Answers) -> None:
        """Measure each source's mean and deviation on answers that the reference gave."""
        raw = [CombinedReward(self.sources).scores(batch)[1] for batch in batches]
        for name in raw[0]:
            scores = torch.cat([batch[name] for batch in raw])
            self.scales[name] = ScoreScale(scores.mean().item(), max(scores.std().item(), 1e-6))

    def scores(
        self, answers: Answers, known: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return (sum [answers], raw scores by source name); `known` holds raw scores that are there already."""
        known = known or {}
        raw = {s.name: known[s.name] if s.name in known else s.scores(answers) for s in self.sources}
        for name, scores in raw.items():
            if not torch.isfinite(scores).all():
                raise NotFinite(f"reward source {name} gave NaN or infinity for an answer")
        total = torch.zeros(len(answers.completions), device=answers.ids.device)
        for source in self.sources:
            scale = self.scales.get(source.name, ScoreScale())
            total = total + source.weight * (raw[source.name] - scale.mean) / scale.std
        return total, raw


@dataclass(frozen=True)
class SourceEntry:
    """One entry of `ppo.reward_sources`, checked; `path` is None for the run's own reward adapter."""

    kind: str
    path: str | None
    name: str
    weight: float
    where: str


def source_entries(config: RunConfig) -> list[SourceEntry]:
    """Return the checked entries of `ppo.reward_sources`; loads nothing but functions.

    Raises:
        UserError: a source of unknown kind or without path, a function that cannot be imported, two of one name.
    """
    entries: list[SourceEntry] = []
    for i, given in enumerate(config.ppo.reward_sources):
        where = f"ppo.reward_sources[{i}]"
        if given.keys() - {"kind", "path", "weight", "name"} or "kind" not in given:
            raise UserError(f"{where}: fields are kind, path, weight and name, not {', '.join(sorted(given))}")
        kind, path = given["kind"], given.get("path") or None
        if kind not in ("adapter", "model", "function"):
            raise UserError(f"{where}: kind is adapter, model or function, not {kind!r}")
        if path is None and kind != "adapter":
            raise UserError(f"{where}: path is missing")
        name = str(given.get("name") or (Path(str(path).partition(":")[0]).stem if path else OWN_ADAPTER))
        try:
            weight = float(given.get("weight", 1.0))
        except (TypeError, ValueError):
            raise UserError(f"{where}: weight is a number, not {given['weight']!r}") from None
        if name in (entry.name for entry in entries):
            raise UserError(f"{where}: a source named {name} is there already; give it another name")
        if kind == "adapter" and str(path or "").startswith(("/", ".", "~")) and not Path(str(path)).is_dir():
            raise UserError(f"{where}: path: no folder {path}")
        if kind == "adapter" and path and Path(str(path)).is_dir():
            try:
                read_plain_config(Path(str(path)))
            except UserError as error:
                raise UserError(f"{where}: path: {error}") from None
        if kind == "function":
            _function(str(path), where)
        entries.append(SourceEntry(kind, None if path is None else str(path), name, weight, where))
    return entries


def reward_sources(config: RunConfig, base: SharedBase, own_adapter: Path) -> list[RewardSource]:
    """Return the sources that `ppo.reward_sources` names; the run's own reward adapter where it names none.

    Raises:
        UserError: what `source_entries` raises, or a source that cannot be loaded.
    """
    batch = config.ppo.scoring_batch_size
    if not config.ppo.reward_sources:
        base.load_adapter(REWARD, own_adapter)
        return [AdapterReward(base, batch=batch)]
    sources: list[RewardSource] = []
    for i, entry in enumerate(source_entries(config)):
        if entry.kind == "adapter":
            role = REWARD if not any(isinstance(s, AdapterReward) for s in sources) else f"{REWARD}_{i}"
            path = Path(entry.path) if entry.path else own_adapter
            base.load_adapter(role, path)
            if role not in base.heads:
                raise UserError(f"{entry.where}: {path} has no reward head; a SEQ_CLS adapter is wanted")
            sources.append(AdapterReward(base, role, entry.name, entry.weight, batch))
        elif entry.kind == "model":
            sources.append(_classifier(config, str(entry.path), entry.name, entry.weight, entry.where))
        else:
            sources.append(FunctionReward(_function(str(entry.path), entry.where), entry.name, entry.weight))
    return sources


def run_reward(config: RunConfig, base: SharedBase, run: Path) -> CombinedReward:
    """Return the reward of the run in `run`, in standard deviations of the reference's own answers.

    Raises:
        UserError: what `reward_sources` raises, or the run's scales cannot be read or lack a source.
    """
    scales, sources = score_scales(run), reward_sources(config, base, run / OWN_ADAPTER)
    if missing := [source.name for source in sources if source.name not in scales]:
        raise UserError(f"{run / 'score_scales.json'} has no scale of {', '.join(missing)}: run the PPO stage again")
    return CombinedReward(sources, scales)


def score_scales(run: Path) -> dict[str, ScoreScale]:
    """Return the scale of each source that the run in `run` measured. Raises `UserError` where they cannot be read."""
    file = run / "score_scales.json"
    try:
        held = json.loads(file.read_text(encoding="utf-8"))["scales"]
        scales = {name: ScoreScale(**scale) for name, scale in held.items()}
        sound = all(abs(scale.mean) < float("inf") and 0 < scale.std < float("inf") for scale in scales.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is no file of score scales: {' '.join(str(error).split())[:300]}") from None
    if not sound:
        raise UserError(f"{file} is no file of score scales: a mean is not finite, or a std not above 0")
    return scales


def _classifier(config: RunConfig, path: str, name: str, weight: float, where: str) -> ClassifierReward:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = resolved_model(path, where)
    with explained(source, config, where), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=getattr(torch, config.dtype), device_map={"": device()}, trust_remote_code=False,
            use_safetensors=True,
        ).eval()  # fmt: skip
    check_float16_range(model, source)
    if model.config.num_labels != 1:
        raise UserError(f"{path} has {model.config.num_labels} outputs; a reward model has one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id
    # without a pad token that is not EOS, transformers would look for the score before the closing EOS
    batch = 1 if tokenizer.pad_token is None else config.ppo.scoring_batch_size
    return ClassifierReward(model, tokenizer, name, weight, batch)


def _function(path: str, where: str) -> Callable[..., Sequence[float]]:
    """Return the function that `module:name` or `file.py:name` names."""
    place, _, attribute = path.rpartition(":")
    if not place or not attribute:
        raise UserError(f"{where}: path of a function is written module:name or file.py:name, not {path}")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function = getattr(module, attribute)
    except FileNotFoundError:
        raise UserError(f"{where}: no file {place}") from None
    except Exception as error:  # whatever the user's file raises while it is imported
        raise UserError(f"{where}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"{where}: {path} is no function")
    return function
