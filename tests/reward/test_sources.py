"""Reward sources: adapters, classifiers and functions, how they add up, and what is said when one is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForSequenceClassification, PreTrainedTokenizerFast

from lora_rlhf.base.shared import POLICY, REWARD, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.reward.sources import (
    AdapterReward,
    Answers,
    ClassifierReward,
    CombinedReward,
    FunctionReward,
    RewardSource,
    ScoreScale,
    reward_sources,
)

Sources = Callable[..., list[RewardSource]]


def answers(*completions: str, **columns: list[Any]) -> Answers:
    """Answers to short dialogues; ids are random, of different lengths."""
    n, generator = len(completions), torch.Generator().manual_seed(0)
    prompts = [[{"role": "user", "content": f"question {i}" + " again" * i}] for i in range(n)]
    mask = torch.arange(9) >= torch.arange(n)[:, None]
    return Answers(torch.randint(5, 500, (n, 9), generator=generator), mask, prompts, list(completions), columns)


def numbers(name: str, values: Any, weight: float = 1.0) -> FunctionReward:
    """A source that gives `values`, whatever the answers."""
    return FunctionReward(lambda **_: values, name, weight)


# -- adding up --------------------------------------------------------------------------------------------------------


def test_each_source_is_normalised_before_the_weights_add_them_up() -> None:
    # a: 1, 2, 3 has mean 2 and deviation 1; b: 10, 30, 20 has mean 20 and deviation 10.
    reward = CombinedReward([numbers("a", [1, 2, 3], weight=2.0), numbers("b", [10, 30, 20], weight=-0.5)])
    reward.fit(answers("x", "y", "z"))
    assert reward.scales == {"a": ScoreScale(2.0, 1.0), "b": ScoreScale(20.0, 10.0)}
    total, raw = reward.scores(answers("x", "y", "z"))
    # 2·(−1, 0, 1) − 0.5·(−1, 1, 0)
    torch.testing.assert_close(total, torch.tensor([-1.5, -0.5, 2.0]))
    assert {name: scores.tolist() for name, scores in raw.items()} == {"a": [1, 2, 3], "b": [10, 30, 20]}


def test_scores_that_are_known_already_are_not_asked_for_again() -> None:
    def never(**_: Any) -> list[float]:
        raise AssertionError("asked again")

    reward = CombinedReward([FunctionReward(never, "a")], {"a": ScoreScale(1.0, 2.0)})
    total, raw = reward.scores(answers("x", "y"), known={"a": torch.tensor([3.0, 5.0])})
    assert total.tolist() == [1.0, 2.0] and raw["a"].tolist() == [3.0, 5.0]


@pytest.mark.parametrize(
    "scores",
    [
        [7.0] * 3, [0.0] * 3, [-1e30] * 3, [1e-30] * 3,
        [0.1] * 97,  # whose mean in float32 is not 0.1
        [1000.0, 1000.0001, 999.9999],  # neighbours in float32
        [3.5],
    ],
    ids=["same", "zero", "huge", "tiny", "0.1", "rounding noise", "one answer"],
)  # fmt: skip
def test_a_source_without_spread_adds_nothing_and_is_not_blown_up_later(scores: list[float]) -> None:
    reward = CombinedReward([numbers("success", scores)])
    batch = answers(*"x" * len(scores))
    assert reward.fit(batch) == ["success"]
    assert reward.scales["success"] == ScoreScale(pytest.approx(sum(scores) / len(scores), rel=1e-6), 1.0)
    assert reward.scores(batch)[0].tolist() == pytest.approx([0.0] * len(scores), abs=1e-3)
    first = reward.scores(answers("x"), known={"success": torch.tensor([reward.scales["success"].mean + 1])})
    assert first[0].tolist() == [1.0] or abs(scores[0]) > 1e7


@pytest.mark.parametrize(
    ("scores", "std"),
    [([0.0] * 3 + [1.0], 0.5), ([1e-30, 3e-30], 2**0.5 * 1e-30), ([1e4, 1e4 + 1], 0.5**0.5), ([3e38, -3e38], 4.24e38)],
    ids=["one success of four", "small scores", "a small part of large scores", "the largest that float32 has"],
)
def test_a_spread_is_kept_however_small_the_scores_are(scores: list[float], std: float) -> None:
    reward = CombinedReward([numbers("f", scores)])
    assert reward.fit(answers(*"x" * len(scores))) == []
    assert reward.scales["f"].std == pytest.approx(std, rel=1e-3)


def test_each_sources_normalised_score_is_clipped_and_the_others_still_count() -> None:
    sources = [numbers("a", [9.0, 9.0, -99.0, 1.0], weight=2.0), numbers("b", [1.0, 2.0, 0.5, 30.0], weight=-1.0)]
    reward = CombinedReward(sources, {"a": ScoreScale(1.0, 2.0), "b": ScoreScale(0.0, 1.0)})
    batch = answers(*"wxyz")
    # a: 4, 4, -50, 0; b: 1, 2, 0.5, 30; within 3: 3, 3, -3, 0 and 1, 2, 0.5, 3
    total, raw = reward.scores(batch, clip=3.0)
    assert total.tolist() == [5.0, 4.0, -6.5, -3.0]
    assert reward.scores(batch)[0].tolist() == [7.0, 6.0, -100.5, -30.0]
    assert reward.clipped_share(raw, 3.0) == 4 / 8 and reward.clipped_share(raw, 30.0) == 1 / 8
    assert raw["a"].tolist() == [9.0, 9.0, -99.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_on_the_references_answers_stops_the_run_and_names_the_source(bad: float) -> None:
    with pytest.raises(UserError, match="sometimes_nan"):
        CombinedReward([numbers("fine", [1, 2]), numbers("sometimes_nan", [1.0, bad])]).fit(answers("x", "y"))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_nan_in_a_later_step_stops_the_run_too(bad: float) -> None:
    reward = CombinedReward([numbers("late", [1.0, bad])], {"late": ScoreScale(0.0, 1.0)})
    with pytest.raises(UserError, match="late"):
        reward.scores(answers("x", "y"))


def test_scales_over_several_batches_are_those_of_all_answers_together() -> None:
    given = iter([[1.0, 2.0], [3.0, 6.0]])
    reward = CombinedReward([FunctionReward(lambda **_: next(given), "f")])
    reward.fit(answers("x", "y"), answers("x", "y"))
    assert reward.scales["f"].mean == 3.0
    assert reward.scales["f"].std == pytest.approx((14 / 3) ** 0.5)  # squares of -2, -1, 0, 3 over n - 1


# -- functions --------------------------------------------------------------------------------------------------------


def test_a_function_is_called_as_trl_calls_it() -> None:
    seen: dict[str, Any] = {}

    def function(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return [0.5, True]

    batch = answers("yes", "no", source=["a", "b"], level=[1, None])
    scores = FunctionReward(function, "f").scores(batch)
    assert scores.dtype == torch.float32 and scores.tolist() == [0.5, 1.0]
    assert seen["prompts"] == batch.prompts
    assert seen["prompts"][0] == [{"role": "user", "content": "question 0"}]
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    assert seen["columns"] == {"source": ["a", "b"], "level": [1, None]}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0], "1 numbers for 2 answers"),
        ([1, 2, 3], "3 numbers for 2 answers"),
        ([1.0, "high"], "no number"),
        ([1.0, None], "no number"),
        (None, ""),  # a forgotten return
        (3.0, ""),
    ],
)
def test_a_function_that_does_not_give_a_number_for_each_answer_is_named(values: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"politeness.*{said}"):
        numbers("politeness", values).scores(answers("x", "y"))


# -- what the config names --------------------------------------------------------------------------------------------


@pytest.fixture
def sources(make_config: Callable[..., RunConfig], make_base: Callable[..., SharedBase], tmp_path: Path) -> Sources:
    """Reward sources of a config with these entries, on a base that has the policy alone."""

    def load(*entries: dict[str, Any], base: SharedBase | None = None) -> list[RewardSource]:
        config = make_config(ppo={"reward_sources": list(entries), "scoring_batch_size": 2})
        return reward_sources(config, base or make_base(config, roles=()), tmp_path / "own_reward")

    return load


@pytest.fixture
def rewards_py(tmp_path: Path) -> Path:
    """A file of reward functions."""
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "LIMIT = 3\n"
        "def length(prompts, completions, **columns):\n"
        "    return [len(c[0]['content']) for c in completions]\n"
        "def shout(completions, **_):\n"
        "    return [c[0]['content'].isupper() for c in completions]\n"
    )
    return file


@pytest.fixture
def reward_folder(make_base: Callable[..., SharedBase], tmp_path: Path) -> tuple[Path, SharedBase]:
    """The folder of a reward adapter, and the base that it was saved from."""
    base = make_base(seed=5, roles=(REWARD,))
    base.save_adapter(REWARD, tmp_path / "own_reward")
    return tmp_path / "own_reward", base


def test_without_entries_the_reward_is_the_runs_own_adapter(
    sources: Sources, reward_folder: tuple[Path, SharedBase]
) -> None:
    (source,) = sources()
    assert isinstance(source, AdapterReward) and (source.role, source.name, source.weight) == (REWARD, REWARD, 1.0)
    batch = answers("x", "y", "z")
    torch.testing.assert_close(source.scores(batch), reward_folder[1].scores(REWARD, batch.ids, batch.mask, 32))


def test_an_adapter_scores_the_last_real_token_of_prompt_and_answer(
    sources: Sources, reward_folder: tuple[Path, SharedBase]
) -> None:
    folder, trained = reward_folder
    (source,) = sources({"kind": "adapter", "path": str(folder), "weight": 2, "name": "helpful"})
    assert (source.name, source.weight) == ("helpful", 2.0)
    batch = answers("x", "y", "z")
    scores = source.scores(batch)
    for ids, mask, score in zip(batch.ids, batch.mask, scores, strict=True):
        row = ids[mask][None]
        state = trained.hidden(REWARD, row, torch.ones_like(row, dtype=torch.bool))[0, -1]
        assert score.item() == pytest.approx((trained.heads[REWARD].weight @ state).item(), abs=1e-4)


def test_two_adapters_keep_their_own_weights_and_the_first_is_the_one_that_ppo_knows(
    sources: Sources, reward_folder: tuple[Path, SharedBase], make_base: Callable[..., SharedBase], tmp_path: Path
) -> None:
    other = make_base(seed=6, roles=(REWARD,))
    other.save_adapter(REWARD, tmp_path / "harmless")
    first, second = sources({"kind": "adapter"}, {"kind": "adapter", "path": str(tmp_path / "harmless")})
    assert (first.name, second.name) == ("reward_adapter", "harmless")
    assert isinstance(first, AdapterReward) and isinstance(second, AdapterReward)
    assert first.role == REWARD != second.role
    batch = answers("x", "y")
    torch.testing.assert_close(first.scores(batch), reward_folder[1].scores(REWARD, batch.ids, batch.mask, 32))
    torch.testing.assert_close(second.scores(batch), other.scores(REWARD, batch.ids, batch.mask, 32))


def test_functions_come_from_files_and_from_modules(sources: Sources, rewards_py: Path) -> None:
    found = sources(
        {"kind": "function", "path": f"{rewards_py}:length"},
        {"kind": "function", "path": f"{rewards_py}:shout", "name": "shout", "weight": "-0.5"},
        {"kind": "function", "path": "lora_rlhf.merge:merge_drift"},
    )
    assert [(s.name, s.weight) for s in found[:2]] == [("my_rewards", 1.0), ("shout", -0.5)]
    assert [s.scores(answers("HEY", "you there")).tolist() for s in found[:2]] == [[3.0, 9.0], [1.0, 0.0]]
    assert found[2].function.__name__ == "merge_drift"


@pytest.mark.parametrize(
    "path",
    [
        "no_such_module:f",
        "lora_rlhf.merge:no_such_function",
        "lora_rlhf.terminal:AGAIN",
        "no_such_file.py:f",
        "{folder}/my_rewards.py:no_such_function",
        "{folder}/my_rewards.py:LIMIT",
        "{folder}/my_rewards.py",
        "just_a_name",
        "{folder}/syntax_error.py:f",
        "{folder}/raises.py:f",
    ],
)
def test_a_function_that_cannot_be_had_is_an_error_that_names_the_entry(
    sources: Sources, rewards_py: Path, path: str
) -> None:
    rewards_py.with_name("syntax_error.py").write_text("def f(:\n")
    rewards_py.with_name("raises.py").write_text("x = undefined_name\n")
    good = {"kind": "function", "path": f"{rewards_py}:length"}
    with pytest.raises(UserError, match=r"ppo\.reward_sources\[1\]"):
        sources(good, {"kind": "function", "path": path.format(folder=rewards_py.parent), "name": "second"})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"kind": "oracle", "path": "x"}, "oracle"),
        ({"path": "x"}, "kind"),
        ({"kind": "function"}, "path is missing"),
        ({"kind": "model"}, "path is missing"),
        ({"kind": "function", "path": "x", "wieght": 2}, "wieght"),
        ({"kind": "function", "path": "m:f", "weight": "heavy"}, "heavy"),
        ({"kind": "function", "path": "{file}:shout"}, "my_rewards is there already"),
        ({"kind": "model", "path": "{file}-no-such-folder", "name": "judge"}, "no-such-folder"),
    ],
)
def test_a_wrong_entry_is_named(sources: Sources, rewards_py: Path, entry: dict[str, Any], said: str) -> None:
    entry = {k: v.format(file=rewards_py) if isinstance(v, str) else v for k, v in entry.items()}
    with pytest.raises(UserError, match=rf"ppo\.reward_sources\[1\].*{said}"):
        sources({"kind": "function", "path": f"{rewards_py}:length"}, entry)


def test_an_adapter_without_head_is_no_reward(
    sources: Sources, make_base: Callable[..., SharedBase], tmp_path: Path
) -> None:
    make_base(roles=()).save_adapter(POLICY, tmp_path / "policy")
    with pytest.raises(UserError, match=r"ppo\.reward_sources\[0\].*policy has no reward head"):
        sources({"kind": "adapter", "path": str(tmp_path / "policy")})


# -- classifiers ------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"


def write_classifier(
    folder: Path, outputs: int = 1, template: str | None = TEMPLATE, pad: str | None = "<pad>"
) -> None:
    """A random Mistral classifier with a byte tokenizer and a chat template that no other model here has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token=pad)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=len(pieces), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=outputs, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MistralForSequenceClassification(config).save_pretrained(folder)


def stock_scores(folder: Path, texts: list[str], add_special_tokens: bool) -> torch.Tensor:
    """What stock transformers gives each text by itself, without padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        rows = [tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt") for text in texts]
        return torch.cat([model.eval()(**row).logits[:, 0] for row in rows])


@pytest.mark.parametrize("pad", ["<pad>", None], ids=["with pad token", "without pad token"])
def test_a_classifier_reads_text_through_its_own_template_and_scores_as_stock_transformers_does(
    sources: Sources, tmp_path: Path, pad: str | None
) -> None:
    write_classifier(tmp_path / "judge", pad=pad)
    (source,) = sources({"kind": "model", "path": str(tmp_path / "judge"), "weight": 0.5})
    assert isinstance(source, ClassifierReward) and (source.name, source.weight) == ("judge", 0.5)
    completions = ["Yes.", "No, never, not in a thousand years.", "é漢"]
    texts = [
        f"[user] question {i}{' again' * i}</s>[assistant] {completion}</s>" for i, completion in enumerate(completions)
    ]
    expected = stock_scores(tmp_path / "judge", texts, add_special_tokens=False)
    torch.testing.assert_close(source.scores(answers(*completions)), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.01


@pytest.mark.parametrize("closes", [False, True], ids=["open", "closed by its tokenizer"])
def test_a_classifier_without_template_reads_human_and_assistant_turns_and_one_eos(
    sources: Sources, tmp_path: Path, closes: bool
) -> None:
    """trl trains on plain text with EOS after it; a tokenizer of BERT's kind closes every text by itself."""
    write_classifier(tmp_path / "judge", template=None)
    if closes:
        file = tmp_path / "judge" / "tokenizer.json"
        held = json.loads(file.read_text())
        held["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
        held["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
        file.write_text(json.dumps(held))
    (source,) = sources({"kind": "model", "path": str(tmp_path / "judge")})
    texts = ["\n\nHuman: question 0\n\nAssistant: Yes.", "\n\nHuman: question 1 again\n\nAssistant: No."]
    texts = texts if closes else [text + "</s>" for text in texts]
    expected = stock_scores(tmp_path / "judge", texts, add_special_tokens=True)
    torch.testing.assert_close(source.scores(answers("Yes.", "No.")), expected, atol=1e-4, rtol=0)


def test_a_classifier_with_two_outputs_is_no_reward_model(sources: Sources, tmp_path: Path) -> None:
    write_classifier(tmp_path / "judge", outputs=2)
    with pytest.raises(UserError, match="judge has 2 outputs"):
        sources({"kind": "model", "path": str(tmp_path / "judge")})


def test_a_classifier_beyond_the_range_of_float16_is_refused(
    make_base: Callable[..., SharedBase], make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    write_classifier(tmp_path / "judge")
    weights = load_file(tmp_path / "judge" / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, tmp_path / "judge" / "model.safetensors", metadata={"format": "pt"})
    entry = {"kind": "model", "path": str(tmp_path / "judge")}
    base = make_base()
    with pytest.raises(UserError, match=r"dtype: model\.norm\.weight of .*judge holds numbers beyond float16's 65504"):
        reward_sources(make_config(dtype="float16", ppo={"reward_sources": [entry]}), base, tmp_path)
    reward_sources(make_config(dtype="bfloat16", ppo={"reward_sources": [entry]}), base, tmp_path)


def test_the_three_kinds_add_up(
    sources: Sources, rewards_py: Path, reward_folder: tuple[Path, SharedBase], tmp_path: Path
) -> None:
    write_classifier(tmp_path / "judge")
    found = sources(
        {"kind": "adapter", "weight": 1},
        {"kind": "model", "path": str(tmp_path / "judge"), "weight": 2},
        {"kind": "function", "path": f"{rewards_py}:length", "weight": -3},
    )
    reward, batch = CombinedReward(found), answers("Yes.", "Perhaps.", "It depends on the day.")
    reward.fit(batch)
    total, raw = reward.scores(batch)
    assert list(raw) == ["reward_adapter", "judge", "my_rewards"]
    standard = {name: (scores - scores.mean()) / scores.std() for name, scores in raw.items()}
    expected = standard["reward_adapter"] + 2 * standard["judge"] - 3 * standard["my_rewards"]
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=0)
