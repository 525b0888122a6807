"""Merged weights answer as base + adapter does, within the drift that is reported, and load with plain transformers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from lora_rlhf.base import shard_files
from lora_rlhf.base.role_layers import dequantized_weight
from lora_rlhf.base.shared import POLICY, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import prompt_ids
from lora_rlhf.errors import UserError
from lora_rlhf.merge import (
    MergedWeights,
    check_room,
    merge_drift,
    model_logprobs,
    original_weights,
    policy_logprobs,
    write_merged,
)
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.ppo.rollout import Rollout, sampled_answers

SAMPLING = Sampling(response_length=8, temperature=0.7, stop_strings=("zzz",), expand_weights=False)
MEASURED = 0.7, 64, 16
"""Temperature, chunk and batch of every drift here."""
Targets = Callable[..., tuple[SharedBase, dict[str, MergedWeights]]]


@pytest.fixture
def targets(make_base: Callable[..., SharedBase], make_config: Callable[..., RunConfig]) -> Targets:
    """A base with a random policy adapter, and its merged weights by target."""

    def make(**fields: Any) -> tuple[SharedBase, dict[str, MergedWeights]]:
        config = make_config(**fields)
        base = make_base(config)
        return base, {
            "original": MergedWeights(base, original_weights(base, config)),
            "dequantized": MergedWeights(base),
        }

    return make


@pytest.fixture
def answers(tokenizer: Any) -> Callable[[SharedBase], Rollout]:
    def answered(base: SharedBase) -> Rollout:
        texts = ("How are you?", "Why?", "Go on.")
        prompts = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]
        return sampled_answers(base, POLICY, prompts, SAMPLING, tokenizer, torch.Generator().manual_seed(0))

    return answered


def drift_of(merged: MergedWeights, rollout: Rollout, **options: Any) -> float:
    trained = policy_logprobs(merged.base, rollout, *MEASURED)
    return merge_drift(merged, rollout, trained, *MEASURED, **options)


def weights_of(merged: MergedWeights) -> dict[str, torch.Tensor]:
    return {name: merged.tensor(name) for name in merged.outlines}


def adapted_layers(base: SharedBase) -> dict[str, Any]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix) + ".weight": m for n, m in base.model.named_modules() if m in base.layers.adapted}


# The weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_weight_is_the_sum_in_64_bits_rounded_once(targets: Targets, dtype: str) -> None:
    base, merged = targets(dtype=dtype)
    assert len(adapted_layers(base)) == 2 * 7
    for name, layer in adapted_layers(base).items():
        a, b, scaling = base.layers.adapted[layer].adapter(POLICY)  # type: ignore[misc]
        exact = dequantized_weight(layer.get_base_layer()).double() + scaling * b.double() @ a.double()
        weight = merged["dequantized"].tensor(name)
        assert weight.dtype == getattr(torch, dtype)
        if dtype == "bfloat16":  # rounding of the float32 sum may lie between the exact sum and a tie
            assert (weight != exact.to(weight.dtype)).float().mean() < 1e-3
        torch.testing.assert_close(weight.double(), exact, rtol=2**-8 if dtype == "bfloat16" else 1e-6, atol=1e-6)


def test_merged_weights_are_those_of_peft_within_its_rounding(
    targets: Targets, tiny_folder: Path, tmp_path: Path
) -> None:
    base, merged = targets(dtype="bfloat16")
    base.save_adapter(POLICY, tmp_path / "policy")
    for target, weights in merged.items():
        plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
        if target == "dequantized":
            with torch.no_grad():
                for name, layer in adapted_layers(base).items():
                    plain.get_parameter(name).copy_(dequantized_weight(layer.get_base_layer()))
        stock = PeftModel.from_pretrained(plain, str(tmp_path / "policy")).merge_and_unload().state_dict()
        ours = weights_of(weights)
        assert list(ours) == list(stock)
        for name, weight in ours.items():
            assert weight.dtype == stock[name].dtype == torch.bfloat16
            # PEFT rounds W, s · B A and their sum; a sum near 0 keeps what was lost of its two parts
            torch.testing.assert_close(weight, stock[name], rtol=2**-7, atol=2**-7 * stock[name].abs().max().item())
            if name not in adapted_layers(base):
                assert torch.equal(weight, stock[name])


def test_original_weights_in_32_bits_are_rounded_after_the_adapter_is_added(
    targets: Targets, tiny_folder: Path
) -> None:
    """The file holds float32; rounding it to bfloat16 first would round twice."""
    base, merged = targets(dtype="bfloat16")
    file = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).state_dict()
    for name, layer in adapted_layers(base).items():
        a, b, scaling = base.layers.adapted[layer].adapter(POLICY)  # type: ignore[misc]
        exact = (file[name].double() + scaling * b.double() @ a.double()).to(torch.bfloat16)
        assert (merged["original"].tensor(name) != exact).float().mean() < 1e-3


def test_without_4_bits_both_targets_are_the_base_with_the_adapter(targets: Targets, tiny_folder: Path) -> None:
    base, merged = targets(load_in_4bit=False)
    one, other = (weights_of(weights) for weights in merged.values())
    assert all(torch.equal(one[name], other[name]) for name in one)
    file = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    changed = {name for name in one if not torch.equal(one[name], file[name])}
    assert changed == set(adapted_layers(base))


# Drift


def test_merging_into_the_dequantized_weights_drifts_by_rounding_alone(
    targets: Targets, answers: Callable[[SharedBase], Rollout]
) -> None:
    base, merged = targets()
    rollout = answers(base)
    assert drift_of(merged["dequantized"], rollout) < 1e-5
    assert drift_of(merged["original"], rollout) > 1e-3


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("target", ["original", "dequantized"])
def test_drift_is_that_of_the_written_model_run_in_full(
    targets: Targets, answers: Callable[[SharedBase], Rollout], tokenizer: Any, tmp_path: Path, target: str,
    four_bit: bool,
) -> None:  # fmt: skip
    base, merged = targets(load_in_4bit=four_bit)
    rollout = answers(base)
    write_merged(merged[target], tokenizer, SAMPLING, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    differences = []
    with torch.no_grad():
        states = base.hidden(POLICY, rollout.ids, rollout.mask)
        ours, _ = base.response_logprobs(states, rollout.ids, rollout.action_mask, 0.7, 64)
        for i in range(3):
            prompt = rollout.query_ids[i][rollout.query_mask[i]]
            answer = rollout.response_ids[i][rollout.action_mask[i]]
            logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1] / 0.7
            theirs = torch.log_softmax(logits, -1).gather(1, answer[:, None])[:, 0]
            differences.append((ours[i][rollout.action_mask[i]] - theirs).abs())
    expected = torch.cat(differences).mean().item()
    assert drift_of(merged[target], rollout) == pytest.approx(expected, abs=2e-6)


def test_drift_does_not_depend_on_the_rows_in_one_pass(
    targets: Targets, answers: Callable[[SharedBase], Rollout]
) -> None:
    base, merged = targets()
    rollout = answers(base)
    trained = policy_logprobs(base, rollout, *MEASURED)
    one_by_one, together = (merge_drift(merged["original"], rollout, trained, 0.7, 64, n) for n in (1, 3))
    assert one_by_one == pytest.approx(together, abs=1e-6)


def test_measuring_drift_holds_one_merged_weight_at_a_time(
    targets: Targets, answers: Callable[[SharedBase], Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, merged = targets()
    rollout = answers(base)
    plain, alive = MergedWeights.linear, []

    def made(self: MergedWeights, frozen: Any) -> torch.Tensor:
        assert not [one for one in alive if one() is not None]
        weight = plain(self, frozen)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(MergedWeights, "linear", made)
    counts: list[int] = []
    drift_of(merged["original"], rollout, made=counts.append)
    assert counts == list(range(1, 2 * 7 + 1))  # two layers of seven, in one pass
    assert merged["original"].linear_count == 2 * 7


@pytest.mark.parametrize("stopped", [False, True])
def test_the_base_is_as_it_was_after_measuring(
    targets: Targets, answers: Callable[[SharedBase], Rollout], stopped: bool
) -> None:
    base, merged = targets()
    rollout = answers(base)

    def made(count: int) -> None:
        if stopped and count == 9:
            raise KeyboardInterrupt

    with torch.no_grad():
        before = {role: base.hidden(role, rollout.ids, rollout.mask) for role in (POLICY, "reward", "reference")}
        if stopped:
            with pytest.raises(KeyboardInterrupt):
                drift_of(merged["original"], rollout, made=made)
        else:
            drift_of(merged["original"], rollout, made=made)
        for role, states in before.items():
            assert torch.equal(base.hidden(role, rollout.ids, rollout.mask), states)


# The folder


def test_written_weights_load_with_plain_transformers_and_give_the_same_log_probs(
    targets: Targets, answers: Callable[[SharedBase], Rollout], tokenizer: Any, tmp_path: Path
) -> None:
    base, merged = targets()
    rollout = answers(base)
    write_merged(merged["dequantized"], tokenizer, SAMPLING, tmp_path / "merged")
    names = {p.name for p in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "config.json"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        theirs = model_logprobs(loaded, rollout, *MEASURED)
        with merged["dequantized"].in_place():
            ours = model_logprobs(base.causal_lm, rollout, *MEASURED)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    generation = loaded.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (generation.temperature, generation.max_new_tokens) == (0.7, 8)
    assert base.causal_lm.generation_config.max_new_tokens != 8  # the base samples as it did
    chat = pipeline("text-generation", model=str(tmp_path / "merged"))  # trained with stop strings, and yet no error
    assert isinstance(chat([{"role": "user", "content": "Hi"}])[0]["generated_text"][-1]["content"], str)
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.chat_template == tokenizer.chat_template and again.pad_token_id != again.eos_token_id


SHAPE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("kind", ["mistral", "mistral, tied", "qwen2", "qwen3, tied"])
def test_the_folder_holds_what_save_pretrained_would_write(
    make_base: Callable[..., SharedBase], make_config: Callable[..., RunConfig], tokenizer: Any, tmp_path: Path,
    kind: str, four_bit: bool,
) -> None:  # fmt: skip
    """Names, shapes and types: with biases, norms of queries, and embeddings that are the head too."""
    family, _, tied = kind.partition(", ")
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, tie_word_embeddings=bool(tied)))
    plain.save_pretrained(tmp_path / "base")
    config = make_config(model_name_or_path=str(tmp_path / "base"), dtype="bfloat16", load_in_4bit=four_bit)
    write_merged(MergedWeights(make_base(config)), tokenizer, SAMPLING, tmp_path / "merged")
    expected, found = (outlines(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert found == expected and ("lm_head.weight" in found) == (not tied)
    held, ours = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("base", "merged"))
    differing = {name for name in held | ours if held.get(name) != ours.get(name)}
    assert differing <= {"eos_token_id", "pad_token_id", "_name_or_path"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def outlines(file: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    from safetensors.torch import load_file

    return {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("when", ["first shard", "last shard", "tokenizer"])
def test_a_write_that_is_stopped_leaves_the_old_model_and_nothing_half(
    targets: Targets, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(shard_files, "SHARD_BYTES", 100_000)
    _, merged = targets()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "kept").touch()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def made(count: int) -> None:
        if count == {"first shard": 1, "last shard": len(merged["original"].outlines)}.get(when):
            raise KeyboardInterrupt

    if when == "tokenizer":
        monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError if when == "tokenizer" else KeyboardInterrupt):
        write_merged(merged["original"], tokenizer, SAMPLING, tmp_path / "merged", made)
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["kept"]


def test_room_is_looked_for_after_the_rest_of_a_killed_merge_is_gone(targets: Targets, tmp_path: Path) -> None:
    (tmp_path / ".merged.part").mkdir()
    (tmp_path / ".merged.part" / "model.safetensors").write_bytes(b"half")
    _, merged = targets(dtype="bfloat16")
    parameters = sum(outline.numel() for outline in merged["original"].outlines.values())
    assert merged["original"].total_bytes == 2 * parameters
    check_room(tmp_path / "merged", merged["original"].total_bytes)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="the merged model needs about"):
        check_room(tmp_path / "merged", 2**60)
