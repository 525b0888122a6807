"""What the arms answer: sampled once per prompt, kept, and read by every suite."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lora_rlhf.base.packing import batches_by_length, right_padded
from lora_rlhf.data.chat import Message, answer_ids, ending_ids, prompt_ids
from lora_rlhf.evaluation.arms import prompts_of_any_template
from lora_rlhf.evaluation.loaded_arms import LoadedArm, digest
from lora_rlhf.evaluation.result_cache import ResultCache
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.ppo.rollout import sampled_answers
from lora_rlhf.processes import Processes
from lora_rlhf.reward.sources import Answers


@dataclass
class GivenAnswers:
    """One arm's answers, in order of the prompts.

    Attributes:
        texts: the answers.
        ended: whether each ended by itself.
        prompt_ids: token ids of each prompt, in the arm's own template.
        answer_ids: the sampled token ids, with the EOS or stop string that ended them.
    """

    texts: list[str]
    ended: list[bool]
    prompt_ids: list[list[int]]
    answer_ids: list[list[int]]

    @property
    def lengths(self) -> list[float]:
        """Length of each answer in words: the same measure for every tokenizer."""
        return [float(len(text.split())) for text in self.texts]

    @property
    def fingerprint(self) -> str:
        """A digest of the token ids of prompts and answers."""
        return digest(str(self.prompt_ids), str(self.answer_ids))


def given_answers(
    arm: LoadedArm,
    conversations: Sequence[Sequence[Message]],
    sampling: Sampling,
    batch: int,
    seed: int,
    cache: ResultCache,
    report: Callable[[int], None] = lambda done: None,
) -> GivenAnswers:
    """Return the arm's answers to conversations that end with a user's turn, `batch` at a time.

    Each batch is kept as soon as it is there. The answer to a prompt depends on the seed and the batch it is in. Where
    the cache is of several processes, each samples its own prompts of a batch, and all return the whole.
    """
    whole = GivenAnswers([], [], [], [])
    for start in range(0, len(conversations), batch):
        part = [list(messages) for messages in conversations[start : start + batch]]
        key = {
            "what": "answers", "arm": arm.fingerprint, "prompts": part, "seed": seed + start,
            "sampling": {**asdict(sampling), "batch_size": None}, "ends": ending_ids(arm.tokenizer),
        }  # fmt: skip
        sample = functools.partial(_sampled, arm, part, sampling, seed + start, cache.processes)
        found = GivenAnswers(**cache.result(key, sample))
        for field in ("texts", "ended", "prompt_ids", "answer_ids"):
            getattr(whole, field).extend(getattr(found, field))
        report(len(whole.texts))
    return whole


def _sampled(
    arm: LoadedArm, part: list[list[Message]], sampling: Sampling, seed: int, processes: Processes
) -> dict[str, Any]:
    prompts = prompts_of_any_template(arm.tokenizer, part)
    generator = torch.Generator().manual_seed(seed)
    rows = processes.rows(len(prompts))
    rollout = sampled_answers(arm.base, arm.role, prompts, sampling, arm.tokenizer, generator, rows)
    kept = zip(rollout.response_ids, rollout.action_mask, strict=True)
    own = GivenAnswers(rollout.texts, rollout.ended.tolist(), prompts[rows], [r[m].tolist() for r, m in kept])
    return processes.whole(asdict(own), len(prompts))


@torch.no_grad()
def answer_logprob(arm: LoadedArm, given: GivenAnswers, temperature: float, batch: int) -> list[float]:
    """Return Σ log p of each answer's tokens after its prompt, in nats at `temperature`, as the arm's role has it."""
    base = arm.base
    rows = [p + a for p, a in zip(given.prompt_ids, given.answer_ids, strict=True)]
    ids, mask = right_padded(rows, arm.tokenizer.pad_token_id, base.device)
    action = torch.zeros_like(mask)
    for i, (prompt, row) in enumerate(zip(given.prompt_ids, rows, strict=True)):
        action[i, len(prompt) : len(row)] = True
    total = torch.zeros(len(rows), device=base.device)
    for part in batches_by_length(mask, torch.arange(len(rows), device=base.device), batch):
        states = base.hidden(arm.role, ids[part], mask[part])
        logprobs, _ = base.response_logprobs(states, ids[part], action[part, 1:], temperature, None, False)
        total[part] = logprobs.sum(1)
    return total.tolist()


def kl_to_base(arm: LoadedArm, base_arm: LoadedArm, given: GivenAnswers, temperature: float) -> list[float] | None:
    """Return Σ log p_arm − log p_base over each answer's tokens (nats); none where their vocabularies differ."""
    if arm.tokenizer.get_vocab() != base_arm.tokenizer.get_vocab():
        return None
    own, reference = (answer_logprob(who, given, temperature, batch=16) for who in (arm, base_arm))
    return [a - b for a, b in zip(own, reference, strict=True)]


def as_read_by_reward(
    base_arm: LoadedArm,
    conversations: Sequence[Sequence[Message]],
    given: GivenAnswers,
    columns: dict[str, list[Any]] | None = None,
) -> Answers:
    """Return the answers in the format of the base's reward models, whatever template the arm answered in.

    Each answer has EOS after it, as in reward training, whether it ended by itself or not.
    """
    tokenizer = base_arm.tokenizer
    rows = [
        prompt_ids(tokenizer, messages) + answer_ids(tokenizer, text)
        for messages, text in zip(conversations, given.texts, strict=True)
    ]
    ids, mask = right_padded(rows, tokenizer.pad_token_id, base_arm.base.device)
    return Answers(ids, mask, [list(messages) for messages in conversations], given.texts, columns or {})
