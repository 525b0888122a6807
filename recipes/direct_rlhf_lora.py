"""Direct RLHF with LoRA: from preference pairs to a merged model, on one 4-bit base.

    python recipes/direct_rlhf_lora.py                                            # embedded model and data, no account
    python recipes/direct_rlhf_lora.py --config recipes/configs/tiny.yaml         # random weights, under a minute
    python recipes/direct_rlhf_lora.py --config recipes/configs/mistral_7b_24gb.yaml

The stages are those of arXiv 2403.02513, which trains the base model by PPO without supervised fine-tuning first; the
SFT arm is made only to be compared with. Nothing is lost: Ctrl-C, SIGTERM or a power cut, the same command goes on at
the stage and step where it was (--save_steps, --save_minutes), and each stage is also a recipe of its own.
`python -m lora_rlhf.watch OUTPUT_DIR` shows a run from another terminal. Any field can be given on the command line:
--ppo.kl_coef 0.1 --dataset_name FOLDER.

Several GPUs: `accelerate launch --config_file recipes/launch/two_gpus.yaml recipes/direct_rlhf_lora.py …`. They share
reward training, SFT, PPO and the comparison, with the result of one; the first one alone merges.

Supported: causal language models that transformers loads and PEFT adapts, in NF4 on CUDA and CPU.
Not supported: encoder-decoder models, images.
"""

from pathlib import Path

from lora_rlhf.config_file import config_from_command_line
from lora_rlhf.session import Session
from lora_rlhf.stages import (
    base_stage,
    compare_stage,
    instruct_stage,
    merge_stage,
    ppo_stage,
    reward_stage,
)
from lora_rlhf.terminal import note, run_recipe

EMBEDDED_CONFIG = Path(__file__).parent / "configs" / "embedded.yaml"


def main() -> None:
    config = config_from_command_line(__doc__, default=EMBEDDED_CONFIG)
    session = Session.open(config)

    base_stage(session)  # 1. the 4-bit base, loaded and checked
    reward_stage(session)  # 2. a LoRA reward adapter on preference pairs
    instruct_stage(session)  # 3. the arm the paper compares with: SFT on the chosen answers
    ppo_stage(session)  # 4. the policy adapter: policy, reference, reward and value on one base
    merge_stage(session)  # 5. Plus: the policy adapter merged into 16-bit weights
    compare_stage(session)  # 6. base, Instruct and Plus on held-out prompts

    note(f"everything is in {session.run.path}: summary.json, curves.png, merged/ and the adapters")


if __name__ == "__main__":
    run_recipe(main)
