"""README's table of what a card does, in Markdown, from the result files of `card.py`.

    python benchmarks/card_table.py benchmarks/results/h100-2026-12-01.json
    python benchmarks/card_table.py FILE FILE        # parts of later files take the place of those of earlier ones
    python benchmarks/card_table.py                  # the newest in benchmarks/results

A figure is printed as it was measured or not at all. Where benchmarks/results holds nothing, or a result is not of a
card, it says that nothing has been measured yet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_rlhf.errors import UserError
from lora_rlhf.terminal import run_recipe

RESULTS = Path(__file__).parent / "results"
NOT_YET = "Not yet measured on a GPU."
CONDITIONS = ("device", "size", "cap_gib")
"""What all figures of a run depend on."""
UPDATE = "update in"
"""How the names of those figures of the ppo part begin that are of the update alone."""


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Return the tables of some results, joined; or that nothing has been measured yet.

    Raises:
        UserError: they are of several devices, sizes or caps.
    """
    results = [result for result in results if result["run"]["device"] != "CPU"]
    if not results:
        return NOT_YET
    for result in results:
        check_same_conditions(results[0]["run"], result["run"], "their figures do not belong in one table")
    parts: dict[str, Any] = {}
    for result in results:
        parts |= result["parts"]
    figures = {name: part["figures"] for name, part in parts.items() if part["figures"]}
    lines = [head(results[-1]["run"], figures.get("limits", {})), ""]
    for section in (steps(figures), updates(figures), tokens(figures), stages(figures), checks(figures)):
        lines += [*section, ""] if section else []
    unsaid = [f"{name} ({part['status']})" for name, part in parts.items() if part["status"] != "done"]
    lines += [f"Not whole: {', '.join(unsaid)}.", ""] if unsaid else []
    return "\n".join(lines).rstrip()


def head(run: dict[str, Any], limits: dict[str, Any]) -> str:
    """Return the sentence that says where the figures come from."""
    said = run["device"]
    if "versions" in limits:
        said += f", torch {limits['versions']['torch']}, bitsandbytes {limits['versions']['bitsandbytes']}"
    if "rates" in limits:
        rates = limits["rates"]
        said += f", measured {rates['copy_gb_per_second']:,.0f} GB/s and {rates['bf16_tflop_per_second']:.0f} TFLOP/s"
    held = f", held to {run['cap_gib']:g} GiB" if run["cap_gib"] else ""
    return f"{said}{held} ({run['date']}, `python benchmarks/card.py`; random weights of Mistral-7B's shape):"


def steps(figures: dict[str, Any]) -> list[str]:
    """Return the table of whole PPO steps."""
    found = {name: f for name, f in figures.get("ppo", {}).items() if not name.startswith(UPDATE)}
    peers = {f"unsloth: {name}": f for name, f in figures.get("unsloth", {}).items() if "seconds" in f}
    rows = []
    for name, f in (found | peers).items():
        if "seconds" not in f:
            rows.append([name, reason(f), *[""] * 8])
            continue
        seconds, peaks = f["seconds"], f["peaks"].values()
        allocated = max(peak["allocated_gib"] for peak in peaks)
        reserved = max(peak.get("reserved_gib", peak["allocated_gib"]) for peak in peaks)
        rows.append([
            name, *(f"{seconds[phase]:.1f}" for phase in ("rollout", "score", "update")), f"**{seconds['step']:.1f}**",
            f"{allocated:.1f} / {reserved:.1f}", f"{max(f['planned_gib'].values()):.1f}",
            f"{f['rollout_tokens_per_second']:,.0f}", f"{f['rollout_share_of_floor']:.0%}",
            f"{f['update_model_flops_utilisation']:.0%}",
        ])  # fmt: skip
    columns = [
        "seconds", "rollout", "score", "update", "step", "peak GiB, tensors / allocator", "planned",
        "rollout tokens/s", "of floor", "update's FLOPs, of rate",
    ]  # fmt: skip
    return table(columns, rows)


def updates(figures: dict[str, Any]) -> list[str]:
    """Return the table of the update's variants, whose seconds are extrapolated."""
    found = {name: f for name, f in figures.get("ppo", {}).items() if name.startswith(UPDATE)}
    rows = [
        [name, f"{f['update_seconds']:.1f}", f"{f['allocated_gib']:.1f}"]
        if "update_seconds" in f
        else [name, reason(f), ""]
        for name, f in found.items()
    ]
    return table(["update of the same step, extrapolated from 16 answers", "seconds", "peak GiB"], rows)


def tokens(figures: dict[str, Any]) -> list[str]:
    """Return the table of decoding."""
    found = {name: f for name, f in figures.get("decode", {}).items() if name != "shape"}
    rows = [
        [name, f"{f['ms_per_token']:.1f}", f"{f['share_of_floor']:.0%}"]
        if "ms_per_token" in f
        else [name, reason(f), ""]
        for name, f in found.items()
    ]
    shape = figures.get("decode", {}).get("shape", {"rows": 0, "context": 0})
    return table([f"decoding {shape['rows']} rows, context {shape['context']}", "ms per token", "of floor"], rows)


def stages(figures: dict[str, Any]) -> list[str]:
    """Return the table of the embedded recipe and of TRL's step."""
    rows = [
        [f"embedded recipe: {name}", f"{f['seconds']:.0f}", ""]
        for name, f in figures.get("embedded", {}).items()
        if "seconds" in f
    ]
    smaller = figures.get("trl", {})
    if "seconds" in smaller.get("step", {}):
        ours, theirs = smaller["ours, the same work"], smaller["step"]
        peak = max(p["allocated_gib"] for p in ours["peaks"].values())
        rows += [["smaller step: ours", f"{ours['seconds']['step']:.1f}", f"{peak:.1f}"]]
        rows += [["smaller step: TRL 1.12", f"{theirs['seconds']:.1f}", f"{theirs['peak_gib']:.1f}"]]
    return table(["", "seconds", "peak GiB"], rows)


def checks(figures: dict[str, Any]) -> list[str]:
    """Return a line that says how many checks were right, and which were not."""
    said: dict[str, bool] = {}
    for what, f in {**figures.get("correctness", {}), **figures.get("training", {})}.items():
        for inner in (f, *(value for value in f.values() if isinstance(value, dict))):
            if "right" in inner:
                said[what] = said.get(what, True) and bool(inner["right"])
        if "error" in f and isinstance(f["error"], str):
            said[what] = False
    if not said:
        return []
    wrong = [what for what, right in said.items() if not right]
    return [
        f"Checks: {len(said) - len(wrong)} of {len(said)} right" + (f"; wrong: {', '.join(wrong)}." if wrong else ".")
    ]


def reason(figures: dict[str, Any]) -> str:
    """Return why there is no figure."""
    if "OutOfMemory" in str(figures.get("error")):
        return "out of memory"
    return next((str(figures[name])[:80] for name in ("not_measured", "skipped", "error") if name in figures), "")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; none where it has no rows."""
    if not rows:
        return []
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def check_same_conditions(first: dict[str, Any], second: dict[str, Any], consequence: str) -> None:
    """Raise `UserError`, which ends with `consequence`, where two runs differ in what all figures depend on."""
    for name in CONDITIONS:
        if first.get(name) != second.get(name):
            raise UserError(f"one run has {name} {first.get(name)}, the other {second.get(name)}: {consequence}")


def read_result(file: Path) -> dict[str, Any]:
    """Return what a result file of `card.py` holds.

    Raises:
        UserError: there is no such file, or it is no result.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        parts = result["parts"].values()
        whole = "device" in result["run"] and all({"status", "figures"} <= part.keys() for part in parts)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{file} is no result of benchmarks/card.py, which writes card.json")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="card.json files [the newest in benchmarks/results]")
    files = parser.parse_args().files or sorted(RESULTS.glob("*.json"), key=lambda file: file.stem[-10:])[-1:]
    print(tables([read_result(file) for file in files]))


if __name__ == "__main__":
    run_recipe(main)
