"""Loading: 4 bits are 4 bits, pad is not EOS, nothing is unpickled, and errors say what to do."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import httpx
import huggingface_hub.errors as hub
import pytest
import tokenizers
import torch
import transformers
from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary

from lora_rlhf.base.embedded import build_tiny_model
from lora_rlhf.base.loading import chosen_backend, explained, load_causal_lm, load_reward_model, resolved_model
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError

MakeConfig = Callable[..., RunConfig]
LOADERS = {
    "tokenizer": load_tokenizer,
    "causal_lm": load_causal_lm,
    "reward_model": lambda config: load_reward_model(config, 2),
}
of_each_model = pytest.mark.parametrize("loader", ["causal_lm", "reward_model"])
of_each_loader = pytest.mark.parametrize("loader", LOADERS)


@pytest.fixture
def copy_of_tiny(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def quantised(model: Any) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


# Precision


@pytest.mark.parametrize("loader", ["causal_lm", "reward_model"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bits_are_truly_four_bits(make_config: MakeConfig, loader: str, dtype: str) -> None:
    model = LOADERS[loader](make_config(dtype=dtype))
    layers = quantised(model)
    assert len(layers) == 2 * 7
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() * 2 == layer.in_features * layer.out_features
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested  # double quantisation
        assert layer.compute_dtype == getattr(torch, dtype)
    plain = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert plain == ["lm_head" if loader == "causal_lm" else "score"]


def test_a_base_in_four_bits_stays_differentiable_after_a_forward_without_gradient(make_config: MakeConfig) -> None:
    model = load_causal_lm(make_config())
    states = torch.randn(1, 3, 64, requires_grad=True)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        before = layer(states)
    after = layer(states)
    after.sum().backward()
    assert torch.equal(before, after)
    assert states.grad is not None
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(states.grad, weight.sum(0).expand_as(states), rtol=1e-4, atol=1e-5)


@of_each_model
def test_without_four_bits_nothing_is_quantised(make_config: MakeConfig, loader: str) -> None:
    model = LOADERS[loader](make_config(load_in_4bit=False))
    assert quantised(model) == []
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_for_generation_comes_in_eval_mode(make_config: MakeConfig) -> None:
    assert not load_causal_lm(make_config()).training


def test_the_reward_head_starts_at_the_deviation_of_the_paper(make_config: MakeConfig, tmp_path: Path) -> None:
    build_tiny_model(tmp_path, hidden_size=1024, num_hidden_layers=1, intermediate_size=64)
    torch.manual_seed(0)
    weight = load_reward_model(make_config(model_name_or_path=str(tmp_path)), 2).score.weight
    assert weight.shape == (1, 1024)
    assert weight.std().item() == pytest.approx(1 / 1025**0.5, rel=0.1)


# Tokenizers


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_pad_is_not_eos(make_config: MakeConfig, copy_of_tiny: Path, pad: str | None) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy_of_tiny)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(copy_of_tiny)
    saved = transformers.AutoTokenizer.from_pretrained(copy_of_tiny)
    assert saved.pad_token_id in (None, saved.eos_token_id)

    loaded = load_tokenizer(make_config(model_name_or_path=str(copy_of_tiny)))
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)
    assert len(loaded) == len(saved)


def test_a_spare_special_token_pads_where_bos_eos_and_unk_are_one(make_config: MakeConfig, tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [], unk_token=None))
    words.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<empty_output>"])
    end = "<|endoftext|>"
    template = "<|im_start|>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=end, eos_token=end, unk_token=end, chat_template=template
    ).save_pretrained(tmp_path)
    transformers.LlamaConfig().save_pretrained(tmp_path)
    loaded = load_tokenizer(make_config(model_name_or_path=str(tmp_path)))
    assert loaded.pad_token == "<empty_output>"


def test_a_pad_of_its_own_is_kept(make_config: MakeConfig) -> None:
    assert load_tokenizer(make_config()).pad_token == "<pad>"


def test_a_tokenizer_without_eos_is_refused(make_config: MakeConfig, copy_of_tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy_of_tiny)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(copy_of_tiny)
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(make_config(model_name_or_path=str(copy_of_tiny)))


# Folders


@of_each_loader
@pytest.mark.parametrize("name", ["./away", "/away/from/here", "../away", "a/b/c"])
def test_a_missing_folder_is_named(make_config: MakeConfig, loader: str, name: str) -> None:
    with pytest.raises(UserError, match="model_name_or_path: no folder") as error:
        LOADERS[loader](make_config(model_name_or_path=name))
    assert name in str(error.value)


@of_each_loader
@pytest.mark.parametrize(
    "files",
    [
        {},
        {"README.md": "about"},
        {"config.json": "{"},
        {"config.json": "{}"},
        {"config.json": '{"model_type": "no-such-type"}'},
        {"config.json": '{"model_type": "mistral"}'},
        {"config.json": '{"model_type": "vit"}', "model.safetensors": ""},
    ],
    ids=lambda files: "+".join(files) or "empty",
)
def test_a_folder_that_is_no_model_is_named(
    make_config: MakeConfig, tmp_path: Path, loader: str, files: dict[str, str]
) -> None:
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_text(content)
    with pytest.raises(UserError, match="holds no model that transformers can load|is no causal language model"):
        LOADERS[loader](make_config(model_name_or_path=str(tmp_path / "folder"), load_in_4bit=False))


@of_each_model
def test_torn_weights_are_named(make_config: MakeConfig, copy_of_tiny: Path, loader: str) -> None:
    weights = copy_of_tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(UserError) as error:
        LOADERS[loader](make_config(model_name_or_path=str(copy_of_tiny)))
    assert str(copy_of_tiny) in str(error.value)


def test_a_torn_tokenizer_is_named(make_config: MakeConfig, copy_of_tiny: Path) -> None:
    file = copy_of_tiny / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError) as error:
        load_tokenizer(make_config(model_name_or_path=str(copy_of_tiny)))
    assert str(copy_of_tiny) in str(error.value)


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@of_each_model
@pytest.mark.parametrize("trapped", [True, False])
def test_python_pickles_are_not_loaded(
    make_config: MakeConfig, copy_of_tiny: Path, tmp_path: Path, loader: str, trapped: bool
) -> None:
    weights = transformers.AutoModelForCausalLM.from_pretrained(copy_of_tiny).state_dict()
    torch.save({"trap": Trap(tmp_path / "made")} if trapped else weights, copy_of_tiny / "pytorch_model.bin")
    (copy_of_tiny / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no model"):
        LOADERS[loader](make_config(model_name_or_path=str(copy_of_tiny)))
    assert not (tmp_path / "made").exists()


@of_each_loader
def test_code_that_comes_with_a_model_is_not_run(
    make_config: MakeConfig, copy_of_tiny: Path, tmp_path: Path, loader: str
) -> None:
    code = f"import os\nos.mkdir({str(tmp_path / 'made')!r})\n"
    (copy_of_tiny / "own.py").write_text(code)
    config = json.loads((copy_of_tiny / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {
        name: "own.Own" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    }
    (copy_of_tiny / "config.json").write_text(json.dumps(config))
    held = json.loads((copy_of_tiny / "tokenizer_config.json").read_text())
    held |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (copy_of_tiny / "tokenizer_config.json").write_text(json.dumps(held))
    try:
        LOADERS[loader](make_config(model_name_or_path=str(copy_of_tiny)))
    except UserError as error:
        assert str(copy_of_tiny) in str(error)
    assert not (tmp_path / "made").exists()


# The Hub


@of_each_loader
def test_an_unknown_hub_name_without_network_says_what_to_do(make_config: MakeConfig, loader: str) -> None:
    with pytest.raises(UserError) as error:
        LOADERS[loader](make_config(model_name_or_path="someone/no-such-model-at-all"))
    for words in ("someone/no-such-model-at-all", "network", "--model_name_or_path embedded"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def refusal(kind: type[hub.HfHubHTTPError], status: int) -> hub.HfHubHTTPError:
    request = httpx.Request("GET", "https://huggingface.co/some/model/resolve/main/config.json")
    return kind(f"{status} Client Error.\nMore lines.", response=httpx.Response(status, request=request))


def as_transformers_wraps_it(error: Exception) -> OSError:
    try:
        raise OSError("You are trying to access ...\nMore lines.") from error
    except OSError as wrapped:
        return wrapped


HUB_ERRORS = [
    (refusal(hub.GatedRepoError, 403), "is gated: accept its terms on its Hub page, then run `hf auth login`"),
    (refusal(hub.RepositoryNotFoundError, 404), "is not on the Hub .*check model_name_or_path"),
    (refusal(hub.RevisionNotFoundError, 404), "model_revision: some/model has no revision v9"),
    (hub.LocalEntryNotFoundError("No network, and not in the cache."), "Check the name and the network"),
    (hub.OfflineModeIsEnabled("Offline mode is enabled."), "Check the name and the network"),
    # raised bare when the network is lost in the middle of a download
    (httpx.ConnectError("Name or service not known"), "Check the name and the network"),
    (httpx.ReadTimeout("The read operation timed out"), "Check the name and the network"),
]


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize(("raised", "advice"), HUB_ERRORS, ids=lambda value: type(value).__name__)
def test_what_the_hub_refuses_becomes_advice(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, raised: Exception, advice: str, wrapped: bool
) -> None:
    def from_pretrained(*_: Any, **__: Any) -> None:
        raise as_transformers_wraps_it(raised) if wrapped else raised

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match=advice) as error:
        load_causal_lm(make_config(model_name_or_path="some/model", model_revision="v9"))
    assert "some/model" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loader", ["tokenizer", "causal_lm"])
def test_a_hub_repository_that_transformers_cannot_load_is_named(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    def from_pretrained(*_: Any, **__: Any) -> None:  # a repository without tokenizer, or of an unknown model_type
        raise ValueError("Couldn't instantiate the backend tokenizer from one of:\n(1) ...")

    for auto in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    with pytest.raises(UserError) as error:
        LOADERS[loader](make_config(model_name_or_path="some/model"))
    assert "some/model" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_of_our_own_making_is_not_explained_away(make_config: MakeConfig) -> None:
    with pytest.raises(KeyError), explained("some/model", make_config()):
        raise KeyError("a bug")


def test_names_of_the_two_models_without_hub_become_folders(cache: Path) -> None:
    assert Path(resolved_model("tiny")).parent == cache
    assert (Path(resolved_model("tiny")) / "model.safetensors").is_file()
    assert resolved_model("some/model") == "some/model"


# Machines and backends


@pytest.mark.parametrize("loader", ["causal_lm", "reward_model"])
def test_four_bits_without_the_native_library_say_what_to_do(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    monkeypatch.setattr("bitsandbytes.cextension.lib", ErrorHandlerMockBNBNativeLibrary("no library"))
    with pytest.raises(UserError) as error:
        LOADERS[loader](make_config())
    assert "no native library" in str(error.value)
    assert "load_in_4bit: false" in str(error.value)
    assert LOADERS[loader](make_config(load_in_4bit=False))


def test_a_model_that_did_not_come_in_four_bits_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, complete = load_causal_lm(make_config(load_in_4bit=False)), {"missing_keys": [], "mismatched_keys": []}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (whole, complete))
    with pytest.raises(UserError, match=r"was not loaded in 4 bits \(0 of 14 layers\).*load_in_4bit: false"):
        load_causal_lm(make_config())


@pytest.fixture
def unsloth(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Say whether unsloth is installed."""
    real = importlib.util.find_spec

    def pretend(installed: bool) -> None:
        spec = importlib.util.spec_from_loader("unsloth", loader=None) if installed else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: spec if n == "unsloth" else real(n, *a))

    return pretend


def test_unsloth_where_it_is_not_installed_says_how_to_install_it(make_config: MakeConfig, unsloth: Any) -> None:
    unsloth(False)
    with pytest.raises(UserError, match=r"backend: unsloth is not installed: pip install"):
        load_causal_lm(make_config(backend="unsloth"))


@pytest.mark.parametrize(
    ("backend", "installed", "cuda", "chosen"),
    [
        ("auto", True, True, "unsloth"),
        ("auto", True, False, "transformers"),
        ("auto", False, True, "transformers"),
        ("transformers", True, True, "transformers"),
        ("unsloth", True, False, "unsloth"),
    ],
)
def test_auto_is_unsloth_on_cuda_where_it_is_installed(
    make_config: MakeConfig,
    unsloth: Any,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    installed: bool,
    cuda: bool,
    chosen: str,
) -> None:
    unsloth(installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert chosen_backend(make_config(backend=backend)) == chosen
