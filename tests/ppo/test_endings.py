"""What ends an answer, and that the reward model reads the very text that the user reads, with EOS after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_rlhf import processes as processes_module
from lora_rlhf.base.embedded import cache_folder
from lora_rlhf.base.positions import PIECES
from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import (
    CHATML,
    HUMAN_ASSISTANT,
    answer_ids,
    answer_lead,
    ending_ids,
    set_model_ends,
    turn_end_id,
)
from lora_rlhf.data.rows import dataset_rows
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.ppo.rollout import Rollout, model_answers
from lora_rlhf.processes import Processes
from lora_rlhf.reward.sources import AdapterReward, Answers

EMBEDDED_FOLDER = cache_folder() / "smollm2-135m-instruct"
"""In the user's cache: the test session has an empty one of its own by the time that tests run."""


class Says:
    """A decoder that has these answers ready."""

    device, reads_working_copy = torch.device("cpu"), False

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.answers = answers

    def __call__(self, ids: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.tensor(self.answers)
        return tokens, torch.zeros(tokens.shape)


def rollout_of(tokenizer: Any, answers: Sequence[Sequence[int]], *stops: str) -> Rollout:
    """The rollout of answers of one length."""
    sampling = Sampling(len(answers[0]), 1.0, stops)
    return model_answers(Says(answers), [[5]] * len(answers), sampling, tokenizer, torch.Generator())


def read_ids(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.score_ids, rollout.score_mask, strict=True)]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# -- a token that straddles a stop string -----------------------------------------------------------------------------


def test_the_reward_model_reads_the_part_of_a_straddling_token_that_is_text(tokenizer: Any) -> None:
    tokenizer.add_tokens([".\n\nHuman"])
    said = ids_of(tokenizer, "Yes it is")
    answer = [*said, *ids_of(tokenizer, ".\n\nHuman:")]
    assert len(answer) == len(said) + 2
    rollout = rollout_of(tokenizer, [answer], "\n\nHuman:")
    assert rollout.texts == ["Yes it is."]
    assert read_ids(rollout) == [[*said, *ids_of(tokenizer, "."), tokenizer.eos_token_id]]
    assert rollout.response_ids.tolist() == [answer] and rollout.action_mask.all()


def test_blanks_before_a_stop_string_are_no_part_of_what_is_read(tokenizer: Any) -> None:
    said = ids_of(tokenizer, "Yes.")
    rollout = rollout_of(tokenizer, [[*said, *ids_of(tokenizer, " \n "), *ids_of(tokenizer, "#")]], "#")
    assert rollout.texts == ["Yes."] and read_ids(rollout) == [[*said, tokenizer.eos_token_id]]


def test_what_is_read_may_be_longer_than_what_was_sampled(tokenizer: Any) -> None:
    tokenizer.add_tokens(["zqxj#"])
    (token,) = ids_of(tokenizer, "zqxj#")
    rollout = rollout_of(tokenizer, [[token], ids_of(tokenizer, "a")], "#")
    read = [[*ids_of(tokenizer, "zqxj"), tokenizer.eos_token_id], [*ids_of(tokenizer, "a"), tokenizer.eos_token_id]]
    assert len(read[0]) > 2 and read_ids(rollout) == read
    assert rollout.score_ids.shape == rollout.score_mask.shape == (2, len(read[0]))
    assert rollout.response_ids.shape == (2, 1) and rollout.texts == ["zqxj", "a"]


def test_processes_put_together_what_is_read_at_different_widths(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.add_tokens(["zqxj#"])
    answers = [ids_of(tokenizer, "a"), ids_of(tokenizer, "zqxj#"), ids_of(tokenizer, "b")]
    parts = [rollout_of(tokenizer, answers[rank::2], "#") for rank in range(2)]
    assert parts[0].score_ids.shape[1] != parts[1].score_ids.shape[1]
    processes, sent = Processes.one(), []
    processes.count = 2

    def sending(value: Any) -> Any:
        sent.append(value)
        raise InterruptedError

    monkeypatch.setattr(processes_module, "gathered", sending)
    for part in parts:
        with pytest.raises(InterruptedError):
            processes.whole_rollout(part, [[5]] * 3, tokenizer.pad_token_id)
    monkeypatch.setattr(processes_module, "gathered", lambda _: sent)
    whole, alone = processes.whole_rollout(parts[0], [[5]] * 3, 0), rollout_of(tokenizer, answers, "#")
    assert read_ids(whole) == read_ids(alone) and whole.texts == alone.texts
    assert whole.score_ids.shape == alone.score_ids.shape
    assert torch.equal(whole.ended_by_eos, alone.ended_by_eos) and torch.equal(whole.ended, alone.ended)


def llama_tokenizer() -> Any:
    """A tokenizer as Llama and Mistral have it: a space goes in front of every text, unknown characters are bytes.

    Without pre-tokenizer, so that tokens hold ends and beginnings of words together.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    plain = Tokenizer(models.BPE())
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    texts = [json.dumps(row)[:300] for row in dataset_rows("embedded", "train")][:200]
    plain.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    learnt = json.loads(plain.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in sorted(learnt["vocab"], key=learnt["vocab"].get)]
    merges = [tuple(merge) for merge in learnt["merges"]]
    whole = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    whole.normalizer = plain.normalizer
    strip = decoders.Strip(" ", 1, 0)
    whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.chat_template = HUMAN_ASSISTANT
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tiny_folder: Path) -> dict[str, Any]:
    """Real tokenizers: byte-level BPE of two kinds, and one that puts a space in front of a text."""
    found = {"tiny": AutoTokenizer.from_pretrained(tiny_folder), "Llama's kind": llama_tokenizer()}
    if EMBEDDED_FOLDER.is_dir():
        found["embedded"] = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    return found


WORDS = st.sampled_from([" Yes", "it is", ".", " \n", "\n\nHuman:", "é漢", "🙂", " ", "!?", "a", "\t", "Ünï", "the"])
KINDS = ["tiny", "Llama's kind", "embedded"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_reward_model_reads_what_the_user_reads(tokenizers: dict[str, Any], kind: str, data: st.DataObject) -> None:
    if kind not in tokenizers:
        pytest.skip("the embedded model is not in the cache")
    tokenizer = tokenizers[kind]
    of_words = st.lists(WORDS, max_size=8).map(lambda parts: ids_of(tokenizer, "".join(parts)))
    of_any = st.lists(st.integers(0, len(tokenizer) - 1), max_size=8)
    tokens = data.draw(of_words | of_any)
    ends = set(ending_ids(tokenizer))
    assume(tokens and not ends & set(tokens))
    hidden = {i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    stop, ending = "", data.draw(st.sampled_from(["EOS", "stop string", "cut"]))
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if ending == "stop string":
        assume(text and not set(tokens) & tokenizer.added_tokens_decoder.keys())  # whose names a stop string could cut
        start = data.draw(st.integers(0, len(text) - 1))
        stop = text[start : data.draw(st.integers(start + 1, len(text)))]
        text = text[: text.index(stop)]
    rollout = rollout_of(
        tokenizer, [[*tokens, tokenizer.eos_token_id] if ending == "EOS" else tokens], *([stop] if stop else [])
    )
    (read,) = read_ids(rollout)
    assert (bool(rollout.ended), bool(rollout.ended_by_eos)) == (ending != "cut", ending == "EOS")
    assert read[-1] == tokenizer.eos_token_id and not hidden & set(read[:-1])
    if len(read) - 1 == rollout.response_ids.shape[1] + PIECES:  # bytes of no character are read as several tokens each
        assert "\ufffd" in text and text.strip().startswith(rollout.texts[0])
    else:
        assert rollout.texts == [text.strip()]
    shown = tokenizer.decode(read[:-1])
    assert shown == shown.rstrip() and shown.strip() == rollout.texts[0]
    blank = not tokenizer.decode(read[:1]).strip() and "\ufffd" not in shown
    assert not blank or shown == answer_lead(tokenizer) + rollout.texts[0] or len(read) == 1


def test_special_tokens_and_blanks_that_nobody_sees_are_not_read(tokenizer: Any) -> None:
    said, more = ids_of(tokenizer, "Yes."), ids_of(tokenizer, " It is")
    (hidden,) = ids_of(tokenizer, "<|im_start|>")
    blanks, eos = ids_of(tokenizer, " \n\n \n"), tokenizer.eos_token_id
    for answer, text, read in [
        ([*said, *blanks, eos], "Yes.", said),
        ([*said, hidden, *more, eos], "Yes. It is", [*said, *more]),
        ([*said, *blanks, hidden], "Yes.", said),
        ([*said, hidden, *ids_of(tokenizer, "#")], "Yes.", said),
        ([*ids_of(tokenizer, "\n\n \n"), *said, eos], "Yes.", said),
        ([*ids_of(tokenizer, "  "), hidden, *said, *blanks, eos], "Yes.", said),
        ([*blanks, *blanks, eos], "", []),
    ]:
        rollout = rollout_of(tokenizer, [answer], "#")
        assert rollout.texts == [text] and read_ids(rollout) == [[*read, eos]]
        assert bool(rollout.ended) == (answer[-1] != hidden) and rollout.response_ids.tolist() == [answer]


@pytest.mark.parametrize(
    ("answer", "expected"), [(" Yes.", " Yes."), ("Yes.", "Yes."), ("\n\n \nYes.", "Yes."), ("  Yes.", "Yes.")]
)
def test_blanks_before_an_answer_are_read_where_the_template_has_them(
    tokenizer: Any, answer: str, expected: str
) -> None:
    """HH-RLHF's format has a space there, with which reward training has read every answer."""
    tokenizer.chat_template = HUMAN_ASSISTANT
    rollout = rollout_of(tokenizer, [[*ids_of(tokenizer, answer), tokenizer.eos_token_id]])
    assert rollout.texts == ["Yes."] and read_ids(rollout) == [[*ids_of(tokenizer, expected), tokenizer.eos_token_id]]


# -- the token that ends a turn ---------------------------------------------------------------------------------------

GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
OPEN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (CHATML, "<s>", "<|im_end|>"),
        (CHATML, "<|im_end|>", None),
        (GEMMA, "<s>", "<end_of_turn>"),
        (PHI, "<s>", "<|end|>"),
        (HUMAN_ASSISTANT, "<s>", None),
        (OPEN, "<s>", None),
    ],
)
def test_the_token_that_closes_a_turn_is_read_off_the_template(
    tokenizer: Any, template: str, eos: str, expected: str | None
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>", "<|end|>", "<|user|>"]})
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    set_model_ends(tokenizer, None)
    found = turn_end_id(tokenizer)
    assert (found and tokenizer.convert_ids_to_tokens(found)) == expected
    assert ending_ids(tokenizer) == [tokenizer.eos_token_id] + [found] * (expected is not None)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_an_answer_ends_at_every_token_that_the_model_ends_at(
    make_config: Callable[..., RunConfig], tiny_folder: Path, tmp_path: Path, file: str
) -> None:
    """Qwen2.5-Instruct and Llama-3 name several; transformers reads config.json where there is no other file."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    tokenizer.save_pretrained(folder)
    end, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")
    (ordinary,) = ids_of(tokenizer, "a")
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    held = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(held | {"eos_token_id": [other, ordinary, end, 10**6]}))
    loaded = load_tokenizer(make_config(model_name_or_path=str(folder)))
    assert ending_ids(loaded) == [end, other]
    said = ids_of(loaded, "ba")
    rollout = rollout_of(loaded, [[*said, other, ordinary]])
    assert rollout.ended.item() and rollout.ended_by_eos.item() and rollout.texts == ["ba"]
    assert rollout.response_ids.tolist() == [[*said, other, loaded.pad_token_id]]
    assert read_ids(rollout) == [[*said, end]]


def test_a_tokenizer_without_a_model_has_its_own_ends(
    make_config: Callable[..., RunConfig], tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    assert ending_ids(load_tokenizer(make_config(model_name_or_path=str(tmp_path / "model")))) == ending_ids(tokenizer)


def test_a_mark_of_several_tokens_ends_no_answer(tokenizer: Any) -> None:
    """A base whose vocabulary lacks the marks of the template that it is given."""
    tokenizer.chat_template = CHATML.replace("im_end", "end of turn")
    assert turn_end_id(tokenizer) is None


@pytest.fixture
def turns(tokenizer: Any) -> Any:
    """A tokenizer whose template closes turns with <|im_end|> while EOS is another token."""
    tokenizer.eos_token = "<s>"
    return tokenizer


def test_a_rollout_ends_at_the_token_that_closes_a_turn_and_is_read_with_eos(turns: Any) -> None:
    end, said = turns.convert_tokens_to_ids("<|im_end|>"), ids_of(turns, "hi")
    rollout = rollout_of(turns, [[*said, end, *said], [*said, turns.eos_token_id, *said]])
    assert rollout.action_mask.sum(1).tolist() == [len(said) + 1] * 2
    assert rollout.response_ids[:, len(said)].tolist() == [end, turns.eos_token_id]
    assert rollout.ended.all() and rollout.ended_by_eos.all() and rollout.texts == ["hi", "hi"]
    assert read_ids(rollout) == [[*said, turns.eos_token_id]] * 2 == [answer_ids(turns, "hi")] * 2


# -- what an end is worth ---------------------------------------------------------------------------------------------


def test_the_reward_adapter_scores_every_answer_as_it_was_trained(
    make_base: Callable[..., SharedBase], tokenizer: Any
) -> None:
    """The same text gets the same score, whether EOS, a stop string or nothing ended it."""
    base, said = make_base(), ids_of(tokenizer, "Yes it is.")
    (stop,) = ids_of(tokenizer, "#")
    rollout = rollout_of(tokenizer, [[*said, tokenizer.eos_token_id], [*said, stop]], "#")
    cut = rollout_of(tokenizer, [said], "#")
    assert [*rollout.ended.tolist(), *cut.ended.tolist()] == [True, True, False]
    source = AdapterReward(base)
    scores = [
        source.scores(Answers(r.text_ids, r.text_mask, [[]] * len(r.texts), r.texts)).tolist() for r in (rollout, cut)
    ]
    trained = torch.tensor([[5, *answer_ids(tokenizer, "Yes it is.")]])
    expected = base.scores(REWARD, trained, torch.ones_like(trained, dtype=torch.bool), 1).item()
    assert [*scores[0], *scores[1]] == pytest.approx([expected] * 3, abs=1e-4)
