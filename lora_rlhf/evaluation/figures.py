"""The figures of a report. An arm has one colour and one marker everywhere; the colours are Okabe and Ito's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_rlhf.evaluation.loaded_arms import TITLES

COLOURS = {"base": "#0072B2", "instruct": "#E69F00", "plus": "#009E73"}
MARKERS = {"base": "o", "instruct": "s", "plus": "D"}
READING_STYLES = {"reward": ("#009E73", "-", "o"), "referee": ("#CC79A7", "--", "s")}


def write_figures(results: Mapping[str, Any], folder: Path) -> dict[str, tuple[str, Path]]:
    """Draw what the results hold into PNGs; return suite -> (text that says what is seen, file), in drawing order.

    Args:
        results: the content of results.json.
        folder: where the PNGs go.
    """
    suites = results["suites"]
    wanted: list[tuple[str, str, bool, Callable[[Any, Any], None]]] = [
        ("general", "Accuracy by task, with 95 % intervals.",
         "general" in suites, _accuracies),
        ("mt_bench", "Grades by category (1 to 10, further out is better).",
         len(suites.get("mt_bench", {}).get("details", {}).get("categories", {})) > 2, _radar),
        ("moderation", "Grades by criterion, with 95 % intervals.", "moderation" in suites, _moderation),
        ("safety", "Declined prompts (many of the unsafe and few of the safe ones is good), and prompts on which the "
         "right kind of answer is likelier (many is good), with 95 % intervals.", "safety" in suites, _safety),
        ("bad_words", "Left: probability of bad words at each layer (bands: 95 % over prompts). Right: by word, at the "
         "last layer, the ten most probable.", "bad_words" in suites, _bad_words),
        ("preference", "Reward above base over the run, against KL to base; where the referee's line leaves the "
         "other's, the reward model is being fooled.", bool(_curve(suites)), _reward_over_kl),
    ]  # fmt: skip
    return {name: (text, _drawn(draw, suites[name], folder / f"{name}.png")) for name, text, has, draw in wanted if has}


def _drawn(draw: Callable[[Any, Any], None], suite: Any, file: Path) -> Path:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 5), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, suite)
        figure.savefig(file, dpi=130)
    return file


def _points_by_task(axis: Any, tasks: Mapping[str, Any], names: Sequence[str]) -> None:
    """Draw a column of points per task, an arm beside the other, with 95 % intervals from the standard errors."""
    arms = [arm for arm in COLOURS if any(arm in tasks[name] for name in names)]
    for i, arm in enumerate(arms):
        at = [j for j, name in enumerate(names) if arm in tasks[name]]
        axis.errorbar(
            [j + 0.2 * (i - (len(arms) - 1) / 2) for j in at], [tasks[names[j]][arm]["value"] for j in at],
            yerr=[1.96 * tasks[names[j]][arm]["stderr"] for j in at],
            fmt=MARKERS[arm], color=COLOURS[arm], label=TITLES[arm], capsize=3, markersize=7,
        )  # fmt: skip
    axis.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.grid(axis="y", alpha=0.3)
    if len(names) > 5:
        axis.tick_params(axis="x", rotation=25)
        for label in axis.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")


def _legend_above(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def _accuracies(figure: Any, suite: Any) -> None:
    axis = figure.subplots()
    _points_by_task(axis, suite["tasks"], list(suite["tasks"]))
    axis.set_ylabel("share right")
    axis.set_ylim(0, 1)
    _legend_above(figure, axis)


def _moderation(figure: Any, suite: Any) -> None:
    axis = figure.subplots()
    names = list(suite["tasks"])
    _points_by_task(axis, suite["tasks"], names)
    axis.set_ylabel(suite["units"][names[0]])
    _legend_above(figure, axis)


def _safety(figure: Any, suite: Any) -> None:
    axis = figure.subplots()
    _points_by_task(axis, suite["tasks"], [name for name in suite["tasks"] if "compliance" not in name])
    axis.set_ylabel("share of prompts")
    axis.set_ylim(-0.03, 1.03)
    _legend_above(figure, axis)


def _radar(figure: Any, suite: Any) -> None:
    categories = suite["details"]["categories"]
    names = list(categories)
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    axis = figure.add_subplot(projection="polar")
    for arm in [arm for arm in COLOURS if arm in categories[names[0]]]:
        values = [categories[name][arm] for name in names]
        axis.plot(
            [*angles, angles[0]], [*values, values[0]], color=COLOURS[arm], marker=MARKERS[arm], label=TITLES[arm]
        )
        axis.fill(angles, values, color=COLOURS[arm], alpha=0.08)
    axis.set_xticks(angles, names)
    axis.tick_params(axis="x", pad=12)
    axis.set_ylim(0, 10)
    axis.set_yticks([2, 4, 6, 8, 10])
    axis.set_rlabel_position(180 / len(names))
    _legend_above(figure, axis)


def _bad_words(figure: Any, suite: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    for arm, layers in suite["details"]["by_layer"].items():
        numbers = range(1, len(layers) + 1)
        left.plot(numbers, [layer["value"] for layer in layers], color=COLOURS[arm], label=TITLES[arm], linewidth=1.5)
        if layers[0]["low"] is not None:
            low, high = ([max(layer[end], 1e-12) for layer in layers] for end in ("low", "high"))
            left.fill_between(numbers, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
    left.set_yscale("log")
    left.set_xlabel("layer")
    left.set_ylabel("probability of bad words")
    left.grid(alpha=0.3)
    by_word = suite["details"]["by_word"]
    words = sorted(by_word, key=lambda word: max(arm["value"] for arm in by_word[word].values()))[-10:]
    arms = list(suite["details"]["by_layer"])
    for i, arm in enumerate(arms):
        at = [j + 0.22 * ((len(arms) - 1) / 2 - i) for j in range(len(words))]
        values = [by_word[word][arm]["value"] for word in words]
        ends = [[by_word[w][arm]["low"] for w in words], [by_word[w][arm]["high"] for w in words]]
        for y, x, low, high in zip(at, values, *ends, strict=True):
            if low is not None:
                right.plot([max(low, 1e-12), max(high, 1e-12)], [y, y], color=COLOURS[arm], linewidth=1.5)
            right.plot([max(x, 1e-12)], [y], MARKERS[arm], color=COLOURS[arm], markersize=5)
    right.set_yticks(range(len(words)), words)
    right.set_xscale("log")
    right.set_xlabel("probability that the word begins")
    right.grid(axis="x", alpha=0.3)
    _legend_above(figure, left)


def _curve(suites: Mapping[str, Any]) -> list[dict[str, Any]]:
    points = suites.get("preference", {}).get("details", {}).get("curve", [])
    return [point for point in points if point["kl"] is not None]


def _reward_over_kl(figure: Any, suite: Any) -> None:
    points, axis = _curve({"preference": suite}), figure.subplots()
    for name, (colour, line, marker) in READING_STYLES.items():
        if name not in points[0]:
            continue
        kl, values = [p["kl"] for p in points], [p[name]["value"] for p in points]
        label = "reward that PPO maximised" if name == "reward" else "referee that PPO never saw"
        axis.plot(kl, values, color=colour, linestyle=line, marker=marker, label=label)
        if all(p[name]["low"] is not None for p in points):
            axis.fill_between(
                kl, [p[name]["low"] for p in points], [p[name]["high"] for p in points], color=colour, alpha=0.15,
                linewidth=0,
            )  # fmt: skip
    for point in points:
        top = max(point[name]["value"] for name in READING_STYLES if name in point)
        axis.annotate(f"step {point['step']}", (point["kl"], top), textcoords="offset points", xytext=(0, 9),
                      ha="center", fontsize=9)  # fmt: skip
    axis.axhline(0, color="black", linewidth=0.8)
    axis.margins(x=0.08, y=0.12)
    axis.set_xlabel("KL to base (nats per answer)")
    axis.set_ylabel("above base (standard deviations)")
    axis.grid(alpha=0.3)
    _legend_above(figure, axis)
