"""Merging the policy adapter into 16-bit weights, and the drift of the result from base + adapter.

Two targets. *original*: the weights as they were before quantisation; the adapter then sits on weights it never saw,
so the quantisation error comes back as drift. *dequantized*: the 4-bit weights written out in 16 bits, the very ones
the adapter was trained on; only rounding remains.

The merged model is never in memory whole: each weight is made when it is computed with or written, and dropped then.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_rlhf.base.lm_head import LmHead
from lora_rlhf.base.loading import quiet_transformers
from lora_rlhf.base.original_weights import OriginalWeights
from lora_rlhf.base.packing import batches_by_length, states_without_padding
from lora_rlhf.base.role_layers import FrozenLinear, dequantized_weight, with_adapter
from lora_rlhf.base.shard_files import write_shards
from lora_rlhf.base.shared import POLICY, REFERENCE, SharedBase
from lora_rlhf.base.token_logprobs import token_logprobs
from lora_rlhf.base.trunk import trunk_name, trunk_of
from lora_rlhf.checkpoint_folders import check_space, sync
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import ending_ids, special_ends
from lora_rlhf.ppo.rollout import Rollout, Sampling
from lora_rlhf.terminal import interrupt


def _silent(_: int) -> None:
    """Report nothing."""


class MergedWeights:
    """The weights of the plain model that base and policy adapter make together, each made when it is asked for.

    Args:
        base: holds the policy adapter.
        original: weights that take the adapter in place of the dequantised 4-bit ones; None: those.

    Attributes:
        outlines: name of each tensor in the plain model → a tensor on the meta device with its shape and dtype; tied
            ones have one name, as transformers saves them.
    """

    def __init__(self, base: SharedBase, original: OriginalWeights | None = None) -> None:
        self.base, self.original = base, original
        self._tensors = plain_tensors(base)
        self._names = {frozen: name for name, frozen in self._tensors.items() if isinstance(frozen, FrozenLinear)}
        self._adapted = {role.frozen: role for role in base.layers.adapted.values()}
        self.outlines = {
            name: torch.empty(weight_shape(held), dtype=base.compute_dtype, device="meta")
            if isinstance(held, FrozenLinear)
            else held.to("meta")
            for name, held in self._tensors.items()
        }

    @property
    def total_bytes(self) -> int:
        """What all weights take in a file."""
        return sum(outline.numel() * outline.itemsize for outline in self.outlines.values())

    @property
    def linear_count(self) -> int:
        """How many linear layers a pass through `in_place` makes weights for."""
        return len(self._names)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor of the plain model, merged where the adapter changes it, on any device."""
        held = self._tensors[name]
        return self.linear(held) if isinstance(held, FrozenLinear) else held.detach()

    def linear(self, frozen: FrozenLinear) -> torch.Tensor:
        """Return the merged weight [out, in] of a layer on the base's device: W + s · B A, rounded once."""
        if self.original is not None and frozen.is_quantized:
            weight = self.original.read(self._names[frozen]).to(self.base.device)
        else:
            weight = dequantized_weight(frozen.layer)
        role = self._adapted.get(frozen)
        if role is not None and (adapter := role.master(POLICY)) is not None:
            weight = with_adapter(weight, adapter)
        return weight.to(self.base.compute_dtype)

    @contextlib.contextmanager
    def in_place(self, made: Callable[[int], object] = _silent) -> Iterator[None]:
        """Let the base be the merged model inside the block: a layer's merged weight is there while it is computed.

        Args:
            made: is told how many weights were made so far, after each.
        """
        layers, count = self.base.layers, 0

        def product(frozen: FrozenLinear) -> Callable[..., torch.Tensor]:
            def forward(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
                nonlocal count
                interrupt.mind()
                bias = frozen.layer.bias
                y = nn.functional.linear(
                    x.to(frozen.dtype), self.linear(frozen), None if bias is None else bias.to(frozen.dtype)
                )
                count += 1
                made(count)
                return y

            return forward

        try:
            for module, frozen in layers.frozen.items():
                module.forward = product(frozen)
            for module, role in layers.adapted.items():
                module.forward = role.frozen.layer.forward
            with self.base.role(REFERENCE):
                yield
        finally:
            for module, frozen in layers.frozen.items():
                module.forward = frozen
            for module, role in layers.adapted.items():
                module.forward = role


def plain_tensors(base: SharedBase) -> dict[str, torch.Tensor | FrozenLinear]:
    """Return what a file of the plain model holds: name → tensor, or the layer whose weight has to be made."""
    found: dict[str, torch.Tensor | FrozenLinear] = {}
    seen = set()
    for path, module in base.causal_lm.named_modules():
        if ".lora_" in path:
            continue
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for leaf, tensor in {**module._parameters, **buffers}.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            name = f"{path}.{leaf}".lstrip(".").replace(".base_layer.", ".")
            frozen = base.layers.frozen.get(module) if leaf == "weight" else None
            found[name] = tensor if frozen is None else frozen
    return found


def weight_shape(frozen: FrozenLinear) -> torch.Size:
    """Return the shape [out, in] of a linear layer's weight, which 4 bits hold packed."""
    return torch.Size((frozen.layer.out_features, frozen.layer.in_features))


def original_weights(base: SharedBase, config: RunConfig) -> OriginalWeights:
    """Return the weights of the base's 4-bit layers as they were before, ready to be read.

    Raises:
        NoOriginalWeights: the base's files hold them in 4 bits too.
        UserError: the files cannot be read.
    """
    quantized = {
        name: weight_shape(held)
        for name, held in plain_tensors(base).items()
        if isinstance(held, FrozenLinear) and held.is_quantized
    }
    return OriginalWeights(config, quantized, trunk_name(base.causal_lm))


@torch.no_grad()
def policy_logprobs(
    base: SharedBase, rollout: Rollout, temperature: float, chunk: int | None, batch: int
) -> torch.Tensor:
    """Return the log-probs [answers, R] of base + adapter, float32, 0 where masked; arguments as `merge_drift`."""
    with base.role(POLICY), base.autocast():
        return model_logprobs(base.causal_lm, rollout, temperature, chunk, batch)


@torch.no_grad()
def merge_drift(
    merged: MergedWeights,
    rollout: Rollout,
    trained: torch.Tensor,
    temperature: float,
    chunk: int | None,
    batch: int,
    made: Callable[[int], object] = _silent,
) -> float:
    """Return mean |log p_merged − log p_base+adapter| in nats over the answer tokens of `rollout`.

    Args:
        merged: the weights to measure.
        rollout: prompts and answers.
        trained: [answers, R] `policy_logprobs` of the rollout.
        temperature: divides the logits.
        chunk: tokens whose logits exist at one time; None: as many as take 16 MiB in float32.
        batch: rows in one pass; every pass makes all merged weights once.
        made: is told how many weights were made so far, after each.
    """
    with merged.in_place(made), merged.base.autocast():
        logprobs = model_logprobs(merged.base.causal_lm, rollout, temperature, chunk, batch)
    return (trained - logprobs)[rollout.action_mask.to(trained.device)].abs().mean().item()


def model_logprobs(
    model: Any, rollout: Rollout, temperature: float, chunk: int | None, batch: int = 16
) -> torch.Tensor:
    """Return the log-probs [answers, R] that any causal language model gives to `rollout`, `batch` rows at a time."""
    trunk, head = trunk_of(model), LmHead.of(model)
    device = head.weight.device
    ids, mask, action = rollout.ids.to(device), rollout.mask.to(device), rollout.action_mask.to(device)
    width = action.shape[1]
    logprobs = torch.zeros(action.shape, device=device)
    for rows in batches_by_length(mask, torch.arange(len(ids), device=device), batch):
        real, answer = action[rows], ids[rows, -width:]
        before = states_without_padding(trunk, ids[rows], mask[rows])[:, -width - 1 : -1][real]
        flat, _ = token_logprobs(before, head, answer[real], temperature, chunk)
        logprobs[rows] = torch.zeros(real.shape, device=device).masked_scatter(real, flat)
    return logprobs


def set_generation(generation: Any, model: Any, tokenizer: Any, sampling: Sampling) -> None:
    """Let `generate` of a plain model sample as training did, and end at the tokens that ended answers there.

    It goes on to end at those special tokens at which the model ended before, too. Stop strings stay out: `generate`
    refuses them without a tokenizer, and pipelines pass it none.

    Args:
        generation: the model's GenerationConfig, which is changed.
        model: the model's PretrainedConfig, which is changed.
        tokenizer: of the run.
        sampling: of the run.
    """
    ends = list(dict.fromkeys([*ending_ids(tokenizer), *special_ends(tokenizer, generation.eos_token_id)]))
    generation.eos_token_id = ends if len(ends) > 1 else tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id
    generation.do_sample, generation.temperature, generation.top_k, generation.top_p = (
        True,
        sampling.temperature,
        0,
        1.0,
    )
    generation.max_new_tokens = sampling.response_length
    model.eos_token_id, model.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id


def check_room(folder: Path, size: int) -> None:
    """Delete what an interrupted merge left beside `folder`; raise `UserError` where the disk has less than `size`."""
    shutil.rmtree(_unfinished(folder), ignore_errors=True)
    check_space(folder.parent, size, "the merged model")


def write_merged(
    merged: MergedWeights, tokenizer: Any, sampling: Sampling, folder: Path, made: Callable[[int], object] = _silent
) -> None:
    """Write weights (safetensors), tokenizer, chat template and generation config, whole or not at all.

    Where the run had stop strings, a README.md says how to pass them to `generate`.

    Args:
        merged: the weights.
        tokenizer: of the run.
        sampling: of the run; what `generate` does by default.
        folder: to write; what it held goes when all is written.
        made: is told how many tensors were made so far, after each.
    """
    causal_lm = merged.base.causal_lm
    config, generation = copy.deepcopy(causal_lm.config), copy.deepcopy(causal_lm.generation_config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype, config.architectures = merged.base.compute_dtype, [type(causal_lm).__name__]
    set_generation(generation, config, tokenizer, sampling)

    def tensor(name: str) -> torch.Tensor:
        interrupt.mind()
        return merged.tensor(name)

    half = _unfinished(folder)
    shutil.rmtree(half, ignore_errors=True)
    try:
        half.mkdir()
        write_shards(merged.outlines, tensor, half, made)
        with quiet_transformers():
            config.save_pretrained(half)
            generation.save_pretrained(half)
        tokenizer.save_pretrained(half)
        if sampling.stop_strings:
            (half / "README.md").write_text(stop_strings_readme(sampling.stop_strings), encoding="utf-8")
        for file in half.iterdir():
            sync(file)
    except BaseException:  # Ctrl-C too: what is half does not take up the disk until the next try
        shutil.rmtree(half, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)


def stop_strings_readme(stop_strings: Sequence[str]) -> str:
    """Return the text, in Markdown, that tells a user of the merged model which stop strings it was trained with."""
    return f"""In training, an answer ended at EOS or before the first of some stop strings. One that does not end with
EOS runs on with the next turn, unless `generate` is given the stop strings, and the tokenizer to look for them with; a
generation config alone cannot do that:

```python
stop_strings = {json.dumps(list(stop_strings), ensure_ascii=False)}
model.generate(**prompt, stop_strings=stop_strings, tokenizer=tokenizer)
pipeline("text-generation", model=folder)(messages, stop_strings=stop_strings, tokenizer=tokenizer)
```

The stop string itself is then at the end of what is returned: cut it off.
"""


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")
