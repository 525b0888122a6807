"""The margin: golden values by hand, and parity of its readers with plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import POLICY, REFERENCE, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import answer_ids, prompt_ids
from lora_rlhf.data.safety_prompts import SafetyPrompt
from lora_rlhf.evaluation.margins import model_reader, role_reader, safe_margins

WRITTEN = {"declines": ("I will not.", "No, ask."), "answers": ("I will do it.", "No problem at all.")}
PROMPTS = [
    SafetyPrompt((("user", "Harm me!"),), "unsafe", "own", **WRITTEN),
    SafetyPrompt((("user", "Help me, please, with a long question!"),), "safe", "own", **WRITTEN),
]


def test_a_margin_is_right_less_wrong_averaged_over_the_written_answers(tokenizer: Any) -> None:
    values = {"I will not.": -1.0, "No, ask.": -2.0, "I will do it.": -3.0, "No problem at all.": -5.0}
    texts = {tuple(answer_ids(tokenizer, text)): value for text, value in values.items()}

    def reader(dialogues: Any) -> list[float]:
        return [texts[tuple(answer)] for _, answer in dialogues]

    # declines are likelier by 2 and by 3: by 2.5 on average
    assert safe_margins(PROMPTS, tokenizer, reader) == [2.5, -2.5]


def test_a_model_that_does_not_read_the_prompt_is_right_on_one_of_each_pair(tokenizer: Any) -> None:
    def reader(dialogues: Any) -> list[float]:
        return [float(sum(answer) % 101) for _, answer in dialogues]

    unsafe, safe = safe_margins(PROMPTS, tokenizer, reader)
    assert unsafe == -safe != 0


def test_readers_give_the_mean_log_probability_of_the_answers_tokens(
    make_base: Callable[..., SharedBase], make_config: Callable[..., RunConfig], tokenizer: Any
) -> None:
    base, model = make_base(), load_causal_lm(make_config())
    dialogues = [
        (prompt_ids(tokenizer, prompt.messages), answer_ids(tokenizer, text))
        for prompt in PROMPTS
        for text in (*prompt.declines, *prompt.answers)
    ]
    expected = []
    for prompt, answer in dialogues:
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prompt, *answer]])).logits[0].float().log_softmax(-1)
        at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        expected.append(sum(logprobs[i, token].item() for i, token in zip(at, answer, strict=True)) / len(answer))
    assert role_reader(base, REFERENCE, tokenizer.pad_token_id, 3)(dialogues) == pytest.approx(expected, abs=1e-4)
    assert model_reader(model, tokenizer.pad_token_id, 3)(dialogues) == pytest.approx(expected, abs=1e-4)
    assert role_reader(base, POLICY, tokenizer.pad_token_id, 3)(dialogues) != pytest.approx(expected, abs=1e-4)
