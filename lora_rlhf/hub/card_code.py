"""The code in a model card: blocks that run as they stand, once the base model is at hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lora_rlhf.hub.base_origin import BaseOrigin

QUESTION = '[{"role": "user", "content": "How do I fly a kite?"}]'


def _answering(stop_strings: Sequence[str]) -> str:
    """Return the lines that let a loaded model answer, up to EOS or the first of the stop strings."""
    lines = [
        f"messages = {QUESTION}",
        "prompt = tokenizer.apply_chat_template("
        'messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        "prompt = prompt.to(model.device)",
    ]
    options = "max_new_tokens=64"
    if stop_strings:
        lines.append(f"stop_strings = {json.dumps(list(stop_strings), ensure_ascii=False)}")
        options += ", stop_strings=stop_strings, tokenizer=tokenizer"
    lines += [
        f'answer = model.generate(**prompt, {options})[0, prompt["input_ids"].shape[1] :]',
        "text = tokenizer.decode(answer, skip_special_tokens=True)",
    ]
    if stop_strings:
        lines += ["for stop in stop_strings:", "    text = text.split(stop)[0]"]
    return "\n".join([*lines, "print(text.strip())"])


def load_plus_code(repo_id: str, origin: BaseOrigin, stop_strings: Sequence[str]) -> str:
    """Return the lines that load the model with `load_plus` and let it answer."""
    return _block("\n".join(load_plus_lines(repo_id, origin)), _answering(stop_strings))


def load_plus_lines(repo_id: str, origin: BaseOrigin) -> list[str]:
    """Return the lines that load the model with `load_plus`."""
    base = f", base={_quoted(origin.name)}" if origin.kind == "folder" else ""
    return ["from lora_rlhf import load_plus", "", f"model, tokenizer = load_plus({_quoted(repo_id)}{base})"]


def adapter_code(repo_id: str, origin: BaseOrigin, dtype: str, four_bits: bool, stop_strings: Sequence[str]) -> str:
    """Return the lines that put the adapter on its base with PEFT."""
    imports = ["AutoModelForCausalLM", "AutoTokenizer"]
    return _block(
        _imports(origin, imports, four_bits),
        _loaded("AutoModelForCausalLM", repo_id, origin, dtype, four_bits)
        + f"\nmodel = PeftModel.from_pretrained(base, {_quoted(repo_id)}).eval()",
        _answering(stop_strings),
    )


def merging_code(repo_id: str, origin: BaseOrigin, dtype: str, stop_strings: Sequence[str]) -> str:
    """Return the lines that merge the adapter into the 16-bit weights of a base that is published in 16 bits."""
    return _block(
        _imports(origin, ["AutoModelForCausalLM", "AutoTokenizer"], four_bits=False),
        _loaded("AutoModelForCausalLM", repo_id, origin, dtype, four_bits=False)
        + f"\nmodel = PeftModel.from_pretrained(base, {_quoted(repo_id)}).merge_and_unload().eval()",
        _answering(stop_strings),
    )


def merged_code(repo_id: str, stop_strings: Sequence[str]) -> str:
    """Return the lines that load a merged model with transformers."""
    return _block(
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(repo_id)})\n"
        f'model = AutoModelForCausalLM.from_pretrained({_quoted(repo_id)}, dtype="auto", device_map="auto").eval()',
        _answering(stop_strings),
    )


def reward_code(repo_id: str, origin: BaseOrigin, dtype: str, four_bits: bool) -> str:
    """Return the lines that score an answer with the reward adapter."""
    imports = _imports(origin, ["AutoModelForSequenceClassification", "AutoTokenizer"], four_bits)
    imports += "\n" if "resolved_model" in imports else "\n\n"
    imports += "from lora_rlhf.data.chat import answer_ids, prompt_ids"
    return _block(
        imports,
        _loaded("AutoModelForSequenceClassification", repo_id, origin, dtype, four_bits)
        + f"\nmodel = PeftModel.from_pretrained(base, {_quoted(repo_id)}).eval()",
        f"messages = {QUESTION}\n"
        'ids = prompt_ids(tokenizer, messages) + answer_ids(tokenizer, "Run into the wind, and let out line.")\n'
        "with torch.no_grad():\n"
        "    print(model(torch.tensor([ids], device=model.device)).logits.item())",
    )


def _imports(origin: BaseOrigin, names: list[str], four_bits: bool) -> str:
    if four_bits:
        names = ["AutoConfig", *names] if origin.published_type else [*names, "BitsAndBytesConfig"]
    from_transformers = ", ".join(names)
    lines = f"import torch\nfrom peft import PeftModel\nfrom transformers import {from_transformers}"
    if origin.kind in ("embedded", "tiny"):
        lines += "\n\nfrom lora_rlhf.base.loading import resolved_model"
    return lines


def _loaded(model_class: str, repo_id: str, origin: BaseOrigin, dtype: str, four_bits: bool) -> str:
    """Return the lines that load `tokenizer` and `base`, in the precision of the run."""
    source = f"resolved_model({_quoted(origin.name)})" if origin.kind in ("embedded", "tiny") else _quoted(origin.name)
    named = [source, f"revision={_quoted(origin.revision)}"] if origin.revision else [source]
    labels = ["num_labels=1"] if model_class == "AutoModelForSequenceClassification" else []
    placed = [f"dtype=torch.{dtype}", 'device_map="auto"']
    lines = [f"tokenizer = AutoTokenizer.from_pretrained({_quoted(repo_id)})"]
    if four_bits and origin.published_type:  # transformers would ignore a config beside the checkpoint's own
        lines += [
            f"config = AutoConfig.from_pretrained({', '.join(named + labels)})",
            "stored = config.quantization_config",
            'stored["llm_int8_skip_modules"] = [*(stored.get("llm_int8_skip_modules") or []), "lm_head", "score"]',
            f'stored["bnb_4bit_compute_dtype"] = "{dtype}"',
        ]
        arguments = [*named, "config=config", *placed]
    elif four_bits:
        lines += [
            "nf4 = BitsAndBytesConfig(",
            "    load_in_4bit=True,",
            '    bnb_4bit_quant_type="nf4",',
            "    bnb_4bit_use_double_quant=True,",
            f"    bnb_4bit_compute_dtype=torch.{dtype},",
            '    llm_int8_skip_modules=["lm_head", "score"],',
            ")",
        ]
        arguments = [*named, *labels, *placed, "quantization_config=nf4"]
    else:
        arguments = [*named, *labels, *placed]
    lines.append(f"base = {model_class}.from_pretrained(\n    {', '.join(arguments)}\n)")
    if model_class == "AutoModelForSequenceClassification":
        lines.append("base.config.pad_token_id = tokenizer.pad_token_id")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _block(*parts: str) -> str:
    return "```python\n" + "\n\n".join(parts) + "\n```"
