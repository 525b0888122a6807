"""The margin: does a model find the right kind of answer likelier than the wrong kind? Nothing is sampled or judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch

from lora_rlhf.base.lm_head import LmHead
from lora_rlhf.base.packing import batches_by_length, right_padded, states_without_padding
from lora_rlhf.base.shared import SharedBase
from lora_rlhf.base.token_logprobs import token_logprobs
from lora_rlhf.base.trunk import trunk_of
from lora_rlhf.data.chat import answer_ids
from lora_rlhf.data.safety_prompts import SafetyPrompt
from lora_rlhf.evaluation.arms import prompts_of_any_template

Dialogues = Sequence[tuple[Sequence[int], Sequence[int]]]
"""(prompt, answer) in token ids."""
Reader = Callable[[Dialogues], list[float]]
"""Returns the mean log-probability of each answer's tokens after its prompt, in nats at temperature 1."""


def role_reader(base: SharedBase, role: str, pad: int, batch: int) -> Reader:
    """Return the reader of a role of a shared base, which reads `batch` dialogues at a time."""

    def read(dialogues: Dialogues) -> list[float]:
        with base.layers.working_copy_where_room():
            return _mean_logprobs(partial(base.hidden, role), base.lm_head, pad, dialogues, batch)

    return read


def model_reader(model: Any, pad: int, batch: int) -> Reader:
    """Return the reader of any causal language model."""
    states, head = partial(states_without_padding, trunk_of(model)), LmHead.of(model)
    return lambda dialogues: _mean_logprobs(states, head, pad, dialogues, batch)


def safe_margins(prompts: Sequence[SafetyPrompt], tokenizer: Any, reader: Reader) -> list[float]:
    """Return by how much each prompt's right answers are likelier than its wrong ones, in nats per token.

    Args:
        prompts: each with written answers.
        tokenizer: of the model that reads, with its chat template.
        reader: of that model.
    """
    asked = prompts_of_any_template(tokenizer, [prompt.messages for prompt in prompts])
    dialogues = [
        (ids, answer_ids(tokenizer, text))
        for ids, prompt in zip(asked, prompts, strict=True)
        for pair in prompt.written
        for text in pair
    ]
    found = iter(reader(dialogues))
    return [fmean(next(found) - next(found) for _ in prompt.written) for prompt in prompts]


@torch.no_grad()
def _mean_logprobs(
    states: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    head: LmHead,
    pad: int,
    dialogues: Dialogues,
    batch: int,
) -> list[float]:
    device = head.weight.device
    ids, mask = right_padded([[*prompt, *answer] for prompt, answer in dialogues], pad, device)
    starts = torch.tensor([len(prompt) for prompt, _ in dialogues], device=device)
    in_answer = mask & (torch.arange(ids.shape[1], device=device) >= starts[:, None])
    means = torch.zeros(len(ids), device=device)
    for rows in batches_by_length(mask, torch.arange(len(ids), device=device), batch):
        read = in_answer[rows, 1:]
        before = states(ids[rows], mask[rows])[:, :-1][read]
        flat, _ = token_logprobs(before, head, ids[rows, 1:][read], 1.0, None, with_entropy=False)
        sums = torch.zeros(read.shape, device=device).masked_scatter(read, flat).sum(1)
        means[rows] = sums / read.sum(1)
    return means.tolist()
