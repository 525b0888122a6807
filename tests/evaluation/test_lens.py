"""The logit lens and the chains of words: by hand, against stock transformers, and whatever batch, role or model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.attention import GROUPED
from lora_rlhf.base.lm_head import LmHead
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, SharedBase
from lora_rlhf.config import LoraSettings, RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.lens import (
    WordProbabilities,
    WordTokens,
    bad_word_probabilities,
    branch_states,
    explicit_states,
    longest_beginnings,
    reads_branches,
    shortest,
    token_probabilities,
    word_tokens,
)

PROMPTS = [[7, 8, 9], [20, 21, 22, 23, 24, 25], [30]]
ANSWERS = [[40, 41, 42, 43], [50, 51], []]
WORDS = [
    WordTokens("one", ((60,), (61,)), (60, 61)),
    WordTokens("two", ((62, 63), (60, 64)), (62, 60)),
    WordTokens("long", ((62, 65, 66, 67), (62, 65, 68), (69, 70, 71)), (62, 69)),
    WordTokens("spaced", ((72, 73),), (73,)),
]
NAMES = ("by_layer", "whole_by_layer", "by_word")


def assert_close(ours: WordProbabilities, theirs: WordProbabilities) -> None:
    for name in NAMES:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-6, msg=name)


def stock_probabilities(
    model: Any, prompts: list[list[int]], answers: list[list[int]], words: list[WordTokens]
) -> WordProbabilities:
    """The same from stock transformers, one plain forward for every context."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    trunk = model.model

    def layers_after(context: list[int]) -> torch.Tensor:
        """The distribution of the next token by layer [layers, vocabulary]; the last from the model's own logits."""
        with torch.no_grad():
            out = model(torch.tensor([context]), output_hidden_states=True, use_cache=False)
            below = [model.lm_head(trunk.norm(h[0, -1])) for h in out.hidden_states[1:-1]]
        return torch.stack([*below, out.logits[0, -1]]).softmax(-1)

    def rest(context: list[int], spelling: tuple[int, ...]) -> float:
        p = 1.0
        for n in range(1, len(spelling)):
            p *= layers_after([*context, *spelling[:n]])[-1, spelling[n]].item()
        return p

    begins = sorted({t for word in words for t in word.begins})
    every = {s for word in words for s in word.tokens}
    once = [s for s in every if not any(s[:n] in every for n in range(1, len(s)))]
    for prompt, answer in zip(prompts, answers, strict=True):
        sums = []
        for n in range(max(1, len(answer))):
            context = prompt + answer[:n]
            probs = layers_after(context)
            rests = {s: rest(context, s) for s in every}
            by_word = [sum(probs[-1, s[0]] * rests[s] for s in word.tokens) for word in words]
            sums.append((probs[:, begins].sum(-1), sum(probs[:, s[0]] * rests[s] for s in once), torch.stack(by_word)))
        for name, values in zip(NAMES, zip(*sums, strict=True), strict=True):
            found[name].append(torch.stack(values).mean(0))
    return WordProbabilities(**{name: torch.stack(rows, 1) for name, rows in found.items()})


# -- by hand ----------------------------------------------------------------------------------------------------------

ODDS = torch.tensor([[1, 3, 2, 1], [1, 1, 2, 1], [2, 1, 1, 1], [3, 1, 1, 5], [2, 3, 1, 1], [1, 1, 1, 1]])
"""Of the six tokens (rows), in each of four states; they sum to 10, 10, 8 and 10."""


HAND_MADE: dict[str, Any] = {
    "vocab_size": 6, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 2, "num_attention_heads": 1,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-12, "mlp_bias": True, "tie_word_embeddings": False,
}  # fmt: skip


def hand_made(second_layer_adds: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)) -> SharedBase:
    """Two layers that write nothing, but for what the second may add: token v is unit vector v mod 4 in every layer.

    The norm of a unit vector of width 4 is twice it, so that the head holds half the logarithms of the odds.
    """
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **HAND_MADE)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                linear.bias.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.bias.copy_(torch.tensor(second_layer_adds))
        model.model.embed_tokens.weight.copy_(torch.eye(4)[[0, 1, 2, 3, 0, 1]])
        model.lm_head.weight.copy_(ODDS.log() / 2)
    return SharedBase(model, lora_config(LoraSettings(r=2, lora_alpha=2)), torch.float32)


def test_layers_that_write_nothing_all_say_what_the_head_makes_of_the_embedding() -> None:
    words = [WordTokens("a", ((3,), (4,)), (3, 4)), WordTokens("b", ((1, 3),), (1,))]
    # two positions: behind token 0 (state 0) and behind token 2 (state 2)
    found = bad_word_probabilities(hand_made(), REFERENCE, [[3, 0]], [[2, 5]], words, batch=4)
    first, second = (1 + 3 + 2) / 10, (2 + 1 + 1) / 8
    torch.testing.assert_close(found.by_layer[:, 0], torch.full((2,), (first + second) / 2))
    # b: token 1, then token 3 in state 1, whose odds there are 1 in 10
    b = (1 / 10 * 1 / 10 + 2 / 8 * 1 / 10) / 2
    a = ((3 + 2) / 10 + (1 + 1) / 8) / 2
    torch.testing.assert_close(found.by_word[:, 0], torch.tensor([a, b]))
    torch.testing.assert_close(found.whole_by_layer[:, 0], torch.full((2,), a + b))


def test_a_second_layer_that_moves_the_state_is_seen_from_the_second_layer_on() -> None:
    words = [WordTokens("a", ((3,),), (3,)), WordTokens("b", ((4, 3, 0),), (4,))]
    # every token here has state 0 below, and the second layer turns state 0 into state 1
    found = bad_word_probabilities(hand_made((-1.0, 1.0, 0.0, 0.0)), POLICY, [[0]], [[4, 0, 4]], words, batch=1)
    torch.testing.assert_close(found.by_layer[:, 0], torch.tensor([(3 + 2) / 10, (1 + 3) / 10]))
    # b's second token is not of state 0: e3 − e0 + e1, whose norm is twice that over √3
    logits = (torch.tensor([-1.0, 1.0, 0.0, 1.0]) * 2 / 3**0.5) @ (ODDS.log() / 2).T
    b = 3 / 10 * 1 / 10 * logits.softmax(0)[0].item()
    torch.testing.assert_close(found.by_word[:, 0], torch.tensor([1 / 10, b]))
    torch.testing.assert_close(found.whole_by_layer[:, 0], torch.tensor([3 / 10 + b * 2 / 3, 1 / 10 + b]))


def test_temperature_divides_the_logits_of_every_layer() -> None:
    words = [WordTokens("a", ((3,),), (3,))]
    found = bad_word_probabilities(hand_made(), REFERENCE, [[0]], [[]], words, batch=1, temperature=2.0)
    expected = 3**0.5 / (3 * 1 + 2 * 2**0.5 + 3**0.5)  # the roots of the odds 1 1 2 3 2 1
    torch.testing.assert_close(found.by_layer[:, 0], torch.full((2,), expected))
    torch.testing.assert_close(found.by_word, torch.tensor([[expected]]))


def test_token_probabilities_are_a_softmax_over_more_rows_than_a_chunk_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(9, 4, generator=generator), 10 * torch.randn(2**20, 4, generator=generator)
    found = token_probabilities(states, LmHead(weight), torch.tensor([5, 0, 5]), 1.5)  # 4 rows at a time
    expected = (states @ weight.T / 1.5).softmax(1)[:, [5, 0, 5]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)


# -- against stock transformers ---------------------------------------------------------------------------------------


def test_the_last_layer_is_the_models_own_softmax(make_base: Callable[..., SharedBase]) -> None:
    base = make_base()
    found = bad_word_probabilities(base, POLICY, PROMPTS, ANSWERS, WORDS, batch=4)
    begins = sorted({t for word in WORDS for t in word.begins})
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        with torch.no_grad(), base.role(POLICY):
            logits = base.causal_lm(input_ids=torch.tensor([prompt + answer])).logits[0]
        own = logits.softmax(-1)[len(prompt) - 1 :][: max(1, len(answer)), begins].sum(1).mean()
        assert found.by_layer[-1, i].item() == pytest.approx(own.item(), abs=1e-5, rel=1e-4)


@pytest.mark.parametrize(("role", "merged", "batch"), [(REFERENCE, False, 2), (POLICY, False, 1), (POLICY, True, 100)])
def test_a_role_of_the_shared_base_is_the_model_loaded_alone(
    role: str, merged: bool, batch: int, make_base: Callable[..., SharedBase],
    make_config: Callable[..., RunConfig], tmp_path: Path,
) -> None:  # fmt: skip
    config = make_config(load_in_4bit=False)
    base = make_base(config)
    alone = load_causal_lm(config)
    if role == POLICY:
        base.save_adapter(POLICY, tmp_path / "policy")
        stock = PeftModel.from_pretrained(alone, str(tmp_path / "policy"))
        alone = stock.merge_and_unload() if merged else stock.get_base_model()
    found = bad_word_probabilities(base, role, PROMPTS, ANSWERS, WORDS, batch)
    assert_close(found, stock_probabilities(alone, PROMPTS, ANSWERS, WORDS))


SHAPE: dict[str, Any] = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip
KINDS = {
    "llama": (AutoConfig.for_model("llama", **SHAPE), GROUPED),
    "llama, sdpa": (AutoConfig.for_model("llama", **SHAPE), "sdpa"),
    "llama, eager": (AutoConfig.for_model("llama", **SHAPE), "eager"),
    "mistral, wide window": (AutoConfig.for_model("mistral", **SHAPE, sliding_window=12), GROUPED),
    "qwen2": (AutoConfig.for_model("qwen2", **SHAPE), GROUPED),
    "mistral, narrow window": (AutoConfig.for_model("mistral", **SHAPE, sliding_window=3), None),
    "qwen3": (AutoConfig.for_model("qwen3", **SHAPE), None),
}
"""Name -> config, and the attention in which branches are run; none: such models get every row written out."""


def of_kind(name: str) -> tuple[SharedBase, Any]:
    """A shared base of random weights, and the same model alone with transformers' plain attention."""
    config, attention = KINDS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    alone = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    alone.load_state_dict(model.state_dict())
    base = SharedBase(model, lora_config(LoraSettings(r=2, lora_alpha=2)), torch.float32)
    if attention is not None:
        model.set_attn_implementation(attention)
    return base, alone


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_gives_what_it_gives_alone(name: str) -> None:
    base, alone = of_kind(name)
    assert reads_branches(base, 10) == (KINDS[name][1] is not None)
    found = bad_word_probabilities(base, REFERENCE, PROMPTS, ANSWERS, WORDS, batch=3)
    assert_close(found, stock_probabilities(alone, PROMPTS, ANSWERS, WORDS))


@pytest.mark.parametrize("name", [name for name, (_, attention) in KINDS.items() if attention])
def test_branches_are_the_rows_written_out(name: str) -> None:
    base, _ = of_kind(name)
    row, beginnings, cache = [3, 1, 4, 1, 5, 9], [(26, 53, 5), (8, 9, 7)], DynamicCache()
    with torch.no_grad(), base.role(REFERENCE):
        base.trunk(input_ids=torch.tensor([row]), past_key_values=cache, use_cache=True)
        for first in (0, 2, 5):
            fast = branch_states(base, row, first, beginnings, cache)
            slow = explicit_states(base, row, first, beginnings, batch=4)
            assert fast.shape == (2, 6 - first, 3, 32)
            torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 6  # left as it was


def test_branches_are_run_where_the_window_holds_row_and_word() -> None:
    base, _ = of_kind("mistral, wide window")
    assert reads_branches(base, 12) and not reads_branches(base, 13)


# -- rows, batches and roles ------------------------------------------------------------------------------------------


def test_rows_do_not_see_each_other(small: SharedBase) -> None:
    together = bad_word_probabilities(small, POLICY, PROMPTS, ANSWERS, WORDS, batch=3)
    for i in (2, 0, 1):
        alone = bad_word_probabilities(small, POLICY, [PROMPTS[i]], [ANSWERS[i]], WORDS, batch=3)
        assert_close(alone, WordProbabilities(*(getattr(together, name)[:, i : i + 1] for name in NAMES)))


def test_an_answers_last_token_is_predicted_and_predicts_nothing(small: SharedBase) -> None:
    once, other = (bad_word_probabilities(small, POLICY, [[7, 8]], [[9, t]], WORDS, batch=9) for t in (10, 11))
    assert_close(once, other)
    empty, one = (bad_word_probabilities(small, POLICY, [[7, 8]], [a], WORDS, batch=9) for a in ([], [9]))
    assert_close(empty, one)
    assert (once.by_layer != one.by_layer).all()


def test_the_role_that_is_asked_answers_and_the_one_before_plays_on(make_base: Callable[..., SharedBase]) -> None:
    base = make_base()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), base.role(REWARD):
        before = base.trunk(input_ids=ids).last_hidden_state
        found = [bad_word_probabilities(base, r, PROMPTS, ANSWERS, WORDS, batch=4) for r in (POLICY, REFERENCE)]
        assert torch.equal(base.trunk(input_ids=ids).last_hidden_state, before)
    for name in NAMES:
        assert (getattr(found[0], name) - getattr(found[1], name)).abs().max() > 1e-4
    assert not any(layer._forward_hooks for layer in base.trunk.layers)


def test_hooks_and_role_are_taken_back_after_an_error(small: SharedBase) -> None:
    with small.role(REFERENCE):
        with pytest.raises(IndexError):
            bad_word_probabilities(small, POLICY, [[10**6]], [[1]], WORDS, batch=4)
        assert small._active == REFERENCE
    assert not any(layer._forward_hooks for layer in small.trunk.layers)


def test_bfloat16_and_a_working_copy_give_nearly_the_same(
    make_base: Callable[..., SharedBase], make_config: Callable[..., RunConfig]
) -> None:
    exact = bad_word_probabilities(make_base(), POLICY, PROMPTS, ANSWERS, WORDS, batch=4)
    base = make_base(make_config(dtype="bfloat16"))
    rounded = bad_word_probabilities(base, POLICY, PROMPTS, ANSWERS, WORDS, batch=4)
    with base.expanded(POLICY):
        folded = bad_word_probabilities(base, POLICY, PROMPTS, ANSWERS, WORDS, batch=4)
    for other in (rounded, folded):
        for name in NAMES:
            assert getattr(other, name).dtype == torch.float32
            torch.testing.assert_close(getattr(other, name), getattr(exact, name), rtol=0.25, atol=1e-3)


@pytest.fixture(scope="module")
def small() -> SharedBase:
    return of_kind("llama")[0]


tokens = st.integers(0, 79)


@given(
    st.lists(tokens, min_size=1, max_size=5),
    st.lists(tokens, max_size=4),
    st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_all_are_probabilities_and_bound_each_other(
    small: SharedBase, prompt: list[int], answer: list[int], spellings: list[tuple[int, ...]], batch: int
) -> None:
    words = [WordTokens(str(i), (s,), s[:1]) for i, s in enumerate(spellings)]
    found = bad_word_probabilities(small, REFERENCE, [prompt], [answer], words, batch)
    tiny = 1e-5
    for name in NAMES:
        assert (getattr(found, name) >= 0).all() and (getattr(found, name) <= 1 + tiny).all()
    assert (found.whole_by_layer <= found.by_layer * (1 + tiny)).all()
    any_word, words_alone = found.whole_by_layer[-1, 0], found.by_word[:, 0]
    assert words_alone.max() <= any_word * (1 + tiny)
    assert any_word <= words_alone.sum() * (1 + tiny)
    if len(shortest(spellings)) == len(spellings):  # no word begins another
        torch.testing.assert_close(any_word, words_alone.sum())


def test_words_of_one_token_sum_to_the_last_layer(small: SharedBase) -> None:
    words = [WordTokens(str(t), ((t,), (t + 1,)), (t, t + 1)) for t in (10, 20, 30)]
    found = bad_word_probabilities(small, REFERENCE, PROMPTS, ANSWERS, words, batch=2)
    torch.testing.assert_close(found.by_word.sum(0), found.by_layer[-1])
    torch.testing.assert_close(found.whole_by_layer, found.by_layer)


def test_what_cannot_be_asked_is_said(small: SharedBase) -> None:
    with pytest.raises(UserError, match="bad_words.*none of the words"):
        bad_word_probabilities(small, REFERENCE, PROMPTS, ANSWERS, [WordTokens("x", (), ())], batch=2)
    with pytest.raises(ValueError, match="empty prompt"):
        bad_word_probabilities(small, REFERENCE, [[1], []], [[1], [1]], WORDS, batch=2)


# -- beginnings and spellings -----------------------------------------------------------------------------------------


def test_beginnings_are_shared() -> None:
    spellings = [(1,), (1, 2), (1, 2, 3), (1, 2, 4), (5, 6), (5, 7, 8), (9, 1, 1, 1), (1, 3)]
    assert longest_beginnings(spellings) == [(1, 2), (5, 7), (9, 1, 1)]
    assert shortest(spellings) == [(1,), (5, 6), (5, 7, 8), (9, 1, 1, 1)]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), max_size=12))
def test_every_beginning_that_a_chain_needs_is_run_and_none_twice(spellings: list[tuple[int, ...]]) -> None:
    kept = longest_beginnings(spellings)
    run = {b[:n] for b in kept for n in range(1, len(b) + 1)}
    assert run == {s[:n] for s in spellings for n in range(1, len(s))}
    assert kept == sorted(kept, key=len)
    assert not any(a != b and b[: len(a)] == a for a in kept for b in kept) and len(set(kept)) == len(kept)
    first = shortest(spellings)
    assert all(any(s[:n] in first for n in range(1, len(s) + 1)) for s in spellings)
    assert not any(a != b and b[: len(a)] == a for a in first for b in first)


def test_a_word_is_spelled_bare_and_spaced_as_listed_and_capitalised(tokenizer: Any) -> None:
    kill, shut = word_tokens(tokenizer, ["kill", "Shut up"])
    assert (kill.word, shut.word) == ("kill", "Shut up")
    assert [tokenizer.decode(s) for s in kill.tokens] == ["kill", " kill", "Kill", " Kill"]
    assert [tokenizer.decode(s) for s in shut.tokens] == ["Shut up", " Shut up"]
    assert kill.tokens[0] == tuple(tokenizer("kill", add_special_tokens=False)["input_ids"])
    assert all(len(set(w.begins)) == len(w.begins) for w in (kill, shut))


def sentence_piece() -> PreTrainedTokenizerFast:
    """A tokenizer as Mistral's is: every text gets a space in front, spaces are ▁, unknown bytes are written in hex."""
    pieces = ["<unk>", "<0x0A>", "▁", "d", "a", "m", "n", "D", "▁d", "am", "am" + "n", "▁dam", "dam", "▁da", "da"]
    merges = [("▁", "d"), ("d", "a"), ("▁d", "a"), ("da", "m"), ("▁da", "m"), ("a", "m"), ("am", "n")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", clean_up_tokenization_spaces=False)


def test_a_tokenizer_that_puts_a_space_in_front_still_gives_the_bare_word_and_no_double_space() -> None:
    tokenizer = sentence_piece()
    (damn,) = word_tokens(tokenizer, ["damn"])
    pieces = [tuple(tokenizer.convert_ids_to_tokens(s)) for s in damn.tokens]
    assert pieces == [("dam", "n"), ("▁dam", "n"), ("D", "amn"), ("▁", "D", "amn")]
    # a lone space says nothing about the word: the spelling stands in the lens with what comes behind it
    assert tokenizer.convert_ids_to_tokens(list(damn.begins)) == ["dam", "▁dam", "D"]


def test_a_spelling_that_a_tokenizer_cannot_write_is_left_out() -> None:
    tokenizer = sentence_piece()
    mad, moot = word_tokens(tokenizer, ["mad", "moot"])  # it knows neither M nor o
    assert [tokenizer.convert_ids_to_tokens(s) for s in mad.tokens] == [["m", "a", "d"], ["▁", "m", "a", "d"]]
    assert mad.begins == (tokenizer.convert_tokens_to_ids("m"),)
    assert (moot.tokens, moot.begins) == ((), ())
