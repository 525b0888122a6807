"""Training the reward adapter with TRL's RewardTrainer, and its accuracy on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict

from lora_rlhf.base.adapters import HEAD_KEY, base_identity, lora_config, write_adapter
from lora_rlhf.base.loading import load_reward_model
from lora_rlhf.base.packing import right_padded
from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import answer_ids, prompt_ids
from lora_rlhf.data.preferences import PreferencePair
from lora_rlhf.processes import Processes
from lora_rlhf.reward.contrast import contrast_pairs, spoilt_pairs
from lora_rlhf.trl_trainer import checkpoints_beside, on_own_device, trainer_arguments, trl_run

SPOILT_PAIRS = 200
"""Pairs of a chosen and a spoilt answer that tell what a reward model falls for: 50 of each kind."""
SAFE_SHARE = 0.8
"""Of the chosen answers of a kind; where fewer score above spoilt ones, it is said."""


def train_reward_adapter(
    config: RunConfig,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    folder: Path,
    processes: Processes | None = None,
) -> None:
    """Train a LoRA reward adapter and write it to `folder` as a stock SEQ_CLS adapter, score head and all.

    The loss is the pairwise logistic one; adapter and head are float32, whatever the base computes in.

    Args:
        config: of the run.
        tokenizer: of its base.
        pairs: to learn from.
        folder: which the first process writes, before any of them returns.
        processes: that share the training, connected, and hidden from libraries; None means this process alone.
    """
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    processes = processes or Processes.one()
    pairs = [*pairs, *contrast_pairs(pairs, config.reward.contrast_share, config.seed)]
    rows = [
        {"chosen_ids": sides["chosen"], "rejected_ids": sides["rejected"], "length": max(map(len, sides.values()))}
        for sides in map(_both_ids(tokenizer), pairs)
    ]
    rows = [row for row in rows if row["length"] <= config.max_length]  # contrast pairs may be longer than given ones
    torch.manual_seed(config.seed)
    model = load_reward_model(config, tokenizer.pad_token_id)
    identity = base_identity(model)
    arguments = on_own_device(
        lambda: RewardConfig(
            **trainer_arguments(config, config.reward, checkpoints_beside(folder)),
            center_rewards_coefficient=config.reward.center_rewards_coefficient,
            max_length=None,
            remove_unused_columns=False,  # the sampler needs `length`
        )
    )
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(config.lora, "SEQ_CLS"),
    )
    trl_run(trainer, "reward", config, processes)
    if processes.is_main:
        state = get_peft_model_state_dict(trainer.model)
        head = state.pop(HEAD_KEY)
        write_adapter(folder, trainer.model.peft_config["default"], state, head, identity)
    processes.wait()


def pair_scores(
    base: SharedBase, role: str, tokenizer: Any, pairs: Sequence[PreferencePair], batch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores of the chosen and of the rejected answers, float32 [pairs] each."""
    both = [_both_ids(tokenizer)(pair) for pair in pairs]
    sides = []
    for side in ("chosen", "rejected"):
        ids, mask = right_padded([sides[side] for sides in both], tokenizer.pad_token_id, base.device)
        sides.append(base.scores(role, ids, mask, batch))
    return sides[0], sides[1]


def reward_accuracy(
    config: RunConfig, base: SharedBase, tokenizer: Any, pairs: Sequence[PreferencePair], processes: Processes
) -> dict[str, Any]:
    """Return how often the reward role scores the better of two answers higher.

    Each of the processes, which are connected, scores its own pairs.

    Args:
        config: of the run.
        base: with the reward role.
        tokenizer: of the base.
        pairs: held out, at least one.
        processes: that share the work.

    Returns:
        `accuracy`, the share of the `n` pairs whose chosen answer scores higher than the rejected one; and
        `against_spoilt`, for each kind of `spoilt_pairs` that are made of them, the share of chosen answers that score
        higher than a spoilt one. What a reward model takes for as good as a chosen answer, PPO finds.
    """
    batch, sides = config.ppo.scoring_batch_size, _both_ids(tokenizer)

    def right(pairs: Sequence[PreferencePair]) -> list[bool]:
        chosen, rejected = pair_scores(base, REWARD, tokenizer, pairs[processes.rows(len(pairs))], batch)
        return processes.whole({"right": chosen > rejected}, len(pairs))["right"].tolist()

    spoilt: dict[str, list[PreferencePair]] = {}
    for kind, pair in spoilt_pairs(pairs, SPOILT_PAIRS, config.seed):
        if max(map(len, sides(pair).values())) <= config.max_length:  # as in training
            spoilt.setdefault(kind, []).append(pair)
    against_spoilt = {kind: fmean(right(made)) for kind, made in spoilt.items()}
    return {"accuracy": fmean(right(pairs)), "n": len(pairs), "against_spoilt": against_spoilt}


def accuracy_in_words(measured: dict[str, Any]) -> list[str]:
    """Return the lines that say what `reward_accuracy` measured, and what to do where it is bad."""
    lines = [f"accuracy on {measured['n']} held-out pairs: {measured['accuracy']:.3f}"]
    against = measured["against_spoilt"]
    if against:
        lines.append("chosen answers above spoilt ones: " + ", ".join(f"{k} {v:.0%}" for k, v in against.items()))
    if fallen := [kind for kind, share in against.items() if share < SAFE_SHARE]:
        lines.append(
            f"what it cannot tell from a chosen answer ({', '.join(fallen)}), PPO may fall into; "
            "reward.contrast_share adds such pairs"
        )
    return lines


def _both_ids(tokenizer: Any) -> Any:
    def both(pair: PreferencePair) -> dict[str, list[int]]:
        prompt = prompt_ids(tokenizer, pair.messages)
        return {
            "chosen": prompt + answer_ids(tokenizer, pair.chosen),
            "rejected": prompt + answer_ids(tokenizer, pair.rejected),
        }

    return both
