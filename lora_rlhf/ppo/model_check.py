"""Whether a model computes on the shared base what it computes on its own: found out before any work is done.

Two checks. The *architecture* is checked on a small twin (`lora_rlhf.base.small_twin`), on the CPU in float32, against
transformers and PEFT as they are: every way of reading the base, gradients, and the way of a reward adapter from its
training into the base. It takes a second and needs the model's config alone, so that no stage begins on a model with
which a later one must fail. The *loaded base*, with its own weights, dtype, 4-bit kernels and device, is checked
against the logits that it gave before it was shared, within what rounding alone can do to them. In 16 bits that finds a
layer that is left out, or logits that are 5 % too large. An error that moves less than rounding does, or that moves few
tokens alone, is left to the twin, whose every token counts.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from lora_rlhf.base.adapters import HEAD_KEY, base_identity, lora_config, write_adapter
from lora_rlhf.base.loading import load_causal_lm, model_config, quiet_transformers
from lora_rlhf.base.packing import right_padded
from lora_rlhf.base.prequantized import BASE_SETTING
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, SharedBase
from lora_rlhf.base.small_twin import small_twin
from lora_rlhf.config import LoraSettings, RunConfig
from lora_rlhf.errors import UserError, first_line
from lora_rlhf.memory_peak import ran_out
from lora_rlhf.ppo.readings import (
    EVAL,
    MIXED,
    MIXED_DECODED,
    NO_END,
    Difference,
    Reader,
    Rows,
    difference,
    fill_adapter,
    halve_policy,
    own_logprobs,
    own_logprobs_at_once,
    random_policy,
    rounded_once_more,
    row_logprobs,
    sample_rows,
    shared_differences,
    shared_logprobs,
)
from lora_rlhf.reward.own_reward import trains_own_reward

LIMIT = 1e-4
"""Nats by which log-probs in float32 may differ, and the share of the largest by which gradients may."""
NOISE_FACTOR = 3
"""How many times what one more rounding of every layer's output does a base in 16 or 4 bits may be off: from what the
model itself gave, and in one of our ways of reading it from another."""
GRADIENTS, SCORES = "gradients of the adapter", "scores of a reward adapter that was trained on its own"

POLICIES = 4
"""How many random policies are tried, each smaller, where numbers are not finite."""


def check_architecture(hf_config: Any, settings: LoraSettings, mixed: bool = True, own_reward: bool = True) -> bool:
    """Check the small twin of a model; return false where none can be made, so that nothing is known.

    Args:
        hf_config: transformers' config of the model.
        settings: of the run's adapters.
        mixed: whether the run plays several roles in one pass.
        own_reward: whether the run trains a reward adapter.

    Raises:
        UserError: what the shared base computes is not what transformers and PEFT do, or the model cannot be shared.
    """
    try:
        for one in architecture_differences(hf_config, settings, mixed, own_reward):
            if not one.largest <= LIMIT:
                raise UserError(words(hf_config, one.reading, one.largest, LIMIT))
    except NoTwin:
        return False
    return True


def check_architecture_of(config: RunConfig) -> None:
    """Check the architecture of a run's base, as `check_architecture` does, for what the run does with it."""
    own_reward = trains_own_reward(config.ppo.reward_sources)
    check_architecture(model_config(config), config.lora, config.ppo.mixed_adapter_scoring, own_reward)


class NoTwin(Exception):
    """The sizes of this architecture are not known well enough to make a small one of it."""


def architecture_differences(
    hf_config: Any, settings: LoraSettings, mixed: bool = True, own_reward: bool = True
) -> Iterator[Difference]:
    """Yield how far the shared base of a model's small twin is from stock transformers and PEFT; arguments as above.

    Raises:
        NoTwin: no small twin can be made.
        UserError: the model cannot be shared.
    """
    from transformers import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the cards too, for good
        try:
            plain, shared = (small_twin(hf_config, AutoModelForCausalLM) for _ in range(2))
            rows = sample_rows(plain.get_input_embeddings().weight.shape[0])
            own_logprobs(plain, rows)
        except Exception as error:
            if _of_the_machine(error):
                raise
            raise NoTwin(first_line(error)) from error
        lora = lora_of_twin(settings)
        with _explained(hf_config, "cannot be shared by several roles"):
            base = SharedBase(shared, lora, torch.float32)
            stock = get_peft_model(plain, lora_of_twin(settings), adapter_name=POLICY).eval()
        fill_adapter(stock, POLICY, lora.lora_alpha / lora.r)

        def expected(role: str, rows: Rows) -> list[torch.Tensor]:
            with stock.disable_adapter() if role == REFERENCE else contextlib.nullcontext():
                return own_logprobs(stock, rows)

        with random_policy(base):
            readings = _all_differences(base, rows, expected, mixed)
            while True:
                with _explained(hf_config, "cannot be run as PPO runs it"):
                    one = next(readings, None)
                if one is None:
                    break
                yield one
            with _explained(hf_config, "cannot be trained as PPO trains it"):
                gradients = _gradient_difference(base, stock, rows)
            yield gradients
        if own_reward:
            if type(hf_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
                raise UserError(
                    "ppo.reward_sources: transformers has no classifier of the architecture "
                    f"{hf_config.model_type}, so that no reward adapter can be trained on it: name another reward "
                    "there, or choose another model"
                )
            with _explained(hf_config, "cannot have a reward adapter of its own"):
                classifier = small_twin(hf_config, AutoModelForSequenceClassification, num_labels=1)
                scores = _score_difference(base, classifier, lora_of_twin(settings, "SEQ_CLS"), rows)
            yield scores


def _all_differences(base: SharedBase, rows: Rows, expected: Reader, mixed: bool) -> Iterator[Difference]:
    both = (REFERENCE, POLICY)
    with torch.no_grad():
        actual = [row for role in both for row in shared_logprobs(base, role, rows)]
    right = {role: expected(role, rows) for role in both}
    yield difference(EVAL, actual, [row for role in both for row in right[role]])
    yield from shared_differences(base, rows, right, expected, mixed)


def lora_of_twin(settings: LoraSettings, task_type: str = "CAUSAL_LM") -> Any:
    """Return PEFT's config of the run's adapters, on all layers: the twin has others."""
    return lora_config(replace(settings, layers_to_transform=None), task_type)


def _gradient_difference(base: SharedBase, stock: Any, rows: Rows) -> Difference:
    """Return the difference of the gradients of the policy's parameters, as a share of the largest."""
    weights = [torch.linspace(-1, 1, len(row) - 1) for row in rows]
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ours = shared_logprobs(base, POLICY, rows)
    theirs = [row_logprobs(stock, torch.tensor([row]))[0] for row in rows]
    for logprobs in (ours, theirs):
        torch.stack([(w * row).sum() for w, row in zip(weights, logprobs, strict=True)]).sum().backward()
    flat = [
        torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in side])
        for side in (base.parameters(POLICY), [p for n, p in stock.named_parameters() if "lora_" in n])
    ]
    largest = flat[1].abs().max()
    return difference(GRADIENTS, [flat[0] / largest], [flat[1] / largest])


def _score_difference(base: SharedBase, classifier: Any, lora: Any, rows: Rows) -> Difference:
    """Return how far a reward adapter's scores on the base are from those of the classifier that it is made on."""
    plain = {n.replace(".base_layer", ""): t for n, t in base.trunk.state_dict().items() if ".lora_" not in n}
    getattr(classifier, classifier.base_model_prefix).load_state_dict(plain)
    classifier.config.pad_token_id = NO_END.pad_token_id
    nn.init.normal_(classifier.score.weight, std=0.1)
    identity = base_identity(classifier)
    stock = get_peft_model(classifier, lora).eval()
    fill_adapter(stock, "default", lora.lora_alpha / lora.r)
    ids, mask = right_padded(rows, NO_END.pad_token_id, base.device)
    with torch.no_grad():
        theirs = [stock(input_ids=torch.tensor([row])).logits[0].float() for row in rows]
    state = get_peft_model_state_dict(stock)
    head = state.pop(HEAD_KEY)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), stock.peft_config["default"], state, head, identity)
        base.load_adapter(REWARD, Path(folder))
    return difference(SCORES, [base.scores(REWARD, ids, mask, len(rows))], theirs)


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
    with _random_state_kept(causal_lm.device):
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
    return f"dtype: {_name(hf_config)} gives logits that are not finite in {name}: {advice}"


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

    explained = _explained(hf_config, "cannot be run as PPO runs it", setting)
    with _random_state_kept(base.device), random_policy(base), explained:
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


def _random_state_kept(device: torch.device) -> Any:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def _explained(hf_config: Any, what: str, setting: str = BASE_SETTING) -> Iterator[None]:
    """Put what is raised inside the block, by code that is not made for this model, into words."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _of_the_machine(error):
            raise
        raise UserError(
            f"{setting}: {_name(hf_config)} {what} ({type(error).__name__}: {first_line(error)[:200]}): choose another "
            "model (this may be a fault of this package: please report it)"
        ) from error


def _of_the_machine(error: Exception) -> bool:
    """Return whether an error says nothing about the model: memory ran out, or the card does not work."""
    return ran_out(error) or isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def _name(hf_config: Any) -> str:
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
        f"{setting}: {_name(hf_config)} does not give on the shared base what transformers gives: {reading} off by "
        f"{off:.2g} {unit}, where rounding explains {limit:.1g}. PPO would learn from wrong numbers: {advice}"
    )
