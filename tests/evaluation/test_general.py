"""General ability through the shared base equals lm-eval's own model on the merged weights, item by item."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.role_layers import dequantized_weight
from lora_rlhf.base.shared import POLICY, REFERENCE
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation import general
from lora_rlhf.evaluation.general import (
    HUB_TASKS,
    TaskUnavailable,
    general_outcomes,
    hub_task,
    logged_samples,
)
from lora_rlhf.evaluation.local_tasks import local_tasks, quiet_lm_eval
from lora_rlhf.merge import MergedWeights, write_merged
from lora_rlhf.ppo.decoding import Sampling

Samples = dict[str, list[dict[str, Any]]]

CHOICES = [
    ("What keeps a house warm?", ["an open window", "a fire in the stove", "a glass of ice"], 1),
    ("How do you thank a neighbour?", ["with a kind note", "by slamming the door"], 0),
    ("Which animal barks?", ["the cat", "the hen", "the dog", "the carp"], 2),
    ("What do plants need?", ["water and light", "a television"], 0),
    ("What is bread made of?", ["sand", "flour", "glass"], 1),
    ("Where does rain come from?", ["from the cellar", "from the clouds"], 1),
    ("When do people sleep?", ["mostly at night", "never", "while they run"], 0),
    ("What do you do with a letter?", ["boil it", "read it"], 1),
    ("How do you cross a street?", ["look left and right first", "with your eyes shut"], 0),
    ("What melts in the sun?", ["a stone", "a snowman", "a bridge"], 1),
    ("What does a baker sell?", ["tickets", "rolls", "tyres", "rain"], 1),
    ("Which is a colour?", ["green", "loud"], 0),
]
BLANKS = [
    ("Ann thanked Bob, for _ had helped.", ["Ann", "Bob"], 1),
    ("The cup did not fit in the box since _ was too big.", ["the cup", "the box"], 0),
    ("Tom lent Jim his coat, so _ was cold.", ["Tom", "Jim"], 0),
    ("Eve asked Mia for the way, as _ knew the town.", ["Eve", "Mia"], 1),
    ("The dog chased the cat until _ climbed a tree.", ["the dog", "the cat"], 1),
    ("Paul paid Nina because _ had sold a bike.", ["Paul", "Nina"], 1),
    ("Rosa taught Emil to swim, and now _ can swim too.", ["Rosa", "Emil"], 1),
    ("The ball broke the vase because _ was made of glass.", ["the ball", "the vase"], 1),
    ("Kim called Lee, but _ did not pick up.", ["Kim", "Lee"], 1),
    ("Ida fed the hens, so _ were no longer hungry.", ["the hens", "the cats"], 0),
    ("Max was taller than Leo, so _ reached the shelf.", ["Max", "Leo"], 0),
    ("The soup was hot but the tea was not, so _ burnt me.", ["the soup", "the tea"], 0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions of each kind."""
    worked = [(f"Ann has {i} pears and buys {i + 3} more. How many has she?", 2 * i + 3) for i in range(12)]
    path = tmp_path_factory.mktemp("general")
    write_rows(path / "quiz.jsonl", [dict(question=q, choices=c, answer=a) for q, c, a in CHOICES])
    write_rows(path / "hellaswag.jsonl", [dict(question=q, choices=c, answer=a) for q, c, a in reversed(CHOICES)])
    write_rows(path / "winogrande.jsonl", [dict(question=q, choices=c, answer=a) for q, c, a in BLANKS])
    write_rows(path / "gsm8k.jsonl", [dict(question=q, answer=f"She has {n}.\n#### {n}") for q, n in worked])
    return path


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps({"id": f"{file.stem}-{i}"} | row) + "\n" for i, row in enumerate(rows)))


def chosen(folder: Path, *names: str) -> list[Any]:
    """The tasks of a folder that are called so."""
    return [task for task in local_tasks(folder) if task.task_name in names]


def reference_samples(model: Any, tokenizer: Any, tasks: list[Any], dtype: str, limit: int | None = None) -> Samples:
    """lm-eval's own log of its own `hf` model: a folder with weights, or a model."""
    with quiet_lm_eval():
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        if isinstance(model, Path):
            arguments: dict[str, Any] = {"model": "hf", "model_args": {"pretrained": str(model), "dtype": dtype}}
            arguments["model_args"] |= {"softmax_dtype": "float32", "max_length": 2048}
        else:
            arguments = {"model": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)}
        arguments |= {"tasks": tasks, "task_manager": TaskManager(include_defaults=False)}
        results = lm_eval.simple_evaluate(**arguments, batch_size=3, device="cpu", bootstrap_iters=0, limit=limit)
    return {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in results["samples"].items()}


def choice_logprobs(row: dict[str, Any]) -> list[float]:
    return [response[0][0] for response in row["resps"]]


# -- parity -----------------------------------------------------------------------------------------------------------


METRICS = {"quiz": "acc", "hellaswag": "acc_norm", "winogrande": "acc"}


@pytest.fixture
def write_policy_merged(tokenizer, tmp_path):
    """Write the policy of a base as a merged model; returns its folder."""

    def write(base: Any) -> Path:
        sampling = Sampling(response_length=200, temperature=0.7, stop_strings=(), expand_weights=False)
        write_merged(MergedWeights(base), tokenizer, sampling, tmp_path / "merged")
        return tmp_path / "merged"

    return write


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4-bit"])
def test_every_item_comes_out_as_lm_evals_own_model_has_it_on_the_merged_weights(
    four_bit, make_base, make_config, tokenizer, folder, write_policy_merged
):
    config = make_config(load_in_4bit=four_bit)
    base = make_base(config, roles=())
    merged = write_policy_merged(base)
    theirs = reference_samples(merged, tokenizer, chosen(folder, *METRICS), "float32")
    ours = logged_samples(base, POLICY, tokenizer, chosen(folder, *METRICS), None, batch_size=4)
    outcomes = general_outcomes(base, POLICY, tokenizer, chosen(folder, *METRICS), None, batch_size=4)
    clear = 0
    for name, metric in METRICS.items():
        assert len(outcomes[name]) == len(theirs[name]) == 12
        for outcome, own, reference in zip(outcomes[name], ours[name], theirs[name], strict=True):
            assert own["arguments"] == reference["arguments"]
            assert choice_logprobs(own) == pytest.approx(choice_logprobs(reference), abs=1e-3)
            if not tied(reference, metric, 2e-3):
                assert outcome == reference[metric]
                clear += 1
    assert clear == 36  # no ties here
    assert {outcome for name in METRICS for outcome in outcomes[name]} == {0.0, 1.0}


def test_written_answers_are_those_of_lm_evals_own_model_on_the_merged_weights(
    make_base, make_config, tokenizer, folder, write_policy_merged
):
    config = make_config()
    base = make_base(config, roles=())
    merged = write_policy_merged(base)
    theirs = reference_samples(merged, tokenizer, chosen(folder, "gsm8k"), "float32", limit=4)["gsm8k"]
    ours = logged_samples(base, POLICY, tokenizer, chosen(folder, "gsm8k"), 4, batch_size=3)["gsm8k"]
    assert [row["resps"] for row in ours] == [row["resps"] for row in theirs]
    assert len({row["resps"][0][0] for row in ours}) > 1


@pytest.mark.slow
def test_in_bfloat16_our_numbers_and_those_of_the_merged_model_are_rounded_ones_of_the_same(
    make_base, make_config, tokenizer, folder, write_policy_merged, tmp_path
):
    config = make_config(dtype="bfloat16")
    base = make_base(config, roles=())
    merged = write_policy_merged(base)
    base.save_adapter(POLICY, tmp_path / "policy")
    exact = load_causal_lm(replace(config, load_in_4bit=False)).float()
    with torch.no_grad():
        for name, module in base.causal_lm.named_modules():
            if module in base.layers.frozen:
                exact.get_submodule(name.removesuffix(".base_layer")).weight.copy_(dequantized_weight(module))
    exact = PeftModel.from_pretrained(exact, str(tmp_path / "policy")).merge_and_unload()
    truth = reference_samples(exact, tokenizer, chosen(folder, *METRICS), "float32")
    theirs = reference_samples(merged, tokenizer, chosen(folder, *METRICS), "bfloat16")
    ours = logged_samples(base, POLICY, tokenizer, chosen(folder, *METRICS), None, batch_size=4)
    outcomes = general_outcomes(base, POLICY, tokenizer, chosen(folder, *METRICS), None, batch_size=4)

    def root_mean_square_error(samples: Samples) -> float:
        pairs = [
            (choice_logprobs(a), choice_logprobs(b)) for n in METRICS for a, b in zip(samples[n], truth[n], strict=True)
        ]
        return torch.tensor([x - y for a, b in pairs for x, y in zip(a, b, strict=True)]).square().mean().sqrt().item()

    rounding = root_mean_square_error(theirs), root_mean_square_error(ours)
    assert rounding[1] < 3 * rounding[0]  # we round A, B and their product, a merged weight is rounded once
    clear = 0
    for name, metric in METRICS.items():
        for outcome, reference, right in zip(outcomes[name], theirs[name], truth[name], strict=True):
            if not tied(right, metric, 4 * max(rounding)):
                assert outcome == reference[metric] == right[metric]
                clear += 1
    assert clear >= 20  # of 36


def tied(row: dict[str, Any], metric: str, margin: float) -> bool:
    """Whether the two best choices are too close to be kept apart when their log-likelihoods may be off by a margin."""
    lengths = [len(choice) if metric == "acc_norm" else 1 for choice in row["doc"]["choices"]]
    ranked = sorted(((p / n, margin / n) for p, n in zip(choice_logprobs(row), lengths, strict=True)), reverse=True)
    return ranked[0][0] - ranked[1][0] < max(slack for _, slack in ranked)


def test_the_policy_and_the_reference_are_told_apart(make_base, make_config, tokenizer, folder):
    config = make_config(load_in_4bit=False)
    base = make_base(config, roles=())
    tasks = chosen(folder, "quiz")
    roles = {role: logged_samples(base, role, tokenizer, tasks, None, 8)["quiz"] for role in (POLICY, REFERENCE)}
    plain = load_causal_lm(config)
    for row in roles[REFERENCE]:
        for (prompt, choice), response in zip(row["arguments"], row["resps"], strict=True):
            ids = torch.tensor([tokenizer.encode(prompt + choice)])
            with torch.no_grad():
                logprobs = plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            expected = logprobs[len(tokenizer.encode(prompt)) - 1 :].sum().item()
            assert response[0][0] == pytest.approx(expected, abs=1e-3)
    assert roles[POLICY] != roles[REFERENCE]


# -- by hand ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sevens(make_base, make_config, tokenizer):
    """A base that gives the token "7" three times the probability of any other, whatever it has read."""
    base = make_base(make_config(load_in_4bit=False), roles=())
    (seven,) = tokenizer.encode("7", add_special_tokens=False)
    with torch.no_grad():
        for layer in base.trunk.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.get_base_layer().weight.zero_()
        base.trunk.embed_tokens.weight.fill_(1.0)  # so that every state after the final norm is all ones
        base.lm_head.weight.zero_()
        base.lm_head.weight[seven] = math.log(3) / base.hidden_size
    return base


def test_a_known_distribution_picks_the_known_choice(sevens, tokenizer, tmp_path):
    write_rows(
        tmp_path / "quiz.jsonl",
        [
            dict(question="Which?", choices=["8", "7"], answer=1),
            dict(question="Which?", choices=["7", "9"], answer=1),
            dict(question="Which?", choices=["889", "77"], answer=0),
        ],
    )
    write_rows(tmp_path / "gsm8k.jsonl", [dict(question="?", answer=f"#### {n}") for n in ("7" * 200, "7")])
    tasks = local_tasks(tmp_path)
    samples = logged_samples(sevens, REFERENCE, tokenizer, tasks, None, 2)["quiz"]
    unlikely = math.log(1 / (3 + 511))  # 512 tokens, one of them with three times the weight
    (eight, _), (seven, _) = (response[0] for response in samples[0]["resps"])
    assert seven - eight == pytest.approx(math.log(3), abs=1e-4)
    assert eight == pytest.approx(unlikely * len(tokenizer.encode(" 8", add_special_tokens=False)), abs=1e-4)
    assert general_outcomes(sevens, REFERENCE, tokenizer, tasks, None, 2) == {
        "quiz": [1.0, 0.0, 0.0],
        "gsm8k": [1.0, 0.0],  # two hundred tokens, all of them 7
    }


def test_a_models_own_length_limit_and_penalties_do_not_come_before_the_tasks(sevens, tokenizer, tmp_path):
    write_rows(tmp_path / "gsm8k.jsonl", [dict(question="?", answer="#### " + "7" * 200)])
    own = sevens.causal_lm.generation_config
    own.max_new_tokens, own.repetition_penalty, own.do_sample, own.temperature = 3, 5.0, True, 0.7
    assert general_outcomes(sevens, REFERENCE, tokenizer, local_tasks(tmp_path), None, 1) == {"gsm8k": [1.0]}
    assert sevens.causal_lm.generation_config is own and own.max_new_tokens == 3


def test_the_limit_takes_the_first_items_of_each_task(sevens, tokenizer, folder):
    tasks = chosen(folder, *METRICS)
    whole = general_outcomes(sevens, REFERENCE, tokenizer, tasks, None, 8)
    part = general_outcomes(sevens, REFERENCE, tokenizer, tasks, 5, 8)
    assert part == {name: outcomes[:5] for name, outcomes in whole.items()}
    assert list(part) == ["hellaswag", "quiz", "winogrande"]


# -- lm-eval's registry -----------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry of lm-eval's with tasks of ours: a group of groups as mmlu is, gsm8k with two readings, lost data."""
    from lm_eval.tasks import TaskManager

    def dump(name: str, config: dict[str, Any]) -> None:
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML

    def data(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        write_rows(tmp_path / f"{name}.jsonl", rows)
        files = {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}, "cache_dir": str(tmp_path / "cache")}
        return {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}

    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for name, answers in (("mmlu_a", [1, 0]), ("mmlu_b", [0]), ("mmlu_c", [1, 1])):
        rows = [dict(question="Which?", choices=["8", "7"], answer=answer) for answer in answers]
        dump(name, choice | data(name, rows))
    dump("mmlu_ab", {"group": "mmlu_ab", "task": ["mmlu_a", "mmlu_b"]})
    dump("mmlu", {"group": "mmlu", "task": ["mmlu_ab", "mmlu_c"]})
    readings = {"strict-match": r"#### (\-?[0-9]+)", "flexible-extract": r"(-?[0-9]+)"}
    worked = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Q"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
            for name, pattern in readings.items()
        ],
    }
    dump("gsm8k", worked | data("gsm8k", [dict(question="?", answer=n) for n in ("7777", "8")]))
    dump("boolq", {"task": "boolq", "dataset_path": "nobody/no-such-data", "test_split": "test"} | choice)
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(general, "_registry", lambda: manager)
    hub_task.cache_clear()
    yield manager
    hub_task.cache_clear()


def test_a_group_is_one_task_with_all_its_items_and_gsm8k_counts_the_number(registry, sevens, tokenizer):
    assert general_outcomes(sevens, REFERENCE, tokenizer, ["mmlu", "gsm8k"], None, 4) == {
        "mmlu": [1.0, 0.0, 0.0, 1.0, 1.0],  # always choice 1, "7": right in a, wrong in a and b, right twice in c
        "gsm8k": [1.0, 0.0],  # "7777" without the form that strict-match wants
    }


def test_a_task_whose_data_cannot_be_had_is_named(registry, sevens, tokenizer):
    with pytest.raises(TaskUnavailable, match="task boolq cannot be run: .*no-such-data") as raised:
        general_outcomes(sevens, REFERENCE, tokenizer, ["boolq"], None, 4)
    assert raised.value.task == "boolq" and "--local_tasks" in raised.value.reason


def test_names_are_looked_up_and_never_taken_for_files(registry, tmp_path, sevens, tokenizer):
    for name in ("no_such_task", str(tmp_path / "gsm8k.yaml")):
        with pytest.raises(UserError, match="lm-eval has no task"):
            general_outcomes(sevens, REFERENCE, tokenizer, [name], None, 4)


def test_two_tasks_of_one_name_are_an_error(registry, sevens, tokenizer, folder):
    with pytest.raises(UserError, match="two tasks are called gsm8k"):
        general_outcomes(sevens, REFERENCE, tokenizer, ["gsm8k", *local_tasks(folder)], None, 4)


@pytest.mark.slow
def test_lm_eval_knows_every_task_of_the_suite():
    from lm_eval.tasks import TaskManager

    assert set(HUB_TASKS) <= set(TaskManager().all_tasks)


# -- what is left as it was -------------------------------------------------------------------------------------------


def test_answers_longer_than_the_model_reads_make_a_task_unavailable(sevens, tokenizer, folder):
    sevens.causal_lm.config.max_position_embeddings = 200
    with pytest.raises(TaskUnavailable, match="gsm8k .* up to 200 tokens, and the model reads 200"):
        general_outcomes(sevens, REFERENCE, tokenizer, local_tasks(folder), 1, 4)


def test_the_base_is_left_as_it_was_and_nothing_is_printed(make_base, tokenizer, folder, capfd, monkeypatch, tmp_path):
    base = make_base()
    state = {n: (p.data_ptr(), p.dtype, p.device, p.requires_grad) for n, p in base.model.named_parameters()}
    padding = tokenizer.padding_side
    monkeypatch.chdir(tmp_path)  # lm-eval asks git for a commit, which complains outside a repository
    capfd.readouterr()
    with base.role(REFERENCE):
        general_outcomes(base, POLICY, tokenizer, local_tasks(folder), 2, 4)
        assert base._active == REFERENCE
    assert capfd.readouterr() == ("", "")
    assert {n: (p.data_ptr(), p.dtype, p.device, p.requires_grad) for n, p in base.model.named_parameters()} == state
    assert tokenizer.padding_side == padding
    assert all(frozen.copy is None for frozen in base.layers.frozen.values())


def test_a_working_copy_is_used_where_there_is_room_and_changes_nothing_in_float32(
    make_base, tokenizer, folder, monkeypatch
):
    base, tasks = make_base(), chosen(folder, "quiz")
    used, real = [], base.layers.working_copy

    @contextlib.contextmanager
    def watched():
        with real():
            used.append(True)
            yield

    monkeypatch.setattr(base.layers, "working_copy", watched)
    logprobs = []
    for room in (True, False):
        monkeypatch.setattr(base.layers, "has_room_for_copy", lambda room=room: room)
        samples = logged_samples(base, POLICY, tokenizer, tasks, None, 8)["quiz"]
        logprobs.append([p for row in samples for p in choice_logprobs(row)])
    assert used == [True]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)
