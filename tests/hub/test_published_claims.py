"""The claims that the card takes from evaluation/results.json: malformed ones are one line of error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from card_check import card_faults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_runs import assert_one_line_of_error
from test_model_card import KINDS, facts

from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.claims import claims
from lora_rlhf.hub.claims import Claim, evaluation_claims
from lora_rlhf.hub.model_card import model_card

DIFFERENCE = {"value": 1.25, "low": 0.5, "high": 2.0, "stderr": 0.4, "n": 37}
CLAIM: dict[str, Any] = {
    "claim": "chats better than base", "arm": "plus", "measure": "reward of the referee", "n": 37, "needed_n": None,
    "difference": DIFFERENCE, "verdict": "holds",
}  # fmt: skip
NONE = object()
"""In `but`: the field is taken away."""


def but(field: str, value: Any) -> dict[str, Any]:
    """Return `CLAIM` with another value of a field, or of a field of its difference."""
    claim = copy.deepcopy(CLAIM)
    part, name = (claim["difference"], field.partition(".")[2]) if "." in field else (claim, field)
    part[name] = value
    if value is NONE:
        del part[name]
    return claim


def results(run: Path, content: bytes | str | Any) -> Path:
    (run / "evaluation").mkdir(exist_ok=True)
    file = run / "evaluation" / "results.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps({"claims": content}))
    return file


def test_claims_are_read_as_they_were_found(tmp_path: Path) -> None:
    first = Claim("chats better than base", "plus", "reward of the referee", 37, "holds", 1.25, 0.5, 2.0)
    without = but("difference.low", None) | {"verdict": "cannot tell", "arm": "instruct"}
    results(tmp_path, [CLAIM, without, but("difference.value", 1e-05)])
    found = evaluation_claims(tmp_path)
    assert found[0] == first
    assert (found[1].arm, found[1].low, found[1].high, found[1].verdict) == ("instruct", None, 2.0, "cannot tell")
    assert found[2].value == 1e-05


def test_what_an_evaluation_writes_is_read(tmp_path: Path) -> None:
    suites = {
        "preference": {
            "tasks": {"referee": {"base": {"difference": None}, "plus": {"difference": DIFFERENCE}}},
            "details": {
                "referee_accuracy": {"low": 0.6},
                "probes": {"referee": {"unsafe": {"low": 0.6}, "safe": {"low": 0.6}}},
            },
        },
        "general": {
            "details": {"kept": {"plus": {"margin": 0.01, "difference": DIFFERENCE, "verdict": "holds", "needed_n": 9}}}
        },
    }
    results(tmp_path, claims(suites))
    assert [claim.value for claim in evaluation_claims(tmp_path)] == [1.25, 1.25]


def test_a_run_that_was_not_evaluated_has_none(tmp_path: Path) -> None:
    assert evaluation_claims(tmp_path) == []
    (tmp_path / "evaluation").write_text("a file")
    assert evaluation_claims(tmp_path) == []


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (but("difference", NONE), "difference is missing"),
        (but("difference", None), "difference is a mapping of fields, not None"),
        (but("difference", [1, 2]), "difference is a mapping of fields, not [1, 2]"),
        (but("difference.value", NONE), "difference.value is missing"),
        (but("difference.value", None), "difference.value is a finite number, not None"),
        (but("difference.value", float("nan")), "difference.value is a finite number, not nan"),
        (but("difference.value", True), "difference.value is a finite number, not True"),
        (but("difference.value", 10**400), "difference.value is a finite number, not 1000"),
        (but("difference.low", float("-inf")), "difference.low is a finite number, not -inf"),
        (but("difference.high", "2"), "difference.high is a finite number, not '2'"),
        (but("difference.high", NONE), "difference.high is missing"),
        (but("claim", NONE), "claim is missing"),
        (but("claim", 3), "claim is one line of text, not 3"),
        (but("measure", ""), "measure is one line of text, not ''"),
        (but("measure", "two\nlines"), r"measure is one line of text, not 'two\nlines'"),
        (but("arm", "\ud800"), r"arm is one line of text, not '\ud800'"),
        (but("arm", ["plus"]), "arm is one line of text, not ['plus']"),
        (but("n", 0), "n is a number of items, not 0"),
        (but("n", 1.5), "n is a number of items, not 1.5"),
        (but("verdict", NONE), "verdict is missing"),
        (but("verdict", ["holds"]), "verdict is one of holds, does not hold, cannot tell, not ['holds']"),
        (None, "it is None, not a mapping of fields"),
        ("claim", "it is 'claim', not a mapping of fields"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_claim_is_one_error_that_names_it(tmp_path: Path, claim: Any, said: str) -> None:
    file = results(tmp_path, [CLAIM, claim])
    with pytest.raises(UserError) as error:
        evaluation_claims(tmp_path)
    text = str(error.value)
    assert text.startswith(f"{file}: claim 2") and said in text
    assert f"run `python recipes/evaluate.py --output_dir {tmp_path}` again" in text
    assert ("('chats better than base')" in text) == (isinstance(claim, dict) and claim.get("claim") == CLAIM["claim"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "is damaged"),
        (b"", "is damaged"),
        (b'{"claims": [', "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"claims": [' + b"9" * 5000 + b"]}", "is damaged"),
        (b"{}", "has no list of claims"),
        (b"[]", "has no list of claims"),
        (b'{"claims": {"claim": "x"}}', "has no list of claims"),
        (b'{"claims": null}', "has no list of claims"),
    ],
)
def test_a_damaged_file_is_one_error(tmp_path: Path, content: bytes, said: str) -> None:
    file = results(tmp_path, content)
    with pytest.raises(UserError) as error:
        evaluation_claims(tmp_path)
    assert str(file) in str(error.value) and said in str(error.value)
    assert "recipes/evaluate.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "evaluation" / "results.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"results\.json cannot be read \(Is a directory\)"):
        evaluation_claims(tmp_path)


@pytest.mark.parametrize(
    "claim",
    [but("difference", NONE), but("difference", None), but("claim", NONE), [1]],
    ids=["no difference", "difference: null", "no claim", "a list"],
)
def test_the_recipe_says_so_and_leaves_nothing_half_written(
    recipe: Callable[..., tuple[int, str]], finished_run: Path, claim: Any
) -> None:
    results(finished_run, [claim])
    words = ["--output_dir", str(finished_run), "--repo_id", "you/plus", "--dry_run"]
    status, printed = recipe("push_to_hub.py", *words)
    assert_one_line_of_error(status, printed, "results.json: claim 1", "recipes/evaluate.py")
    assert not (finished_run / "hub").exists()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from([10**400, "holds", "plus", "a|b", "", "\ud800", "\n", "[x](y)", "---"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*CLAIM, *DIFFERENCE]), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from([*CLAIM, *(f"difference.{name}" for name in DIFFERENCE)])
CONTENTS = (
    st.lists(st.builds(but, FIELDS, st.just(NONE) | JSON) | JSON, max_size=3).map(lambda c: json.dumps({"claims": c}))
    | JSON.map(lambda value: json.dumps({"claims": value}))
    | JSON.map(json.dumps)
    | st.integers(0, 400).map(lambda end: json.dumps({"claims": [CLAIM]})[:end])
    | st.binary(max_size=40)
)


@given(content=CONTENTS)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_gives_sound_cards_or_one_error(tmp_path: Path, content: str | bytes) -> None:
    file = results(tmp_path, content)
    try:
        found = evaluation_claims(tmp_path)
    except UserError as error:
        assert str(file) in str(error) and "recipes/evaluate.py" in str(error)
        assert len(str(error).splitlines()) == 1
        return
    for kind in KINDS:
        card = model_card(facts(kind, claims=found))
        card.encode()
        assert card_faults(card) == []
