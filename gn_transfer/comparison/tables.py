"""The comparison as tables: for people (percent, rounded), and for programs (fractions, unrounded)."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gn_transfer.comparison.answer import answer
from gn_transfer.comparison.comparison import Comparison, Contrast, Group
from gn_transfer.comparison.grouping import label, shown
from gn_transfer.config import markdown_text
from gn_transfer.report.runs import PREDICTIONS, Run, Setting

Row: TypeAlias = dict[str, str]

_FIGURES = ("images_per_sec", "peak_memory_mib", "wall_time_s")


def group_rows(comparison: Comparison) -> list[Row]:
    """Tabulate the groups, the metric in percent."""
    return [
        {
            **{key: shown(value) for key, value in group.settings.items()},
            "n": str(group.n),
            f"{comparison.metric} %": _percent(group.mean),
            "95 % interval": _interval(group.low, group.high),
            "sd": "-" if group.sd is None else _percent(group.sd),
            "images/s": f"{group.average('images_per_sec'):.1f}",
            "peak MiB": f"{group.average('peak_memory_mib'):,.0f}",
        }
        for group in comparison.groups
    ]


def contrast_rows(comparison: Comparison) -> list[Row]:
    """Tabulate the contrasts, differences in percentage points."""
    return [
        {
            "group": contrast.group.label,
            "against": contrast.against,
            "pairs": str(contrast.test.pairs),
            "difference": f"{100 * contrast.difference:+.2f}",
            "95 % interval": _interval(contrast.low, contrast.high, sign="+"),
            "p (sign flip)": f"{contrast.test.p:.3g}",
            "p (Holm)": f"{contrast.p_holm:.3g}",
            "smallest p": f"{contrast.test.smallest_p:.2g}",
        }
        for contrast in comparison.contrasts
    ]


def contrast_note(comparison: Comparison) -> str:
    """Explain the columns of the contrasts; empty without any."""
    if not comparison.contrasts:
        return ""
    exact = all(contrast.test.exact for contrast in comparison.contrasts)
    flips = "all 2^n flips" if exact else "all 2^n flips up to 16 pairs, 65,536 random ones beyond"
    contrasts = f"{len(comparison.contrasts)} contrast{'s' * (len(comparison.contrasts) != 1)}"
    return (
        "Differences in percentage points, paired by seed. p: two-sided sign-flip test of the paired differences "
        f"({flips}); Holm over {contrasts}; the last column is the smallest p that so many pairs "
        "can reach. Intervals: percentile bootstrap over seeds, and over images where predictions are stored."
    )


def group_count_tables(comparison: Comparison) -> list[tuple[str, list[Row]]]:
    """Tabulate studies of the number of groups and of channels per group in the form of arXiv:1803.08494, table 2.

    Returns:
        Heading and rows of each: mean error in percent, one column per value, the greatest first; below each row how
        far each is from the best.
    """
    tables = []
    for name, heading in (("num_groups", "groups"), ("group_size", "channels per group")):
        if name not in comparison.grouping.keys:
            continue
        studies: dict[str, dict[float, Group]] = defaultdict(dict)
        for group in comparison.groups:
            value = group.settings[name]
            if isinstance(value, int | float):
                rest = {key: other for key, other in group.settings.items() if key not in ("num_groups", "group_size")}
                studies[label(rest)][value] = group
        columns = sorted({value for study in studies.values() for value in study}, reverse=True)
        rows = []
        for said, study in studies.items():
            if len(study) < 2:
                continue
            best = max(group.mean for group in study.values())
            cells = {f"{value:g}": study.get(value) for value in columns}
            rows.append({"": said} | {k: "-" if g is None else _percent(1 - g.mean) for k, g in cells.items()})
            rows.append(
                {"": "above the best"} | {k: "-" if g is None else _percent(best - g.mean) for k, g in cells.items()}
            )
        if rows:
            error = "1 - mIoU" if comparison.metric.endswith("miou") else "Error"
            tables.append((f"{error} in percent by number of {heading}", rows))
    return tables


def run_rows(comparison: Comparison) -> list[dict[str, Setting]]:
    """List every run with its settings and figures, unrounded."""
    return [_run_row(comparison, run) for run in comparison.runs]


def _run_row(comparison: Comparison, run: Run) -> dict[str, Setting]:
    names = [*comparison.grouping.keys, *comparison.grouping.tied]
    wanted = (*(f"{evaluation}/{run.main_metric}" for evaluation in PREDICTIONS), "val/loss", "samples_seen", *_FIGURES)
    facts = ("weights", "device", "git_commit", "val_split", "test_split")
    return {
        "run": run.name,
        "seed": run.seed,
        **{name: run.settings.get(name) for name in names},
        **{name: run.metrics.get(name) for name in (*wanted, *facts)},
        "folder": str(run.folder),
    }


def group_records(comparison: Comparison) -> list[dict[str, Any]]:
    """List the groups with unrounded fractions."""
    return [
        {
            **group.settings,
            "n": group.n,
            "metric": comparison.metric,
            "mean": group.mean,
            "sd": group.sd,
            "low": group.low,
            "high": group.high,
            **{name: _finite(group.average(name)) for name in _FIGURES},
        }
        for group in comparison.groups
    ]


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Give the whole comparison as plain values."""
    return {
        "title": comparison.title,
        "metric": comparison.metric,
        "metric_note": comparison.metric_note,
        "keys": comparison.grouping.keys,
        "tied": comparison.grouping.tied,
        "equal": comparison.grouping.equal,
        "groups": [
            {**record, "label": group.label, "by_seed": {str(seed): value for seed, value in group.by_seed.items()}}
            for group, record in zip(comparison.groups, group_records(comparison), strict=True)
        ],
        "contrasts": [_contrast_record(contrast) for contrast in comparison.contrasts],
        "not_comparable": comparison.forced,
        "notes": comparison.notes,
        "problems": [{"folder": str(problem.folder), "reason": problem.reason} for problem in comparison.problems],
        "runs": run_rows(comparison),
    }


def _contrast_record(contrast: Contrast) -> dict[str, Any]:
    return {
        "group": contrast.group.label,
        "baseline": contrast.baseline.label,
        "pairs": contrast.test.pairs,
        "difference": contrast.difference,
        "low": contrast.low,
        "high": contrast.high,
        "p": contrast.test.p,
        "p_holm": contrast.p_holm,
        "smallest_p": contrast.test.smallest_p,
        "exact": contrast.test.exact,
    }


def markdown(comparison: Comparison) -> str:
    """Write the comparison as Markdown, ready to be pasted."""
    parts = [
        f"# {markdown_text(comparison.title)}",
        "\n".join(map(markdown_text, answer(comparison))),
        markdown_table(group_rows(comparison)),
    ]
    if comparison.contrasts:
        parts += [markdown_table(contrast_rows(comparison)), contrast_note(comparison)]
    for heading, rows in group_count_tables(comparison):
        parts += [f"{heading}:", markdown_table(rows)]
    parts += ["\n".join(f"- {markdown_text(line)}" for line in comparison.remarks())]
    if comparison.problems:
        listed = "\n".join(
            f"- {markdown_text(f'{problem.folder}: {problem.reason}')}" for problem in comparison.problems
        )
        parts += [f"Left out:\n\n{listed}"]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Sequence[Row]) -> str:
    """Write rows as a Markdown table.

    Example:
        >>> print(markdown_table([{"norm": "bn", "n": "8"}]))
        | norm | n |
        | --- | --- |
        | bn | 8 |
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(markdown_text(cell) for cell in line) + " |" for line in lines)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "-" if low is None or high is None else f"[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_text(comparison: Comparison, width: int | None = None) -> str:
    """Write tables and remarks as text.

    Args:
        comparison: The comparison.
        width: Columns of the terminal; None: no line is broken.
    """
    console = Console(file=io.StringIO(), width=width or 10_000, color_system=None, highlight=False, markup=False)
    for line in answer(comparison):
        console.print(Text(line), soft_wrap=width is None)
    tables = [("", group_rows(comparison)), (contrast_note(comparison), contrast_rows(comparison))]
    for heading, rows in [*tables, *group_count_tables(comparison)]:
        if not rows:
            continue
        console.print()
        if heading:
            console.print(Text(heading), soft_wrap=width is None)
        table = Table(box=None, pad_edge=False)
        for name, value in rows[0].items():
            table.add_column(name, justify="right" if value[:1] in "0123456789+-[" else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row.values()))
        console.print(table)
    console.print()
    for line in comparison.remarks():
        console.print(Text(line), soft_wrap=width is None)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
