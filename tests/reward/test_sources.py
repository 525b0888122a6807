"""Reward sources: adapters, classifiers and functions, how they add up, and what is said when one is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_answers import answers, numbers
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForSequenceClassification, PreTrainedTokenizerFast

from lora_rlhf.base.shared import POLICY, REWARD, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.reward.sources import (
    AdapterReward,
    ClassifierReward,
    CombinedReward,
    FunctionReward,
    RewardSource,
    reward_sources,
)

Sources = Callable[..., list[RewardSource]]


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
