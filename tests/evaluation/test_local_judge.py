"""A judge in this process: greedy answers with its own template, kept and never generated twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_rlhf.evaluation.judge import LocalJudge
from lora_rlhf.evaluation.judge_prompts import parse_grade


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    model.generation_config.repetition_penalty = 3.0  # what a model's own defaults bring must not count
    return model, AutoTokenizer.from_pretrained(tiny_folder)


def test_a_local_judge_answers_with_the_likeliest_tokens(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    questions = [ask(text) for text in ("Hi", "How good is this, on the whole?", "a b c", "Why?")]
    judge, done = LocalJudge(model, tokenizer, tmp_path / "r.jsonl", max_tokens=6, batch_size=3), list[int]()
    verdicts = judge.replies(questions, str, done.append)
    for question, verdict in zip(questions, verdicts, strict=True):
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        n = len(ids)
        while len(ids) < n + 6 and (len(ids) == n or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        assert verdict.reply == tokenizer.decode(ids[n:], skip_special_tokens=True)
    assert done == [0, 3, 4] and judge.counts["requests"] == 4


def test_a_local_judge_generates_nothing_twice(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    first, passes = LocalJudge(model, tokenizer, tmp_path / "r.jsonl", max_tokens=4), list[int]()
    verdicts = first.replies([ask("a"), ask("b")], parse_grade)
    assert [verdict.problem for verdict in verdicts] == ["unparseable", "unparseable"]  # random weights grade nothing
    assert (first.counts["requests"], first.counts["unparseable verdicts"]) == (2, 2)
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        again = LocalJudge(model, tokenizer, tmp_path / "r.jsonl", max_tokens=4)
        assert again.replies([ask("b"), ask("a")], parse_grade) == verdicts[::-1]
        assert (again.counts["requests"], again.counts["from file"], passes) == (0, 2, [])
        longer = LocalJudge(model, tokenizer, tmp_path / "r.jsonl", max_tokens=5)  # could say more: asked anew
        longer.replies([ask("a")], parse_grade)
        assert passes
    finally:
        hook.remove()


def test_a_conversation_beyond_the_local_judges_context_has_no_answer(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    room = model.config.max_position_embeddings
    verdicts = LocalJudge(model, tokenizer, tmp_path / "r.jsonl", max_tokens=4).replies(
        [ask("word " * room), ask("Hi")], str
    )
    assert verdicts[0].problem is not None and f"context of {room}" in verdicts[0].problem
    assert verdicts[1].problem is None
