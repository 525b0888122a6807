"""Drawing tokens: intervals of the cumulative distribution, and two decoders that draw the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_rlhf.base.packing import left_padded
from lora_rlhf.base.shared import SharedBase
from lora_rlhf.ppo.decoding import (
    AnswerEndings,
    GenerateDecoder,
    Sampling,
    TrunkDecoder,
    decoder_of,
    inverse_cdf,
    stop_position,
)
from lora_rlhf.ppo.rollout import model_answers

PROMPTS = [[5], [60, 70, 80, 90], [33, 44], [5, 6, 7, 8, 9, 10, 11], [100, 101, 102], [200] * 5]
LENGTH = 10


@settings(deadline=None)
@given(st.lists(st.floats(1e-4, 1), min_size=1, max_size=30), st.floats(0.05, 0.95))
def test_a_uniform_number_inside_a_tokens_interval_draws_that_token(weights: list[float], where: float) -> None:
    probs = torch.tensor(weights) / sum(weights)
    upper = probs.double().cumsum(0)
    aims = (upper - (1 - where) * probs.double()).float()
    assert inverse_cdf(probs.expand(len(probs), -1), aims).tolist() == list(range(len(probs)))


def test_the_edges_of_the_unit_interval_draw_possible_tokens_only() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 1 - 2**-24])
    assert inverse_cdf(probs, uniform).tolist() == [1, 1, 3, 3]


def test_every_row_uses_its_own_probabilities_and_number() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert inverse_cdf(probs, torch.tensor([0.5, 0.5])).tolist() == [0, 1]
    assert inverse_cdf(probs, torch.tensor([0.95, 0.05])).tolist() == [1, 0]


@pytest.mark.parametrize("stop_strings", [(), ("a", "e", "the")], ids=["EOS", "stop strings"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_generate_draws_the_tokens_that_our_own_loop_draws(
    make_base: Callable[..., SharedBase], tokenizer: Any, stop_strings: tuple[str, ...], temperature: float
) -> None:
    base = make_base()
    with torch.no_grad():
        base.lm_head.weight[[tokenizer.eos_token_id, tokenizer.pad_token_id]] *= 7
    sampling = Sampling(LENGTH, temperature, stop_strings)
    own, found = (
        model_answers(decoder, PROMPTS, sampling, tokenizer, torch.Generator().manual_seed(3))
        for decoder in (TrunkDecoder(base.trunk, base.lm_head), GenerateDecoder(base.causal_lm))
    )
    assert len(set(own.action_mask.sum(1).tolist())) >= 3
    assert torch.equal(found.response_ids, own.response_ids) and found.texts == own.texts
    torch.testing.assert_close(found.sampled_logprobs, own.sampled_logprobs, atol=1e-4, rtol=0)


def test_a_stop_string_may_not_begin_in_the_prompt(make_base: Callable[..., SharedBase], tokenizer: Any) -> None:
    base = make_base()
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        base.lm_head.weight[newline] *= 7
    sampling, prompts = Sampling(LENGTH, 1.0, ("\n\n",)), [[*prompt, newline] for prompt in PROMPTS]
    own, found = (
        model_answers(decoder, prompts, sampling, tokenizer, torch.Generator().manual_seed(3))
        for decoder in (TrunkDecoder(base.trunk, base.lm_head), GenerateDecoder(base.causal_lm))
    )
    begun = own.response_ids[:, 0] == newline
    assert begun.any() and (own.action_mask.sum(1)[begun] > 1).all()
    assert torch.equal(found.response_ids, own.response_ids) and torch.equal(found.action_mask, own.action_mask)


def test_generate_ignores_what_the_models_own_generation_config_says(
    make_base: Callable[..., SharedBase], tokenizer: Any
) -> None:
    base = make_base()
    ids, mask = left_padded(PROMPTS, tokenizer.pad_token_id, base.device)
    uniform = torch.rand((LENGTH, len(PROMPTS)), generator=torch.Generator().manual_seed(3))
    before, _ = GenerateDecoder(base.causal_lm)(ids, mask, uniform, Sampling(LENGTH, 1.0), tokenizer)
    base.causal_lm.generation_config.update(
        temperature=0.1, do_sample=True, top_k=2, repetition_penalty=5.0, max_length=9
    )
    after, _ = GenerateDecoder(base.causal_lm)(ids, mask, uniform, Sampling(LENGTH, 1.0), tokenizer)
    assert torch.equal(before, after)


def test_a_model_that_unsloth_loaded_is_decoded_by_its_own_generate(make_base: Callable[..., SharedBase]) -> None:
    base = make_base()
    assert isinstance(decoder_of(base.causal_lm), TrunkDecoder)
    base.causal_lm.for_inference = lambda: None
    assert isinstance(decoder_of(base.causal_lm), GenerateDecoder)


class Spelling:
    """A tokenizer whose tokens are these texts, and which counts the tokens that it decodes."""

    eos_token_id, chat_template = 0, None

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.decoded = texts, 0

    def decode(self, tokens: list[int], **_: Any) -> str:
        self.decoded += len(tokens)
        return "".join(self.texts[token] for token in tokens)


TEXTS = ["<eos>", "\n", "\n\n", "Hu", "man", ":", "H", "u", "man:", "é", " and so on"]


@given(st.lists(st.integers(1, len(TEXTS) - 1), max_size=40))
def test_an_answer_ends_at_the_token_that_completes_a_stop_string(tokens: list[int]) -> None:
    stops = ("\n\nHuman:", "né")
    tokenizer = Spelling(TEXTS)
    endings = AnswerEndings(tokenizer, stops, rows=1)
    ended_at = next((n for n, token in enumerate(tokens) if not endings.unfinished([0], [token])), None)
    prefixes = (tokens[: n + 1] for n in range(len(tokens)))
    expected = next((n for n, prefix in enumerate(prefixes) if stop_position(tokenizer, prefix, stops)), None)
    assert ended_at == expected


def test_each_row_ends_by_itself_and_stays_ended() -> None:
    endings = AnswerEndings(Spelling(TEXTS), ("man:",), rows=3)
    assert endings.unfinished([0, 1, 2], [0, 3, 4]) == [1, 2], "row 0 has its EOS"
    assert endings.unfinished([0, 1, 2], [3, 8, 9]) == [2], "row 1 has the stop string"
    assert endings.unfinished([1, 2], [3, 5]) == [1], "row 2 went on after the beginning of a stop string"


def test_a_long_answer_is_not_decoded_whole_for_every_token() -> None:
    tokenizer = Spelling(TEXTS)
    endings = AnswerEndings(tokenizer, ("\n\nHuman:",), rows=1)
    for _ in range(1000):
        endings.unfinished([0], [10])
    assert tokenizer.decoded <= 1000 * endings.last_tokens < 1000 * 1000 / 20
