"""The report as files: one page that needs no network, tables for people and programs, the figures alone."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gn_transfer.comparison import tables
from gn_transfer.comparison.figures import Picture, draw
from gn_transfer.comparison.grouping import shown
from gn_transfer.comparison.importance import importances
from gn_transfer.comparison.pictures import choose_pair, class_difference, thumbnail
from gn_transfer.comparison.report import Report
from gn_transfer.files import write_csv, write_text

_MOST_RUNS = 300
_STANDALONE = (
    "<style>svg{color:#222;background:#fff}text{font-family:sans-serif!important}"
    ".onlines text{paint-order:stroke;stroke:#fff;stroke-width:4px}</style>"
)


def write_files(report: Report, output: Path) -> None:
    """Write every file of a report.

    Args:
        report: The comparison.
        output: Folder that exists, with a folder ``figures`` in it.

    Raises:
        OSError: It cannot be written to.
    """
    pair = choose_pair(report)
    by_class = None if pair is None else class_difference(*pair, report.predictions)
    pictures = draw(report, importances(report), by_class)
    for picture in pictures:
        write_text(output / "figures" / f"{picture.name}.svg", standalone(picture))
    disagreements = [
        (item, None if item.file is None else thumbnail(item.file))
        for item in (by_class.disagreements if by_class is not None else ())
    ]
    runs = tables.run_rows(report)
    write_text(
        output / "index.html",
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            headline=headline(report),
            groups=tables.group_rows(report),
            contrasts=tables.contrast_rows(report),
            contrast_note=tables.contrast_note(report),
            group_counts=tables.group_count_tables(report),
            pictures=[picture._replace(svg=Markup(picture.svg)) for picture in pictures],
            by_class=by_class,
            disagreements=disagreements,
            runs=[{key: shown(value) for key, value in row.items()} for row in runs[:_MOST_RUNS]],
            more_runs=max(0, len(runs) - _MOST_RUNS),
            equal={key: shown(value) for key, value in report.grouping.equal.items()},
            provenance=_provenance(report),
            version=version("gn-transfer"),
        ),
    )
    write_text(output / "table.md", tables.markdown(report))
    write_text(output / "report.json", json.dumps(tables.as_dict(report), indent=2) + "\n")
    for name, records in (("table.csv", tables.group_records(report)), ("rows.csv", runs)):
        write_csv(output / name, list(records[0]), (list(record.values()) for record in records))


def headline(report: Report) -> list[str]:
    """Say the result in a sentence per contrast, for at most five with the smallest p-values."""
    lines = []
    for contrast in sorted(report.contrasts, key=lambda contrast: (contrast.p_holm, -abs(contrast.difference)))[:5]:
        verdict = "" if contrast.p_holm <= 0.05 else "; not below 0.05"
        lines.append(
            f"{contrast.group.label}, against {contrast.against}: {100 * contrast.difference:+.1f} points "
            f"(95 % interval {100 * contrast.low:+.1f} to {100 * contrast.high:+.1f}, {contrast.test.pairs} pairs, "
            f"p {contrast.test.p:.2g}, after Holm {contrast.p_holm:.2g}){verdict}."
        )
    return lines


def standalone(picture: Picture) -> str:
    """Give a figure as a file of its own: dark ink on white."""
    end = picture.svg.index(">") + 1
    return f"{picture.svg[:end]}{_STANDALONE}{picture.svg[end:]}\n"


def _provenance(report: Report) -> dict[str, str]:
    """List where the figures come from, each value once."""
    found: dict[str, str] = {}
    for name in ("device", "threads", "git_commit", "data", "architecture", "weights", "weights_saw"):
        values = sorted({str(run.metrics[name]) for run in report.runs if run.metrics.get(name) not in (None, "")})
        if values:
            found[name] = "; ".join(values)
    versions: dict[str, Any] = dict(report.runs[0].metrics.get("versions") or {})
    return found | {"versions": ", ".join(f"{package} {number}" for package, number in versions.items())}


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
