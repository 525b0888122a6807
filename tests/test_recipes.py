"""The recipes as a user runs them, with the tiny config: what they leave, how they go on, and how they fail."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import ROOT, TINY, as_process, assert_one_line_of_error

from lora_rlhf.base.loading import resolved_model
from lora_rlhf.config_file import config_from_file
from lora_rlhf.run import LOCK

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
STAGES_OF_A_RUN = [path for path in RECIPES if path.name not in ("evaluate.py", "push_to_hub.py")]
ADAPTERS = ("reward_adapter", "instruct_adapter", "policy_adapter", "value_adapter")


@pytest.fixture
def summary(run_folder: Path) -> dict[str, Any]:
    return json.loads((run_folder / "summary.json").read_text())


# What a whole run leaves


def test_the_whole_pipeline_ends_well(whole_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    done = whole_run[1]
    assert done.returncode == 0, done.stdout + done.stderr
    stages = re.findall(r"^(base|reward|instruct|ppo|merge|compare)  ", done.stdout, re.MULTILINE)
    assert stages == ["base", "reward", "instruct", "ppo", "merge", "compare"]
    assert str(whole_run[0]) in done.stdout.splitlines()[-1]


def test_a_run_prints_nothing_but_its_own_text(whole_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert whole_run[1].stderr == ""
    assert "Warning" not in whole_run[1].stdout


def test_a_run_leaves_its_artefacts_and_nothing_else(run_folder: Path) -> None:
    left = {path.name for path in run_folder.iterdir()} - {LOCK}
    documented = {"config.yaml", "summary.json", "metrics.jsonl", "curves.png", "score_scales.json", "samples.json"}
    assert left == documented | {"pairs.json", "merged", "policy_snapshots", *ADAPTERS}
    # three steps are too few for the four policies that are kept by default: those of two steps are
    assert sorted(path.name for path in (run_folder / "policy_snapshots").iterdir()) == ["step_000001", "step_000002"]
    assert config_from_file(run_folder / "config.yaml").output_dir == str(run_folder)
    assert (run_folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_stands_alone_in_pefts_own_form(run_folder: Path, name: str) -> None:
    from safetensors import safe_open

    config = json.loads((run_folder / name / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    lora = config_from_file(run_folder / "config.yaml").lora
    assert set(config["target_modules"]) == set(lora.target_modules)
    with safe_open(run_folder / name / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert len([key for key in keys if "lora_" in key]) == 2 * len(lora.target_modules) * 2
    heads = [key for key in keys if "lora_" not in key]
    assert heads == (["base_model.model.score.weight"] if name in ("reward_adapter", "value_adapter") else [])


@pytest.mark.parametrize("name", ADAPTERS)
def test_stock_transformers_and_peft_load_each_adapter_whole(run_folder: Path, name: str) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    task = json.loads((run_folder / name / "adapter_config.json").read_text())["task_type"]
    base = resolved_model(config_from_file(run_folder / "config.yaml").model_name_or_path)
    stock: Any
    if task == "SEQ_CLS":
        stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    else:
        stock = AutoModelForCausalLM.from_pretrained(base)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(stock, str(run_folder / name)))
    saved = load_file(run_folder / name / "adapter_model.safetensors")
    assert task == ("SEQ_CLS" if name in ("reward_adapter", "value_adapter") else "CAUSAL_LM")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key].float(), saved[key].float()) for key in saved)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{kind: functoin, path: a.py:f}", "kind is adapter, model or function"),
        ("{kind: function}", "path is missing"),
        ("{kind: function, path: away.py:f}", "no file away.py"),
    ],
)
def test_a_wrong_reward_source_stops_the_run_before_any_work(
    recipe: Callable[..., Any], tmp_path: Path, source: str, words: str
) -> None:
    folder = tmp_path / "run"
    status, printed = recipe("direct_rlhf_lora.py", *TINY, "--output_dir", str(folder), "--ppo.reward_sources", source)
    assert_one_line_of_error(status, printed, "ppo.reward_sources[0]", words)
    assert not folder.exists()


def test_metrics_have_one_line_per_ppo_step(run_folder: Path, summary: dict[str, Any]) -> None:
    config = config_from_file(run_folder / "config.yaml").ppo
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert summary["ppo"]["steps"] == len(lines) == config.total_steps
    assert summary["ppo"]["episodes"] == lines[-1]["episodes"] == config.total_steps * config.batch_size
    assert all(value == value and abs(value) != float("inf") for line in lines for value in line.values())


def test_the_summary_has_exactly_the_documented_keys(summary: dict[str, Any]) -> None:
    assert set(summary) == {"arms", "reward_model", "ppo", "merge", "seconds", "versions"}
    assert set(summary["arms"]) == {"base", "instruct", "plus"}
    of_an_arm = {"reward_mean", "reward_sem", "win_rate_vs_base", "kl_to_base", "ended_rate", "bad_word_rate", "n"}
    of_safety = {"decline_unsafe", "decline_safe", "safe_margin", "n_unsafe", "n_safe", "n_margin"}
    assert all(set(arm) == of_an_arm | of_safety for arm in summary["arms"].values())
    assert set(summary["reward_model"]) == {"accuracy", "n", "against_spoilt", "probes"}
    assert set(summary["reward_model"]["probes"]) == {"unsafe", "safe"}
    assert set(summary["ppo"]) >= {"steps", "episodes", "seconds_per_step", "peak_memory_gib"}
    assert set(summary["merge"]) == {"target", "drift"}
    assert set(summary["merge"]["drift"]) == {"original", "dequantized"}
    assert set(summary["seconds"]) == {"base", "reward", "instruct", "ppo", "merge", "compare"}
    assert set(summary["versions"]) >= {"lora-rlhf", "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets"}


def test_the_numbers_of_the_summary_make_sense(summary: dict[str, Any]) -> None:
    arms = summary["arms"]
    assert {arm["n"] for arm in arms.values()} == {8}
    assert arms["base"]["kl_to_base"] == 0
    assert arms["base"]["win_rate_vs_base"] == 0.5
    for arm in arms.values():
        assert all(0 <= arm[rate] <= 1 for rate in ("win_rate_vs_base", "ended_rate", "bad_word_rate"))
        assert arm["reward_sem"] >= 0
    assert summary["reward_model"]["n"] == 16
    assert 0 <= summary["reward_model"]["accuracy"] <= 1
    assert summary["merge"]["target"] == "dequantized"
    assert 0 <= summary["merge"]["drift"]["dequantized"] < 1e-4 < summary["merge"]["drift"]["original"]
    assert all(seconds > 0 for seconds in summary["seconds"].values())


def test_the_samples_hold_an_answer_of_each_arm_to_each_prompt(run_folder: Path) -> None:
    samples = json.loads((run_folder / "samples.json").read_text())
    assert {name: len(texts) for name, texts in samples.items()} == {
        "prompts": 8, "base": 8, "instruct": 8, "plus": 8
    }  # fmt: skip


def test_the_merged_model_is_a_plain_model_that_chats(run_folder: Path) -> None:
    import transformers

    folder = run_folder / "merged"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "MistralForCausalLM"
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert (folder / "chat_template.jinja").read_text() == tokenizer.chat_template

    held = model.generation_config
    assert (folder / "generation_config.json").is_file()
    assert (held.eos_token_id, held.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert held.max_new_tokens == 16

    chat = transformers.pipeline("text-generation", model=str(folder))
    messages = [{"role": "user", "content": "How do I fly a kite?"}]
    answered = chat(messages)[0]["generated_text"]
    assert answered[:1] == messages
    assert answered[-1]["role"] == "assistant"
    assert isinstance(answered[-1]["content"], str)


def test_the_merged_model_is_the_base_changed_by_training(run_folder: Path, cache: Path) -> None:
    from safetensors.torch import load_file

    merged = load_file(run_folder / "merged" / "model.safetensors")
    base = load_file(cache / "tiny-mistral" / "model.safetensors")
    changed = {name for name in base if not merged[name].equal(base[name])}
    assert changed == {name for name in base if "_proj" in name}


# Going on


def test_a_second_run_repeats_no_stage(run_folder: Path, recipe: Callable[..., Any]) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        files = [path for path in run_folder.rglob("*") if path.is_file() and path.name != LOCK]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    status, printed = recipe("direct_rlhf_lora.py", *TINY, "--output_dir", str(run_folder))
    assert status == 0, printed
    assert printed.count("done before") == 5
    assert "Plus" in printed  # the comparison is shown again
    assert state() == before


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("reward_lora.py", "done before: accuracy"),
        ("sft_lora.py", "done before"),
        ("ppo_lora.py", "done before: 3 steps"),
        ("merge_lora.py", "done before: .*merged"),
        ("compare_lora.py", "sample answers"),
    ],
)
def test_a_recipe_of_one_stage_is_part_of_the_same_run(
    run_folder: Path, recipe: Callable[..., Any], name: str, shown: str
) -> None:
    before = (run_folder / "summary.json").read_bytes()
    status, printed = recipe(name, *TINY, "--output_dir", str(run_folder))
    assert status == 0, printed
    assert re.search(shown, printed)
    assert (run_folder / "summary.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "missing", "first"),
    [
        ("ppo_lora.py", "reward_adapter", "reward_lora.py"),
        ("merge_lora.py", "policy_adapter", "ppo_lora.py"),
        ("compare_lora.py", "policy_adapter", "ppo_lora.py"),
    ],
)
def test_a_stage_whose_input_is_missing_says_what_to_run_first(
    tmp_path: Path, recipe: Callable[..., Any], name: str, missing: str, first: str
) -> None:
    folder = tmp_path / "new"
    status, printed = recipe(name, *TINY, "--output_dir", str(folder))
    assert_one_line_of_error(status, printed, f"{folder} has no {missing}", f"recipes/{first}", "direct_rlhf_lora.py")
    assert not (folder / "summary.json").exists()


# Failing


@pytest.fixture(scope="session")
def misspelt_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("runs") / "misspelt"
    return folder, as_process("direct_rlhf_lora.py", "--ppo.kl_coeff", "0.1", "--output_dir", str(folder))


def test_a_misspelt_option_is_one_line_of_error(misspelt_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = misspelt_run
    assert done.stdout == "error: unknown option --ppo.kl_coeff; did you mean ppo.kl_coef?; see --help\n"
    assert done.returncode == 2
    assert not folder.exists()


def test_an_error_comes_without_the_noise_of_libraries(
    misspelt_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    assert misspelt_run[1].stderr == ""


def test_a_missing_config_is_one_line_of_error(recipe: Callable[..., Any]) -> None:
    status, printed = recipe("direct_rlhf_lora.py", "--config", "recipes/configs/tny.yaml")
    assert_one_line_of_error(status, printed, "no file recipes/configs/tny.yaml", "recipes/configs/tiny.yaml?")


@pytest.mark.parametrize("name", ["away/pairs.jsonl", "someone/no-such-pairs-at-all"])
def test_a_missing_data_set_is_one_line_of_error(tmp_path: Path, recipe: Callable[..., Any], name: str) -> None:
    status, printed = recipe(
        "direct_rlhf_lora.py", *TINY, "--output_dir", str(tmp_path / "new"), "--dataset_name", name
    )
    assert_one_line_of_error(status, printed, name)
    assert not (tmp_path / "new" / "summary.json").exists()


@pytest.mark.parametrize("name", ["./away", "someone/no-such-model-at-all"])
def test_a_missing_model_is_one_line_of_error_and_begins_no_run(
    tmp_path: Path, recipe: Callable[..., Any], name: str
) -> None:
    options = ["--output_dir", str(tmp_path / "new"), "--model_name_or_path", name]
    status, printed = recipe("direct_rlhf_lora.py", *TINY, *options)
    assert_one_line_of_error(status, printed, name)
    assert not (tmp_path / "new").exists()


def test_another_runs_directory_is_one_line_of_error(run_folder: Path, recipe: Callable[..., Any]) -> None:
    before = (run_folder / "config.yaml").read_bytes()
    status, printed = recipe("direct_rlhf_lora.py", *TINY, "--output_dir", str(run_folder), "--seed", "1")
    assert_one_line_of_error(status, printed, str(run_folder), "differs in seed", "--overwrite_output_dir")
    assert (run_folder / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("text", ["ppo: [", "seed: '", "a: b: c"])
def test_bad_yaml_is_an_error_that_points_to_the_line(tmp_path: Path, recipe: Callable[..., Any], text: str) -> None:
    (tmp_path / "bad.yaml").write_text(f"seed: 1\n{text}\n")
    status, printed = recipe("direct_rlhf_lora.py", "--config", str(tmp_path / "bad.yaml"))
    assert status == 2
    assert printed.startswith(f"error: --config: {tmp_path / 'bad.yaml'}")
    assert re.search(r"line [23]", printed)
    assert "Traceback" not in printed


def test_a_missing_value_is_one_line_of_error(recipe: Callable[..., Any]) -> None:
    status, printed = recipe("direct_rlhf_lora.py", "--seed")
    assert_one_line_of_error(status, printed, "--seed")


# The scripts themselves


@pytest.mark.parametrize("path", STAGES_OF_A_RUN, ids=lambda path: path.name)
def test_help_says_what_a_recipe_does_and_lists_the_fields(path: Path, recipe: Callable[..., Any]) -> None:
    status, printed = recipe(path.name, "--help")
    assert status == 0
    assert f"python recipes/{path.name}" in printed
    assert "--ppo.kl_coef" in printed
    assert "Weight of the KL penalty" in printed


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_under_150_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 150


LIBRARY = sorted((ROOT / "lora_rlhf").rglob("*.py"))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_of_the_library_has_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
