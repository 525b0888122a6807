"""The claims of an evaluation as the model card needs them, every field checked where results.json is read."""

from __future__ import annotations

import json
import math
import reprlib
import shlex
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.claims import Verdict

NO_TEXT = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories that a table's cell cannot hold: controls, lone surrogates, ends of lines."""


@dataclass(frozen=True)
class Claim:
    """What one measure says of one of the paper's claims.

    Attributes:
        claim: which one, for people.
        arm: of which model.
        measure: what was measured, for people.
        n: over how many items.
        verdict: whether it holds.
        value: difference to base.
        low: lower end of its 95 % interval; None where there is no interval.
        high: upper end.
    """

    claim: str
    arm: str
    measure: str
    n: int
    verdict: Verdict
    value: float
    low: float | None
    high: float | None


class _Malformed(Exception):
    """What is wrong with a claim, as it goes into the sentence of a `UserError`."""


def evaluation_claims(output_dir: Path) -> list[Claim]:
    """Return the claims in OUTPUT_DIR/evaluation/results.json; none where the run was not evaluated.

    Raises:
        UserError: the file cannot be read, is no JSON, or a claim in it is malformed.
    """
    file = output_dir / "evaluation" / "results.json"
    again = f"run `python recipes/evaluate.py --output_dir {shlex.quote(str(output_dir))}` again, which writes it anew"
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): put that right, or {again}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): {again}") from None
    given = held.get("claims") if isinstance(held, dict) else None
    if not isinstance(given, list):
        raise UserError(f"{file} has no list of claims: {again}")
    claims = []
    for number, fields in enumerate(given, 1):
        try:
            claims.append(_claim(fields))
        except _Malformed as error:
            named = fields.get("claim") if isinstance(fields, dict) else None
            which = f"claim {number}" + (f" ({reprlib.repr(named)})" if isinstance(named, str) else "")
            raise UserError(f"{file}: {which} is malformed: {error}; {again}") from None
    return claims


def _claim(fields: Any) -> Claim:
    if not isinstance(fields, dict):
        raise _Malformed(f"it is {reprlib.repr(fields)}, not a mapping of fields")
    claim, arm, measure = (_text(fields, name) for name in ("claim", "arm", "measure"))
    n, verdict, difference = (_field(fields, name) for name in ("n", "verdict", "difference"))
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise _Malformed(f"n is a number of items, not {reprlib.repr(n)}")
    if verdict not in get_args(Verdict):
        raise _Malformed(f"verdict is one of {', '.join(get_args(Verdict))}, not {reprlib.repr(verdict)}")
    if not isinstance(difference, dict):
        raise _Malformed(f"difference is a mapping of fields, not {reprlib.repr(difference)}")
    value = _number(_field(difference, "value", "difference."), "difference.value")
    low, high = (
        None if end is None else _number(end, f"difference.{name}")
        for name, end in ((name, _field(difference, name, "difference.")) for name in ("low", "high"))
    )
    return Claim(claim, arm, measure, n, verdict, value, low, high)


def _field(fields: dict[str, Any], name: str, prefix: str = "") -> Any:
    if name not in fields:
        raise _Malformed(f"{prefix}{name} is missing")
    return fields[name]


def _text(fields: dict[str, Any], name: str) -> str:
    value = _field(fields, name)
    if not isinstance(value, str) or not value.strip() or any(unicodedata.category(c) in NO_TEXT for c in value):
        raise _Malformed(f"{name} is one line of text, not {reprlib.repr(value)}")
    return value


def _number(value: Any, name: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Malformed(f"{name} is a finite number, not {reprlib.repr(value)}")
    return number
