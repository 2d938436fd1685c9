"""The curve of a learning rate range test, as a picture and in a terminal. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path

from sft_dist.train.lr_curve import LrCurve

ROWS, COLUMNS = 12, 64


def draw(curve: LrCurve, picture: Path) -> None:
    """Losses by rate, which is logarithmic, with the suggested rates; the kind of file by its ending."""
    # The object interface needs no display and leaves the caller's Matplotlib backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(curve.rates, curve.losses, ".", color="tab:blue", alpha=0.35, markersize=4, label="loss of a step")
    axes.plot(curve.rates, curve.smoothed, color="tab:blue", linewidth=1.6, label="smoothed")
    marks = {
        "steepest descent": (curve.steepest, "tab:green", "--"),
        "a tenth of where it rises": (curve.tenth, "tab:orange", "-."),
        "where it rises": (curve.turning, "tab:red", ":"),
    }
    for name, (rate, color, style) in marks.items():
        if rate is not None:
            axes.axvline(rate, color=color, linestyle=style, linewidth=1.4, label=f"{name}: {rate:.1e}")
    low, high = _range(curve)
    margin = 0.06 * (high - low)
    axes.set(xscale="log", xlabel="learning rate (one step each)", ylabel="training loss (nats per supervised token)")
    axes.set_ylim(low - margin, high + margin)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=9)
    figure.savefig(picture)


def in_terminal(curve: LrCurve) -> str:
    """The smoothed loss by the logarithm of the rate; below it where the suggested rate is."""
    low, high = _range(curve)
    first, last = math.log(curve.rates[0]), math.log(curve.rates[-1])
    width = (last - first) or 1.0
    grid = [[" "] * COLUMNS for _ in range(ROWS)]

    def column(rate: float) -> int:
        return round((math.log(rate) - first) / width * (COLUMNS - 1))

    for rate, loss in zip(curve.rates, curve.smoothed, strict=True):
        share = min(1.0, max(0.0, (loss - low) / ((high - low) or 1.0)))
        grid[ROWS - 1 - round(share * (ROWS - 1))][column(rate)] = "•"
    labels = [f"{high:8.3f} ┤", *["         │"] * (ROWS - 2), f"{low:8.3f} ┤"]
    lines = [label + "".join(row).rstrip() for label, row in zip(labels, grid, strict=True)]
    lines.append("         └" + "─" * COLUMNS)
    ends = f"{curve.rates[0]:.0e}", f"{curve.rates[-1]:.0e}"
    lines.append(" " * 10 + ends[0] + ends[1].rjust(COLUMNS - len(ends[0])))
    suggested = curve.suggested
    if suggested is not None and suggested >= curve.rates[0]:
        lines.insert(-1, " " * (10 + column(suggested)) + f"↑ {suggested:.1e}")
    return "\n".join(lines)


def _range(curve: LrCurve) -> tuple[float, float]:
    """Of the axis of losses: the smoothed ones, of a divergence only its beginning."""
    low, high, start = min(curve.smoothed), max(curve.smoothed), curve.smoothed[0]
    return low, min(high, start + 0.5 * ((start - low) or abs(low)))
