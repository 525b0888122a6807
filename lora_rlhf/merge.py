"""Merging the policy adapter into 16-bit weights, and the drift of the result from base + adapter.

Two targets. *original*: the weights as they were before quantisation; the adapter then sits on weights it never saw,
so the quantisation error comes back as drift. *dequantized*: the 4-bit weights written out in 16 bits, the very ones
the adapter was trained on; only rounding remains.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from lora_rlhf.base.loading import load_original_weights, quiet_transformers
from lora_rlhf.base.packing import batches_by_length, states_without_padding
from lora_rlhf.base.role_layers import dequantized_weight
from lora_rlhf.base.shared import POLICY, SharedBase
from lora_rlhf.base.token_logprobs import token_logprobs
from lora_rlhf.config import RunConfig
from lora_rlhf.ppo.rollout import Rollout, Sampling

TARGETS = ("original", "dequantized")


def dequantized_layers(base: SharedBase) -> dict[str, torch.Tensor]:
    """Return the weight of every quantised layer, by its name in the plain model, dequantised, on the CPU."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix).removesuffix(".base_layer"): dequantized_weight(module).to("cpu", base.compute_dtype)
        for name, module in base.model.named_modules()
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None
        and not isinstance(module, LoraLayer)
    }


def merged_model(config: RunConfig, adapter: Path, dequantized: dict[str, torch.Tensor] | None) -> Any:
    """Return the plain 16-bit model with the adapter merged in, on the CPU.

    Args:
        config: names the base.
        adapter: folder of the policy adapter.
        dequantized: weights that replace the original ones first; none: the original ones take the adapter.
    """
    model = load_original_weights(config)
    if dequantized is not None:
        with torch.no_grad():
            for name, weight in dequantized.items():
                model.get_submodule(name).weight.copy_(weight)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)


def merge_drift(base: SharedBase, model: Any, rollout: Rollout, temperature: float, chunk: int | None) -> float:
    """Return mean |log p_merged − log p_base+adapter| in nats over the answer tokens of `rollout`."""
    with torch.no_grad():
        states = base.hidden(POLICY, rollout.ids, rollout.mask)
        trained, _ = base.response_logprobs(states, rollout.ids, rollout.action_mask, temperature, chunk)
        merged = model_logprobs(model, rollout, temperature, chunk)
    return (trained.cpu() - merged.cpu())[rollout.action_mask.cpu()].abs().mean().item()


def model_logprobs(
    model: Any, rollout: Rollout, temperature: float, chunk: int | None, batch: int = 16
) -> torch.Tensor:
    """Return the log-probs [answers, R] that any causal language model gives to `rollout`, `batch` rows at a time."""
    trunk, head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
    device = head.weight.device
    ids, mask, action = rollout.ids.to(device), rollout.mask.to(device), rollout.action_mask.to(device)
    width = action.shape[1]
    logprobs = torch.zeros(action.shape, device=device)
    for rows in batches_by_length(mask, torch.arange(len(ids), device=device), batch):
        real, answer = action[rows], ids[rows, -width:]
        before = states_without_padding(trunk, ids[rows], mask[rows])[:, -width - 1 : -1][real]
        flat, _ = token_logprobs(before.to(head.weight.dtype), head.weight, answer[real], temperature, chunk)
        logprobs[rows] = torch.zeros(real.shape, device=device).masked_scatter(real, flat)
    return logprobs


def set_generation(model: Any, tokenizer: Any, sampling: Sampling) -> None:
    """Let `generate` of a plain model sample as training did, and end where the tokenizer's answers end."""
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id
    generation.do_sample, generation.temperature, generation.top_k, generation.top_p = (
        True,
        sampling.temperature,
        0,
        1.0,
    )
    generation.max_new_tokens = sampling.response_length
    # stop strings stay out: `generate` refuses them without a tokenizer, and pipelines pass it none
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id


def write_merged(model: Any, tokenizer: Any, sampling: Sampling, folder: Path) -> None:
    """Write weights (safetensors), tokenizer, chat template and generation config, whole or not at all."""
    set_generation(model, tokenizer, sampling)
    half = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(half)
    tokenizer.save_pretrained(half)
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)
