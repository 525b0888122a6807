"""Whether a model's architecture computes on the shared base what it computes on its own.

It is checked on a small twin (`lora_rlhf.base.small_twin`), on the CPU in float32, against transformers and PEFT as
they are: every way of reading the base, gradients, and the way of a reward adapter from its training into the base.
It takes a second and needs the model's config alone, so that no stage begins on a model with which a later one must
fail. The loaded base is checked with its own weights besides (`lora_rlhf.ppo.model_check`).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from lora_rlhf.base.adapters import HEAD_KEY, base_identity, lora_config, write_adapter
from lora_rlhf.base.loading import model_config, quiet_transformers
from lora_rlhf.base.packing import right_padded
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, SharedBase
from lora_rlhf.base.small_twin import small_twin
from lora_rlhf.base.trunk import trunk_of
from lora_rlhf.config import LoraSettings, RunConfig
from lora_rlhf.errors import UserError, first_line
from lora_rlhf.ppo.model_check import LIMIT, explained_for, of_the_machine, words
from lora_rlhf.ppo.readings import (
    EVAL,
    GRADIENTS,
    NO_END,
    SCORES,
    Difference,
    Reader,
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
from lora_rlhf.reward.own_reward import trains_own_reward


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
            if of_the_machine(error):
                raise
            raise NoTwin(first_line(error)) from error
        lora = lora_of_twin(settings)
        with explained_for(hf_config, "cannot be shared by several roles"):
            base = SharedBase(shared, lora, torch.float32)
            stock = get_peft_model(plain, lora_of_twin(settings), adapter_name=POLICY).eval()
        fill_adapter(stock, POLICY, lora.lora_alpha / lora.r)

        def expected(role: str, rows: Rows) -> list[torch.Tensor]:
            with stock.disable_adapter() if role == REFERENCE else contextlib.nullcontext():
                return own_logprobs(stock, rows)

        with random_policy(base):
            readings = _all_differences(base, rows, expected, mixed)
            while True:
                with explained_for(hf_config, "cannot be run as PPO runs it"):
                    one = next(readings, None)
                if one is None:
                    break
                yield one
            with explained_for(hf_config, "cannot be trained as PPO trains it"):
                gradients = _gradient_difference(base, stock, rows)
            yield gradients
        if own_reward:
            if type(hf_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
                raise UserError(
                    "ppo.reward_sources: transformers has no classifier of the architecture "
                    f"{hf_config.model_type}, so that no reward adapter can be trained on it: name another reward "
                    "there, or choose another model"
                )
            with explained_for(hf_config, "cannot have a reward adapter of its own"):
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
    trunk_of(classifier).load_state_dict(plain)
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
