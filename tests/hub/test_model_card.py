"""The model card: what the Hub asks of it, figures that are the run's own, and code that runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from card_check import card_faults
from hub_server import HubServer
from hub_state import TOKEN
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from recipe_runs import ROOT
from test_hub import Push, add_claim

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm, resolved_model
from lora_rlhf.base.shared import REWARD, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.config_file import config_from_file
from lora_rlhf.hub.base_origin import BaseOrigin, Licence, base_origin, portable_name
from lora_rlhf.hub.claims import Claim
from lora_rlhf.hub.folder import portable_config
from lora_rlhf.hub.model_card import CardFacts, Kind, model_card

SUMMARY: dict[str, Any] = {
    "arms": {
        name: {
            "reward_mean": 0.5 * i, "reward_sem": 0.1, "win_rate_vs_base": 0.5 + 0.123456 * i, "kl_to_base": 3.25 * i,
            "ended_rate": 0.75, "bad_word_rate": 0.015, "n": 37,
        }
        for i, name in enumerate(("base", "instruct", "plus"))
    },
    "reward_model": {"accuracy": 0.71875, "n": 64},
    "ppo": {"steps": 7, "episodes": 448, "stopped_early": None},
    "merge": {"target": "dequantized", "drift": {"original": 0.21, "dequantized": 0.001}},
    "versions": {"torch": "2.13.0"},
}  # fmt: skip
CLAIM = Claim("chats better than base", "plus", "reward of the referee", 37, "holds", 1.25, 0.5, 2.0)
KINDS: tuple[Kind, ...] = ("adapter", "merged", "reward")
ORIGINS = {
    "hub": BaseOrigin("hub", "mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1", "f" * 40, Licence("apache-2.0")),
    "embedded": base_origin("embedded", None, ask_hub=False),
    "tiny": base_origin("tiny", None, ask_hub=False),
    "folder": BaseOrigin("folder", "./my-base", None, None, None),
}


def facts(kind: Kind = "adapter", origin: str = "embedded", **changed: Any) -> CardFacts:
    config = changed.pop("config", RunConfig())
    held = CardFacts("you/plus", kind, config, ORIGINS[origin], SUMMARY, [CLAIM])
    return replace(held, **changed)


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)


# What the Hub asks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_the_hub_accepts_the_card(validation: None, kind: Kind, origin: str) -> None:
    ModelCard(model_card(facts(kind, origin))).validate()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("license: apache-2.0", "license: Apache 2.0"),
        ("license: apache-2.0", "license: other"),
        ("base_model: HuggingFaceTB/SmolLM2-135M-Instruct", "base_model: ./my base"),
        ("library_name: peft", "library_name: [peft]"),
        ("      type: lora_rlhf-embedded\n", ""),
        ("tags:", "labels:"),
    ],
)
def test_the_stand_in_refuses_a_wrong_card(before: str, after: str) -> None:
    card = model_card(facts())
    assert before in card
    assert card_faults(card) == []
    assert card_faults(card.replace(before, after, 1))


def test_a_refused_card_is_an_error_of_the_client(validation: None) -> None:
    card = ModelCard(model_card(facts()))
    card.data.license = "Apache 2.0"
    with pytest.raises(ValueError, match="license is an identifier"):
        card.validate()


@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_of_the_front_matter_are_the_runs(tmp_path: Path, kind: Kind) -> None:
    (tmp_path / "README.md").write_text(model_card(facts(kind)))
    data = ModelCard.load(tmp_path / "README.md").data
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == "plus"
    assert results == data.eval_results
    found = {result.metric_type: result.metric_value for result in results}
    if kind == "reward":
        assert found == {"accuracy": 0.7188}
        assert "n = 64" in results[0].metric_name
        return
    assert found == {
        "reward": 1.0, "win_rate": 0.7469, "kl_divergence": 6.5, "ended_rate": 0.75, "bad_word_rate": 0.015,
        "difference": 1.25,
    }  # fmt: skip
    assert all("n = 37" in result.metric_name for result in results)
    assert [result.dataset_type for result in results] == ["lora_rlhf-embedded"] * 5 + ["lora_rlhf-evaluation"]
    assert results[-1].metric_name.endswith("interval [+0.5, +2] (n = 37): holds")


def test_the_card_of_a_reward_says_what_it_falls_for() -> None:
    held = {"accuracy": 0.75, "n": 64, "against_spoilt": {"stub": 0.98, "word salad": 0.5}}
    card = model_card(facts("reward", summary=SUMMARY | {"reward_model": held}))
    assert "above a spoilt one, by the kind of spoilt answer: stub 98%, word salad 50%." in card
    assert "spoilt" not in model_card(facts("reward"))


def test_figures_that_are_not_numbers_are_left_out() -> None:
    arms = {name: arm | {"kl_to_base": None} for name, arm in SUMMARY["arms"].items()}
    unclear = replace(CLAIM, low=None, high=None, verdict="cannot tell")
    card = model_card(facts(summary=SUMMARY | {"arms": arms}, claims=[unclear]))
    assert "kl_divergence" not in card
    assert "+1.25 [?, ?]" in card
    assert "nan" not in card
    assert card_faults(card) == []


def test_the_tables_say_what_was_measured() -> None:
    card = model_card(facts())
    assert "| **Plus** (this model) | +1.00 ± 0.10 | 75% | 6.50 | 75% | 2% | 37 |" in card
    assert (
        "| chats better than base | **Plus** (this model) | reward of the referee | +1.25 [+0.5, +2] | 37 | holds |"
        in card
    )
    assert "right on 71.9% of 64 held-out pairs" in card
    assert "7 steps of PPO (448 sampled answers)" in card
    assert "| Instruct (SFT) | +0.50 ± 0.10 | 62% |" in card
    assert "2403.02513" in card
    named = model_card(facts(config=RunConfig(instruct_model_name_or_path="some/instruct")))
    assert "| `some/instruct` | +0.50" in named
    assert "was not evaluated" not in card
    assert "was not evaluated" in model_card(facts(claims=[]))


# Base and licence


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: mit\n---\n# A model\n", Licence("mit")),
        (
            "---\nlicense: other\nlicense_name: acme\nlicense_link: LICENSE\n---\n",
            Licence("other", "acme", "LICENSE"),
        ),
        ("---\nlicense:\n- cc-by-4.0\n---\n", Licence("cc-by-4.0")),
        ("---\nlicense: Acme Licence (v2)\n---\n", Licence("other", "acme-licence-v2")),
        ("# A model under the MIT licence\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
    ],
)
def test_a_folders_licence_is_what_its_card_states(tmp_path: Path, readme: str, expected: Licence | None) -> None:
    (tmp_path / "README.md").write_text(readme)
    origin = base_origin(str(tmp_path), None, ask_hub=False)
    assert (origin.kind, origin.name, origin.licence) == ("folder", f"./{tmp_path.name}", expected)


def test_the_licence_of_a_model_on_the_hub_is_read_there(hub: HubServer) -> None:
    hub.create("some/base", {"README.md": b"---\nlicense: gemma\n---\n"})
    hub.create("some/bare", {"config.json": b"{}"})
    assert base_origin("some/base", None, ask_hub=False).licence is None
    assert hub.requests == []
    assert base_origin("some/base", None, ask_hub=True).licence == Licence("gemma")
    assert base_origin("some/base", None, ask_hub=False).licence == Licence("gemma")  # from the cache
    assert base_origin("some/bare", None, ask_hub=True).licence is None
    assert base_origin("some/none", None, ask_hub=True).licence is None
    assert base_origin("mistralai/Mistral-7B-v0.1", None, ask_hub=True).licence == Licence("apache-2.0")


def test_an_unknown_licence_is_not_made_up() -> None:
    card = model_card(facts(origin="folder"))
    assert "license: other\nlicense_name: unknown" in card
    assert "could not be found" in card
    assert "apache" not in card


def test_a_licence_with_a_name_is_handed_on() -> None:
    origin = replace(ORIGINS["hub"], licence=Licence("other", "acme", "https://example.org/licence"))
    card = model_card(facts(origin="hub")).replace("apache-2.0", "")
    assert "acme" not in card
    card = model_card(replace(facts(), origin=origin))
    assert "license: other\nlicense_name: acme\nlicense_link: https://example.org/licence" in card
    assert "inherited from the base model: other, acme (https://example.org/licence)" in card


def test_a_snapshot_in_the_hubs_cache_has_its_name_back() -> None:
    path = f"/home/someone/.cache/huggingface/hub/models--mistralai--Mistral-7B-v0.1/snapshots/{'a' * 40}"
    origin = base_origin(path, None, ask_hub=False)
    assert (origin.kind, origin.name, origin.revision) == ("hub", "mistralai/Mistral-7B-v0.1", "a" * 40)
    assert portable_config(RunConfig(model_name_or_path=path), origin).model_name_or_path == origin.hub_name


@pytest.mark.parametrize(
    ("name", "portable"),
    [
        ("embedded", "embedded"),
        ("Anthropic/hh-rlhf:harmless-base", "Anthropic/hh-rlhf:harmless-base"),
        ("/home/someone/data/hh:harmless-base", "./hh:harmless-base"),
        ("~/data/pairs.jsonl", "./pairs.jsonl"),
        ("../someone/pairs", "./pairs"),
        ("secret/pairs.jsonl", "./pairs.jsonl"),
        (r"C:\Users\someone\pairs", "./pairs"),
        ("/home/someone/rewards.py:short", "./rewards.py:short"),
    ],
)
def test_published_names_hold_no_path(name: str, portable: str) -> None:
    assert portable_name(name) == portable


def test_a_config_of_local_things_is_published_without_their_places() -> None:
    config = RunConfig(
        output_dir="/home/someone/runs/x",
        model_name_or_path="/home/someone/base",
        instruct_model_name_or_path="/home/someone/instruct",
        chat_template="/home/someone/chat.jinja",
        dataset_name=["/home/someone/pairs.jsonl", "Anthropic/hh-rlhf"],
    )
    config.ppo.reward_sources = [{"kind": "function", "path": "/home/someone/r.py:f"}]
    config.compare.bad_words_file = "/home/someone/words.txt"
    shown = portable_config(config, base_origin(config.model_name_or_path, None, ask_hub=False))
    assert "someone" not in repr(shown)
    card = model_card(facts(config=shown))
    assert "datasets:\n- Anthropic/hh-rlhf\n" in card
    assert "The data was local and is not published with the model: `./pairs.jsonl`." in card


# The code


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_every_block_is_python_and_loads_safely(kind: Kind, origin: str) -> None:
    blocks = code_blocks(model_card(facts(kind, origin)))
    assert len(blocks) == {"adapter": 3, "merged": 2, "reward": 1}[kind]
    for block in blocks:
        compile(block, "card", "exec")
        assert '"you/plus"' in block
        assert "trust_remote_code" not in block
    if origin == "folder" and kind != "merged":
        assert all("./my-base" in block for block in blocks)
    if origin == "hub" and kind != "merged":
        assert all('"mistralai/Mistral-7B-v0.1", ' in block for block in blocks if "load_plus" not in block)
        assert all(f'revision="{"f" * 40}"' in block for block in blocks if "load_plus" not in block)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_card_of_a_run_with_stop_strings_passes_them_on(kind: Kind) -> None:
    stops = ["\n\nHuman:", 'a "quoted" one']
    config = RunConfig()
    assert "stop" not in model_card(facts(kind, config=config)).partition("## Results")[0]
    config.ppo.stop_strings = stops
    card = model_card(facts(kind, config=config))
    assert "In training, an answer ended at EOS or before the first of these stop strings." in card
    for block in code_blocks(card):
        compile(block, "card", "exec")
        space: dict[str, Any] = {}
        (line,) = re.findall(r"^stop_strings = .*$", block, re.MULTILINE)
        exec(line, space)
        assert space["stop_strings"] == stops
        assert "max_new_tokens=64, stop_strings=stop_strings, tokenizer=tokenizer)" in block


def test_the_blocks_of_a_pushed_card_load_the_trained_model(
    hub: HubServer, pushed: Push, loud_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from test_load_plus import logits

    pushed(loud_run, "--reward_repo_id", "you/reward")
    pushed(loud_run, "--merged", repo_id="you/merged")
    found: dict[str, list[Any]] = {}
    for name in ("plus", "merged", "reward"):
        for block in code_blocks(hub.repositories[f"you/{name}"].head.files["README.md"].decode()):
            space: dict[str, Any] = {}
            capfd.readouterr()
            exec(compile(block, name, "exec"), space)
            assert capfd.readouterr().out.strip()
            found.setdefault(name, []).append(space)
    plus, peft, on_16_bits = (logits(space["model"], space["tokenizer"]) for space in found["plus"])
    with_plus, stock = (logits(space["model"], space["tokenizer"]) for space in found["merged"])
    # stock bitsandbytes may take a CPU kernel that rounds to bfloat16, which the package leaves out
    assert (plus - peft).abs().max() < 0.2
    assert (plus - on_16_bits).abs().max() > 1
    own, *others = (
        space["model"].get_base_model().config.quantization_config.to_dict()
        for space in (*found["plus"][:2], *found["reward"])
    )
    assert others == [own, own]
    assert torch.equal(on_16_bits, own_merged(loud_run, found["plus"][2]["tokenizer"]))
    assert torch.equal(with_plus, stock)
    (reward,) = found["reward"]
    assert score_of(reward) == pytest.approx(own_score(loud_run, reward["ids"]), abs=0.05)
    assert abs(score_of(reward)) > 0.5


def own_merged(run: Path, tokenizer: Any) -> torch.Tensor:
    """The logits of the run's own adapter, merged into the base's original weights."""
    from peft import PeftModel
    from test_load_plus import logits
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(resolved_model("tiny"))
    return logits(PeftModel.from_pretrained(base, str(run / "policy_adapter")).merge_and_unload().eval(), tokenizer)


def score_of(space: dict[str, Any]) -> float:
    with torch.no_grad():
        return space["model"](torch.tensor([space["ids"]])).logits.item()


def own_score(run: Path, ids: list[int]) -> float:
    """The score that the run itself gives, with its reward adapter on the shared base."""
    config = config_from_file(run / "config.yaml")
    base = SharedBase(load_causal_lm(config), lora_config(config.lora), torch.float32)
    base.load_adapter(REWARD, run / "reward_adapter")
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    return base.scores(REWARD, torch.tensor([ids]), mask, 1).item()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--merged",)])
def test_the_blocks_run_as_a_reader_runs_them(
    hub: HubServer, pushed: Push, finished_run: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    pushed(finished_run, *options)
    readme = hub.repositories["you/plus"].head.files["README.md"].decode()
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "fresh"), "HF_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for block in code_blocks(readme):
        command = [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_the_card_of_a_pushed_run_speaks_of_that_run(
    hub: HubServer, validation: None, pushed: Push, finished_run: Path
) -> None:
    add_claim(finished_run)
    pushed(finished_run)
    card = hub.repositories["you/plus"].head.files["README.md"].decode()
    ModelCard(card).validate()
    arm = json.loads((finished_run / "summary.json").read_text())["arms"]["plus"]
    assert f"{arm['reward_mean']:+.2f} ± {arm['reward_sem']:.2f}" in card
    assert "is as good as can be" in card
    assert "3 steps of PPO (24 sampled answers)" in card


def test_the_paper_in_the_card_is_the_one_that_is_cited() -> None:
    cited = (ROOT / "CITATION.cff").read_text()
    title = re.search(r'preferred-citation:.*?title: "(.*?)"', cited, re.DOTALL)
    assert title and title[1] in model_card(facts())
