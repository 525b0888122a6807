"""Whether an Instruct model that is a whole model of its own says in a padded batch what it says alone.

It is not shared, so that less can go wrong with it than with the base: it answers by the rollout's own decoder, and its
answers are read without padding. The architecture is checked before any stage begins, the loaded model before it
answers.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_rlhf.base.loading import model_config, quiet_transformers
from lora_rlhf.base.prequantized import INSTRUCT_SETTING
from lora_rlhf.base.small_twin import small_twin
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.ppo.model_check import OwnReading, explained_for, model_name, of_the_machine, random_state_kept
from lora_rlhf.ppo.readings import Difference, batch_differences, own_logprobs, sample_rows

EXPLAINED = "cannot answer as the other arms do"
TWIN_LIMIT = 1e-2
"""Nats by which a token of a twin may be off, in float32. Nothing is learnt from them, and deep state-space models are
off by some 1e-4 by rounding alone; those that forget what was padding are off by 1 and more."""


def check_instruct_architecture(config: RunConfig) -> bool:
    """Check the small twin of the Instruct model that a config names; return false where nothing is known of it.

    Raises:
        UserError: it says something else in a padded batch than alone, or cannot be read so.
    """
    from transformers import AutoModelForCausalLM

    if config.instruct_model_name_or_path is None:
        return False
    hf_config = model_config(config, config.instruct_model_name_or_path, INSTRUCT_SETTING)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        try:
            twin = small_twin(hf_config, AutoModelForCausalLM)
            rows = sample_rows(twin.get_input_embeddings().weight.shape[0])
            own = own_logprobs(twin, rows)
        except Exception as error:
            if of_the_machine(error):
                raise
            return False
        with explained_for(hf_config, EXPLAINED, INSTRUCT_SETTING):
            for one in batch_differences(twin, rows, own):
                if not one.largest <= TWIN_LIMIT:
                    raise UserError(_words(hf_config, one, one.largest, TWIN_LIMIT))
    return True


def check_instruct_model(causal_lm: Any, dtype: torch.dtype) -> None:
    """Check a loaded Instruct model as `check_instruct_architecture` does its twin, within what rounding does.

    Raises:
        UserError: as there, or its logits are not finite.
    """
    if hasattr(causal_lm, "for_inference"):  # unsloth's kernels are others: it has a check of its own at loading
        return
    with random_state_kept(causal_lm.device), explained_for(causal_lm.config, EXPLAINED, INSTRUCT_SETTING):
        own = OwnReading.of(causal_lm, dtype, INSTRUCT_SETTING)
        for one in batch_differences(causal_lm, own.rows, own.logprobs):
            if not one.typical <= own.limit:
                raise UserError(_words(causal_lm.config, one, one.typical, own.limit))


def _words(hf_config: Any, one: Difference, off: float, limit: float) -> str:
    return (
        f"{INSTRUCT_SETTING}: {model_name(hf_config)} does not say in a batch what it says alone: {one.reading} off by "
        f"{off:.2g} nats, where rounding explains {limit:.1g}. Its answers would not be its own: choose another model, "
        "or leave the setting out (then an Instruct arm is trained)"
    )
