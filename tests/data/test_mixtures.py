"""Mixtures of data sets, their limits and order, and the report of what was left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preference_rows import questions, row

from lora_rlhf.config import RunConfig
from lora_rlhf.data.preferences import PairReport, preference_pairs

# Mixtures, limits and order


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ((60, 60), [], (60, 60)),
        ((60, 60), [1, 1], (60, 60)),
        ((60, 60), [3, 1], (60, 20)),
        ((60, 20), [1, 1], (20, 20)),
        ((30, 60), [0.25, 0.75], (20, 60)),
        ((10, 60), [100, 1], (10, 1)),
        ((12, 12, 12), [1, 2, 3], (4, 8, 12)),
    ],
)
def test_weights_are_the_shares_of_the_largest_mixture(
    make_config: Callable[..., RunConfig],
    tokenizer: Any,
    dataset: Callable[..., str],
    sizes: tuple[int, ...],
    weights: list[float],
    expected: tuple[int, ...],
) -> None:
    names = [dataset([row(f"{i} {n}") for n in range(size)], name=f"part{i}") for i, size in enumerate(sizes)]
    config = make_config(dataset_name=names, dataset_weights=weights)
    pairs, report = preference_pairs(config, tokenizer, "train")
    shares = Counter(question.split()[0] for question in questions(pairs))
    assert tuple(shares[str(i)] for i in range(len(sizes))) == expected
    assert len(set(questions(pairs))) == sum(expected) == report.kept
    assert report.left_out["beyond dataset_weights"] == sum(sizes) - sum(expected)


def test_what_a_weight_leaves_out_is_not_always_the_end_of_the_file(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    names = [dataset([row(f"{i} {n:02}") for n in range(40)], name=f"part{i}") for i in range(2)]
    config = make_config(dataset_name=names, dataset_weights=[1, 4])
    pairs, _ = preference_pairs(config, tokenizer, "train")
    assert sorted(q for q in questions(pairs) if q.startswith("0")) != [f"0 {n:02}" for n in range(10)]


def test_a_dialogue_that_the_template_refuses_is_left_out_and_counted(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'bad' in m['content'] %}{{ raise_exception('no') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    name = dataset([row("fine"), row("bad"), row("fine too")])
    pairs, report = preference_pairs(make_config(dataset_name=[name]), tokenizer, "train")
    assert sorted(questions(pairs)) == ["fine", "fine too"]
    assert report.left_out == {"the chat template refuses it": 1}


@pytest.mark.parametrize("split", ["train", "test"])
def test_max_pairs_limit_their_own_split_only(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str], split: Any
) -> None:
    name = dataset([row(f"t {n}") for n in range(9)], [row(f"e {n}") for n in range(8)])
    limits = {"train": {"max_train_pairs": 5}, "test": {"max_eval_pairs": 5}}
    pairs, report = preference_pairs(make_config(dataset_name=[name], **limits[split]), tokenizer, split)
    assert (len(pairs), report.kept) == (5, 5)
    assert sum(report.left_out.values()) == report.read - 5
    other = "test" if split == "train" else "train"
    pairs, report = preference_pairs(make_config(dataset_name=[name], **limits[other]), tokenizer, split)
    assert len(pairs) == report.read
    assert not report.left_out


def test_a_limit_above_the_number_of_pairs_changes_nothing(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    name = dataset([row(f"{n}") for n in range(6)])
    pairs, report = preference_pairs(make_config(dataset_name=[name], max_train_pairs=99), tokenizer, "train")
    assert len(pairs) == 6
    assert str(report) == "6 of 6 rows"


def test_the_order_is_the_seeds_and_not_the_files(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    name = dataset([row(f"{n:02}") for n in range(30)])

    def order(seed: int) -> list[str]:
        return questions(preference_pairs(make_config(dataset_name=[name], seed=seed), tokenizer, "train")[0])

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != sorted(order(0)) == sorted(order(1))


def test_two_data_sets_come_mixed_and_not_one_after_the_other(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    names = [dataset([row(f"{i} {n}") for n in range(20)], name=f"part{i}") for i in range(2)]
    pairs, _ = preference_pairs(make_config(dataset_name=names), tokenizer, "train")
    assert {question[0] for question in questions(pairs)[:12]} == {"0", "1"}


# The report


def numbers(report: PairReport) -> tuple[int, int, list[int]]:
    head, _, tail = str(report).partition(" (left out: ")
    kept, read = map(int, re.findall(r"\d+", head))
    return kept, read, [int(part.split()[0]) for part in tail.rstrip(")").split(", ") if part]


def test_the_text_of_a_report_adds_up_for_a_real_mixture(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    one = dataset([row(f"{n}") for n in range(20)] + [row("Q", "A", "A"), row("why " * 99)], name="one")
    two = dataset([row(f"{n}") for n in range(9)] + [row("Q", "", "A")], name="two")
    config = make_config(dataset_name=[one, two], dataset_weights=[1, 1], max_train_pairs=7, max_prompt_length=50)
    pairs, report = preference_pairs(config, tokenizer, "train")
    kept, read, left_out = numbers(report)
    assert len(left_out) == 5
    assert (kept, read) == (len(pairs), 32) == (7, 32)
    assert kept + sum(left_out) == read


@given(st.integers(0, 99), st.dictionaries(st.sampled_from(["empty answer", "over 9 tokens"]), st.integers(-3, 9)))
def test_the_text_of_a_report_adds_up(kept: int, left_out: dict[str, int]) -> None:
    report = PairReport(kept=kept)
    for reason, rows in left_out.items():
        report.leave_out(reason, rows)
    report.read = kept + sum(rows for rows in left_out.values() if rows > 0)
    found = numbers(report)
    assert found[0] + sum(found[2]) == found[1]
    assert 0 not in found[2]
