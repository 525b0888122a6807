"""Whether a model computes on the shared base what it computes on its own: found out before any work is done.

Two checks. The *architecture* is checked on a small twin (`lora_rlhf.base.small_twin`), on the CPU in float32, against
transformers and PEFT as they are: every way of reading the base, gradients, and the way of a reward adapter from its
training into the base. It takes a second and needs the model's config alone, so that no stage begins on a model with
which a later one must fail. The *loaded base*, with its own weights, dtype, 4-bit kernels and device, is checked
against the logits that it gave before it was shared, within what rounding alone can do to them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from lora_rlhf.base.adapters import HEAD_KEY, base_identity, lora_config, write_adapter
from lora_rlhf.base.loading import load_causal_lm, quiet_transformers
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
    Rows,
    difference,
    fill_adapter,
    own_logprobs,
    random_policy,
    row_logprobs,
    sample_rows,
    shared_differences,
    shared_logprobs,
)

LIMIT = 1e-4
"""Nats by which log-probs in float32 may differ, and the share of the largest by which gradients may."""
NOISE_FACTOR = 10
"""How many times what one more rounding of every layer's output does a base in 16 or 4 bits may be off."""
GRADIENTS, SCORES = "gradients of the adapter", "scores of a reward adapter that was trained on its own"


def check_architecture(found: Any, settings: LoraSettings, mixed: bool = True, own_reward: bool = True) -> bool:
    """Check the small twin of a model; return false where none can be made, so that nothing is known.

    Args:
        found: transformers' config of the model.
        settings: of the run's adapters.
        mixed: whether the run plays several roles in one pass.
        own_reward: whether the run trains a reward adapter.

    Raises:
        UserError: what the shared base computes is not what transformers and PEFT do, or the model cannot be shared.
    """
    try:
        for apart in architecture_differences(found, settings, mixed, own_reward):
            if not apart.largest <= LIMIT:
                raise UserError(_words(found, apart, LIMIT))
    except NoTwin:
        return False
    return True


class NoTwin(Exception):
    """The sizes of this architecture are not known well enough to make a small one of it."""


def architecture_differences(
    found: Any, settings: LoraSettings, mixed: bool = True, own_reward: bool = True
) -> Iterator[Difference]:
    """Yield how far the shared base of a model's small twin is from stock transformers and PEFT; arguments as above.

    Raises:
        NoTwin: no small twin can be made.
        UserError: the model cannot be shared.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        try:
            plain, shared = (small_twin(found, AutoModelForCausalLM) for _ in range(2))
            rows = sample_rows(plain.get_input_embeddings().weight.shape[0])
            own_logprobs(plain, rows)
        except Exception as error:
            if ran_out(error):
                raise
            raise NoTwin(first_line(error)) from error
        lora = lora_config(settings)
        lora.layers_to_transform = None  # the twin has other layers
        with _explained(found, "cannot be shared by several roles"):
            base = SharedBase(shared, lora, torch.float32)
            stock = get_peft_model(plain, lora_config_like(lora), adapter_name=POLICY).eval()
        fill_adapter(stock, POLICY, lora.lora_alpha / lora.r)

        def expected(role: str, rows: Rows) -> list[torch.Tensor]:
            with stock.disable_adapter() if role == REFERENCE else contextlib.nullcontext():
                return own_logprobs(stock, rows)

        with random_policy(base):
            readings = shared_differences(base, rows, expected, mixed)
            while True:
                with _explained(found, "cannot be run as PPO runs it"):
                    apart = next(readings, None)
                if apart is None:
                    break
                yield apart
            with _explained(found, "cannot be trained as PPO trains it"):
                apart = _gradients_apart(base, stock, rows)
            yield apart
        if own_reward:
            with _explained(found, "cannot have a reward adapter of its own"):
                classifier = small_twin(found, AutoModelForSequenceClassification, num_labels=1)
                apart = _scores_apart(base, classifier, lora_config(settings, "SEQ_CLS"), rows)
            yield apart


def lora_config_like(config: Any) -> Any:
    """Return a copy of a LoRA config: PEFT writes into the one that it is given."""
    import copy

    return copy.deepcopy(config)


def _gradients_apart(base: SharedBase, stock: Any, rows: Rows) -> Difference:
    """Return the difference of the gradients of the policy's parameters, as a share of the largest."""
    weights = [torch.linspace(-1, 1, len(row) - 1) for row in rows]
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ours = shared_logprobs(base, POLICY, rows)
    theirs = [row_logprobs(stock, torch.tensor([row])) for row in rows]
    for told in (ours, theirs):
        torch.stack([(w * row).sum() for w, row in zip(weights, told, strict=True)]).sum().backward()
    pairs = [
        (p.grad, q.grad)
        for p, q in zip(base.parameters(POLICY), (q for n, q in stock.named_parameters() if "lora_" in n), strict=True)
    ]
    flat = [torch.cat([torch.zeros(n) if g is None else g.flatten() for g, n in side]) for side in zip(
        *(((a, p.numel()), (b, p.numel())) for (a, b), p in zip(pairs, base.parameters(POLICY), strict=True)), strict=True
    )]
    largest = flat[1].abs().max()
    return difference(GRADIENTS, [flat[0] / largest], [flat[1] / largest])


def _scores_apart(base: SharedBase, classifier: Any, lora: Any, rows: Rows) -> Difference:
    """Return how far the scores of a reward adapter are, on the base, from those of the classifier that it is made on."""
    trunk = getattr(classifier, classifier.base_model_prefix)
    trunk.load_state_dict({n.replace(".base_layer", ""): t for n, t in base.trunk.state_dict().items() if "lora_" not in n})
    classifier.config.pad_token_id = NO_END.pad_token_id
    nn.init.normal_(classifier.score.weight, std=0.1)
    identity = base_identity(classifier)
    lora.layers_to_transform = None
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


@contextlib.contextmanager
def _explained(found: Any, what: str) -> Iterator[None]:
    """Put what is raised inside the block, by code that is not made for this model, into words."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        raise UserError(
            f"model_name_or_path: {_name(found)} {what} ({first_line(error)[:200]}): choose another model"
        ) from error


def _name(found: Any) -> str:
    """Return what a model is called in an error: its name, where it has one, and its architecture."""
    own = str(getattr(found, "_name_or_path", "") or "")
    return f"{own} ({found.model_type})" if own else f"a model of the architecture {found.model_type}"


def _words(found: Any, apart: Difference, limit: float) -> str:
    unit = "of the largest" if apart.reading == GRADIENTS else "nats" if apart.reading != SCORES else "points"
    advice = "choose another model"
    if apart.reading in (MIXED, MIXED_DECODED):
        advice = "set ppo.mixed_adapter_scoring: false, or choose another model"
    return (
        f"model_name_or_path: {_name(found)} does not give on the shared base what transformers gives: its "
        f"{apart.reading} are {apart.largest:.2g} {unit} off, and rounding explains {limit:.1g}. PPO would learn from "
        f"wrong numbers: {advice}"
    )
