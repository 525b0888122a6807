"""Merged weights answer as base + adapter does, within the drift that is reported, and load with plain transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from lora_rlhf.base.shared import POLICY
from lora_rlhf.data.chat import prompt_ids
from lora_rlhf.merge import dequantized_layers, merge_drift, merged_model, model_logprobs, write_merged
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.ppo.rollout import sampled_answers

SAMPLING = Sampling(response_length=8, temperature=0.7, stop_strings=("zzz",), expand_weights=False)


@pytest.fixture
def trained(make_base, make_config, tokenizer, tmp_path):
    """A base with a policy adapter, that adapter's folder, the config, and answers of the policy."""
    config, base = make_config(), make_base()
    base.save_adapter(POLICY, tmp_path / "policy")
    prompts = [
        prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in ("How are you?", "Why?", "Go on.")
    ]
    rollout = sampled_answers(base, POLICY, prompts, SAMPLING, tokenizer, torch.Generator().manual_seed(0))
    return base, tmp_path / "policy", config, rollout


def test_merging_into_the_dequantized_weights_drifts_by_rounding_alone(trained):
    base, adapter, config, rollout = trained
    model = merged_model(config, adapter, dequantized_layers(base))
    assert merge_drift(base, model, rollout, 0.7, chunk=64) < 1e-4


def test_merging_into_the_original_weights_brings_the_quantisation_error_back(trained):
    base, adapter, config, rollout = trained
    model = merged_model(config, adapter, None)
    assert merge_drift(base, model, rollout, 0.7, chunk=64) > 1e-3


def test_drift_is_the_mean_absolute_difference_over_answer_tokens(trained):
    base, adapter, config, rollout = trained
    model = merged_model(config, adapter, None)
    differences = []
    with torch.no_grad():
        states = base.hidden(POLICY, rollout.ids, rollout.mask)
        ours, _ = base.response_logprobs(states, rollout.ids, rollout.action_mask, 0.7, 64)
        for i in range(3):
            prompt, answer = (
                rollout.query_ids[i][rollout.query_mask[i]],
                rollout.response_ids[i][rollout.action_mask[i]],
            )
            logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1] / 0.7
            theirs = torch.log_softmax(logits, -1).gather(1, answer[:, None])[:, 0]
            differences.append((ours[i][rollout.action_mask[i]] - theirs).abs())
    expected = torch.cat(differences).mean().item()
    assert merge_drift(base, model, rollout, 0.7, chunk=64) == pytest.approx(expected, rel=1e-3)


def test_written_weights_load_with_plain_transformers_and_give_the_same_log_probs(trained, tokenizer, tmp_path):
    base, adapter, config, rollout = trained
    model = merged_model(config, adapter, dequantized_layers(base))
    write_merged(model, tokenizer, SAMPLING, tmp_path / "merged")
    names = {p.name for p in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "config.json"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        before, after = (model_logprobs(m, rollout, 0.7, 64) for m in (model, loaded))
    assert torch.equal(before, after)
    generation = loaded.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (generation.temperature, generation.max_new_tokens) == (0.7, 8)
    chat = pipeline("text-generation", model=str(tmp_path / "merged"))  # trained with stop strings, and yet no error
    assert isinstance(chat([{"role": "user", "content": "Hi"}])[0]["generated_text"][-1]["content"], str)
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.chat_template == tokenizer.chat_template and again.pad_token_id != again.eos_token_id


def test_a_failed_write_leaves_the_old_merged_model_alone(trained, tokenizer, tmp_path, monkeypatch):
    base, adapter, config, _ = trained
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "kept").touch()
    model = merged_model(config, adapter, dequantized_layers(base))

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_merged(model, tokenizer, SAMPLING, tmp_path / "merged")
    assert (tmp_path / "merged" / "kept").exists()
