"""Rollouts: what is drawn, where answers end, and that the batch, the cache and the padding do not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MistralConfig

from lora_rlhf.base.lm_head import LmHead
from lora_rlhf.base.packing import left_padded, right_padded
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, VALUE, SharedBase
from lora_rlhf.ppo.decoding import Sampling, TrunkDecoder, inverse_cdf
from lora_rlhf.ppo.rollout import Rollout, model_answers, sampled_answers

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- drawing from a distribution --------------------------------------------------------------------------------------


def test_tokens_are_drawn_from_the_full_distribution(make_base: Callable[..., SharedBase], tokenizer: Any) -> None:
    base, prompt, rows = make_base(), [5, 60, 70], 6000
    drawn = sampled_answers(base, POLICY, [prompt] * rows, Sampling(1, 1.0), tokenizer, generator()).response_ids[:, 0]
    probs = following(base, POLICY, prompt, temperature=1.0)[-1]
    counts = torch.bincount(drawn, minlength=len(probs))
    # Pearson's χ² over 512 tokens: mean 511, deviation √1022 = 32. Five deviations above the mean is a wrong sampler.
    chi_square = ((counts - rows * probs) ** 2 / (rows * probs)).sum().item()
    assert chi_square < 511 + 5 * 32
    rarest_half = probs.argsort()[: len(probs) // 2]
    assert counts[rarest_half].sum() > 0.8 * rows * probs[rarest_half].sum()  # no top-k, no top-p


def test_the_least_likely_token_can_be_drawn(
    make_base: Callable[..., SharedBase], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, prompt = make_base(), [5, 60, 70]
    probs = following(base, POLICY, prompt, temperature=1.0)[-1]
    rarest = int(probs.argmin())
    middle = (probs.double().cumsum(0)[rarest] - probs[rarest] / 2).float()
    monkeypatch.setattr(torch, "rand", lambda size, **_: middle.expand(size))
    assert sampled_answers(base, POLICY, [prompt], Sampling(1, 1.0), tokenizer, generator()).response_ids == rarest


# -- where answers end: a scripted model ------------------------------------------------------------------------------


class Scripted:
    """A "transformer" that reads its whole past from the cache and puts all its mass on the next token of a script.

    The past goes through the real cache and attention mask, so that a row which is dropped, reordered or wrongly
    padded finds another row's script, or none.
    """

    def __init__(self, scripts: dict[tuple[int, ...], list[int]], vocabulary: int = 512) -> None:
        self.scripts, self.batches = scripts, []
        self.config = MistralConfig(num_hidden_layers=1, sliding_window=None)
        self.lm_head = LmHead(torch.eye(vocabulary))

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Any, **_: Any) -> Any:
        self.batches.append(len(input_ids))
        as_keys = input_ids[:, None, :, None].float()
        past = past_key_values.update(as_keys, as_keys, 0)[0][:, 0, :, 0].long()
        states = torch.zeros(*input_ids.shape, len(self.lm_head.weight))
        for i, (row, mask) in enumerate(zip(past, attention_mask, strict=True)):
            states[i, -1, self._next(tuple(row[mask].tolist()))] = 60.0
        return SimpleNamespace(last_hidden_state=states)

    def _next(self, past: tuple[int, ...]) -> int:
        prompt = next(p for p in self.scripts if past[: len(p)] == p)
        said, script = list(past[len(prompt) :]), self.scripts[prompt]
        assert said[: len(script)] == script[: len(said)]
        return script[len(said)] if len(said) < len(script) else 300  # babbles on after its script


def scripted_rollout(
    answers: Sequence[Sequence[int]], tokenizer: Any, length: int, stop_strings: tuple[str, ...] = ()
) -> tuple[Rollout, Scripted]:
    """The rollout of a model that gives these answers to prompts of growing length."""
    prompts = [(*[250] * i, 251 + i) for i in range(len(answers))]
    model = Scripted(dict(zip(prompts, map(list, answers), strict=True)))
    sampling = Sampling(length, 1.0, stop_strings)
    return model_answers(TrunkDecoder(model, model.lm_head), prompts, sampling, tokenizer, generator()), model


def spelled(tokenizer: Any, *texts: str) -> list[int]:
    """Ids of texts that are tokenised each on its own."""
    return [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_an_answer_ends_at_its_first_eos_and_what_follows_is_masked_padding(tokenizer: Any) -> None:
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    hi = spelled(tokenizer, "hi")
    rollout, _ = scripted_rollout([[*hi, eos, *hi, eos], hi * 9], tokenizer, length=len(hi) + 4)
    n, rest = len(hi) + 1, 3
    assert rollout.response_ids[0].tolist() == [*hi, eos] + [pad] * rest
    assert rollout.action_mask[0].tolist() == [True] * n + [False] * rest
    assert rollout.score_ids[0].tolist() == [*hi, eos] + [pad] * (rest + 1)
    assert rollout.score_mask[0].tolist() == [True] * n + [False] * (rest + 1)
    assert rollout.ended.tolist() == rollout.ended_by_eos.tolist() == [True, False]
    assert rollout.action_mask[1].all()
    assert rollout.texts[0] == "hi"
    assert (rollout.sampled_logprobs[0, n:] == 0).all()


def test_an_answer_may_end_at_once_or_with_its_very_last_token(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    rollout, _ = scripted_rollout([[eos], [70, 71, eos]], tokenizer, length=3)
    assert rollout.ended.tolist() == [True, True]
    assert rollout.action_mask.tolist() == [[True, False, False], [True, True, True]]
    assert rollout.texts[0] == ""


def test_decoding_stops_when_every_answer_has_ended_and_ended_rows_are_dropped(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    answers = [[70 + i] * i + [eos] for i in range(8)]
    rollout, model = scripted_rollout(answers, tokenizer, length=50)
    for row, answer in zip(rollout.response_ids.tolist(), answers, strict=True):
        assert row == answer + [tokenizer.pad_token_id] * (50 - len(answer))
    assert len(model.batches) == 8  # the longest answer has 8 tokens
    assert model.batches[0] == 8 and model.batches[-1] < 4


def test_an_answer_ends_at_a_stop_string(tokenizer: Any) -> None:
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    said, stop = spelled(tokenizer, "Yes."), spelled(tokenizer, "\n\nHuman", ":")
    rollout, _ = scripted_rollout([[*said, *stop, *said]], tokenizer, 20, ("\n\nHuman:",))
    rest = 20 - len(said) - len(stop)
    # The policy chose the tokens of the stop string, so it is held to account for them...
    assert rollout.response_ids[0].tolist() == [*said, *stop] + [pad] * rest
    assert rollout.action_mask[0].tolist() == [True] * (len(said) + len(stop)) + [False] * rest
    # ... and the reward model reads EOS in their place.
    assert rollout.score_ids[0].tolist() == [*said, eos] + [pad] * (20 - len(said))
    assert rollout.score_mask[0].sum() == len(said) + 1
    assert rollout.texts == ["Yes."]
    assert rollout.ended.all() and not rollout.ended_by_eos.any()


@pytest.mark.parametrize("stops", [("one", "two", "wo"), ("wo", "two", "one")])
def test_the_stop_string_that_begins_first_in_the_text_counts(tokenizer: Any, stops: tuple[str, ...]) -> None:
    answer = spelled(tokenizer, "x", "t", "w", "o", "y", "one", "z")
    rollout, _ = scripted_rollout([answer], tokenizer, 20, stops)
    assert rollout.texts == ["x"]
    assert rollout.action_mask.sum() == len(spelled(tokenizer, "x", "t", "w", "o"))


@pytest.mark.parametrize("first", ["stop string", "EOS"])
def test_whichever_of_eos_and_stop_string_comes_first_ends_the_answer(tokenizer: Any, first: str) -> None:
    eos, said, stop = tokenizer.eos_token_id, spelled(tokenizer, "ab"), spelled(tokenizer, "#")
    end = [*stop, eos] if first == "stop string" else [eos, *stop]
    rollout, _ = scripted_rollout([[*said, *end]], tokenizer, 10, ("#",))
    assert rollout.response_ids[0, : len(said) + 1].tolist() == [*said, end[0]]
    assert rollout.action_mask.sum() == len(said) + 1
    assert rollout.texts == ["ab"] and rollout.ended.all()
    assert rollout.ended_by_eos.item() == (first == "EOS")


def test_a_stop_string_at_the_very_start_leaves_an_empty_answer_of_one_eos(tokenizer: Any) -> None:
    rollout, _ = scripted_rollout([spelled(tokenizer, "#", "abc")], tokenizer, 6, ("#",))
    assert rollout.texts == [""] and rollout.ended.all()
    assert rollout.score_ids[0, 0] == tokenizer.eos_token_id and rollout.score_mask.sum() == 1


def test_text_before_a_stop_string_is_kept_when_one_token_holds_both(tokenizer: Any) -> None:
    token, text = next(
        (i, t) for i in range(5, 512) if len(t := tokenizer.decode([i])) == 2 and t.isalpha() and t[0] != t[1]
    )
    before, stop = text
    rollout, _ = scripted_rollout([[*spelled(tokenizer, "1"), token]], tokenizer, 5, (stop,))
    assert rollout.texts == ["1" + before]


def test_an_answer_cut_by_its_length_has_not_ended_and_is_read_with_eos_as_in_training(tokenizer: Any) -> None:
    answer = spelled(tokenizer, "abcdefgh")
    rollout, _ = scripted_rollout([answer], tokenizer, 3, ("#",))
    assert not rollout.ended.any() and not rollout.ended_by_eos.any()
    assert rollout.response_ids.tolist() == [answer[:3]]
    assert rollout.score_ids.tolist() == [[*answer[:3], tokenizer.eos_token_id]]
    assert rollout.score_mask.all() and rollout.action_mask.all()


def test_a_pad_token_that_was_sampled_is_an_action_like_any_other_which_nobody_sees(tokenizer: Any) -> None:
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rollout, _ = scripted_rollout([[70, pad, pad, 71, eos], [pad, eos]], tokenizer, length=7)
    assert rollout.response_ids[:, :5].tolist() == [[70, pad, pad, 71, eos], [pad, eos, pad, pad, pad]]
    assert rollout.action_mask.sum(1).tolist() == [5, 2]
    assert [ids[mask].tolist() for ids, mask in zip(rollout.score_ids, rollout.score_mask, strict=True)] == [
        [70, 71, eos], [eos],
    ]  # fmt: skip


def test_prompts_are_padded_on_the_left_and_answers_follow_at_once(tokenizer: Any) -> None:
    pad = tokenizer.pad_token_id
    ids, mask = left_padded([[7], [8, 9, 10]], pad, CPU)
    assert ids.tolist() == [[pad, pad, 7], [8, 9, 10]]
    assert mask.tolist() == [[False, False, True], [True, True, True]]
    ids, mask = right_padded([[7], [8, 9, 10]], pad, CPU)
    assert ids.tolist() == [[7, pad, pad], [8, 9, 10]]
    assert mask.tolist() == [[True, False, False], [True, True, True]]

    rollout, _ = scripted_rollout([[70, 71], [72, 73]], tokenizer, length=2)
    assert rollout.ids.tolist() == [[pad, 251, 70, 71], [250, 252, 72, 73]]
    assert rollout.mask.tolist() == [[False, True, True, True], [True] * 4]
    eos = tokenizer.eos_token_id
    assert rollout.text_ids.tolist() == [[*row, eos] for row in rollout.ids.tolist()]
    assert rollout.text_mask.tolist() == [[*row, True] for row in rollout.mask.tolist()]


# -- the real model: cache, padding and batch do not matter -----------------------------------------------------------

PROMPTS = [[5], [60, 70, 80, 90], [33, 44], [5, 6, 7, 8, 9, 10, 11], [100, 101, 102], [200] * 5, [9], [8], [7], [99, 6]]
LENGTH = 12


ENGINES = ["expanded weights", "4-bit weights", "generate"]


def expands(engine: str, base: SharedBase) -> bool:
    """Whether the engine expands weights; for `generate`, the base is marked as unsloth marks it."""
    if engine == "generate":
        base.causal_lm.for_inference = lambda: None
    return engine == "expanded weights"


def following(base: SharedBase, role: str, ids: list[int], temperature: float) -> torch.Tensor:
    """The distribution of the token after each of `ids`, from a plain forward: no batch, no padding, no cache."""
    with torch.no_grad():
        states = base.hidden(role, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
        return torch.softmax(base.lm_head(states[0]).float() / temperature, -1)


@pytest.fixture
def ending_base(make_base: Callable[..., SharedBase], tokenizer: Any) -> SharedBase:
    """A base that says EOS and pad often, so that answers end at many different steps."""
    base = make_base()
    with torch.no_grad():
        base.lm_head.weight[[tokenizer.eos_token_id, tokenizer.pad_token_id]] *= 7
    return base


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("role", "temperature"), [(POLICY, 1.0), (REFERENCE, 0.8)])
def test_an_answer_does_not_depend_on_the_other_rows(
    ending_base: SharedBase, tokenizer: Any, role: str, temperature: float, engine: str
) -> None:
    sampling = Sampling(LENGTH, temperature, expand_weights=expands(engine, ending_base))
    rollout = sampled_answers(ending_base, role, PROMPTS, sampling, tokenizer, generator(1))
    uniform = torch.rand((LENGTH, len(PROMPTS)), generator=generator(1))
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    lengths = rollout.action_mask.sum(1).tolist()
    for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        answer = rollout.response_ids[i, :length].tolist()
        probs = following(ending_base, role, prompt + answer, temperature)[len(prompt) - 1 : -1]
        assert answer == inverse_cdf(probs, uniform[:length, i]).tolist()
        assert length == (answer.index(eos) + 1 if eos in answer else LENGTH)
        expected = probs.log()[range(length), answer]
        torch.testing.assert_close(rollout.sampled_logprobs[i, :length], expected, atol=1e-4, rtol=0)
    # The example is one that could go wrong: rows were dropped on the way, and answers hold the pad token.
    assert len(set(lengths)) >= 3
    assert (rollout.response_ids == pad)[rollout.action_mask].any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampler_and_the_trainer_agree_on_log_probs(
    ending_base: SharedBase, tokenizer: Any, engine: str, temperature: float
) -> None:
    base, sampling = ending_base, Sampling(LENGTH, temperature, expand_weights=expands(engine, ending_base))
    rollout = sampled_answers(base, POLICY, PROMPTS, sampling, tokenizer, generator())
    with torch.no_grad():
        states = base.hidden(POLICY, rollout.ids, rollout.mask)
    trained, _ = base.response_logprobs(states, rollout.ids, rollout.action_mask, temperature, chunk=5)
    torch.testing.assert_close(rollout.sampled_logprobs, trained, atol=1e-4, rtol=0)
    assert trained[rollout.action_mask].mean() < -0.1 and (trained[~rollout.action_mask] == 0).all()


def test_a_higher_temperature_flattens_what_is_drawn(make_base: Callable[..., SharedBase], tokenizer: Any) -> None:
    base = make_base()

    def mean_logprob(temperature: float) -> float:
        sampling = Sampling(4, temperature)
        return sampled_answers(base, POLICY, PROMPTS, sampling, tokenizer, generator()).sampled_logprobs.mean().item()

    assert mean_logprob(0.1) > mean_logprob(1.0) > mean_logprob(3.0)


def test_the_same_generator_state_gives_the_same_answers(ending_base: SharedBase, tokenizer: Any) -> None:
    def texts(seed: int) -> list[str]:
        return sampled_answers(ending_base, POLICY, PROMPTS, Sampling(LENGTH, 1.0), tokenizer, generator(seed)).texts

    assert texts(1) == texts(1) != texts(2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("role", [POLICY, REFERENCE])
def test_sampling_leaves_role_trainability_and_weights_as_they_were(
    make_base: Callable[..., SharedBase], tokenizer: Any, role: str, engine: str
) -> None:
    base = make_base()
    expand = expands(engine, base)
    trainable = {n: p.requires_grad for n, p in base.model.named_parameters()}
    before = {n: t.clone() for n, t in base.model.state_dict().items() if isinstance(t, torch.Tensor)}
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
    outputs = {r: base.hidden(r, ids, mask).detach() for r in (POLICY, REFERENCE, REWARD, VALUE)}

    with base.role(REWARD):
        sampled_answers(base, role, PROMPTS, Sampling(3, 1.0, expand_weights=expand), tokenizer, generator())
        assert torch.equal(base._forward(ids, mask), outputs[REWARD])

    assert {n: p.requires_grad for n, p in base.model.named_parameters()} == trainable
    assert all(torch.equal(t, before[n]) for n, t in base.model.state_dict().items() if n in before)
    assert all(torch.equal(base.hidden(r, ids, mask), output) for r, output in outputs.items())
    assert not base.model.training
