"""A PPO trainer whose weights are shapes on torch's meta device: it takes no memory and computes no numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_rlhf.base import attention as attention_module
from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.devices import AMPERE
from lora_rlhf.base.known_shapes import shape_config
from lora_rlhf.base.prequantized import is_quantized
from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.data.preferences import PreferencePair
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.reward.sources import AdapterReward, CombinedReward, ScoreScale
from lora_rlhf.roofline.cards import Card
from lora_rlhf.roofline.operations import META

QUANTISED_PER_SCALE, SCALES_PER_SCALE = 64, 256
"""NF4 with double quantisation: weights that share an 8-bit scale, and scales that share a float32 one."""


class NoText:
    """A tokenizer that the counted code asks for nothing but these: no answer ends, and each token is no text."""

    pad_token_id, eos_token_id, chat_template = 0, -1, None

    def decode(self, ids: list[int], **_: Any) -> str:
        """Return no text, so that no stop string is found."""
        return ""


class ShapesBase(SharedBase):
    """A shared base on the meta device, for which torch has no autocast; the lean layers cast by themselves."""

    def autocast(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Return a context that changes nothing."""
        return contextlib.nullcontext()

    def head_outputs(self, role: str, states: torch.Tensor) -> torch.Tensor:
        """Return what `SharedBase.head_outputs` returns."""
        return self.heads[role](states.float())[..., 0]


def shapes_trainer(config: RunConfig) -> PpoTrainer:
    """Return a trainer of the run's shape with all of its roles; to be made and used inside an `OperationCounter`."""
    with META:
        causal_lm = _causal_lm(config)
        base = ShapesBase(causal_lm, lora_config(config.lora), getattr(torch, config.dtype))
        base.new_adapter(REWARD, lora_config(config.lora), trainable=False)
        source = AdapterReward(base, batch=config.ppo.scoring_batch_size)
        reward = CombinedReward([source], {source.name: ScoreScale()})
        pairs: list[PreferencePair] = []
        settings = replace(config.ppo, optim="adam")  # the other one cannot be made without a card
        return PpoTrainer(base, NoText(), pairs, reward, settings, config.seed)


def _causal_lm(config: RunConfig) -> Any:
    from transformers import AutoModelForCausalLM

    found = shape_config(config)
    found._attn_implementation = "sdpa"
    dtype = getattr(torch, config.dtype)
    model = AutoModelForCausalLM.from_config(found, dtype=dtype, trust_remote_code=False).eval()
    if config.load_in_4bit:
        published = getattr(found, "quantization_config", None)
        for path, child in list(model.named_modules()):
            if isinstance(child, nn.Linear) and is_quantized(published, path):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, _in_4_bits(child, dtype))
        model.is_loaded_in_4bit = model.is_quantized = True
    return model


def _in_4_bits(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Return bitsandbytes' layer of the shape of `layer`, quantised twice, without numbers."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    def shape(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=META)

    weights = layer.out_features * layer.in_features
    scales = -(-weights // QUANTISED_PER_SCALE)
    of_scales = QuantState(
        absmax=shape(-(-scales // SCALES_PER_SCALE), dtype=torch.float32),
        code=shape(256, dtype=torch.float32), blocksize=SCALES_PER_SCALE, dtype=torch.float32,
    )  # fmt: skip
    state = QuantState(
        absmax=shape(scales, dtype=torch.uint8), shape=torch.Size((layer.out_features, layer.in_features)),
        code=shape(16, dtype=torch.float32), blocksize=QUANTISED_PER_SCALE, quant_type="nf4", dtype=dtype,
        offset=torch.empty((), device=META), state2=of_scales,
    )  # fmt: skip
    quantised = Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype)
    packed = shape(weights // 2, 1, dtype=torch.uint8)
    quantised.weight = Params4bit(packed, quant_state=state, quant_type="nf4", bnb_quantized=True)
    quantised.bias, quantised.compute_type_is_set = layer.bias, True
    return quantised


@contextlib.contextmanager
def fused_attention(card: Card) -> Iterator[None]:
    """Let torch's attention be the kernel that it picks on a card; on the meta device it would pick the plain products.

    That is flash attention from Ampere on, and the memory-efficient one before it or where there is a mask.
    """
    has_flash = card.capability >= AMPERE

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if attn_mask is None and has_flash:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, 0.0, is_causal, False, scale=scale)[0]
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        if attn_mask is None:
            return efficient(query, key, value, None, query.requires_grad, 0.0, is_causal, scale=scale)[0]
        bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        bias = bias.masked_fill_(attn_mask.logical_not(), -torch.inf)
        bias = nn.functional.pad(bias, (0, -bias.shape[-1] % 8))[..., : bias.shape[-1]]  # the kernel wants it aligned
        bias = bias.expand(-1, query.shape[1], -1, -1)
        return efficient(query, key, value, bias, query.requires_grad, 0.0, is_causal, scale=scale)[0]

    with (
        _replaced(nn.functional, "scaled_dot_product_attention", attention),
        _replaced(attention_module, "fused_with_shared_keys", lambda _: has_flash),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `owner.name` be `value` inside the block."""
    had = hasattr(owner, name)
    before = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def fused_4bit(card: Card) -> Any:
    """Return bitsandbytes' own choice for a card: whether a product reads 4-bit weights without dequantising them.

    Its rule stands in the CUDA half of the package, which a torch without CUDA cannot import as it is.
    """
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0)
    with _replaced(torch._C, "_cuda_getCurrentRawStream", stream):
        from bitsandbytes.backends.cuda import ops

    def chosen(dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> bool:
        if rows > ops._gemm_4bit_custom_max_m or inputs % QUANTISED_PER_SCALE:
            return False
        properties = (card.multiprocessors, *card.capability)
        with _replaced(ops, "_gpu_dispatch_props", lambda _: properties):
            return ops._gemm_4bit_use_custom_cuda.__wrapped__(0, dtype, rows, outputs, inputs)

    return chosen
