"""Our PPO step equals an independent, deliberately slow one: separate models, one unpadded answer at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel

from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import REWARD
from lora_rlhf.config import LoraSettings
from lora_rlhf.data.preferences import preference_pairs
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.reward.sources import AdapterReward, CombinedReward

STEPS = 3


class SlowPpo:
    """Plain PyTorch on four separately loaded models; shares no code with lora_rlhf.ppo."""

    def __init__(self, config, folder, trainer, scale, tokenizer):
        self.s, self.scale, self.tokenizer = config.ppo, scale, tokenizer
        self.models, self.heads = {}, {}
        for role in ("policy", "reward", "value"):
            file = folder / role / "adapter_config.json"
            file.write_text(
                json.dumps(json.loads(file.read_text()) | {"task_type": "CAUSAL_LM", "modules_to_save": None})
            )
            self.models[role] = PeftModel.from_pretrained(load_causal_lm(config), str(folder / role), is_trainable=True)
            self.models[role].eval()
        self.models["reference"] = load_causal_lm(config)
        for model in self.models.values():
            model.get_output_embeddings().weight.data.copy_(trainer.base.lm_head.weight)
        for role in ("reward", "value"):
            self.heads[role] = torch.nn.Parameter(trainer.base.heads[role].weight.detach().clone())
        self.value_role = "value" if config.ppo.value_model == "adapter" else "policy"
        trained = dict.fromkeys(("policy", self.value_role))
        self.parameters = [p for r in trained for p in self.models[r].parameters() if p.requires_grad]
        self.policy_count = sum(p.requires_grad for p in self.models["policy"].parameters())
        self.parameters.append(self.heads["value"])
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.updates, self.steps, self.clipped = 0, 0, set()

    def states(self, role, ids):
        model = self.models[role]
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        return causal.model(torch.tensor([ids])).last_hidden_state[0], causal.lm_head.weight

    def logprobs(self, role, prompt, answer):
        states, head = self.states(role, prompt + answer)
        all_logprobs = torch.log_softmax(states @ head.T / self.s.temperature, -1)
        return torch.stack([all_logprobs[len(prompt) - 1 + t, token] for t, token in enumerate(answer)])

    def values(self, prompt, answer):
        states, _ = self.states(self.value_role, prompt + answer)
        shift = self.scale.mean / self.scale.std if self.value_role == "value" else 0.0
        return (
            torch.stack([states[len(prompt) - 1 + t] @ self.heads["value"][0] for t in range(len(answer) + 1)]) - shift
        )

    def ids_of(self, tokens, text):
        """The tokens that are wholly inside the text, and those of what is missing of it."""
        while not text.startswith(self.tokenizer.decode(tokens)):
            tokens = tokens[:-1]
        missing = text[len(self.tokenizer.decode(tokens)) :]
        return [*tokens, *self.tokenizer(missing, add_special_tokens=False)["input_ids"]]

    def read(self, answer):
        """The tokens that the reward model reads, with EOS, and the penalty: what a user sees, whatever ended it."""
        s, eos = self.s, self.tokenizer.eos_token_id
        text, penalty = self.tokenizer.decode(answer), s.missing_eos_penalty
        if answer[-1] == eos:
            answer, penalty = answer[:-1], 0.0
        elif any(stop in text for stop in s.stop_strings):
            text = min((text.split(stop)[0] for stop in s.stop_strings), key=len).rstrip()
            answer, penalty = self.ids_of(answer, text), s.missing_eos_penalty * s.stop_string_penalty
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        seen = [token for token in answer if token not in special]
        seen = self.ids_of(seen, self.tokenizer.decode(seen).rstrip())
        while seen and not self.tokenizer.decode(seen[:1]).strip():  # nobody sees blanks in front
            seen = seen[1:]
        return [*seen, eos], penalty

    def step(self, rollout, orders):
        s = self.s

        def cut(ids, mask):
            return [[int(i) for i, m in zip(r, k, strict=True) if m] for r, k in zip(ids, mask, strict=True)]

        prompts = cut(rollout.query_ids, rollout.query_mask)
        answers = cut(rollout.response_ids, rollout.action_mask)
        old, old_values, returns, advantages = [], [], [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            with torch.no_grad():
                logp, ref = self.logprobs("policy", prompt, answer), self.logprobs("reference", prompt, answer)
                value = self.values(prompt, answer)
                read, penalty = self.read(answer)
                raw = self.states("reward", prompt + read)[0][-1] @ self.heads["reward"][0]
                score = (raw - self.scale.mean) / self.scale.std - penalty
            rewards = [-s.kl_coef * float(d) for d in logp - ref] + [float(score)]
            n = len(rewards)
            delta = [rewards[t] + (float(value[t + 1]) if t + 1 < n else 0.0) - float(value[t]) for t in range(n)]
            adv = [sum(s.lam ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]  # gamma is 1
            old.append(logp), old_values.append(value), advantages.append(torch.tensor(adv[:-1]))
            returns.append(torch.tensor([a + float(v) for a, v in zip(adv, value, strict=True)]))
        flat = torch.cat(advantages)
        mean, std = flat.mean(), math.sqrt(float(flat.var()) + 1e-8)
        for order in orders:
            size = len(order) // s.num_mini_batches
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                self.one_update(
                    rows, prompts, answers, old, old_values, returns, [(a - mean) / std for a in advantages]
                )
        self.steps += 1

    def one_update(self, rows, prompts, answers, old, old_values, returns, advantages):
        s = self.s
        policy_terms, value_terms = [], []
        for i in rows:
            ratio = torch.exp(self.logprobs("policy", prompts[i], answers[i]) - old[i])
            for rho, a in zip(ratio, advantages[i], strict=True):
                policy_terms.append(-torch.min(rho * a, torch.clamp(rho, 1 - s.cliprange, 1 + s.cliprange) * a))
            for v, v_old, ret in zip(self.values(prompts[i], answers[i]), old_values[i], returns[i], strict=True):
                near = v_old + torch.clamp(v - v_old, -s.cliprange_value, s.cliprange_value)
                value_terms.append(0.5 * torch.max((v - ret) ** 2, (near - ret) ** 2))
        loss = sum(policy_terms) / len(policy_terms) + s.vf_coef * sum(value_terms) / len(value_terms)
        grads = torch.autograd.grad(loss, self.parameters)
        factors = []
        for own in (grads[: self.policy_count], grads[self.policy_count :]):  # what the value has is clipped apart
            norm = math.sqrt(sum(float((g**2).sum()) for g in own))
            factors += [min(1.0, s.max_grad_norm / (norm + 1e-6))] * len(own)
        self.clipped |= {i for i, factor in enumerate(factors) if factor < 1}
        self.updates += 1
        rate = s.learning_rate * (1 - self.steps / s.total_steps)
        with torch.no_grad():
            for p, g, m, v, factor in zip(self.parameters, grads, self.first, self.second, factors, strict=True):
                m.mul_(0.9).add_(0.1 * factor * g)
                v.mul_(0.999).add_(0.001 * (factor * g) ** 2)
                m_hat, v_hat = m / (1 - 0.9**self.updates), v / (1 - 0.999**self.updates)
                p.sub_(rate * m_hat / (v_hat.sqrt() + 1e-5))


FAST_PATHS = {
    "default": {"expand_weights": True},
    "4-bit throughout": {"expand_weights": False, "sampler_correction": None},
    "mixed": {"mixed_adapter_scoring": True, "expand_weights": False},
    "mixed from a copy": {"mixed_adapter_scoring": True, "expand_weights": True},
    "checkpointing": {"gradient_checkpointing": True},
    "small batches": {"rollout_batch_size": 2, "scoring_batch_size": 4, "micro_batch_size": 1},
    "value head": {"value_model": "head"},
    "value head, checkpointing": {"value_model": "head", "gradient_checkpointing": True, "expand_weights": False},
}


@pytest.mark.parametrize("fast_paths", FAST_PATHS.values(), ids=FAST_PATHS.keys())
@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "upper layer"])
def test_three_steps_equal_the_slow_reference(make_base, make_config, tokenizer, tmp_path, fast_paths, layers):
    settings = {
        "total_steps": 5, "batch_size": 6, "num_ppo_epochs": 2, "num_mini_batches": 2, "micro_batch_size": 2,
        "response_length": 6, "temperature": 0.7, "stop_strings": ["e"], "kl_coef": 0.1, "learning_rate": 5e-4,
        "normalization_samples": 6, "update_kl_limit": None, "max_kl": None, "logits_chunk_size": 5,
        "max_grad_norm": 0.5, "vf_coef": 0.5,
    }  # fmt: skip
    lora = LoraSettings(r=4, lora_alpha=8, layers_to_transform=layers)
    config = make_config(ppo=settings | fast_paths, max_train_pairs=12, lora=lora)
    base = make_base(config, roles=(REWARD,))
    with torch.no_grad():
        base.lm_head.weight[tokenizer.eos_token_id] *= 3  # so that some answers end with EOS
    pairs, _ = preference_pairs(config, tokenizer, "train")
    trainer = PpoTrainer(base, tokenizer, pairs, CombinedReward([AdapterReward(base)]), config.ppo, seed=3)
    for role in ("policy", "reward", "value"):
        base.save_adapter(role, tmp_path / role)
    slow = SlowPpo(config, tmp_path, trainer, trainer.reward.scales[REWARD], tokenizer)

    rollouts, orders = [], []
    plain_rollout, plain_update = trainer._rollout, trainer.update

    def recorded_rollout(role, chosen):
        rollouts.append(plain_rollout(role, chosen))
        return rollouts[-1]

    def recorded_update(rollout, *rest):
        state = trainer.generator.get_state()
        orders.append([torch.randperm(6, generator=trainer.generator).tolist() for _ in range(2)])
        trainer.generator.set_state(state)
        return plain_update(rollout, *rest)

    trainer._rollout, trainer.update = recorded_rollout, recorded_update
    before = [p.detach().clone() for r in ("policy", "value") for p in base.parameters(r)]
    for step in range(STEPS):
        metrics = trainer.step()
        assert metrics["first_ratio_deviation"] < 1e-5
        slow.step(rollouts[step], orders[step])
    ours = [p.detach() for r in ("policy", "value") for p in base.parameters(r)]
    assert slow.clipped == set(range(len(ours))), "the norm is small enough to matter to policy and value"
    endings = {tuple(row) for r in rollouts for row in torch.stack([r.ended, r.ended_by_eos], 1).tolist()}
    assert endings == {(True, True), (True, False), (False, False)}, "by EOS, at a stop string, and cut"
    assert len(ours) == len(slow.parameters)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, before, strict=True)) > 1e-3
    for mine, theirs in zip(ours, slow.parameters, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=1e-5)
