"""The stages of a run, each a function: it does nothing where the output directory holds its result already."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.original_weights import NoOriginalWeights
from lora_rlhf.base.prequantized import INSTRUCT_SETTING
from lora_rlhf.base.shared import INSTRUCT, POLICY, REFERENCE, REWARD, VALUE, SharedBase
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.data.chat import prompt_ids
from lora_rlhf.data.preferences import PreferencePair, digest_of_pairs
from lora_rlhf.data.rows import Split
from lora_rlhf.data.safety_prompts import prompts_with_answers, safety_prompts
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.arm_safety import arm_safety
from lora_rlhf.evaluation.arms import ArmAnswers, arm_summary, bad_word_pattern, model_arm_answers, role_answers
from lora_rlhf.evaluation.curves import write_curves
from lora_rlhf.evaluation.margins import model_reader, role_reader
from lora_rlhf.instruct import train_instruct_adapter
from lora_rlhf.memory import with_checkpointing_decided
from lora_rlhf.memory_peak import reset_peak_memory
from lora_rlhf.merge import MergedWeights, check_room, merge_drift, original_weights, policy_logprobs, write_merged
from lora_rlhf.ppo.checkpoint import scales_of
from lora_rlhf.ppo.decoding import Sampling, decoder_of
from lora_rlhf.ppo.instruct_check import check_instruct_model
from lora_rlhf.ppo.rollout import Rollout, model_answers, sampled_answers
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.ppo_steps import checkpoint_to_resume, taken_steps, without_skipped
from lora_rlhf.reward.own_reward import trains_own_reward
from lora_rlhf.reward.probes import probed, probes_in_words, warning_in_words
from lora_rlhf.reward.sources import CombinedReward, reward_sources, run_reward
from lora_rlhf.reward.training import accuracy_in_words, pair_scores, reward_accuracy, train_reward_adapter
from lora_rlhf.run import RunDirectory, write_text
from lora_rlhf.session import PAIRS, Session
from lora_rlhf.terminal import arms_table, console, heading, interrupt, note, progress, samples_table, warning

Arm = tuple[ArmAnswers, dict[str, float]]
"""An arm's answers to the held-out prompts, and what `arm_safety` measures of it."""


def base_stage(session: Session) -> None:
    """Download (once), load in 4 bits and check; reads the data, so that bad data stops the run here."""
    if not session.processes.is_main:
        return
    heading("base", session.config.model_name_or_path)
    if session.run.finished("base"):
        note("  done before")
        return
    with session.stage("base"):
        session.check_run()
        splits: tuple[Split, ...] = ("train", "test")
        digests = {split: digest_of_pairs(session.pairs(split)) for split in splits}
        write_text(session.run / PAIRS, json.dumps(digests) + "\n")
        if session.config.merge.target == "original":
            _mergeable(session, session.shared_base())


def reward_stage(session: Session) -> None:
    """Train the LoRA reward adapter and measure its accuracy on held-out pairs; all processes share both."""
    heading("reward", "a LoRA reward adapter on preference pairs")
    config, run = session.config, session.run
    if not trains_own_reward(config.ppo.reward_sources):
        note("  ppo.reward_sources names other rewards: no adapter is trained")
        return
    if not session.begins("reward"):
        if run.writes:
            note(f"  done before: accuracy {_reported(run, 'reward_model', 'accuracy'):.3f}")
        return
    with session.processes.connected(), session.stage("reward") as results:
        session.check_run()
        train, test = session.pairs("train"), session.pairs("test")
        session.free_base()
        with session.processes.alone():
            train_reward_adapter(config, session.tokenizer, train, run / "reward_adapter", session.processes)
        session.free_base()  # TRL's model is in cycles: it goes when garbage is collected
        base = session.shared_base()
        base.load_adapter(REWARD, run / "reward_adapter")
        results["reward_model"] = reward_accuracy(config, base, session.tokenizer, test, session.processes)
        results["reward_model"]["probes"] = _probes(session, base)
        session.free_base()
    measured = results["reward_model"]
    for line in [*accuracy_in_words(measured), "safety probes: " + probes_in_words(measured["probes"])]:
        note(f"  {line}")


def _probes(session: Session, base: SharedBase) -> dict[str, dict[str, float]]:
    """Return what the safety probes find of the reward role; each of the processes scores its own."""
    config = session.config
    prompts = safety_prompts(config.compare.safety_prompts, config.compare.num_safety_prompts)
    prompts = prompts_with_answers(prompts)

    def scores(pairs: Sequence[PreferencePair]) -> tuple[list[float], list[float]]:
        rows = session.processes.rows(len(pairs))
        with base.layers.working_copy_where_room():
            own = pair_scores(base, REWARD, session.tokenizer, pairs[rows], config.ppo.scoring_batch_size)
        whole = session.processes.whole(dict(zip(("chosen", "rejected"), own, strict=True)), len(pairs))
        return whole["chosen"].tolist(), whole["rejected"].tolist()

    return probed(prompts, scores)


def _reported(run: RunDirectory, stage: str, name: str) -> Any:
    try:
        return run.summary[stage][name]
    except (KeyError, TypeError):
        raise UserError(f"{run / 'summary.json'} is damaged; delete it to run the stages again") from None


def instruct_stage(session: Session) -> None:
    """Train the SFT arm, where the config names no instruct model; all processes share it."""
    config, run = session.config, session.run
    heading("instruct", config.instruct_model_name_or_path or "SFT on the chosen answers, as a LoRA adapter")
    if config.instruct_model_name_or_path:
        note("  named in the config: nothing to train")
        return
    if not session.begins("instruct"):
        note("  done before")
        return
    with session.processes.connected(), session.stage("instruct"):
        session.check_run()
        train = session.pairs("train")
        session.free_base()
        with session.processes.alone():
            train_instruct_adapter(config, session.tokenizer, train, run / "instruct_adapter", session.processes)


def ppo_stage(session: Session) -> None:
    """Train the policy adapter by PPO against the reward; the reference is the same base with adapters off."""
    heading("ppo", "the policy adapter, against the reward; reference: the base with adapters off")
    config, run = session.config, session.run
    own_reward = trains_own_reward(config.ppo.reward_sources)
    needed = {"reward_adapter/adapter_model.safetensors": "reward"} if own_reward else {}
    if not session.begins("ppo", needed):
        if run.writes:
            note(f"  done before: {_reported(run, 'ppo', 'steps')} steps")
        return
    with session.processes.connected(), session.stage("ppo") as results:
        session.free_base()  # before the check, which may load a base that has no adapters yet
        session.check_run()
        _warn_of_failed_probes(session)
        train = session.pairs("train")
        base = session.shared_base()
        reset_peak_memory(base.device)
        reward = CombinedReward(reward_sources(config, base, run / "reward_adapter"))
        settings = with_checkpointing_decided(config).ppo
        state = session.processes.from_main(checkpoint_to_resume(run, config) if run.writes else None)
        if state is not None:
            reward.scales = scales_of(state.numbers)
        trainer = PpoTrainer(base, session.tokenizer, train, reward, settings, config.seed, session.processes)
        metrics = taken_steps(trainer, run, state)
        if not run.writes:
            return
        metrics = without_skipped(metrics)
        if not metrics:
            raise UserError(f"every PPO step was skipped for NaN or infinity; the batches are in {run / 'skipped'}")
        base.save_adapter(POLICY, run / "policy_adapter")
        base.save_adapter(VALUE, run / "value_adapter")
        write_text(run / "score_scales.json", json.dumps(trainer.normalization(), indent=1) + "\n")
        write_curves(metrics, run / "curves.png")
        seconds = sorted(m["seconds_rollout"] + m["seconds_score"] + m["seconds_update"] for m in metrics)
        results["ppo"] = {
            "steps": trainer.step_count,
            "episodes": trainer.episodes,
            "seconds_per_step": seconds[len(seconds) // 2],
            "peak_memory_gib": metrics[-1]["peak_memory_gib"],
            "stopped_early": trainer.stopped_early,
        }
    if trainer.stopped_early:
        note(
            f"  stopped early: {trainer.stopped_early}. A larger ppo.kl_coef or a smaller learning rate holds it back."
        )


def _warn_of_failed_probes(session: Session) -> None:
    """Say in red, before PPO begins, that the run's own reward model fails its safety probes."""
    probes = session.run.summary.get("reward_model", {}).get("probes")
    if probes and (text := warning_in_words(probes)):
        warning(f"  {text}.")


def merge_stage(session: Session) -> None:
    """Merge the policy adapter into both 16-bit targets, measure the drift of each, and keep the one asked for."""
    if not session.processes.is_main:
        return
    config, run = session.config, session.run
    heading("merge", f"Plus in 16 bits, from the {config.merge.target} weights")
    if run.finished("merge"):
        note(f"  done before: {run / 'merged'}")
        return
    run.needed("policy_adapter/adapter_model.safetensors", "ppo")
    with session.stage("merge") as results:
        s, sampling = config.ppo, replace(Sampling.of(config.ppo), expand_weights=False)
        test = session.pairs("test")[: config.merge.drift_prompts]
        base = _base_with_policy(session)
        merged = _mergeable(session, base)
        check_room(run / "merged", merged["dequantized"].total_bytes)
        prompts = [prompt_ids(session.tokenizer, pair.messages) for pair in test]
        generator = torch.Generator().manual_seed(config.seed)
        rollout = sampled_answers(base, POLICY, prompts, sampling, session.tokenizer, generator)
        measured = s.temperature, s.logits_chunk_size, s.scoring_batch_size
        trained = policy_logprobs(base, rollout, *measured)
        passes = -(-len(prompts) // s.scoring_batch_size)
        drift = {}
        for target, weights in merged.items():
            with progress(f"merge: drift of {target}", passes * weights.linear_count) as report:
                drift[target] = merge_drift(weights, rollout, trained, *measured, report)
        kept = merged[config.merge.target]
        with progress("merge: written", len(kept.outlines)) as report:
            write_merged(kept, session.tokenizer, sampling, run / "merged", report)
        interrupt.mind()
        results["merge"] = {"target": config.merge.target, "drift": drift}
    note("  mean drift of log-probs (nats per token): " + ", ".join(f"{t} {d:.4f}" for t, d in drift.items()))


def _mergeable(session: Session, base: SharedBase) -> dict[str, MergedWeights]:
    """Return the merged weights of each target that the base's files allow.

    Raises:
        UserError: they do not allow the one that the config asks for.
    """
    config = session.config
    try:
        original = MergedWeights(base, original_weights(base, config))
    except NoOriginalWeights as reason:
        if config.merge.target == "original":
            raise UserError(f"merge.target: {reason}: set merge.target: dequantized") from None
        note(f"  the drift of the original weights is not measured: {reason}")
        return {"dequantized": MergedWeights(base)}
    return {"original": original, "dequantized": MergedWeights(base)}


def compare_stage(session: Session) -> None:
    """Let base, Instruct and Plus answer held-out prompts, which all processes share, and count."""
    heading("compare", "base, Instruct and Plus on held-out prompts")
    config, run = session.config, session.run
    needed = {"policy_adapter/adapter_model.safetensors": "ppo"}
    if not config.instruct_model_name_or_path:
        needed["instruct_adapter/adapter_model.safetensors"] = "instruct"
    if session.begins("compare", needed):
        with session.processes.connected(), session.stage("compare") as results:
            pairs = session.pairs("test")[: config.compare.num_prompts]
            arms, safety = _arms(session, pairs)
            words = bad_word_pattern(config.compare.bad_words_file)
            results["arms"] = {name: arm_summary(arm, arms["base"], words) | safety[name] for name, arm in arms.items()}
            prompts = {"prompts": [p.messages[-1]["content"] for p in pairs]}
            samples = prompts | {name: arm.texts for name, arm in arms.items()}
            if run.writes:
                write_text(run / "samples.json", json.dumps(samples, indent=1) + "\n")
    if not run.writes:
        return
    console.print(arms_table(run.summary["arms"]))
    try:
        samples = json.loads((run / "samples.json").read_text(encoding="utf-8"))
        prompts = samples.pop("prompts")
        console.print(samples_table(prompts[:3], {arm: texts[:3] for arm, texts in samples.items()}))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, IndexError, RecursionError):
        note(f"  {run / 'samples.json'} is missing or damaged: no sample answers to show")


def _arms(session: Session, pairs: list[PreferencePair]) -> tuple[dict[str, ArmAnswers], dict[str, dict[str, float]]]:
    """Return each arm's answers to the held-out prompts, and what `arm_safety` measures of it."""
    config, run, tokenizer = session.config, session.run, session.tokenizer
    base = _base_with_policy(session)
    run.needed("score_scales.json", "ppo")
    reward = run_reward(config, base, run.path)

    prompts = safety_prompts(config.compare.safety_prompts, config.compare.num_safety_prompts)
    sampling, batch = Sampling.of(config.ppo), config.ppo.scoring_batch_size

    def by_role(role: str) -> Callable[[], Arm]:
        def sample(asked: list[list[int]], generator: torch.Generator, rows: slice) -> Rollout:
            return sampled_answers(base, role, asked, sampling, tokenizer, generator, rows)

        def both() -> Arm:
            reader = role_reader(base, role, tokenizer.pad_token_id, batch)
            return (
                role_answers(base, role, tokenizer, pairs, reward, config, config.seed, session.processes),
                arm_safety(prompts, tokenizer, sample, reader, config, session.processes),
            )

        return both

    def by_instruct_model() -> Arm:
        name = config.instruct_model_name_or_path
        own = load_tokenizer(config, name, INSTRUCT_SETTING)
        model = load_causal_lm(config, name, INSTRUCT_SETTING)
        check_instruct_model(model, getattr(torch, config.dtype))

        def sample(asked: list[list[int]], generator: torch.Generator, rows: slice) -> Rollout:
            return model_answers(decoder_of(model), asked, sampling, own, generator, rows=rows)

        reader = model_reader(model, own.pad_token_id, batch)
        return (
            model_arm_answers(base, tokenizer, model, own, pairs, reward, config, config.seed, session.processes),
            arm_safety(prompts, own, sample, reader, config, session.processes),
        )

    makers = {"base": by_role(REFERENCE), "instruct": by_instruct_model, "plus": by_role(POLICY)}
    if not config.instruct_model_name_or_path:
        base.load_adapter(INSTRUCT, run / "instruct_adapter")
        makers["instruct"] = by_role(INSTRUCT)
    arms, safety = {}, {}
    with progress("compare: arms", len(makers)) as report:
        for name, make in makers.items():
            arms[name], safety[name] = make()
            report(len(arms))
    return arms, safety


def _base_with_policy(session: Session) -> SharedBase:
    """Return a freshly loaded base with the finished policy adapter."""
    session.free_base()
    base = session.shared_base()
    base.replace_adapter(POLICY, session.run / "policy_adapter")
    return base
