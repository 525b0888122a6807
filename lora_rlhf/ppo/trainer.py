"""The PPO loop: rollout, score, advantages, update. The numbers in comments are the points of the design."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch

from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, VALUE, SharedBase
from lora_rlhf.config import PpoSettings
from lora_rlhf.data.chat import answer_ids, prompt_ids
from lora_rlhf.data.preferences import PreferencePair, prompts_and_columns
from lora_rlhf.errors import NotFinite
from lora_rlhf.memory_peak import peak_memory_gib, ran_out, trim_heap
from lora_rlhf.ppo.advantages import advantages_and_returns, masked_mean, masked_whiten, token_rewards, value_mask
from lora_rlhf.ppo.batch_sizes import BatchSizes
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.ppo.guards import Answered, Guards, check_finite, opening_share, repetition
from lora_rlhf.ppo.kl_limit import PolicyWithinLimit
from lora_rlhf.ppo.losses import AdaptiveKl, FixedKl, importance_weights, kl_estimate
from lora_rlhf.ppo.minibatch import Batch, Metrics, add_gradients
from lora_rlhf.ppo.optimization import LossScale, adam, clipped_gradients, learning_rate_share
from lora_rlhf.ppo.prefixes import drawn_prefixes, share_at
from lora_rlhf.ppo.rollout import Rollout, sampled_answers
from lora_rlhf.ppo.scoring import Scored, answers_of, scored_by_roles, with_rewards
from lora_rlhf.processes import Processes
from lora_rlhf.reward.sources import AdapterReward, CombinedReward
from lora_rlhf.terminal import note


class PpoTrainer:
    """PPO over the roles of one shared base.

    The base has its policy adapter already, and whatever adapters the reward sources play. The value role is made
    here: a copy of the first reward adapter, head included (so it starts out knowing the score), or a fresh one.

    Args:
        base: the shared base.
        tokenizer: its tokenizer.
        pairs: training pairs, for their prompts and columns.
        reward: the sources of reward; their scales are fitted here (point 14).
        settings: hyper-parameters.
        seed: of prompt order and sampling.
        processes: that share the work; none: those that were launched.
    """

    def __init__(
        self,
        base: SharedBase,
        tokenizer: Any,
        pairs: Sequence[PreferencePair],
        reward: CombinedReward,
        settings: PpoSettings,
        seed: int,
        processes: Processes | None = None,
    ) -> None:
        self.base, self.tokenizer, self.pairs, self.reward, self.settings = base, tokenizer, pairs, reward, settings
        self.processes = processes or Processes()
        self.prompt_ids = [prompt_ids(tokenizer, pair.messages) for pair in pairs]
        self.prefixes: list[list[int]] = []
        if settings.prefix_share:  # without the EOS: the policy goes on, or ends the answer itself
            self.prefixes = [answer_ids(tokenizer, pair.chosen)[:-1][: settings.prefix_tokens] for pair in pairs]
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = BatchSizes(settings, self._give_up_copy)
        self._order: list[int] = []
        self.sampling = Sampling.of(settings)  # 4. the full distribution
        # decided once: the same seed then samples the same answers
        self.sampling = replace(self.sampling, expand_weights=base.layers.expands(self.sampling.expand_weights))
        self.step_count, self.episodes = 0, 0
        self.stopped_early: str | None = None
        self.value_offset = 0.0
        self.guards = Guards()
        self.within_limit = PolicyWithinLimit()
        self.answered: Answered | None = None
        self.skip_reason = ""
        self.kl = FixedKl(settings.kl_coef)
        if settings.adaptive_kl:
            self.kl = AdaptiveKl(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        if settings.gradient_checkpointing:
            base.enable_gradient_checkpointing()
        if not reward.scales:
            self._fit_reward_scales()
        self._start_value_role()
        base.set_trainable(POLICY, True)
        self.parameters = {role: base.parameters(role) for role in (POLICY, VALUE)}
        groups = [
            {"params": self.parameters[POLICY], "lr": settings.learning_rate},
            {"params": self.parameters[VALUE], "lr": settings.value_learning_rate or settings.learning_rate},
        ]
        self.optimizer = adam(groups, settings.optim)
        self.loss_scale = LossScale.of(base.compute_dtype)
        # 16. the learning rate is annealed to 0
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_share(step, settings.total_steps, settings.warmup_ratio)
        )

    def _fit_reward_scales(self) -> None:
        """14. Normalise each source on the reference's own samples, before PPO starts."""
        batches = []
        chosen = self._next_prompts(self.settings.normalization_samples)
        for start in range(0, len(chosen), self.settings.batch_size):
            part = chosen[start : start + self.settings.batch_size]
            batches.append(answers_of(self._rollout(REFERENCE, part), *self._prompts_and_columns(part)))
        if self.processes.is_main:  # a reward need not say the same twice, and the scales are those of all
            for name in self.reward.fit(*batches):
                note(
                    f"  reward source {name}: its scores of the reference's {len(chosen)} answers have no spread to be "
                    f"divided by; they count as they are, less their mean of {self.reward.scales[name].mean:g}"
                )
        self.reward.scales = self.processes.from_main(self.reward.scales)

    def _start_value_role(self) -> None:
        if not self.settings.trains_value_adapter:
            self.base.add_head(VALUE, torch.zeros(1, self.base.hidden_size))
            return
        adapters = [s for s in self.reward.sources if isinstance(s, AdapterReward)]
        if not adapters:
            self.base.new_adapter(VALUE, self.base.configs[POLICY], trainable=True)
            return
        source = next((s for s in adapters if s.role == REWARD), adapters[0])
        self.base.copy_adapter(source.role, VALUE, trainable=True)
        scale = self.reward.scales[source.name]
        factor = source.weight / scale.std  # the value starts at the normalised score of the text so far
        with torch.no_grad():
            self.base.heads[VALUE].weight.mul_(factor)  # type: ignore[operator]
        self.value_offset = -factor * scale.mean

    def _next_prompts(self, count: int) -> list[int]:
        """Return the next `count` prompts, through one permutation of all of them after another."""
        while len(self._order) < count:
            self._order += torch.randperm(len(self.pairs), generator=self.generator).tolist()
        chosen, self._order = self._order[:count], self._order[count:]
        return chosen

    def _prompts_and_columns(self, chosen: list[int]) -> tuple[list[Any], dict[str, list[Any]]]:
        return prompts_and_columns([self.pairs[i] for i in chosen])

    def _rollout(self, role: str, chosen: list[int]) -> Rollout:
        prompts = [self.prompt_ids[i] for i in chosen]
        prefixes = None
        if self.prefixes and role == POLICY:
            share = share_at(self.step_count, self.settings.total_steps, self.settings.prefix_share)
            prefixes = drawn_prefixes([self.prefixes[i] for i in chosen], share, self.generator)
        before = self.generator.get_state()

        def sampled(size: int) -> Rollout:
            self.generator.set_state(before)  # the same random numbers, should this be the second try
            sampling = replace(self.sampling, batch_size=size)
            rows = self.processes.rows(len(prompts))
            return sampled_answers(self.base, role, prompts, sampling, self.tokenizer, self.generator, rows, prefixes)

        part = self.batches.within_memory("rollout_batch_size", sampled)
        return self.processes.whole_rollout(part, prompts, self.tokenizer.pad_token_id)

    def _scored(self, rollout: Rollout, chosen: list[int]) -> Scored:
        rows = self.processes.rows(len(chosen))
        part = rollout.part(rows)
        answers = answers_of(part, *self._prompts_and_columns(chosen[rows]))

        def scored(size: int) -> Scored:
            settings = replace(self.settings, scoring_batch_size=size)
            return scored_by_roles(self.base, part, self.reward, settings, self.value_offset)

        own, problem = self.batches.within_memory("scoring_batch_size", scored), None
        try:
            # a reward function is called once, whatever memory does
            own = with_rewards(own, self.reward, answers, self.settings.score_clip)
        except NotFinite as error:
            problem = str(error)
        if problem := self.processes.first(problem):  # all processes skip the step, or none
            raise NotFinite(problem)
        return self.processes.whole_scores(own, len(chosen))

    @contextlib.contextmanager
    def _weights_for_gradients(self) -> Iterator[None]:
        """Hold a working copy for scoring and update, where the run has one and memory lets it."""
        with contextlib.ExitStack() as held:
            if self.sampling.expand_weights:
                try:
                    held.enter_context(self.base.layers.working_copy())
                except Exception as error:
                    if not ran_out(error):
                        raise
                    self._give_up_copy()
            yield

    def _give_up_copy(self) -> bool:
        """Do without a working copy from here on; return whether there was one.

        Scores and gradients stay the same; answers are then sampled without the rounding of a folded copy.
        """
        had = bool(self.sampling.expand_weights)
        self.sampling = replace(self.sampling, expand_weights=False)
        self.base.layers.give_up_copy()
        return had

    def step(self) -> Metrics:
        """Sample one batch of answers, learn from it, and return the metrics of the step.

        A step with NaN or infinity is skipped: what is left of its updates is not taken, and its metrics are few.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        before = (self.generator.get_state(), self._order.copy())
        chosen = self._next_prompts(self.settings.batch_size)
        self.answered = Answered(chosen, [], [], *before)
        try:
            metrics = self._taken(chosen)
        except NotFinite as error:
            metrics = self._skipped(str(error))
        self.scheduler.step()
        return metrics

    def _skipped(self, reason: str) -> Metrics:
        self.optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        self.episodes += self.settings.batch_size
        self.skip_reason = reason
        self.guards.note_skipped(self.settings, self.step_count, reason)
        return {"step": self.step_count, "episodes": self.episodes, "skipped": 1.0, "kl_coef": self.kl.coef}

    def _taken(self, chosen: list[int]) -> Metrics:
        s = self.settings
        started = time.perf_counter()
        rollout = self._rollout(POLICY, chosen)
        assert self.answered is not None
        self.answered = replace(self.answered, texts=rollout.texts)
        sampled = time.perf_counter()
        trim_heap()
        with self._weights_for_gradients():
            scored = self._scored(rollout, chosen)
            check_finite(score=scored.score, log_probability=scored.logprobs, value=scored.values)
            self.answered = replace(self.answered, scores=scored.score.tolist())
            kl = kl_estimate(scored.logprobs, scored.reference, s.kl_estimator)
            own = rollout.free if rollout.free.any() else ~rollout.free  # what the policy does by itself
            mask = rollout.action_mask & own[:, None]
            answer_kl = ((scored.logprobs - scored.reference) * mask).sum(1)[own].mean().item()
            answer_kl = self.processes.from_main(answer_kl)  # all processes stop at the same step
            advantages, returns = self.targets(rollout, scored, kl)
            scored_at = time.perf_counter()
            trim_heap()
            learning: Metrics = {}
            if not (passed := self._passes_limit(answer_kl)):
                learning = self.update(rollout, scored, advantages, returns)
        self.optimizer.zero_grad(set_to_none=True)  # gradients take no memory in the next rollout
        ended = time.perf_counter()

        self.step_count += 1
        self.episodes += s.batch_size
        metrics: Metrics = {
            "step": self.step_count,
            "episodes": self.episodes,
            "reward": (self.penalised(scored.score, rollout) - self.kl.coef * (kl * mask).sum(1))[own].mean().item(),
            "score": scored.score[own].mean().item(),
            "kl": answer_kl,
            "kl_coef": self.kl.coef,
            "entropy": masked_mean(scored.entropy, mask).item(),
            **learning,
            "response_length": mask.sum(1)[own].float().mean().item(),
            "ended_rate": rollout.ended[own].float().mean().item(),
            "eos_rate": rollout.ended_by_eos[own].float().mean().item(),
            "repetition": repetition(rollout.response_ids[own], mask[own]),
            "opening_share": opening_share([rollout.texts[i] for i in own.nonzero()[:, 0].tolist()]),
            "sampler_kl": masked_mean(rollout.sampled_logprobs - scored.logprobs, mask).item(),
            "sampler_max_difference": (rollout.sampled_logprobs - scored.logprobs).abs().max().item(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "samples_per_second": s.batch_size / (ended - started),
            "peak_memory_gib": peak_memory_gib(self.base.device),
            "seconds_rollout": sampled - started,
            "seconds_score": scored_at - sampled,
            "seconds_update": ended - scored_at,
        }
        if (folding := self.base.layers.folding) is not None:
            metrics |= {"folded_layers": folding.layers, "folding_error": folding.error}
        if self.loss_scale.adapts:
            metrics["loss_scale"] = self.loss_scale.scale
        if s.score_clip is not None:
            metrics["score_clip_fraction"] = self.reward.clipped_share(scored.raw_scores, s.score_clip)
        metrics |= {f"score/{name}": raw[own].mean().item() for name, raw in scored.raw_scores.items()}
        self.kl.update(answer_kl, s.batch_size)  # 17.
        if passed:
            self.within_limit.restore(self.parameters)
            assert s.max_kl is not None
            self.stopped_early = self.within_limit.said(answer_kl, s.max_kl, self.step_count)
            return metrics | {"back_to_step": self.within_limit.step or self.step_count}
        if reason := self.guards.note_taken(s, bool(learning["update_stopped"])):
            self.stopped_early = f"{reason} at step {self.step_count}"
        return metrics

    def _passes_limit(self, kl: float) -> bool:
        """Return whether the policy's KL is past `max_kl`; where it is within, keep what the step begins with."""
        limit = self.settings.max_kl
        if limit is not None and kl <= limit:  # what is not a number is neither: the step is skipped
            self.within_limit.keep(self.parameters, self.step_count + 1, kl)
        return limit is not None and kl > limit

    def penalised(self, score: torch.Tensor, rollout: Rollout) -> torch.Tensor:
        """8. Return the score, less the penalty where the answer did not end, and a share of it at a stop string."""
        s, at_stop_string = self.settings, rollout.ended & ~rollout.ended_by_eos
        return score - s.missing_eos_penalty * (~rollout.ended + s.stop_string_penalty * at_stop_string)

    def targets(self, rollout: Rollout, scored: Scored, kl: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (whitened advantages [batch, R], returns [batch, R + 1])."""
        s, mask = self.settings, rollout.action_mask
        rewards = token_rewards(kl, self.kl.coef, self.penalised(scored.score, rollout), mask)  # 9.
        states = value_mask(mask)  # 10.
        if s.whiten_rewards:
            rewards = masked_whiten(rewards, states, keep_mean=True)  # 12.
        advantages, returns = advantages_and_returns(rewards, scored.values, states, s.gamma, s.lam)  # 11.
        return masked_whiten(advantages[:, :-1], mask), returns  # 12.

    def update(self, rollout: Rollout, scored: Scored, advantages: torch.Tensor, returns: torch.Tensor) -> Metrics:
        """Take the optimizer steps of one batch; return means over its minibatches."""
        s = self.settings
        history: list[Metrics] = []
        first_ratio = 0.0
        if s.sampler_correction is not None:  # 19. what was sampled from slightly other probabilities is weighed
            weights = importance_weights(scored.logprobs, rollout.sampled_logprobs, s.sampler_correction)
            advantages = advantages * weights
        warming = self.step_count < s.value_warmup_steps
        everything = [p for own in self.parameters.values() for p in own]
        with self.base.training():
            for _ in range(s.num_ppo_epochs):
                order = torch.randperm(len(rollout.texts), generator=self.generator)  # 18.
                for rows in order.chunk(s.num_mini_batches):
                    part = rows.to(self.base.device)
                    accumulate = partial(self._accumulate, rollout, scored, advantages, returns, part, warming)
                    minibatch = partial(self._summed_gradients, accumulate, everything)
                    now, norms = clipped_gradients(minibatch, self.parameters, s.max_grad_norm, self.loss_scale)
                    if not history:
                        first_ratio = now["ratio_deviation"]  # 19.
                    history.append(now)
                    if s.update_kl_limit is not None and now["update_kl"] > s.update_kl_limit:
                        return self._summary(history, first_ratio, stopped=1.0)
                    check_finite(gradient=norms[POLICY], value_gradient=norms[VALUE])
                    now |= {"grad_norm": norms[POLICY].item(), "value_grad_norm": norms[VALUE].item()}
                    self.optimizer.step()
                    self.loss_scale.note_finite()
        return self._summary(history, first_ratio, stopped=0.0)

    def _summed_gradients(
        self, accumulate: Callable[[int], Metrics], parameters: Sequence[torch.nn.Parameter]
    ) -> Metrics:
        now = self.batches.within_memory("micro_batch_size", accumulate)
        self.processes.sum_gradients(parameters)
        return self.processes.sum_numbers(now, largest=("ratio_deviation",))

    def _accumulate(
        self,
        rollout: Rollout,
        scored: Scored,
        advantages: torch.Tensor,
        returns: torch.Tensor,
        rows: torch.Tensor,
        warming: bool,
        micro_batch_size: int,
    ) -> Metrics:
        """Add up the gradients of this process's rows of a minibatch; all processes' sum is one pass over all of it."""
        self.optimizer.zero_grad(set_to_none=True)
        batch = Batch(rollout, scored, advantages, returns)
        return add_gradients(
            self.base, batch, rows, settings=self.settings, processes=self.processes, value_offset=self.value_offset,
            loss_scale=self.loss_scale.scale, warming=warming, micro_batch_size=micro_batch_size,
        )  # fmt: skip

    @staticmethod
    def _summary(history: list[Metrics], first_ratio: float, stopped: float) -> Metrics:
        names = {n for m in history for n in m} - {"ratio_deviation"}
        means = {n: fmean(m[n] for m in history if n in m) for n in sorted(names)}
        return means | {"first_ratio_deviation": first_ratio, "update_stopped": stopped}

    def normalization(self) -> dict[str, Any]:
        """Return what normalises scores and values, to be kept beside the adapters."""
        return {"scales": {n: asdict(s) for n, s in self.reward.scales.items()}, "value_offset": self.value_offset}
