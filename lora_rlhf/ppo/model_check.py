"""Whether a loaded model computes on the shared base what it computes on its own: found out before any work is done.

The base, with its own weights, dtype, 4-bit kernels and device, is checked against the logits that it gave before it
was shared, within what rounding alone can do to them. In 16 bits that finds a layer that is left out, or logits that
are 5 % too large. An error that moves less than rounding does, or that moves few tokens alone, is left to the
check of the architecture (`lora_rlhf.ppo.architecture_check`), where every token counts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.prequantized import BASE_SETTING
from lora_rlhf.base.shared import POLICY, REFERENCE, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError, first_line
from lora_rlhf.memory_peak import ran_out
from lora_rlhf.ppo.readings import (
    EVAL,
    GRADIENTS,
    MIXED,
    MIXED_DECODED,
    SCORES,
    Rows,
    difference,
    halve_policy,
    own_logprobs_at_once,
    random_policy,
    rounded_once_more,
    sample_rows,
    shared_differences,
    shared_logprobs,
)

LIMIT = 1e-4
"""Nats by which log-probs in float32 may differ, and the share of the largest by which gradients may."""
NOISE_FACTOR = 3
"""How many times what one more rounding of every layer's output does a base in 16 or 4 bits may be off: from what the
model itself gave, and in one of our ways of reading it from another."""
POLICIES = 4
"""How many random policies are tried, each smaller, where numbers are not finite."""


def loaded_base(
    config: RunConfig,
    name: str | None = None,
    setting: str = BASE_SETTING,
    mixed: bool | None = None,
    check: bool = True,
) -> SharedBase:
    """Return a model as a shared base with a fresh policy adapter, checked against its own logits.

    Args:
        config: the run's; its seed is that of the adapter.
        name: another model than the run's base.
        setting: that names the model, for errors.
        mixed: whether several roles are played in one pass; None means as `ppo.mixed_adapter_scoring` says.
        check: whether to check it; false where the same model passed in this process.

    Raises:
        UserError: it cannot be loaded or shared, or computes otherwise when it is shared.
    """
    torch.manual_seed(config.seed)
    causal_lm = load_causal_lm(config, name, setting)
    dtype = getattr(torch, config.dtype)
    # unsloth's kernels are others: it has a check of its own at loading
    if not check or hasattr(causal_lm, "for_inference"):
        return SharedBase(causal_lm, lora_config(config.lora), dtype)
    with random_state_kept(causal_lm.device):
        own = OwnReading.of(causal_lm, dtype, setting)
    base = SharedBase(causal_lm, lora_config(config.lora), dtype)
    config_decides = mixed is None
    check_base(base, own, config.ppo.mixed_adapter_scoring if mixed is None else mixed, setting, config_decides)
    return base


@dataclass(frozen=True)
class OwnReading:
    """What a model says of a few tokens before it is shared.

    Attributes:
        rows: of token ids.
        logprobs: of each row's tokens but the first.
        noise: nats by which one more rounding of every layer's output moves them (`Difference.typical`).
    """

    rows: Rows
    logprobs: list[torch.Tensor]
    noise: float

    @property
    def limit(self) -> float:
        """The nats by which a reading of the shared base may be off."""
        return LIMIT + NOISE_FACTOR * self.noise

    @classmethod
    def of(cls, causal_lm: Any, dtype: torch.dtype, setting: str = BASE_SETTING) -> OwnReading:
        """Read a model that nothing was done to, as it is and with its outputs rounded once more.

        What a dtype's rounding does to log-probs depends on the model: its depth, its width, what it amplifies. So it
        is measured on the model itself. Two right ways to compute the same layers differ by several roundings each
        (another kernel, another order of sums, the residual stream in another dtype), a wrong one by far more.

        Raises:
            UserError: the model's own log-probs are not finite in this dtype.
        """
        rows = sample_rows(causal_lm.get_input_embeddings().weight.shape[0])
        logprobs = own_logprobs_at_once(causal_lm, rows)
        with rounded_once_more(causal_lm, dtype):
            noise = difference("rounding", own_logprobs_at_once(causal_lm, rows), logprobs).typical
        if not math.isfinite(noise):
            raise UserError(_not_finite(causal_lm.config, dtype, setting))
        return cls(rows, logprobs, noise)


def _not_finite(hf_config: Any, dtype: torch.dtype, setting: str) -> str:
    advice = f"{setting}: its weights are damaged, or transformers cannot run it: choose another model"
    if dtype == torch.float16:
        advice = "set dtype: float32, or use a card that has bfloat16"
    name = str(dtype).removeprefix("torch.")
    return f"dtype: {model_name(hf_config)} gives logits that are not finite in {name}: {advice}"


def check_base(
    base: SharedBase, own: OwnReading, mixed: bool, setting: str = BASE_SETTING, config_decides: bool = True
) -> None:
    """Check a shared base against what its model said before; it is left as it was found.

    The reference must say what the model said. The policy, with random weights for the while, must say the same in
    every way in which it is read.

    Args:
        base: freshly made.
        own: of the same model, before.
        mixed: whether several roles are played in one pass.
        setting: that names the model, for errors.
        config_decides: whether `mixed` is as `ppo.mixed_adapter_scoring` says.

    Raises:
        UserError: it computes otherwise than the model did.
    """
    hf_config = base.causal_lm.config

    @torch.no_grad()
    def read(role: str, rows: Rows) -> list[torch.Tensor]:
        return shared_logprobs(base, role, rows)

    explained = explained_for(hf_config, "cannot be run as PPO runs it", setting)
    with random_state_kept(base.device), random_policy(base), explained:
        for _ in range(POLICIES):
            right = {role: read(role, own.rows) for role in (REFERENCE, POLICY)}
            differences = [difference(EVAL, right[REFERENCE], own.logprobs)]
            differences += shared_differences(base, own.rows, right, read, mixed)
            if all(math.isfinite(one.largest) for one in differences):
                break
            halve_policy(base)
    for one in differences:
        if not one.typical <= own.limit:
            raise UserError(words(hf_config, one.reading, one.typical, own.limit, setting, config_decides))


def random_state_kept(device: torch.device) -> Any:
    """Return a context that leaves the global random state, and that of a card, as it was."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def explained_for(hf_config: Any, what: str, setting: str = BASE_SETTING) -> Iterator[None]:
    """Put what is raised inside the block, by code that is not made for this model, into words."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if of_the_machine(error):
            raise
        raise UserError(
            f"{setting}: {model_name(hf_config)} {what} ({type(error).__name__}: {first_line(error)[:200]}): choose "
            "another model (this may be a fault of this package: please report it)"
        ) from error


def of_the_machine(error: Exception) -> bool:
    """Return whether an error says nothing about the model: memory ran out, or the card does not work."""
    return ran_out(error) or isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def model_name(hf_config: Any) -> str:
    """Return what a model is called in an error: its name, where it has one, and its architecture."""
    own = str(getattr(hf_config, "_name_or_path", "") or "")
    return f"{own} ({hf_config.model_type})" if own else f"a model of the architecture {hf_config.model_type}"


def words(
    hf_config: Any, reading: str, off: float, limit: float, setting: str = BASE_SETTING, config_decides: bool = True
) -> str:
    """Return what is said of a model that is off by more than `limit` in a reading.

    Args:
        hf_config: transformers' config of the model.
        reading: which way of reading it, in words.
        off: by how much.
        limit: by how much it may be.
        setting: that names the model.
        config_decides: whether the config decides on playing several roles in one pass.
    """
    unit = "of the largest" if reading == GRADIENTS else "nats" if reading != SCORES else "points"
    advice = "choose another model"
    if reading in (MIXED, MIXED_DECODED) and config_decides:
        advice = "set ppo.mixed_adapter_scoring: false, or choose another model"
    return (
        f"{setting}: {model_name(hf_config)} does not give on the shared base what transformers gives: {reading} off "
        f"by {off:.2g} {unit}, where rounding explains {limit:.1g}. PPO would learn from wrong numbers: {advice}"
    )
