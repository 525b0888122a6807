"""The curves of a PPO run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PANELS = (
    ("score", "score (reference sd)"), ("kl", "KL to base per answer (nats)"), ("ended_rate", "answers that end"),
    ("response_length", "answer length (tokens)"),
)  # fmt: skip


def write_curves(metrics: Sequence[dict[str, float]], file: Path) -> None:
    """Draw reward, KL, ended share and length over the PPO steps into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        axis.plot([m["step"] for m in metrics], [m[key] for m in metrics], color="tab:blue", marker=".", label=key)
        if key == "score":
            axis.plot(
                [m["step"] for m in metrics], [m["reward"] for m in metrics], color="tab:orange", label="reward, all in"
            )
            axis.legend(frameon=False)
        axis.set_title(title)
        axis.set_xlabel("PPO step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
