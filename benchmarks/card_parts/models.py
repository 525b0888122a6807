"""Random models in 4 bits, made on the device itself: no file, and no weight in main memory."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shapes import trainer_on
from torch import nn

from card_parts.bench import Bench
from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.embedded import build_tiny_model
from lora_rlhf.base.loading import quiet_transformers
from lora_rlhf.base.shared import SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_file, config_from_mapping, config_to_mapping
from lora_rlhf.data.chat import set_chat_template
from lora_rlhf.memory import with_checkpointing_decided
from lora_rlhf.ppo.trainer import PpoTrainer
from lora_rlhf.reward.sources import ScoreScale

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
NAME = "random-mistral"


def whole_vocabulary_tokenizer(vocabulary: int) -> Any:
    """Return the byte-level BPE tokenizer of the embedded pairs, with made-up words for all other ids.

    It encodes with its own 512 tokens, and whatever a model of that many rows samples decodes to text, as with a real
    tokenizer: looking for stop strings then costs what it really costs.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(Path(folder), chat_template=None)
        small = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    content = json.loads(small.backend_tokenizer.to_str())
    known = content["model"]["vocab"]
    made_up = (
        "Ġ" + "".join(letters) for n in itertools.count(3) for letters in itertools.product("aeinorst", repeat=n)
    )
    words = (word for word in made_up if word not in known)
    for number in range(len(known), vocabulary):
        known[next(words)] = number
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    set_chat_template(tokenizer, "human_assistant")
    return tokenizer


def mistral_config(bench: Bench, hidden: int, layers: int, inner: int, heads: tuple[int, int]) -> Any:
    """Return transformers' config of a Mistral with the vocabulary of the benchmark."""
    from transformers import MistralConfig

    tokenizer = bench.tokenizer
    config = MistralConfig(
        vocab_size=bench.size.vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        dtype=torch.bfloat16, name_or_path=NAME,
    )  # fmt: skip
    return config


def config_of_size(bench: Bench) -> Any:
    """Return transformers' config of the model that speed and memory are measured on."""
    size = bench.size
    return mistral_config(bench, size.hidden, size.layers, size.inner, size.heads)


def quantized_linear(weight: torch.Tensor) -> Any:
    """Return a linear layer without bias whose weight [out, in] is quantised to NF4 on its own device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    outputs, inputs = weight.shape
    layer = Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device=torch.device("meta")
    )
    layer.weight = Params4bit(weight, quant_type="nf4", module=layer).to(weight.device)
    layer.support_avx512bf16_for_cpu = False  # see `lora_rlhf.base.loading`
    return layer


def random_causal_lm(bench: Bench, config: Any, seed: int = 0) -> Any:
    """Return a random model with NF4 weights (double quantisation) on the device, as loading leaves one.

    Speed and memory do not depend on what the weights are, as long as they are neither zero nor NaN. The end of an
    answer is made as likely as the average token, so that nearly all answers are as long as they may be.
    """
    from transformers import MistralForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = MistralForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(bench.device).manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        std = 0.02 if config.hidden_size > 256 else 0.1
        return torch.empty(shape, dtype=torch.bfloat16, device=bench.device).normal_(std=std, generator=generator)

    with torch.device(bench.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                quantized = quantized_linear(drawn(child.out_features, child.in_features))
                setattr(module, name, quantized)
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            owner, _, leaf = name.rpartition(".")
            data = torch.ones(parameter.shape, dtype=torch.bfloat16, device=bench.device) if "norm" in name else None
            data = drawn(*parameter.shape) if data is None else data
            setattr(model.get_submodule(owner), leaf, nn.Parameter(data, requires_grad=False))
    model.lm_head.weight.data[config.eos_token_id] = 0.0
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config._name_or_path = NAME
    model.generation_config.pad_token_id = config.pad_token_id
    return model.eval()


def write_model(causal_lm: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model of `random_causal_lm` in 4 bits, as other libraries load it: a quarter of the 16-bit file."""
    from transformers import BitsAndBytesConfig

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in causal_lm.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with quiet_transformers():
        causal_lm.config.save_pretrained(folder)
        causal_lm.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head", "score"],
    )  # fmt: skip
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = four_bit.to_dict()
    (folder / "config.json").write_text(json.dumps(written, indent=1) + "\n")


def step_config(bench: Bench, file: str, cap_gib: float | None, **ppo: Any) -> RunConfig:
    """Return a config of `recipes/configs` as its PPO step is measured; `ppo` replaces fields.

    Both adapters learn from the first step on, and no guard against a policy that runs away ends a step early.
    """
    values = config_to_mapping(config_from_file(CONFIGS / file))
    guards = {"value_warmup_steps": 0, "max_kl": None, "update_kl_limit": None, "max_stopped_updates": None}
    values["ppo"] |= guards | bench.size.step | ppo
    values |= {"dataset_name": ["embedded"], "dataset_weights": [], "instruct_model_name_or_path": None}
    values["max_prompt_length"] = bench.size.prompt or values["max_prompt_length"]
    folder = bench.folder / "shape"
    if not (folder / "config.json").is_file():  # the planner reads shapes from files
        config_of_size(bench).save_pretrained(folder)
    values["model_name_or_path"] = str(folder)
    return with_checkpointing_decided(config_from_mapping(values, file), cap_gib if bench.on_card else None)


def mixed_prompts(bench: Bench, longest: int, seed: int = 0) -> list[list[int]]:
    """Return prompts of the embedded pairs' text, an eighth of `longest` to all of it: batches of them are padded."""
    tokenizer, pairs = bench.tokenizer, bench.pairs
    stream = [i for pair in pairs for i in tokenizer(pair.prompt[-1][1], add_special_tokens=False)["input_ids"]]
    stream = stream * (1 + longest * len(pairs) // len(stream))
    lengths = random.Random(seed).choices(range(max(1, longest // 8), longest + 1), k=len(pairs))
    starts = itertools.accumulate(lengths, initial=0)
    return [stream[start : start + length] for start, length in zip(starts, lengths, strict=False)]


def shared_base(config: RunConfig, causal_lm: Any) -> SharedBase:
    """Return the shared base on a model, its policy adapter drawn from the config's seed."""
    torch.manual_seed(config.seed)
    return SharedBase(causal_lm, lora_config(config.lora), torch.bfloat16)


def step_trainer(
    bench: Bench, config: RunConfig, causal_lm: Any, prompts: Sequence[list[int]] | None = None
) -> PpoTrainer:
    """Return a PPO trainer with all four roles on a model, and prompts of mixed length unless others are given.

    The reward's scale is given, not measured: that would be another rollout.
    """
    trainer = trainer_on(shared_base(config, causal_lm), config, bench.tokenizer, bench.pairs, ScoreScale())
    trainer.prompt_ids = list(prompts or mixed_prompts(bench, config.max_prompt_length))
    return trainer
