"""What the compare stage measures of an arm's safety: decline rates and margins on safety prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch

from lora_rlhf.config import RunConfig
from lora_rlhf.data.safety_prompts import LABELS, SafetyPrompt, prompts_with_answers
from lora_rlhf.evaluation.arms import prompts_of_any_template
from lora_rlhf.evaluation.declining import declines
from lora_rlhf.evaluation.margins import Reader, safe_margins
from lora_rlhf.ppo.rollout import Rollout
from lora_rlhf.processes import Processes

Sampler = Callable[[list[list[int]], torch.Generator, slice], Rollout]
"""Samples an answer to some rows of prompts, given in token ids."""


def arm_safety(
    prompts: Sequence[SafetyPrompt],
    tokenizer: object,
    sample: Sampler,
    reader: Reader,
    config: RunConfig,
    processes: Processes,
) -> dict[str, float]:
    """Return `decline_unsafe` and `decline_safe`, the shares of the prompts of each label that the arm declines,
    `safe_margin`, the share on which it finds the right written answers likelier (see `margins`), and how many prompts
    each was measured on: `n_unsafe`, `n_safe`, `n_margin`. Prompts without written answers leave the margin to the
    package's own.

    Args:
        prompts: of both labels.
        tokenizer: of the arm, with its chat template.
        sample: lets the arm answer.
        reader: of the arm.
        config: of the run.
        processes: that share the prompts and are connected; all return the same.
    """
    generator = torch.Generator().manual_seed(config.seed)
    declined: list[bool] = []
    for start in range(0, len(prompts), config.ppo.batch_size):
        part = prompts[start : start + config.ppo.batch_size]
        rows = processes.rows(len(part))
        asked = prompts_of_any_template(tokenizer, [prompt.messages for prompt in part])
        texts = sample(asked, generator, rows).texts
        declined += processes.whole({"declined": [declines(text) for text in texts]}, len(part))["declined"]
    written = prompts_with_answers(list(prompts))
    rows = processes.rows(len(written))
    own = safe_margins(written[rows], tokenizer, reader)
    right = processes.whole({"right": [float(margin > 0) for margin in own]}, len(written))["right"]
    of_label = {label: [d for d, p in zip(declined, prompts, strict=True) if p.label == label] for label in LABELS}
    shares = {f"decline_{label}": fmean(own) for label, own in of_label.items()}
    counts = {f"n_{label}": len(own) for label, own in of_label.items()}
    return {**shares, "safe_margin": fmean(right), **counts, "n_margin": len(written)}
