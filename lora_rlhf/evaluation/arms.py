"""The arms of the comparison (base, Instruct, Plus): their answers and what is counted on them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_rlhf.base.packing import batches_by_length, right_padded
from lora_rlhf.base.positions import most_positions
from lora_rlhf.base.prequantized import INSTRUCT_SETTING
from lora_rlhf.base.shared import REFERENCE, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import Message, answer_ids, prompt_ids
from lora_rlhf.data.preferences import PreferencePair, prompts_and_columns
from lora_rlhf.errors import UserError
from lora_rlhf.merge import model_logprobs
from lora_rlhf.ppo.decoding import Sampling, decoder_of
from lora_rlhf.ppo.rollout import Rollout, model_answers, sampled_answers
from lora_rlhf.processes import Processes
from lora_rlhf.reward.sources import Answers, CombinedReward


@dataclass
class ArmAnswers:
    """One arm's answers to the prompts, in order.

    Attributes:
        texts: the answers.
        ended: [prompts] whether each ended by itself.
        kl_to_base: [prompts] Σ log p_arm − log p_base over the answer's tokens, in nats; NaN where the two models do
            not share a vocabulary.
        score: [prompts] combined reward, in standard deviations of the reference.
    """

    texts: list[str]
    ended: torch.Tensor
    kl_to_base: torch.Tensor
    score: torch.Tensor


def role_answers(
    base: SharedBase,
    role: str,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    reward: CombinedReward,
    config: RunConfig,
    seed: int,
    processes: Processes | None = None,
) -> ArmAnswers:
    """Return the answers of a role of the shared base.

    The `processes` share the prompts and are connected: each answers its own, and all return the whole. None means this
    process alone.
    """
    processes = processes or Processes.one()
    parts = []
    generator = torch.Generator().manual_seed(seed)
    sampling = Sampling.of(config.ppo)
    for chunk in _chunks(pairs, config.ppo.batch_size):
        rows = processes.rows(len(chunk))
        rollout = sampled_answers(base, role, _prompts(tokenizer, chunk), sampling, tokenizer, generator, rows)
        own = _role_logprobs(base, role, rollout, config)
        ref = _role_logprobs(base, REFERENCE, rollout, config)
        part = _part(rollout, (own - ref).sum(1), reward, chunk[rows], rollout.text_ids, rollout.text_mask)
        parts.append(ArmAnswers(**processes.whole(vars(part), len(chunk))))
    return _joined(parts)


def model_arm_answers(
    base: SharedBase,
    base_tokenizer: Any,
    model: Any,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    reward: CombinedReward,
    config: RunConfig,
    seed: int,
    processes: Processes | None = None,
) -> ArmAnswers:
    """Return the answers of a whole other model, with its own chat template, judged as the others are.

    The `processes` share the prompts, as in `role_answers`.
    """
    processes = processes or Processes.one()
    parts = []
    generator = torch.Generator().manual_seed(seed)
    same_vocabulary = tokenizer.get_vocab() == base_tokenizer.get_vocab()
    room = most_positions(base.causal_lm.config) or sys.maxsize
    same_format = same_vocabulary and tokenizer.chat_template == base_tokenizer.chat_template
    for chunk in _chunks(pairs, config.ppo.batch_size):
        rows = processes.rows(len(chunk))
        rollout = model_answers(
            decoder_of(model),
            prompts_of_any_template(tokenizer, [pair.messages for pair in chunk]),
            Sampling.of(config.ppo),
            tokenizer,
            generator,
            rows=rows,
        )
        answered = chunk[rows]
        # the reward model reads the dialogue in its own format, EOS included, whatever template the arm answered in
        base_prompts = _prompts(base_tokenizer, answered)
        if same_format:  # then what was sampled can be read, as of the other arms
            rows_read = zip(rollout.score_ids, rollout.score_mask, strict=True)
            answers = [[*ids[real].tolist()[:-1], base_tokenizer.eos_token_id] for ids, real in rows_read]
        else:  # the base may need more tokens for them, and more than it has positions for
            answers = [answer_ids(base_tokenizer, text) for text in rollout.texts]
        read = [
            p + (a if len(p) + len(a) <= room else [*a[: room - len(p) - 1], base_tokenizer.eos_token_id])
            for p, a in zip(base_prompts, answers, strict=True)
        ]
        ids, mask = right_padded(read, base_tokenizer.pad_token_id, base.device)
        kl = torch.full((len(answered),), float("nan"))
        if same_vocabulary:
            with torch.no_grad():
                own = model_logprobs(
                    model, rollout, config.ppo.temperature, config.ppo.logits_chunk_size, config.ppo.scoring_batch_size
                )
            kl = (own.to(base.device) - _role_logprobs(base, REFERENCE, rollout, config)).sum(1)
        part = _part(rollout, kl, reward, answered, ids, mask)
        parts.append(ArmAnswers(**processes.whole(vars(part), len(chunk))))
    return _joined(parts)


def arm_summary(arm: ArmAnswers, base: ArmAnswers, bad_words: re.Pattern[str]) -> dict[str, float | int | None]:
    """Return the figures of one arm; a tie with base counts half a win."""
    n = len(arm.texts)
    wins = (arm.score > base.score).float() + 0.5 * (arm.score == base.score).float()
    kl = arm.kl_to_base.mean().item()
    return {
        "reward_mean": arm.score.mean().item(),
        "reward_sem": arm.score.std().item() / n**0.5 if n > 1 else 0.0,
        "win_rate_vs_base": wins.mean().item(),
        "kl_to_base": kl if kl == kl else None,
        "ended_rate": arm.ended.float().mean().item(),
        "bad_word_rate": sum(bool(bad_words.search(text)) for text in arm.texts) / n,
        "n": n,
    }


def bad_words(file: str | None) -> list[str]:
    """Return the words of a file, one per line (`#` begins a comment line); none: the package's print-safe list.

    Raises:
        UserError: the file cannot be read or holds no word.
    """
    path = Path(file) if file else Path(__file__).with_name("bad_words.txt")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:  # not UTF-8, or a name with a zero byte
        raise UserError(f"compare.bad_words_file: {path} cannot be read: {error}") from None
    words = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not words:
        raise UserError(f"compare.bad_words_file: {path} holds no word")
    return words


def bad_word_pattern(file: str | None) -> re.Pattern[str]:
    """Return a pattern that finds any of `bad_words(file)`, whole, case aside."""
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, bad_words(file))) + r")(?!\w)", re.IGNORECASE)


def _part(
    rollout: Rollout,
    kl: torch.Tensor,
    reward: CombinedReward,
    chunk: Sequence[PreferencePair],
    ids: torch.Tensor,
    mask: torch.Tensor,
) -> ArmAnswers:
    prompts, columns = prompts_and_columns(chunk)
    score, _ = reward.scores(Answers(ids, mask, prompts, rollout.texts, columns))
    return ArmAnswers(rollout.texts, rollout.ended.cpu(), kl.cpu(), score.cpu())


def _joined(parts: list[ArmAnswers]) -> ArmAnswers:
    return ArmAnswers(
        [text for part in parts for text in part.texts],
        torch.cat([part.ended for part in parts]),
        torch.cat([part.kl_to_base for part in parts]),
        torch.cat([part.score for part in parts]),
    )


@torch.no_grad()
def _role_logprobs(base: SharedBase, role: str, rollout: Rollout, config: RunConfig) -> torch.Tensor:
    settings = config.ppo
    ids, mask, action = (part.to(base.device) for part in (rollout.ids, rollout.mask, rollout.action_mask))
    logprobs = torch.zeros(action.shape, device=base.device)
    for rows in batches_by_length(mask, torch.arange(len(ids), device=base.device), settings.scoring_batch_size):
        states = base.hidden(role, ids[rows], mask[rows])
        logprobs[rows], _ = base.response_logprobs(
            states, ids[rows], action[rows], settings.temperature, settings.logits_chunk_size, with_entropy=False
        )
    return logprobs


def _prompts(tokenizer: Any, pairs: Sequence[PreferencePair]) -> list[list[int]]:
    return [prompt_ids(tokenizer, pair.messages) for pair in pairs]


def prompts_of_any_template(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Return prompt ids; where the template refuses a dialogue (many want user and assistant in turns), a plainer form.

    Raises:
        UserError: the template refuses a single question too.
    """
    prompts = []
    for dialogue in conversations:
        for messages in (dialogue, in_turns(dialogue), dialogue[-1:]):
            try:
                prompts.append(prompt_ids(tokenizer, messages))
                break
            except Exception as error:  # whatever a template raises
                reason = error
        else:
            raise UserError(f"{INSTRUCT_SETTING}: its chat template refuses a single question: {reason}")
    return prompts


def in_turns(messages: Sequence[Message]) -> list[Message]:
    """Return the dialogue with user and assistant taking turns: a system text and neighbours of one role are joined."""
    turns: list[Message] = []
    for message in messages:
        role = "user" if message["role"] == "system" else message["role"]
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + message["content"]
        else:
            turns.append({"role": role, "content": message["content"]})
    return turns[turns[0]["role"] == "assistant" :]


def _chunks(pairs: Sequence[PreferencePair], size: int) -> list[Sequence[PreferencePair]]:
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]
