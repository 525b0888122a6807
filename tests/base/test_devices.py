"""Devices: cards without bfloat16 are refused before anything is loaded, and GPUs that are not used are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lora_rlhf import load_plus
from lora_rlhf.base import devices
from lora_rlhf.base.devices import check_device
from lora_rlhf.base.loading import load_causal_lm, load_reward_model
from lora_rlhf.chat.loading import named_comparison, run_comparison
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_to_mapping
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.context import EvaluationSettings
from lora_rlhf.evaluation.evaluate import evaluate
from lora_rlhf.session import Session

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let this machine have a card; it says that it supports bfloat16, whatever it is, as torch does."""

    def put(name: str, capability: tuple[int, int]) -> None:
        answers: dict[str, Any] = {
            "is_available": True, "current_device": 0, "get_device_name": name, "get_device_capability": capability,
            "is_bf16_supported": True,
        }  # fmt: skip
        for asked, answer in answers.items():
            monkeypatch.setattr(torch.cuda, asked, lambda *_, answer=answer: answer)

    return put


@pytest.fixture(autouse=True)
def not_said_yet() -> Iterator[None]:
    devices._name_unused_gpu.cache_clear()
    yield
    devices._name_unused_gpu.cache_clear()


@pytest.mark.parametrize(
    ("name", "capability"), [("Tesla V100", (7, 0)), ("Tesla T4", (7, 5)), ("Quadro P6000", (6, 1))]
)
def test_a_card_that_emulates_bfloat16_is_refused(
    make_config: MakeConfig, card: Callable[..., None], name: str, capability: tuple[int, int]
) -> None:
    card(name, capability)
    with pytest.raises(UserError, match=rf"dtype: {name} has no bfloat16 \(compute capability {capability[0]}\."):
        check_device(make_config(dtype="bfloat16"))
    for dtype in ("float16", "float32"):
        check_device(make_config(dtype=dtype))


@pytest.mark.parametrize(("name", "capability"), [("A100", (8, 0)), ("RTX 4090", (8, 9)), ("RTX 5090", (12, 0))])
def test_later_cards_are_taken(
    make_config: MakeConfig, card: Callable[..., None], name: str, capability: tuple[int, int]
) -> None:
    card(name, capability)
    check_device(make_config(dtype="bfloat16"))


def test_amd_counts_otherwise(
    make_config: MakeConfig, card: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    card("gfx something", (7, 5))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    check_device(make_config(dtype="bfloat16"))


@pytest.mark.parametrize("entrance", ["a run", "a base", "a reward model"])
def test_it_is_said_before_anything_is_loaded(
    make_config: MakeConfig, card: Callable[..., None], monkeypatch: pytest.MonkeyPatch, entrance: str
) -> None:
    import transformers

    card("Tesla T4", (7, 5))
    for kind in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    config = make_config(dtype="bfloat16")
    enter: dict[str, Callable[[], Any]] = {
        "a run": lambda: Session.open(config),
        "a base": lambda: load_causal_lm(config),
        "a reward model": lambda: load_reward_model(config, 2),
    }
    with pytest.raises(UserError, match="Tesla T4 has no bfloat16"):
        enter[entrance]()


def test_what_is_advised_is_what_a_run_that_has_begun_allows(
    make_config: MakeConfig, card: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = make_config(dtype="bfloat16")
    with Session.open(begun).run.stage("base"):
        pass
    with pytest.raises(UserError, match="dtype.*output_dir"):
        Session.open(replace(begun, dtype="float16"))
    card("Tesla T4", (7, 5))
    with pytest.raises(UserError, match="A run that has finished a stage keeps its dtype: .* in another output_dir"):
        Session.open(begun)
    monkeypatch.undo()
    Session.open(replace(begun, dtype="float16", output_dir=f"{begun.output_dir}_again"))


class Loading(Exception):
    """Something is about to be loaded; with the config that says how."""


@pytest.mark.parametrize("entrance", ["demo", "demo of models", "evaluation", "load_plus"])
@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_models_that_only_answer_do_so_in_a_dtype_that_the_card_knows(
    make_config: MakeConfig, card: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], entrance: str, capability: tuple[int, int], dtype: str,
) -> None:  # fmt: skip
    """A run that was trained on another card can be talked to, and an adapter of it be loaded."""
    card("A card", capability)

    def loads(config: RunConfig, *_: Any, **__: Any) -> Any:
        raise Loading(config.dtype)

    config = make_config(dtype="bfloat16")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_to_mapping(config)))
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    settings = EvaluationSettings(output_dir=tmp_path)
    places: dict[str, tuple[str, Callable[[], Any]]] = {
        "demo": ("lora_rlhf.chat.loading.run_arms", lambda: run_comparison(tmp_path, 64, 8)),
        "demo of models": ("lora_rlhf.chat.loading.named_arms", lambda: named_comparison(config, {}, None, 64, 8)),
        "evaluation": ("lora_rlhf.evaluation.evaluate.run_arms", lambda: evaluate(settings)),
        "load_plus": ("lora_rlhf.plus.load_tokenizer", lambda: load_plus(tmp_path)),
    }
    place, enter = places[entrance]
    monkeypatch.setattr(place, loads)
    with pytest.raises(Loading, match=f"^{dtype}$"):
        enter()
    said = "float16 in place of bfloat16: A card has no bfloat16" in " ".join(capsys.readouterr().out.split())
    assert said == (dtype == "float16")


@pytest.mark.parametrize(("kind", "words"), [("mps", "Apple, mps"), ("xpu", "Intel, xpu")])
def test_a_gpu_that_is_not_used_is_named_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, words: str
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    for _ in range(2):
        check_device(make_config())
    printed = capsys.readouterr().out
    assert printed.count("is not used") == 1
    assert words in printed and "Everything runs on the CPU" in printed


@pytest.mark.parametrize("accelerator", [None, torch.device("cuda")])
def test_nothing_is_said_of_no_gpu_or_one_that_is_used(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], accelerator: Any
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    check_device(make_config())
    assert capsys.readouterr().out == ""
