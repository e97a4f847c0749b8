"""Draw the figures of "How it works" as SVG; run it after a change: ``python docs/figures/make.py``."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BLUE, ORANGE, GREEN, GREY = "#cfe2f7", "#f9dcc4", "#cfead6", "#e6e6e6"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Create an empty drawing whose units are tenths of an inch."""
    figure = Figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str, height: float = 8) -> None:
    """Draw a box with a text."""
    style = "round,pad=0,rounding_size=1"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="#444"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """Draw an arrow with a text above it."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color="#444"))
    if text:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 1.5, text, ha="center", fontsize=8)


def engine() -> Figure:
    """One accumulation step: what is done once, and what for every micro-batch."""
    figure, axes = canvas(78, 36)
    box(axes, 1, 26, 16, "weight\n(parameter)", GREY)
    box(axes, 27, 26, 24, "working copy:\nstandardized, cast", BLUE)
    arrow(axes, (17, 30), (27, 30), "once")
    for number, name in enumerate(("image 1", "image 2", "...", "image 16")):
        box(axes, 5 + 18 * number, 12, 14, name, GREEN, 6)
        arrow(axes, (39, 26), (12 + 18 * number, 18))
        arrow(axes, (12 + 18 * number, 12), (39, 7))
    box(axes, 27, 1, 24, "sum of gradients", ORANGE, 6)
    box(axes, 1, 1, 14, "weight.grad", GREY, 6)
    arrow(axes, (27, 4), (15, 4), "once")
    axes.text(53, 4, "back through the\nstandardization: once", fontsize=8, va="center")
    return figure


def cache() -> Figure:
    """From a file to a batch, with and without the cache."""
    figure, axes = canvas(84, 24)
    box(axes, 1, 13, 14, "image file", GREY)
    box(axes, 21, 13, 16, "decode,\nreduce", BLUE)
    box(axes, 43, 13, 16, "augment\n(seeded)", GREEN)
    box(axes, 65, 13, 18, "batch, uint8", GREY)
    for start in (15, 37, 59):
        arrow(axes, (start, 17), (start + 6, 17))
    box(axes, 21, 1, 16, "cache", ORANGE, 6)
    arrow(axes, (29, 13), (29, 7))
    arrow(axes, (37, 4), (48, 13))
    axes.text(50, 4, "from the second epoch on", fontsize=8)
    return figure


def statistics() -> Figure:
    """Which values share a mean and a variance, for a batch of three images with six channels."""
    figure, axes = canvas(84, 34)
    palette = colormaps["tab20"]
    for place, (title, rule) in enumerate(
        (
            ("BatchNorm", lambda n, c: c),
            ("GroupNorm, 2 groups", lambda n, c: 2 * n + c // 3),
            ("GN, 1 group (LN)", lambda n, c: n),
            ("GN, 6 groups (IN)", lambda n, c: 6 * n + c),
        )
    ):
        left = 4 + 20 * place
        axes.text(left + 7, 30, title, ha="center", fontsize=9)
        for n in range(3):
            for c in range(6):
                color = palette(rule(n, c))
                axes.add_patch(
                    FancyBboxPatch(
                        (left + 2.4 * c, 20 - 7 * n), 2.1, 6, boxstyle="square,pad=0", facecolor=color, edgecolor="#444"
                    )
                )
        if place == 0:
            for n in range(3):
                axes.text(left - 1, 23 - 7 * n, f"image {n + 1}", ha="right", va="center", fontsize=7)
    axes.text(42, 1.5, "columns are channels; fields of one color share a mean and a variance", ha="center", fontsize=8)
    axes.set_xlim(-6, 84)
    return figure


def learning_rate() -> Figure:
    """Accuracy over the learning rate, from the stored rows of sweep_learning_rate.yaml."""
    rows = list(csv.DictReader((RESULTS / "sweep_learning_rate_rows.csv").open()))
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for norm, color, shift in (("bn_frozen", "#c0529d", 0.97), ("gn_ws", "#2f7ed8", 1.03)):
        found: dict[float, list[float]] = {}
        for row in rows:
            if row["norm"] == norm:
                found.setdefault(float(row["lr"]), []).append(100 * float(row["val/acc1"]))
        rates = sorted(found)
        axes.plot(rates, [sum(found[rate]) / len(found[rate]) for rate in rates], "o-", color=color, label=norm)
        for rate in rates:
            axes.plot([rate * shift] * len(found[rate]), found[rate], "o", color=color, alpha=0.3, markersize=4)
    axes.plot([0.1, 0.3], [20, 20], "x", color="#c0529d", markersize=8, label="bn_frozen: loss not finite")
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy, %", ylim=(0, 104))
    axes.set_xticks([0.003, 0.01, 0.03, 0.1, 0.3], ["0.003", "0.01", "0.03", "0.1", "0.3"])
    axes.axhline(20, color="#999", linewidth=0.8, linestyle=":")
    axes.text(0.0028, 21.5, "chance", fontsize=8, color="#666")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def cost() -> Figure:
    """Speed and memory of a training over what they grow with, from the stored rows of cost.py, with their limits."""
    panels = {
        "batch": "images at a time",
        "img_size": "image side, px",
        "backbone": "layers of the ResNetV2",
        "classes": "classes",
    }
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    grid = figure.subplots(2, len(panels), sharex="col", sharey="row")
    for column, (name, label) in enumerate(panels.items()):
        rows = json.loads((RESULTS / f"cost_{name}.json").read_text())["rows"]
        places = [int(str(row[name]).rpartition("_")[2]) for row in rows]
        for axes, measured, limit, said in (
            (grid[0, column], "images_per_sec", "floor_images_per_sec", "the convolutions alone"),
            (grid[1, column], "peak_mib", "state_mib", "weights, gradients,\nmomentum"),
        ):
            axes.plot(places, [row[measured] for row in rows], "o-", color="#2f7ed8", label="measured")
            axes.plot(places, [row[limit] for row in rows], ":", color="#666", label=said)
            axes.set_xscale("log")
            axes.set_xticks(places, [f"{place:,}" for place in places])
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
        grid[1, column].set_xlabel(label)
    for row, label, place in zip(grid, ("images/s", "peak memory, MiB"), (3, 1), strict=True):
        row[0].set_ylabel(label)
        row[0].set_ylim(0, None)
        row[place].legend(frameon=False, fontsize=8, loc="upper center")  # where there is room
    return figure


if __name__ == "__main__":
    rcParams["svg.hashsalt"] = "gn_transfer"  # the same drawing gives the same file
    for draw in (engine, cache, statistics, learning_rate, cost):
        draw().savefig(Path(__file__).with_name(f"{draw.__name__}.svg"), metadata={"Date": None})
