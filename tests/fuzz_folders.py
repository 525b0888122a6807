"""Fuzzed files of runs, adapters and evaluations: what is damaged is refused, passed over or made again."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from fuzz_inputs import EDITS, Bench, Target, edited, filled_lines, garbage, lines_of, outcome
from hypothesis import strategies as st

from lora_rlhf.chat.votes import kept_votes, win_rates
from lora_rlhf.data.chat import CHATML, prompt_ids, set_chat_template
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.judge_replies import ReplyFile
from lora_rlhf.evaluation.local_tasks import _file_docs
from lora_rlhf.evaluation.mt_bench import read_questions
from lora_rlhf.evaluation.result_cache import ResultCache
from lora_rlhf.reward.sources import score_scales
from lora_rlhf.run import run_summary


def loaded(bench: Bench, name: str, content: bytes) -> None:
    """Put the adapter on the base with one of its files changed."""
    folder = bench.folder / "adapter"
    folder.mkdir(exist_ok=True)
    for file, own in (bench.adapter | {name: content}).items():
        (folder / file).write_bytes(own)
    found = outcome(lambda: bench.base.load_adapter("fuzzed", folder))
    try:
        if not isinstance(found, UserError):
            config, parameters = bench.base.configs["fuzzed"], bench.base.parameters("fuzzed")
            assert 0 < config.r <= 4
            assert math.isfinite(config.lora_alpha)
            assert sum(p.numel() for p in parameters) == bench.parameters
            assert all(torch.isfinite(p).all() for p in parameters)
    finally:
        if "fuzzed" in bench.base.model.peft_config:
            bench.base.model.delete_adapter("fuzzed")
        bench.base.configs.pop("fuzzed", None)
        if "fuzzed" in bench.base.heads:
            del bench.base.heads["fuzzed"]


def adapter_config_bytes(bench: Bench, case: Any) -> None:
    loaded(bench, "adapter_config.json", edited(bench.adapter["adapter_config.json"], case))


def adapter_config_shape(bench: Bench, values: dict[str, Any]) -> None:
    held = json.loads(bench.adapter["adapter_config.json"]) | values
    loaded(bench, "adapter_config.json", json.dumps(held).encode())


def adapter_weights(bench: Bench, case: Any) -> None:
    loaded(bench, "adapter_model.safetensors", edited(bench.adapter["adapter_model.safetensors"], case))


def adapter_base(bench: Bench, case: Any) -> None:
    loaded(bench, "base_model.json", edited(bench.adapter["base_model.json"], case))


PEFT_FIELDS = [
    "r", "lora_alpha", "target_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "bias", "use_rslora", "use_dora", "exclude_modules", "modules_to_save", "task_type", "peft_type",
    "init_lora_weights", "fan_in_fan_out", "loftq_config", "eva_config", "auto_mapping", "revision", "inference_mode",
    "base_model_name_or_path", "megatron_config", "layer_replication", "runtime_config", "peft_version", "unheard_of",
]  # fmt: skip


# -- files of a run ---------------------------------------------------------------------------------------------------

SCALES = json.dumps({"scales": {"reward_adapter": {"mean": 0.25, "std": 1.5}}}).encode()
SUMMARY = json.dumps({"seconds": {"base": 1.5}, "ppo": {"steps": 3}, "versions": {}}, indent=1).encode()


def scales(bench: Bench, content: bytes) -> None:
    bench.file("score_scales.json", content)
    found = outcome(lambda: score_scales(bench.folder))
    if not isinstance(found, UserError):
        assert all(math.isfinite(scale.mean) and 0 < scale.std < math.inf for scale in found.values())


def summary(bench: Bench, content: bytes) -> None:
    bench.file("summary.json", content)
    found = outcome(lambda: run_summary(bench.folder))
    assert isinstance(found, UserError) or found == json.loads(content)


VOTES = [{"winner": w, "arms": {"base": "b", "plus": "p"}, "text": "né"} for w in ("plus", "tie", "base", "plus")]


def votes(bench: Bench, content: bytes) -> None:
    found = kept_votes(bench.file("votes.jsonl", content))
    lines = filled_lines(content)
    whole = [vote for line, vote in zip(lines_of(VOTES).splitlines(), VOTES, strict=True) if line in lines]
    assert all(vote in found for vote in whole)
    assert all(isinstance(vote["winner"], str) for vote in found)
    assert sum(row["wins"] for row in win_rates(found, {"base": "b", "plus": "p"})) <= len(found)


# -- files of an evaluation -------------------------------------------------------------------------------------------

DOCS = [{"id": i, "question": f"Which é {i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(4)]
WORKED = [{"id": str(i), "question": f"{i} + 1?", "answer": f"So #### {i + 1}"} for i in range(4)]
QUESTIONS = [
    {"question_id": i, "category": "math", "turns": [f"a{i}", "b\u2028"], "reference": ["x", None]} for i in range(4)
]
REPLIES = [{"key": f"k{i}", "reply": f"Rating: [[{i}]]"} for i in range(6)]


def local_task(bench: Bench, content: bytes) -> None:
    found = outcome(lambda: _file_docs(bench.file("task.jsonl", content)))
    if not isinstance(found, UserError):
        lines = filled_lines(content)
        assert [doc["question"] for doc in found] == [json.loads(line)["question"] for line in lines]
        assert all("choices" not in doc or 0 <= doc["answer"] < len(doc["choices"]) for doc in found)
        assert "\ud800" not in repr([*found]).encode("ascii", "backslashreplace").decode()


def questions(bench: Bench, content: bytes) -> None:
    found = outcome(lambda: read_questions(bench.file("questions.jsonl", content)))
    if not isinstance(found, UserError):
        assert [list(q.turns) for q in found] == [json.loads(line)["turns"] for line in filled_lines(content)]
        for question in found:
            for text in (*question.turns, *question.references):
                assert text is None or text.encode()


def replies(bench: Bench, content: bytes) -> None:
    known = ReplyFile(bench.file("replies.jsonl", content)).known
    lines = filled_lines(content)
    for line, row in zip(lines_of(REPLIES).splitlines(), REPLIES, strict=True):
        assert line not in lines or row["key"] in known
    assert all(isinstance(reply, str) for reply in known.values())


def cached_result(bench: Bench, case: Any) -> None:
    folder = bench.folder / "cache"
    cache, key = ResultCache(folder), {"what": "x", "n": 1}
    for old in folder.glob("*"):
        old.unlink()
    kept = cache.result(key, lambda: [1.5, {"text": "kept"}])
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(edited(content, case) if isinstance(case, list) else json.dumps(case["value"]).encode())
    assert cache.result(key, lambda: "made again") in (kept, "made again")


def chat_template(bench: Bench, case: Any) -> None:
    file = bench.file("chat.jinja", edited(CHATML.encode(), case))
    before = bench.tokenizer.chat_template
    try:
        if not isinstance(outcome(lambda: set_chat_template(bench.tokenizer, str(file))), UserError):
            assert isinstance(prompt_ids(bench.tokenizer, [{"role": "user", "content": "Q"}]), list)
    finally:
        bench.tokenizer.chat_template = before


def of_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    return EDITS.map(lambda edits: edited(content, edits))


def of_lines(rows: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    """Changed bytes, or rows of which some have fields of any shape."""
    names = sorted(rows[0])
    changed = st.builds(
        lambda row, new: row | new,
        st.sampled_from(rows),
        st.dictionaries(st.sampled_from(names), garbage(*names), max_size=2),
    )
    return of_bytes(lines_of(rows)) | st.lists(changed | garbage(*names), max_size=4).map(lines_of)


def of_object(content: bytes) -> st.SearchStrategy[bytes]:
    names = sorted(json.loads(content))
    shapes = st.dictionaries(st.sampled_from(names), garbage(*names, "mean", "std")) | garbage(*names)
    return of_bytes(content) | shapes.map(lambda value: json.dumps(value).encode())


TARGETS: dict[str, Target] = {
    "adapter_config.json: bytes": (EDITS, adapter_config_bytes),
    "adapter_config.json: shape": (
        st.dictionaries(st.sampled_from(PEFT_FIELDS), garbage("q_proj", "LORA", "(.+)+", "all-linear"), max_size=3),
        adapter_config_shape,
    ),
    "adapter_model.safetensors": (EDITS, adapter_weights),
    "base_model.json": (EDITS, adapter_base),
    "score_scales.json": (of_object(SCALES), scales),
    "summary.json": (of_object(SUMMARY), summary),
    "votes": (of_lines(VOTES), votes),
    "local task: choices": (of_lines(DOCS), local_task),
    "local task: worked": (of_lines(WORKED), local_task),
    "questions": (of_lines(QUESTIONS), questions),
    "judge's replies": (of_lines(REPLIES), replies),
    "result cache": (EDITS | st.fixed_dictionaries({"value": garbage("key", "result", "sha256")}), cached_result),
    "chat template": (EDITS, chat_template),
}
