"""The comparison of a finished run, or of models and adapters that are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lora_rlhf.base.devices import with_fast_dtype
from lora_rlhf.chat.comparison import ChatComparison
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_file
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.loaded_arms import adapter_folder, named_arms, run_arms
from lora_rlhf.reward.sources import CombinedReward, reward_sources, run_reward


def run_comparison(run: Path, context: int, most_tokens: int) -> ChatComparison:
    """Return the arms of the run in `run`, with its reward.

    Raises:
        UserError: there is no run, or it is not finished.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} holds no run. Make one with `python recipes/direct_rlhf_lora.py --output_dir {run}` (no GPU and no "
            f"account needed; `--config recipes/configs/tiny.yaml` for one in a minute), or name what is to be "
            f"compared: --base NAME --instruct NAME --plus NAME"
        )
    config = with_fast_dtype(config_from_file(run / "config.yaml"))
    arms = run_arms(config, run)
    reward = run_reward(config, arms["base"].base, run)
    words = config.compare.bad_words_file
    return ChatComparison(arms, reward, config.ppo.stop_strings, context, most_tokens, words)


def named_comparison(
    config: RunConfig, names: Mapping[str, str], reward: str | None, context: int, most_tokens: int
) -> ChatComparison:
    """Return arms by name: Hub names, folders, adapters; `reward` names a reward adapter or a classifier.

    Raises:
        UserError: a model, adapter or reward that cannot be loaded.
    """
    config = with_fast_dtype(config)
    arms = named_arms(config, names)
    combined = None
    if reward is not None:
        folder = adapter_folder(reward)
        source = {"kind": "model", "path": reward} if folder is None else {"kind": "adapter", "path": str(folder)}
        named = replace(config, ppo=replace(config.ppo, reward_sources=[source]))
        combined = CombinedReward(reward_sources(named, arms["base"].base, Path()))
    words = config.compare.bad_words_file
    return ChatComparison(arms, combined, config.ppo.stop_strings, context, most_tokens, words)
