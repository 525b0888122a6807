"""Part 3: milliseconds per decoded token, one thing changed at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from card_parts.bench import NO_CARD, Bench, Figures
from card_parts.models import config_of_size, mixed_prompts, random_causal_lm, shared_base, step_config
from card_parts.ppo import MAIN, decoding_floor, planned_shape
from lora_rlhf.base.attention import GROUPED
from lora_rlhf.base.shared import POLICY, SharedBase
from lora_rlhf.ppo.decoding import Sampling, decoder_of
from lora_rlhf.ppo.rollout import model_answers

ROUNDS = 2
"""How often each setting is timed; the least counts."""


@dataclass(frozen=True)
class Setting:
    """How a token is decoded.

    Attributes:
        padded: whether prompts differ in length.
        stop_strings: whether they are looked for.
        attention: torch's own, or grouped.
        adapter: read in float32 for each product, cast once, or folded into a 16-bit copy of the weights.
        fused: whether bitsandbytes' fused kernel is forced, forbidden, or left to it (None).
    """

    padded: bool = True
    stop_strings: bool = True
    attention: str = "sdpa"
    adapter: str = "as it is"
    fused: bool | None = None


PLAIN = Setting()
SETTINGS = {
    "padded, stop strings, torch's attention, adapter as it is": PLAIN,
    "no padding": replace(PLAIN, padded=False),
    "no stop strings": replace(PLAIN, stop_strings=False),
    "grouped attention": replace(PLAIN, attention=GROUPED),
    "adapter cast once": replace(PLAIN, adapter="cast"),
    "adapter folded into a 16-bit copy": replace(PLAIN, adapter="folded"),
    "fused 4-bit kernel forced": replace(PLAIN, fused=True),
    "fused 4-bit kernel forbidden": replace(PLAIN, fused=False),
    "grouped attention, adapter cast once": replace(PLAIN, attention=GROUPED, adapter="cast"),
    "grouped attention, adapter cast once, fused kernel forced": Setting(attention=GROUPED, adapter="cast", fused=True),
}


class Missing(Exception):
    """What a setting asks for is not there; the text says what."""


def decode(bench: Bench) -> Iterator[tuple[str, Figures]]:
    """Yield milliseconds per token of each setting after each round; the settings are interleaved over the rounds."""
    rows, context, tokens = bench.size.decoded
    config = step_config(bench, MAIN, bench.cap_gib)
    _ = bench.rates  # measured while no model stands
    base = policy_base(bench, random_causal_lm(bench, config_of_size(bench)))
    floor = 1e3 * decoding_floor(planned_shape(bench), bench.rates, rows, context)
    yield "shape", {"rows": rows, "context": context, "tokens": tokens, "floor_ms": floor}
    took: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for number in range(ROUNDS):
        for name, setting in SETTINGS.items():
            if number > len(took[name]):  # it could not be measured in the first round
                continue
            result = bench.attempt(partial(milliseconds, bench, base, setting, config.ppo.stop_strings), seconds=4)
            if "ms" in result:
                took[name].append(result["ms"])
                least = min(took[name])
                yield name, {"ms_per_token": least, "all_ms": list(took[name]), "share_of_floor": floor / least}
            elif number == 0:
                yield name, result


def policy_base(bench: Bench, causal_lm: Any) -> SharedBase:
    """Return a shared base on a model, with a policy adapter that is not zero."""
    base = shared_base(step_config(bench, MAIN, bench.cap_gib), causal_lm)
    with torch.no_grad():
        for parameter in base.parameters(POLICY):
            parameter.normal_(std=0.01)
    return base


def milliseconds(bench: Bench, base: SharedBase, setting: Setting, stop_strings: list[str]) -> Figures:
    """Return the mean milliseconds between the second token and the last; or in words why there are none."""
    rows, context, tokens = bench.size.decoded
    prompts = mixed_prompts(bench, context)[:rows]
    for prompt in prompts[: 1 if setting.padded else rows]:  # one at least is as long as the context
        prompt[:] = (prompt * context)[:context]
    sampling = Sampling(tokens, 1.0, tuple(stop_strings) if setting.stop_strings else ())
    clock = TokenClock(bench, tokens)
    with ExitStack() as played:
        try:
            for context_manager in contexts(bench, base, setting):
                played.enter_context(context_manager)
        except Missing as missing:
            return {"not_measured": str(missing)}
        played.enter_context(clock.running(base))
        decoder, generator = decoder_of(base.causal_lm), torch.Generator().manual_seed(0)
        autocast = None if setting.adapter == "folded" else base.autocast()
        model_answers(decoder, prompts, sampling, bench.tokenizer, generator, autocast)
    return {"ms": clock.milliseconds()}


class TokenClock:
    """When the trunk began each token; the device has done what came before the second one, and before the last."""

    def __init__(self, bench: Bench, tokens: int) -> None:
        self.bench, self.tokens, self.began = bench, tokens, list[float]()

    @contextlib.contextmanager
    def running(self, base: SharedBase) -> Iterator[None]:
        """Note the time inside the block."""
        handle = base.trunk.register_forward_pre_hook(self._note)
        try:
            yield
        finally:
            handle.remove()

    def _note(self, *_: Any) -> None:
        if len(self.began) in (1, self.tokens - 1):
            self.bench.synchronize()
        self.began.append(time.perf_counter())

    def milliseconds(self) -> float:
        """Return the mean time of a token; the prompts and the first token do not count."""
        return 1e3 * (self.began[-1] - self.began[1]) / (len(self.began) - 2)


def contexts(bench: Bench, base: SharedBase, setting: Setting) -> Iterator[AbstractContextManager[Any]]:
    """Yield what has to be entered so that tokens are decoded as the setting says.

    Raises:
        Missing: something that it takes is not there.
    """
    folded = setting.adapter == "folded"
    yield bench.held_to(None if folded else bench.cap_gib)  # the copy is for cards that have room for it
    yield attention_set(base, setting.attention)
    if setting.fused is not None:
        yield fused_kernel(bench, setting.fused)
    if folded:
        yield base.expanded(POLICY)
        return
    yield base.role(POLICY)
    if setting.adapter == "cast":
        cast: Callable[[str], AbstractContextManager[None]] | None = getattr(base.layers, "adapters_cast", None)
        if cast is None:
            raise Missing("SharedBase.layers has no adapters_cast")
        yield cast(POLICY)


@contextlib.contextmanager
def attention_set(base: SharedBase, name: str) -> Iterator[None]:
    """Use an attention inside the block.

    Raises:
        Missing: there is none of that name.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name != "sdpa" and name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise Missing(f"no attention is registered as {name} on this device")
    before = base.causal_lm.config._attn_implementation
    base.causal_lm.set_attn_implementation(name)
    try:
        yield
    finally:
        base.causal_lm.set_attn_implementation(before)


@contextlib.contextmanager
def fused_kernel(bench: Bench, used: bool) -> Iterator[None]:
    """Let bitsandbytes' fused 4-bit product be used inside the block wherever it can be, or nowhere.

    For more than `most_fused_rows` it has none, and dequantises first.

    Raises:
        Missing: there is no card, or this version chooses by another name.
    """
    if not bench.on_card:
        raise Missing(NO_CARD)
    from bitsandbytes.backends.cuda import ops

    chooser = "_gemm_4bit_use_custom_fn"
    if not hasattr(ops, chooser):
        raise Missing(f"this bitsandbytes has no {chooser}")
    before = getattr(ops, chooser)
    setattr(ops, chooser, lambda *_: used)
    try:
        yield
    finally:
        setattr(ops, chooser, before)


def most_fused_rows() -> int:
    """Return the most rows for which bitsandbytes has a fused product; on CUDA."""
    from bitsandbytes.backends.cuda import ops

    return getattr(ops, "_gemm_4bit_custom_max_m", 1536)
