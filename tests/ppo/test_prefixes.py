"""Given beginnings: their share over a run, that they are taken as given, and what of a rollout they change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_cases import MakeTrainer, text_length

from lora_rlhf.base.shared import POLICY, REFERENCE, SharedBase
from lora_rlhf.data.chat import answer_ids
from lora_rlhf.ppo.decoding import GenerateDecoder, Sampling, TrunkDecoder
from lora_rlhf.ppo.prefixes import drawn_prefixes, share_at
from lora_rlhf.ppo.rollout import Rollout, model_answers, sampled_answers

PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [10, 11, 12, 13]]
PREFIXES: list[list[int]] = [[40, 41], [], [42, 43, 44], []]


@pytest.mark.parametrize(("step", "expected"), [(0, 0.6), (1, 0.45), (2, 0.3), (3, 0.15), (4, 0.0), (5, 0.0)])
def test_the_share_falls_linearly_and_is_0_at_the_last_step(step: int, expected: float) -> None:
    assert share_at(step, 5, 0.6) == pytest.approx(expected)


def test_a_run_of_one_step_has_its_share() -> None:
    assert share_at(0, 1, 0.6) == 0.6


@given(st.floats(0.01, 1), st.integers(0, 2**31))
def test_about_the_share_of_rows_keeps_its_prefix(share: float, seed: int) -> None:
    drawn = drawn_prefixes([[1, 2]] * 400, share, torch.Generator().manual_seed(seed))
    assert drawn is not None and all(prefix in ([], [1, 2]) for prefix in drawn)
    assert abs(sum(map(bool, drawn)) / 400 - share) < 0.13


def test_no_share_draws_nothing_and_leaves_the_generator_as_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert drawn_prefixes([[1]], 0.0, generator) is None
    assert torch.equal(generator.get_state(), before)


def test_a_prefix_is_taken_as_given_and_the_other_rows_are_as_without(
    make_base: Callable[..., SharedBase], tokenizer: Any
) -> None:
    base, sampling = make_base(), Sampling(8, 1.0)

    def rollout(prefixes: list[list[int]] | None) -> Any:
        return sampled_answers(
            base, POLICY, PROMPTS, sampling, tokenizer, torch.Generator().manual_seed(1), prefixes=prefixes
        )

    plain, prefixed = rollout(None), rollout(PREFIXES)
    assert plain.free.tolist() == [True] * 4 and prefixed.free.tolist() == [False, True, False, True]
    for row, prefix in enumerate(PREFIXES):
        assert prefixed.response_ids[row, : len(prefix)].tolist() == prefix
        if not prefix:
            assert torch.equal(prefixed.response_ids[row], plain.response_ids[row])
            torch.testing.assert_close(prefixed.sampled_logprobs[row], plain.sampled_logprobs[row])
    assert prefixed.texts[0].startswith(tokenizer.decode(PREFIXES[0]).strip())


def test_given_tokens_have_the_probability_that_the_policy_gives_them(
    make_base: Callable[..., SharedBase], tokenizer: Any
) -> None:
    base = make_base()
    generator = torch.Generator().manual_seed(1)
    rollout = sampled_answers(base, POLICY, PROMPTS, Sampling(6, 0.7), tokenizer, generator, prefixes=PREFIXES)
    with torch.no_grad():
        states = base.hidden(POLICY, rollout.ids, rollout.mask)
        logprobs, _ = base.response_logprobs(states, rollout.ids, rollout.action_mask, 0.7, None)
    torch.testing.assert_close(rollout.sampled_logprobs, logprobs, atol=1e-4, rtol=1e-4)


def test_generate_takes_them_as_our_own_loop_does(make_base: Callable[..., SharedBase], tokenizer: Any) -> None:
    base = make_base()
    decoders = TrunkDecoder(base.trunk, base.lm_head), GenerateDecoder(base.causal_lm)
    ours, theirs = (
        model_answers(
            decoder, PROMPTS, Sampling(6, 1.0), tokenizer, torch.Generator().manual_seed(3), prefixes=PREFIXES
        ).response_ids
        for decoder in decoders
    )
    assert torch.equal(ours, theirs)


def test_a_prefix_longer_than_an_answer_is_cut(make_base: Callable[..., SharedBase], tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    rollout = sampled_answers(
        make_base(), POLICY, PROMPTS[:1], Sampling(2, 1.0), tokenizer, generator, prefixes=[[40, 41, 42]]
    )
    assert rollout.response_ids.tolist() == [[40, 41]]


# In the trainer


def test_a_prefix_is_the_beginning_of_the_pairs_chosen_answer(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(text_length, prefix_share=1.0, prefix_tokens=2, total_steps=5)
    rollout = trainer._rollout(POLICY, [0, 1, 2])
    for row, pair in enumerate(trainer.pairs[:3]):
        assert rollout.response_ids[row, :2].tolist() == answer_ids(trainer.tokenizer, pair.chosen)[:2]
    assert not rollout.free.any()


def test_the_reference_begins_nothing_for_the_scales(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(text_length, prefix_share=1.0, prefix_tokens=2, total_steps=5)
    assert trainer._rollout(REFERENCE, [0, 1, 2]).free.all()


def test_a_step_learns_from_all_answers_and_speaks_of_those_that_the_policy_began(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(text_length, prefix_share=0.5, prefix_tokens=2, total_steps=5, batch_size=16)
    rollouts: list[Rollout] = []
    sampled = trainer._rollout

    def kept(role: str, chosen: list[int]) -> Rollout:
        rollouts.append(sampled(role, chosen))
        return rollouts[-1]

    trainer._rollout = kept  # type: ignore[method-assign]
    metrics = trainer.step()
    free = rollouts[0].free
    assert 0 < free.sum() < 16
    lengths = rollouts[0].action_mask.sum(1)
    assert metrics["response_length"] == pytest.approx(lengths[free].float().mean().item())
    assert metrics["first_ratio_deviation"] < 1e-3  # given tokens count with the policy's own probability


def test_the_share_is_0_at_the_last_step_and_metrics_stay_finite(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(text_length, prefix_share=1.0, prefix_tokens=2, total_steps=3)
    shares = []
    for _ in range(3):
        shares.append(trainer._rollout(POLICY, [0, 1, 2, 3]).free.float().mean().item())  # as the step will sample
        metrics = trainer.step()
        assert all(math.isfinite(value) for value in metrics.values())
    assert shares[0] == 0.0 and shares[2] == 1.0
