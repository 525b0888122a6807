"""Loading the 4-bit base, and what a run names in its place, with errors that say what to do."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors import SafetensorError

from lora_rlhf.base.backend_check import reads_causally
from lora_rlhf.base.devices import check_device, device
from lora_rlhf.base.embedded import embedded_model_folder, tiny_model_folder
from lora_rlhf.base.prequantized import (
    BASE_SETTING,
    NEVER_QUANTIZED,
    UNGATED_COPIES,
    checked_quantization,
    compute_in,
    is_quantized,
)
from lora_rlhf.base.text_part import TEXT_WEIGHTS, text_config
from lora_rlhf.config import EMBEDDED, TINY, RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.memory_peak import ran_out, return_freed_memory


def resolved_model(name: str, setting: str = BASE_SETTING) -> str:
    """Return what `from_pretrained` is given for a model name: the folder of `embedded` and `tiny`, else the name.

    Raises:
        UserError: it is a folder that is not there (`setting` is said to name it), or asks for code from the Hub.
    """
    if name == EMBEDDED:
        return str(embedded_model_folder())
    if name == TINY:
        return str(tiny_model_folder())
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UserError(f"{setting}: no folder {name}")
    _check_kernels(Path(name))
    return name


def _check_kernels(folder: Path) -> None:
    """Raise `UserError` where the config of a model folder asks transformers to fetch code: attention from the Hub."""
    try:
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # no folder, or one that loading finds damaged
    for name, value in held.items() if isinstance(held, dict) else ():
        if name.endswith("_implementation") and "/" in str(value):
            raise UserError(
                f"{folder / 'config.json'}: {name} names code on the Hub ({str(value)[:80]}): it is not run"
            )


def model_config(config: RunConfig, name: str | None = None, setting: str = BASE_SETTING, **fields: Any) -> Any:
    """Return the transformers config of a model, fitted to the run where the weights are quantised already.

    Of a model that takes images too it is the config of the text model inside.

    Args:
        config: the run's config.
        name: another model than the run's base.
        setting: that names the model, for errors.
        fields: of the transformers config, that are set.

    Raises:
        UserError: it cannot be had, is no causal language model, or its weights are quantised in a way that cannot be
            a base.
    """
    from transformers import AutoConfig

    source = resolved_model(name or config.model_name_or_path, setting)
    if (Path(source) / "adapter_config.json").is_file():  # transformers would load the base that it names, and add it
        wanted = "a whole model is wanted" if name else "name the model that it was trained on"
        raise UserError(f"{setting}: {source} is an adapter; {wanted}")
    revision = None if name else config.model_revision
    with explained(source, config, setting):
        found = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, **fields)
        text = text_config(found, source, setting)
        if text is not found:  # whether the head is the embeddings, the outer config says, where it says it
            stated, _ = type(found).get_config_dict(source, revision=revision)
            if isinstance(tied := stated.get("tie_word_embeddings"), bool):
                text.tie_word_embeddings = tied
    found = text
    for field, value in fields.items():  # the text model inside has not got them
        setattr(found, field, value)
    if (held := getattr(found, "quantization_config", None)) is not None:
        found.quantization_config = checked_quantization(source, held, config.load_in_4bit, config.dtype, setting)
    return found


def load_causal_lm(config: RunConfig, name: str | None = None, setting: str = BASE_SETTING) -> Any:
    """Return the causal language model, in NF4 where the config says so, in eval mode on `device()`.

    Args:
        config: the run's config.
        name: another model than the run's base.
        setting: that names the model, for errors.

    Raises:
        UserError: not on the Hub, gated, no network, no 4-bit to be had, the backend is not installed, or the card does
            not know the dtype.
    """
    from transformers import AutoModelForCausalLM

    check_device(config)
    source = resolved_model(name or config.model_name_or_path, setting)
    revision = None if name else config.model_revision
    found = model_config(config, name, setting)
    if chosen_backend(config) == "unsloth":
        return _load_with_unsloth(source, revision, config)
    with explained(source, config, setting), quiet_transformers():
        model, report = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, output_loading_info=True, **loading_arguments(config, found)
        )
    _check_complete(report, source)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # whatever its config said: merged weights are saved with it
    return _without_mapped_file(_checked(model, config, source)).eval()


def _check_complete(report: dict[str, Any], source: str) -> None:
    """Raise `UserError` where transformers had to invent weights, which it does without an error."""
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} tensors of the model that its config.json describes, or has them in "
            f"another shape (the first is {missing[0]}): the files are not of this model, or not all of it"
        )


def load_reward_model(config: RunConfig, pad_token_id: int) -> Any:
    """Return the base as a one-output sequence classifier for reward training; the head starts at std 1/√(d+1).

    Source of the initialisation: Huang et al. 2024, detail on reward heads.
    """
    from transformers import AutoModelForSequenceClassification

    check_device(config)
    source = resolved_model(config.model_name_or_path)
    found = model_config(config, num_labels=1)
    with explained(source, config), quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            source, revision=config.model_revision, **loading_arguments(config, found)
        )
    model.config.pad_token_id = pad_token_id
    torch.nn.init.normal_(model.score.weight, std=1 / (model.score.weight.shape[1] + 1) ** 0.5)
    return _checked(model, config, source)


def loading_arguments(config: RunConfig, found: Any) -> dict[str, Any]:
    """Return the `from_pretrained` arguments of the run's precision.

    That is NF4 with double quantisation, or plain; a checkpoint in 4 bits stays as it is.

    Args:
        config: the run's config.
        found: the model's, from `model_config`.
    """
    dtype = getattr(torch, config.dtype)
    arguments: dict[str, Any] = {
        "config": found, "dtype": dtype, "device_map": {"": device()}, "trust_remote_code": False,
        "use_safetensors": True, "key_mapping": TEXT_WEIGHTS,
    }  # fmt: skip
    if config.load_in_4bit:
        check_4bit()
    if config.load_in_4bit and getattr(found, "quantization_config", None) is None:
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(NEVER_QUANTIZED),
        )
    return arguments


def check_4bit() -> None:
    """Raise `UserError` where bitsandbytes is missing or has no native library for this machine."""
    advice = "install bitsandbytes>=0.50 for this platform, or set load_in_4bit: false (four times the memory)"
    try:
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except ImportError as error:
        raise UserError(f"load_in_4bit: bitsandbytes cannot be imported ({error}); {advice}") from None
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        raise UserError(f"load_in_4bit: bitsandbytes has no native library for this machine; {advice}")


def chosen_backend(config: RunConfig) -> str:
    """Return `transformers` or `unsloth`; `auto` is unsloth on CUDA where it is installed."""
    installed = importlib.util.find_spec("unsloth") is not None
    if config.backend == "auto":
        return "unsloth" if installed and torch.cuda.is_available() else "transformers"
    if config.backend == "unsloth" and not installed:
        raise UserError(
            "backend: unsloth is not installed: pip install -c constraints.txt -e '.[unsloth]' (or backend: auto)"
        )
    return config.backend


def _load_with_unsloth(source: str, revision: str | None, config: RunConfig) -> Any:
    from unsloth import FastLanguageModel

    with explained(source, config):
        model, _ = FastLanguageModel.from_pretrained(
            source,
            revision=revision,
            max_seq_length=config.max_length + config.ppo.response_length,
            dtype=getattr(torch, config.dtype),
            load_in_4bit=config.load_in_4bit,
            trust_remote_code=False,
            use_exact_model_name=True,
        )
    model = _checked(model, config, source).eval()
    if not reads_causally(model):
        raise UserError(
            "backend: this version of unsloth looks ahead where no mask is given, so that PPO would learn from wrong "
            "numbers; set backend: transformers"
        )
    return model


def check_float16_range(model: Any, source: str) -> None:
    """Raise `UserError` where a float16 weight of `model` is infinite: it was too large in `source`."""
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float16 and not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"dtype: {name} of {source} holds numbers beyond float16's 65504; set dtype: float32, or use a "
                "card that has bfloat16"
            )


def _checked(model: Any, config: RunConfig, source: str) -> Any:
    """Return `model` after making sure that it is truly in 4 bits, and that it stays differentiable on the CPU.

    In float16 also that no number of it was too large.
    """
    check_float16_range(model, source)
    if not config.load_in_4bit:
        return model
    import bitsandbytes

    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    published = getattr(model.config, "quantization_config", None)
    published = None if published is None else published.to_dict()
    whole = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and is_quantized(published, n)]
    packed = [m for m in layers if m.weight.dtype == torch.uint8 and m.weight.quant_state is not None]
    if not layers or whole or len(packed) != len(layers):
        raise UserError(
            f"load_in_4bit: {source} was not loaded in 4 bits ({len(packed)} of {len(layers) + len(whole)} layers): "
            "only torch's own linear layers are packed. Set load_in_4bit: false, or choose another model"
        )
    for layer in layers:
        # On the CPU, bitsandbytes repacks a weight at its first forward without gradient, for a kernel that has no
        # backward: gradients after the first rollout would be silently wrong.
        layer.support_avx512bf16_for_cpu = False
        compute_in(layer, getattr(torch, config.dtype))
    return model


def _without_mapped_file(model: Any) -> Any:
    """Return `model` with its own copy of what was not quantised: a view into the file would keep all of it mapped."""
    if model.device.type == "cpu":
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point:
                parameter.data = parameter.data.clone()
    return_freed_memory()
    return model


@contextlib.contextmanager
def explained(source: str, config: RunConfig, setting: str = BASE_SETTING) -> Iterator[None]:
    """Turn what transformers and the Hub raise while loading `source` into a `UserError` that says what to do.

    Args:
        source: what is loaded.
        config: the run's config.
        setting: that names `source`.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError | ValueError | httpx.HTTPError | SafetensorError)
        ours = isinstance(error, UserError | ImportError | torch.AcceleratorError)
        if ran_out(error) or (not known and (ours or not Path(source).is_dir())):  # a damaged folder may raise anything
            raise
        chain: list[BaseException] = []
        link: BaseException | None = error
        while link is not None and link not in chain:
            chain.append(link)
            link = link.__cause__ or link.__context__
        text = " ".join(str(error).split())[:300] or type(error).__name__
        if any(isinstance(e, GatedRepoError) for e in chain):
            advice = f"{source} is gated: accept its terms on its Hub page, then run `hf auth login`"
            if copy := UNGATED_COPIES.get(source):
                advice += f". {copy} is a copy of it in 4 bits that is not gated; name that instead"
        elif any(isinstance(e, RevisionNotFoundError) for e in chain):
            advice = f"model_revision: {source} has no revision {config.model_revision}"
        elif any(isinstance(e, RepositoryNotFoundError) for e in chain):
            advice = f"{source} is not on the Hub (or is private: `hf auth login`); check {setting}"
        elif any(isinstance(e, RemoteEntryNotFoundError) for e in chain):
            advice = f"{source} on the Hub is no model that transformers loads (an adapter? another format?): {text}"
        elif Path(source).is_dir():
            advice = f"{source} holds no model that transformers can load: {text}"
        elif isinstance(error, OSError | httpx.HTTPError):
            advice = (
                f"{source} is no folder here and could not be had from the Hub. Check the name and the network, "
                "or run once with the network on and later with HF_HUB_OFFLINE=1; "
                "--model_name_or_path embedded needs no Hub"
            )
        else:
            advice = f"{source} cannot be loaded by transformers: {text}"
        raise UserError(advice) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' progress bars and load reports; an error takes along what a report would have told."""
    from transformers.utils import logging as hf_logging

    level, shown = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    # bitsandbytes warns at import that the optional Hub kernels are not installed; we never load code from the Hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        yield
    except RuntimeError as error:
        if cause := _first_conversion_error(error):
            error.add_note(cause)
        raise
    finally:
        hf_logging.set_verbosity(level)
        if shown:
            hf_logging.enable_progress_bar()


def _first_conversion_error(error: RuntimeError) -> str | None:
    """Return what went wrong with the first weight that transformers could not convert, or none.

    It keeps such errors, memory that ran out too, for a report in its log, and raises one that only points there.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        kept = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
        if kept:
            return str(next(iter(kept.values())))
    return None
