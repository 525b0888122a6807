"""YAML of plain values: no tags, no key twice, and no aliases that unfold without end."""

from __future__ import annotations

import itertools
import time

import pytest

from lora_rlhf.plain_yaml import MOST_VALUES, BadYaml, plain_yaml

LETTERS = "abcdefghij"
BOMB = f"a: &a [{', '.join('x' * 10)}]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in itertools.pairwise(LETTERS)
)


def refused(text: str) -> str:
    with pytest.raises(BadYaml) as error:
        plain_yaml(text)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(
    "text",
    [BOMB, BOMB + "seed: *j", "&a [*a]", "ppo: {reward_sources: [&a {kind: adapter, path: *a}]}", "&a {b: {c: *a}}"],
)
def test_aliases_that_unfold_without_end_are_refused_at_once(text: str) -> None:
    begun = time.monotonic()
    assert f"more than {MOST_VALUES:,} values" in refused(text)
    assert time.monotonic() - begun < 10


def test_aliases_and_merges_in_reason_are_read() -> None:
    text = "base: &base {r: 4, lora_alpha: 8}\nlora: {<<: *base, r: 16}\nagain: [*base, *base]\n"
    base = {"r": 4, "lora_alpha": 8}
    assert plain_yaml(text) == {"base": base, "lora": {"r": 16, "lora_alpha": 8}, "again": [base, base]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2", "line 1: seed is there twice"),
        ("ppo:\n  gamma: 1\n  lam: 1\n  gamma: 0", "line 2: gamma is there twice"),
        ("a: 1\nb: {c: 1, c: 1}", "line 2: c is there twice"),
        ("a: 1\nb: !!python/name:os.system", "line 2: the tag tag:yaml.org,2002:python/name:os.system is refused"),
        ("a: !mine 3", "the tag !mine is refused"),
        ("? [a]\n: 1", "unhashable key"),
        ("a: [1, 2", "line 1"),
    ],
)
def test_what_is_no_plain_value_is_named_with_its_line(text: str, words: str) -> None:
    assert words in refused(text)
