"""Figures of a comparison as SVG that takes its ink from the page, so that light and dark mode both work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from gn_transfer.comparison.comparison import Comparison, Group
from gn_transfer.comparison.grouping import label, shown
from gn_transfer.comparison.images import ClassDifference
from gn_transfer.comparison.importance import INTERACTIONS, REST, Importance
from gn_transfer.report.figures import MOST_POINTS
from gn_transfer.report.runs import MAIN_METRICS, Setting
from gn_transfer.report.svg import COLORS, INK, STYLE, PageFigure, as_svg, hover, on_lines

_OF_NORM = dict(zip(("gn_ws", "bn", "gn", "bn_frozen", "ln", "bn_ws", "in", "none", "bn_sync"), COLORS, strict=True))
_BAD_TO_GOOD = LinearSegmentedColormap.from_list("bad to good", ["#d1495b", "#c9932c", "#2f7ed8"])
_MOST_LINES = 10
_MOST_ROWS = 40


_PLAIN = "no accumulation: batch = effective batch"


def create_figures(
    comparison: Comparison, importances: Sequence[Importance], by_class: ClassDifference | None
) -> list[PageFigure]:
    """Create every figure that the runs are good for.

    Args:
        comparison: The comparison.
        importances: See :func:`gn_transfer.comparison.importance.importances`.
        by_class: The difference between two groups class by class, or None.

    Returns:
        The figures, the most informative first.
    """
    found: list[PageFigure] = []
    main = comparison.metric.rpartition("/")[2]
    error = "1 - mIoU" if main == "miou" else "error"
    with matplotlib.rc_context(STYLE):
        panels = batch_panels(comparison.groups)
        if panels:
            found.append(
                PageFigure(
                    "batch_size",
                    f"{error[0].upper()}{error[1:]} against batch size",
                    as_svg(_batch_figure(panels, error), "batch_size"),
                    "Mean over seeds with its 95 % interval; pale dots are single seeds. Under accumulation, a norm "
                    "that does not look across images has the same gradient at every micro-batch.",
                )
            )
        rest = (
            f" The first {_MOST_ROWS} of {len(comparison.groups)} groups."
            if len(comparison.groups) > _MOST_ROWS
            else ""
        )
        found.append(
            PageFigure(
                "groups",
                "Groups",
                as_svg(_forest(comparison), "groups"),
                f"{comparison.metric}: mean over seeds with its 95 % interval; pale dots are single seeds.{rest}",
            )
        )
        curves = _curves(comparison)
        if curves is not None:
            found.append(
                PageFigure(
                    "curves",
                    "Learning curves",
                    as_svg(curves, "curves"),
                    f"The {MAIN_METRICS[main]} on validation; bands span the seeds.",
                )
            )
        if comparison.grouping.keys and len(comparison.runs) > 2:
            found.append(
                PageFigure(
                    "parallel",
                    "Parallel coordinates",
                    as_svg(_parallel(comparison), "parallel"),
                    f"One line per run, colored by {comparison.metric} on the right-hand axis; - where a setting "
                    "does not apply.",
                )
            )
        if importances:
            found.append(
                PageFigure(
                    "importance",
                    "Importance of each setting",
                    as_svg(_importance_figure(importances), "importance"),
                    " ".join(dict.fromkeys(part.note for part in importances)),
                )
            )
        if by_class is not None:
            found.append(
                PageFigure(
                    "classes",
                    "Class by class",
                    as_svg(_class_figure(by_class), "classes"),
                    f"{'IoU' if main == 'miou' else 'Accuracy'} of {by_class.first.label} less that of "
                    f"{by_class.second.label}, in percentage points, "
                    f"on the images that both were evaluated on ({by_class.images:,}).",
                )
            )
    return found


def batch_panels(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Sort groups into the arms of a study over batch sizes.

    Args:
        groups: The groups.

    Returns:
        Title and groups of each arm with at least two batch sizes. Where the runs name no arms: one without
        accumulation, one per fixed effective batch, and a group whose batch is the effective batch can be in two.
    """

    def sizes(group: Group) -> tuple[Setting, Setting]:
        settings = group.runs[0].settings
        return settings["batch_size"], settings["effective_batch_size"]

    effectives = sorted({int(sizes(group)[1] or 0) for group in groups})
    if names := sorted({str(group.settings["arm"]) for group in groups if group.settings.get("arm") is not None}):
        panels = []
        for name in names:
            some = [group for group in groups if group.settings["arm"] == name]
            said = [_PLAIN] if all(sizes(group)[0] == sizes(group)[1] for group in some) else []
            said += [_accumulated(one) for one in effectives if all(sizes(group)[1] == one for group in some)]
            panels.append((": ".join([f"arm {name}", *said[:1]]), some))
    else:
        arms: list[tuple[str, Callable[[Group], bool]]] = [
            (_PLAIN, lambda group: sizes(group)[0] == sizes(group)[1]),
            *((_accumulated(effective), _has_effective(effective)) for effective in effectives),
        ]
        panels = [(title, [group for group in groups if belongs(group)]) for title, belongs in arms]
    return [(title, some) for title, some in panels if len({sizes(group)[0] for group in some}) > 1]


def _accumulated(effective: int) -> str:
    return f"accumulated to an effective batch of {effective}"


def _has_effective(effective: int) -> Callable[[Group], bool]:
    return lambda group: group.runs[0].settings["effective_batch_size"] == effective


def _batch_figure(panels: Sequence[tuple[str, list[Group]]], error: str) -> Figure:
    series: dict[str, None] = {}
    for _, groups in panels:
        series |= {_series(group): None for group in groups}
    height = 3.4 + 0.2 * (-(-len(series) // 2))
    figure = Figure(figsize=(max(5.6, 4.2 * len(panels)), height), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, (title, groups) in zip(all_axes, panels, strict=True):
        of_series: dict[str, list[Group]] = defaultdict(list)
        for group in groups:
            of_series[_series(group)].append(group)
        for number, name in enumerate(name for name in series if name in of_series):
            members = sorted(of_series[name], key=_batch_size)
            shift = 1.03 ** (number - len(of_series) / 2)  # so that intervals do not hide each other
            x = [_batch_size(group) * shift for group in members]
            color, dashes = _look(name, list(series))
            for place, group in zip(x, members, strict=True):
                for seed, value in group.by_seed.items():
                    [dot] = axes.plot([place], [100 * (1 - value)], "o", color=color, alpha=0.25, markersize=3)
                    hover(dot, f"{group.label}, seed {seed}: {error} {100 * (1 - value):.1f} %")
            y, below, above = _errors(members)
            bars = axes.errorbar(x, y, (below, above), color=color, linestyle=dashes, marker="o", ms=5, capsize=2)
            handles.setdefault(name, bars)
            for place, group in zip(x, members, strict=True):
                [point] = axes.plot([place], [100 * (1 - group.mean)], "o", color=color, markersize=5)
                hover(point, _group_text(group, error))
        ticks = sorted({_batch_size(group) for group in groups})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("batch size (images per forward)")
        axes.set_title(title, loc="left")
    all_axes[0].set_ylabel(f"{error}, %")
    columns = 2 if max(map(len, handles)) < 40 else 1
    figure.legend(list(handles.values()), list(handles), loc="outside lower left", ncols=columns)
    return figure


def _group_text(group: Group, error: str = "") -> str:
    """What is read under the pointer: label, mean (or the error of this name), interval, seeds."""
    mean, low, high = group.mean, group.low, group.high
    if error:
        mean, low, high = 1 - mean, None if high is None else 1 - high, None if low is None else 1 - low
    interval = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{group.label}: {f'{error} ' if error else ''}{100 * mean:.1f} %{interval}, {group.n} seeds"


def _errors(groups: Sequence[Group]) -> tuple[list[float], list[float], list[float]]:
    """Error in percent, and the lengths of its bars down and up."""
    y = [100 * (1 - group.mean) for group in groups]
    below = [0.0 if group.high is None else 100 * max(0.0, group.high - group.mean) for group in groups]
    above = [0.0 if group.low is None else 100 * max(0.0, group.mean - group.low) for group in groups]
    return y, below, above


def _forest(comparison: Comparison) -> Figure:
    groups = comparison.groups[:_MOST_ROWS]
    figure = Figure(figsize=(7.6, 1.0 + 0.3 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    for row, group in enumerate(groups):
        color = _norm_color(group)
        for seed, value in group.by_seed.items():
            [dot] = axes.plot([100 * value], [row], "o", color=color, alpha=0.3, markersize=4)
            hover(dot, f"{group.label}, seed {seed}: {100 * value:.1f} %")
        if group.low is not None and group.high is not None:
            axes.plot([100 * group.low, 100 * group.high], [row, row], color=color, linewidth=2)
        [mean] = axes.plot([100 * group.mean], [row], "D", color=color, markersize=6)
        hover(mean, _group_text(group))
    axes.set_yticks(range(len(groups)), [group.label for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel(f"{comparison.metric}, %")
    axes.grid(visible=False, axis="y")
    return figure


def _curves(comparison: Comparison) -> Figure | None:
    many = len(comparison.groups) > _MOST_LINES
    figure = Figure(figsize=(7.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    names = [group.label for group in comparison.groups]
    name = f"val/{comparison.metric.rpartition('/')[2]}"
    for group in comparison.groups:
        runs = [rows for run in group.runs if (rows := run.epochs()) and {name, "samples_seen"} <= rows[0].keys()]
        length = min(map(len, runs), default=0)
        if length < 2:  # one point is no curve
            continue
        values = 100 * np.array([[row[name] for row in rows[:length]] for rows in runs])
        samples = [row["samples_seen"] for row in runs[0][:length]]
        color, dashes = (_norm_color(group), "-") if many else _look(group.label, names)
        said = str(group.runs[0].settings["norm"]) if many else group.label
        alpha = 0.55 if many else 1.0
        axes.plot(samples, values.mean(axis=0), color=color, linestyle=dashes, alpha=alpha, label=said)
        points = list(zip(samples, values.mean(axis=0), strict=True))
        for seen, value in points[:: 1 + len(points) // MOST_POINTS]:
            [point] = axes.plot([seen], [value], "o", color=color, alpha=alpha, markersize=3.5)
            hover(point, f"{group.label}, {seen:,.0f} images: {value:.1f} %")
        if not many and len(runs) > 1:
            axes.fill_between(samples, values.min(axis=0), values.max(axis=0), color=color, alpha=0.13, linewidth=0)
    if not axes.lines:
        return None
    axes.set_xlabel("training images seen")
    axes.set_ylabel(f"{name}, %")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(list(once.values()), list(once), loc="outside lower left", ncols=2)
    return figure


def _parallel(comparison: Comparison) -> Figure:
    keys = comparison.grouping.keys[:10]
    figure = Figure(figsize=(max(5.6, 1.5 * (len(keys) + 1)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    scores = [float(run.metrics[comparison.metric]) for run in comparison.runs]
    low, high = min(scores), max(scores)
    span = (high - low) or 1.0
    places = {key: _places([run.settings.get(key) for run in comparison.runs]) for key in keys}
    jitter = np.random.default_rng(0).uniform(-0.018, 0.018, (len(comparison.runs), len(keys)))
    for score, run, moved in sorted(zip(scores, comparison.runs, jitter, strict=True), key=lambda item: item[0]):
        height = (score - low) / span
        path = [places[key][shown(run.settings.get(key))] + move for key, move in zip(keys, moved, strict=True)]
        color = _BAD_TO_GOOD(height)
        [line] = axes.plot([*range(len(keys)), len(keys)], [*path, height], color=color, alpha=0.6, linewidth=1.1)
        hover(line, f"{run.name}: {100 * score:.1f} %")
    for number, key in enumerate(keys):
        axes.axvline(number, color=INK, linewidth=0.8)
        for text, height in places[key].items():
            on_lines(axes.text(number + 0.04, height, text, fontsize=9, va="center"))
    axes.axvline(len(keys), color=INK, linewidth=0.8)
    for height in np.linspace(0, 1, 5):
        axes.text(len(keys) + 0.04, height, f"{100 * (low + height * (high - low)):.1f}", fontsize=9, va="center")
    axes.set_xticks(range(len(keys) + 1), [*keys, f"{comparison.metric}, %"])
    axes.set_xlim(-0.1, len(keys) + 0.35)
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _places(values: Sequence[Setting]) -> dict[str, float]:
    """Spread the different values of an axis evenly, numbers in order."""
    numbers = sorted({value for value in values if isinstance(value, int | float)})
    words = sorted({shown(value) for value in values if not isinstance(value, int | float)})
    texts = [*words, *map(shown, numbers)]
    return {text: 0.5 if len(texts) == 1 else place / (len(texts) - 1) for place, text in enumerate(texts)}


def _importance_figure(importances: Sequence[Importance]) -> Figure:
    rows = sum(len(part.shares) + 1 for part in importances)
    figure = Figure(figsize=(7.6, 0.7 + 0.3 * rows), layout="constrained")
    ratios = [len(part.shares) + 0.5 for part in importances]
    all_axes = figure.subplots(len(importances), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, part in zip(all_axes, importances, strict=True):
        names = list(part.shares)
        noise = ("seed", INTERACTIONS, REST)
        colors = [COLORS[-1] if name in noise else COLORS[0] for name in names]
        bars = axes.barh(names, [100 * part.shares[name] for name in names], color=colors)
        for bar, name in zip(bars, names, strict=True):
            hover(bar, f"{name}: {100 * part.shares[name]:.1f} % of the variance")
        axes.invert_yaxis()
        axes.set_title(f"{part.heading} ({part.runs} runs)", loc="left")
        axes.grid(visible=False, axis="y")
    all_axes[-1].set_xlabel("share of the variance of the metric, %")
    return figure


def _class_figure(by_class: ClassDifference) -> Figure:
    ordered = sorted(by_class.difference.items(), key=lambda item: -abs(item[1]))[:_MOST_ROWS]
    ordered.sort(key=lambda item: item[1])
    figure = Figure(figsize=(7.6, 1.0 + 0.26 * len(ordered)), layout="constrained")
    axes = figure.add_subplot()
    values = [100 * value for _, value in ordered]
    bars = axes.barh([name for name, _ in ordered], values, color=[COLORS[0] if v > 0 else COLORS[1] for v in values])
    for bar, (name, value) in zip(bars, ordered, strict=True):
        hover(bar, f"{name}: {100 * value:+.1f} points")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("difference, percentage points")
    axes.grid(visible=False, axis="y")
    return figure


def _series(group: Group) -> str:
    in_panel = ("batch_size", "effective_batch_size", "arm")
    return label({key: value for key, value in group.label_settings.items() if key not in in_panel})


def _batch_size(group: Group) -> float:
    run = group.runs[0]
    size = run.settings["batch_size"]
    size = run.metrics.get("micro_batch_size") if size == "auto" else size
    return float(size) if isinstance(size, int) else 0.0


def _norm_color(group: Group) -> str:
    return _OF_NORM.get(str(group.runs[0].settings["norm"]), COLORS[-1])


def _look(name: str, names: Sequence[str]) -> tuple[str, str]:
    """Choose color and dashes of a line: the norm's color, and dashes that tell lines of the same norm apart."""
    norm = name.split(",")[0]
    if norm not in _OF_NORM:
        place = list(names).index(name)
        return COLORS[place % len(COLORS)], ("-", "--", ":", "-.")[place // len(COLORS) % 4]
    same = [other for other in names if other.split(",")[0] == norm]
    return _OF_NORM[norm], ("-", "--", ":", "-.")[same.index(name) % 4]
