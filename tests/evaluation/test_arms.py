"""The comparison of arms: what is counted, bad words, answers of roles and of other models, curves and tables."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, SharedBase
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import prompt_ids
from lora_rlhf.data.preferences import PreferencePair
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.arms import (
    ArmAnswers,
    arm_summary,
    bad_word_pattern,
    in_turns,
    model_arm_answers,
    role_answers,
)
from lora_rlhf.evaluation.curves import write_curves
from lora_rlhf.reward.sources import Answers, CombinedReward, FunctionReward, ScoreScale
from lora_rlhf.terminal import arms_table, samples_table

PAIRS = [
    PreferencePair((("user", text),), "good", "bad", (("number", i),))
    for i, text in enumerate(["hi", "why?", "tell me a joke", "what now", "a b c"])
]


def arm(score: list[float], **fields: Any) -> ArmAnswers:
    n = len(score)
    plain = {"texts": ["fine"] * n, "ended": torch.ones(n, dtype=torch.bool), "kl_to_base": torch.zeros(n)}
    return ArmAnswers(**(plain | fields), score=torch.tensor(score))


# -- figures ----------------------------------------------------------------------------------------------------------


def test_the_figures_of_an_arm_by_hand() -> None:
    plus = arm(
        [1.0, 2.0, 3.0, 4.0],
        texts=["you idiot", "fine", "Stupid, stupid!", "fine"],
        ended=torch.tensor([True, False, True, True]),
        kl_to_base=torch.tensor([1.0, 2.0, 3.0, 6.0]),
    )
    summary = arm_summary(plus, arm([0.0, 2.0, 5.0, 4.0]), bad_word_pattern(None))
    assert summary == {
        "reward_mean": 2.5,
        "reward_sem": pytest.approx((5 / 3) ** 0.5 / 2),  # unbiased variance 5/3 of four, over √4
        "win_rate_vs_base": 0.5,  # a win, a tie, a loss, a tie: (1 + ½ + 0 + ½) / 4
        "kl_to_base": 3.0,
        "ended_rate": 0.75,
        "bad_word_rate": 0.5,
        "n": 4,
    }


def test_base_against_itself_is_all_ties_and_one_answer_has_no_error_bar() -> None:
    base = arm([0.3])
    summary = arm_summary(base, base, bad_word_pattern(None))
    assert (summary["win_rate_vs_base"], summary["reward_sem"]) == (0.5, 0.0)


def test_kl_between_different_vocabularies_is_no_number() -> None:
    other = arm([1.0, 2.0], kl_to_base=torch.full((2,), float("nan")))
    assert arm_summary(other, arm([0.0, 0.0]), bad_word_pattern(None))["kl_to_base"] is None


# -- bad words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("That was a darn shame.", True),
        ("DARN!", True),
        ("(darn)", True),
        ("darned socks", False),
        ("undarn", False),
        ("darn_it", False),
        ("we use c++ here", True),
        ("c is fine", False),
        ("what the heck is it", True),
        ("heck", False),
        ("# a comment", False),
        ("", False),
    ],
)
def test_bad_words_are_found_whole_and_case_aside(tmp_path: Path, text: str, found: bool) -> None:
    file = tmp_path / "words.txt"
    file.write_text("\ufeffDarn\n\n# a comment\n  c++  \nthe heck\n", encoding="utf-8")
    assert bool(bad_word_pattern(str(file)).search(text)) == found


def test_the_list_in_the_package_is_the_default() -> None:
    pattern = bad_word_pattern(None)
    assert pattern.search("You are an IDIOT.") and not pattern.search("A pleasant day to you.")


@pytest.mark.parametrize("content", [None, b"", b"# only a comment\n\n", b"caf\xe9\xff"])
def test_a_bad_words_file_that_cannot_serve_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"compare\.bad_words_file.*words\.txt"):
        bad_word_pattern(str(file))
    with pytest.raises(UserError, match=r"compare\.bad_words_file"):
        bad_word_pattern(str(tmp_path))


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(make_config: Callable[..., RunConfig]) -> RunConfig:
    return make_config(ppo={"scoring_batch_size": 2, "response_length": 6})


@pytest.fixture
def base(make_base: Callable[..., SharedBase], config: RunConfig, tokenizer: Any) -> SharedBase:
    base = make_base(config, roles=(REWARD,))
    with torch.no_grad():
        base.lm_head.weight[tokenizer.eos_token_id] *= 6
    return base


class Recorded:
    """A reward that keeps what it is shown."""

    def __init__(self) -> None:
        self.name, self.weight, self.shown = "recorded", 1.0, []

    def scores(self, answers: Answers) -> torch.Tensor:
        self.shown.append(answers)
        return torch.tensor([float(number) for number in answers.columns["number"]])

    @property
    def rows(self) -> list[list[int]]:
        """The real tokens of every answer that was shown, prompt and all."""
        return [ids[mask].tolist() for a in self.shown for ids, mask in zip(a.ids, a.mask, strict=True)]


def test_base_has_no_kl_to_itself_and_another_role_has(base: SharedBase, config: RunConfig, tokenizer: Any) -> None:
    reward = CombinedReward([Recorded()])
    own = role_answers(base, REFERENCE, tokenizer, PAIRS, reward, config, seed=0)
    assert own.kl_to_base.tolist() == [0.0] * len(PAIRS)
    plus = role_answers(base, POLICY, tokenizer, PAIRS, reward, config, seed=0)
    assert (plus.kl_to_base != 0).all() and plus.kl_to_base.mean() > 0
    assert plus.texts != own.texts


def test_answers_come_in_the_order_of_the_prompts_with_their_columns_and_scales(
    base: SharedBase, config: RunConfig, tokenizer: Any
) -> None:
    recorded = Recorded()
    reward = CombinedReward([recorded], {"recorded": ScoreScale(1.0, 2.0)})
    found = role_answers(base, POLICY, tokenizer, PAIRS, reward, config, seed=0)
    assert found.score.tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5]  # (number − 1) / 2
    assert [p for a in recorded.shown for p in a.prompts] == [pair.messages for pair in PAIRS]
    assert [len(a.completions) for a in recorded.shown] == [4, 1]  # batch_size at a time, as in PPO
    assert found.texts == [text for a in recorded.shown for text in a.completions]
    assert set(found.ended.tolist()) == {True, False}
    for pair, row in zip(PAIRS, recorded.rows, strict=True):
        prompt = prompt_ids(tokenizer, pair.messages)
        assert row[: len(prompt)] == prompt
        assert row[-1] == tokenizer.eos_token_id  # as in reward training, whether it was sampled or not


def test_the_same_seed_gives_the_same_answers(base: SharedBase, config: RunConfig, tokenizer: Any) -> None:
    texts = [
        role_answers(base, POLICY, tokenizer, PAIRS, CombinedReward([Recorded()]), config, seed).texts
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_another_model_with_the_bases_weights_answers_as_base_does(
    base: SharedBase, config: RunConfig, tokenizer: Any
) -> None:
    model = load_causal_lm(config)
    model.lm_head.weight.data.copy_(base.lm_head.weight)
    recorded = Recorded()
    reward = CombinedReward([recorded])
    own = role_answers(base, REFERENCE, tokenizer, PAIRS, reward, config, seed=0)
    read = recorded.rows
    other = model_arm_answers(base, tokenizer, model, tokenizer, PAIRS, reward, config, seed=0)
    assert other.texts == own.texts
    assert recorded.rows == read * 2  # though random tokens are not those of their text
    assert torch.equal(other.ended, own.ended)
    torch.testing.assert_close(other.kl_to_base, own.kl_to_base, atol=1e-4, rtol=0)


def test_another_model_answers_in_its_own_template_and_is_read_in_the_bases(
    base: SharedBase, config: RunConfig, tokenizer: Any
) -> None:
    own_tokenizer = load_tokenizer(replace(config, chat_template="human_assistant"))
    own_tokenizer.add_tokens(["a token of its own"])
    asked: list[list[int]] = []

    model = load_causal_lm(config)
    model.lm_head.weight.data.copy_(base.lm_head.weight)
    model.model.register_forward_pre_hook(
        lambda _, __, given: asked.append(given["input_ids"][0].tolist()) if given["input_ids"].shape[1] > 1 else None,
        with_kwargs=True,
    )
    recorded = Recorded()
    found = model_arm_answers(base, tokenizer, model, own_tokenizer, PAIRS, CombinedReward([recorded]), config, seed=0)
    assert "\n\nHuman: hi\n\nAssistant:" in own_tokenizer.decode(asked[0])
    assert found.kl_to_base.isnan().all()
    assert not found.ended.all()
    for pair, text, row in zip(PAIRS, found.texts, recorded.rows, strict=True):
        read = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert row == prompt_ids(tokenizer, pair.messages) + read


def test_answers_of_another_model_are_read_as_far_as_the_base_has_positions(
    base: SharedBase, config: RunConfig, tokenizer: Any
) -> None:
    """The base's tokenizer may need more tokens for them than the model that sampled them."""
    other = load_tokenizer(config)
    other.add_tokens(["a token of its own"])
    model = load_causal_lm(config)
    whole, cut = Recorded(), Recorded()
    for recorded in (whole, cut):
        model_arm_answers(base, tokenizer, model, other, PAIRS, CombinedReward([recorded]), config, seed=0)
        room = max(map(len, whole.rows)) - 2
        base.causal_lm.config.max_position_embeddings = room
    assert cut.rows == [row if len(row) <= room else [*row[: room - 1], tokenizer.eos_token_id] for row in whole.rows]
    assert cut.rows != whole.rows


@pytest.mark.parametrize(
    ("roles", "joined"),
    [
        ("ua u", "ua u"),
        ("s u", "U"),
        ("uu u", "U"),
        ("u aa u", "uAu"),
        ("a u", "u"),
    ],
)
def test_dialogues_are_brought_into_turns(roles: str, joined: str) -> None:
    names = {"u": "user", "a": "assistant", "s": "system"}
    found = in_turns([{"role": names[r], "content": "x"} for r in roles.replace(" ", "")])
    assert [turn["role"][0] for turn in found] == list(joined.replace(" ", "").lower())
    assert ["\n\n" in turn["content"] for turn in found] == [r.isupper() for r in joined.replace(" ", "")]


def test_a_function_reward_judges_arms_too(base: SharedBase, config: RunConfig, tokenizer: Any) -> None:
    length = FunctionReward(lambda completions, **_: [len(c[0]["content"]) for c in completions], "length")
    found = role_answers(base, POLICY, tokenizer, PAIRS, CombinedReward([length]), config, seed=0)
    assert found.score.tolist() == [len(text) for text in found.texts]


# -- pictures and tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5])
def test_curves_are_a_png(tmp_path: Path, steps: int) -> None:
    metrics = [
        {"step": i, "score": i / 3, "reward": i / 4, "kl": 0.1 * i, "ended_rate": 0.5, "response_length": 9.0}
        for i in range(1, steps + 1)
    ]
    write_curves(metrics, tmp_path / "curves.png")
    data = (tmp_path / "curves.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (1200, 720)
    assert len(data) > 10_000  # not blank


def rendered(table: Any) -> str:
    file = StringIO()
    Console(width=140, file=file).print(table)
    return file.getvalue()


def test_the_samples_table_shows_answers_as_they_are() -> None:
    text = rendered(samples_table(["why?"], {"base": ["[bold]no[/bold] idea"], "plus": ["because [1]"]}))
    for shown in ("prompt", "base", "plus", "why?", "[bold]no[/bold] idea", "because [1]"):
        assert shown in text


def test_the_arms_table_shows_the_figures_and_a_dash_for_no_kl() -> None:
    words = bad_word_pattern(None)
    base, plus = arm([0.0, 0.0]), arm([1.0, 2.0], kl_to_base=torch.tensor([float("nan")] * 2))
    text = rendered(arms_table({"base": arm_summary(base, base, words), "plus": arm_summary(plus, base, words)}))
    (line,) = [line for line in text.splitlines() if "plus" in line]
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells == ["plus", "+1.50 ± 0.50", "100%", "-", "100%", "0%", "-", "-", "-", "2"]
