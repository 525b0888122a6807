"""TRL's PPOTrainer, one step for each line on standard input; run by ppo_step.py in a virtual environment of its own.

Policy: QLoRA; reference: the policy with its adapter off; reward: a 4-bit classifier; value: a QLoRA classifier. What
is not quantised is float32: with bfloat16 this trainer stops on a mismatch of dtypes. Each step prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--prompts", required=True, help="JSON file with lists of token ids, all of one length")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, on all linear layers")
    parser.add_argument("--batch", type=int, default=16, help="answers per step")
    parser.add_argument("--micro", type=int, default=4, help="answers per forward-backward pass")
    parser.add_argument("--scoring", type=int, default=16, help="answers per forward pass without gradient")
    parser.add_argument("--response", type=int, default=48, help="tokens per answer")
    parser.add_argument("--epochs", type=int, default=2, help="PPO epochs")
    parser.add_argument("--steps", type=int, default=1000, help="most steps")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--cap_gib", type=float, help="CUDA: refuse memory beyond this")
    return parser.parse_args()


class Stages:
    """When the parts of a step begin and end."""

    def __init__(self) -> None:
        self.started = self.sampled = self.scored = 0.0

    def watch(self) -> None:
        """Wrap TRL's own functions so that they note the time."""
        generate, forward = ppo_trainer.batch_generation, ppo_trainer.forward

        def noted_generate(*args, **kwargs):
            out = generate(*args, **kwargs)
            self.sampled = time.perf_counter()
            return out

        def noted_forward(*args, **kwargs):
            if torch.is_grad_enabled() and not self.scored:
                self.scored = time.perf_counter()
            return forward(*args, **kwargs)

        ppo_trainer.batch_generation, ppo_trainer.forward = noted_generate, noted_forward


class Gate(TrainerCallback):
    """Says what a step took, and waits for the word for the next."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages

    def on_train_begin(self, args, state, control, **_):
        self.wait(control)

    def on_step_end(self, args, state, control, **_):
        ended, s = time.perf_counter(), self.stages
        print(
            json.dumps({
                "rollout": s.sampled - s.started, "score": s.scored - s.sampled, "update": ended - s.scored,
                "seconds": ended - s.started, "peak_gib": peak_gib(),
            }),
            flush=True,
        )  # fmt: skip
        self.wait(control)

    def wait(self, control) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        if not torch.cuda.is_available():
            Path("/proc/self/clear_refs").write_text("5")  # the peak of this step, not of loading
        self.stages.started, self.stages.scored = time.perf_counter(), 0.0


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**20


def main() -> None:
    given = arguments()
    if given.cap_gib and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, given.cap_gib / whole))
    tokenizer = AutoTokenizer.from_pretrained(given.model, padding_side="left", trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<pad>"
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["lm_head", "score"],
    )  # fmt: skip
    place = {"": 0 if torch.cuda.is_available() else "cpu"}
    load = {"quantization_config": four_bit, "dtype": torch.float32, "device_map": place, "trust_remote_code": False}
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = {"r": given.rank, "lora_alpha": 2 * given.rank, "target_modules": layers}
    policy = AutoModelForCausalLM.from_pretrained(given.model, **load)
    judges = [
        AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=1, **load)
        for _ in ("reward", "value")
    ]
    for model in judges:
        model.config.pad_token_id = tokenizer.pad_token_id
    reward, value = judges
    value = get_peft_model(value, LoraConfig(task_type="SEQ_CLS", **lora))
    prompts = json.loads(Path(given.prompts).read_text())
    data = Dataset.from_dict({"input_ids": prompts})
    config = PPOConfig(
        output_dir=str(Path(given.prompts).parent / "trl"), per_device_train_batch_size=given.micro,
        gradient_accumulation_steps=given.batch // given.micro, num_ppo_epochs=given.epochs, num_mini_batches=1,
        local_rollout_forward_batch_size=given.scoring, response_length=given.response, temperature=1.0,
        total_episodes=given.batch * given.steps, num_sample_generations=0, save_strategy="no", report_to="none",
        bf16=False, use_cpu=not torch.cuda.is_available(), gradient_checkpointing=given.checkpointing,
        learning_rate=1e-5, disable_tqdm=True,
    )  # fmt: skip
    stages = Stages()
    stages.watch()
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=value,
        train_dataset=data, eval_dataset=data.select(range(given.batch)), callbacks=[Gate(stages)],
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
    )  # fmt: skip
    trainer.log = lambda *_, **__: None
    print(json.dumps({"ready": True}), flush=True)
    trainer.train()


if __name__ == "__main__":
    main()
