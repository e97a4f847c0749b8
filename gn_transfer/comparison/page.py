"""The comparison as files: one page that needs no network, tables for people and programs, the figures alone."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gn_transfer.comparison import tables
from gn_transfer.comparison.answer import answer
from gn_transfer.comparison.comparison import Comparison
from gn_transfer.comparison.figures import create_figures
from gn_transfer.comparison.grouping import shown
from gn_transfer.comparison.images import choose_pair, class_difference
from gn_transfer.comparison.importance import importances
from gn_transfer.files import spreadsheet_cell, write_csv, write_text
from gn_transfer.report.html import environment
from gn_transfer.report.images import thumbnail
from gn_transfer.report.svg import PageFigure

_MOST_RUNS = 300
_PROVENANCE = (
    *("data", "classes", "train_images", "val_images", "test_images", "architecture", "weights"),
    *("weights_pretrained_on", "device", "threads", "git_commit"),
)
_HINTS = {
    "n": "Number of seeds.",
    "sd": "Standard deviation over seeds, in percentage points.",
    "95 % interval": "Bootstrap over seeds, and over images where predictions are stored.",
    "images/s": "Training images per second, evaluation left out. Other programs on the machine slow it.",
    "peak MiB": "Greatest memory of the training process.",
    "pairs": "Seeds that both groups have.",
    "difference": "Mean of group less against, in percentage points.",
    "p (sign flip)": "Two-sided exact test of the paired differences.",
    "p (Holm)": "The same, corrected for the number of contrasts.",
    "smallest p": "No result of so many pairs could give a smaller p.",
}
_STANDALONE = (
    "<style>svg{color:#222;background:#fff}text{font-family:sans-serif!important}"
    ".onlines text{paint-order:stroke;stroke:#fff;stroke-width:4px}</style>"
)


def write_files(comparison: Comparison, output: Path) -> None:
    """Write every file of a comparison.

    Args:
        comparison: The comparison.
        output: Folder that exists, with a folder ``figures`` in it.

    Raises:
        OSError: It cannot be written to.
    """
    pair = choose_pair(comparison)
    by_class = None if pair is None else class_difference(*pair, comparison.predictions)
    page_figures = create_figures(comparison, importances(comparison), by_class)
    for figure in page_figures:
        write_text(output / "figures" / f"{figure.name}.svg", standalone(figure))
    disagreements = [(item, thumbnail(item.file)) for item in (by_class.disagreements if by_class is not None else ())]
    runs = tables.run_rows(comparison)
    write_text(
        output / "index.html",
        environment(Path(__file__).parent)
        .get_template("comparison.html.j2")
        .render(
            title=comparison.title,
            comparison=comparison,
            answer=answer(comparison),
            groups=tables.group_rows(comparison),
            best=max(range(len(comparison.groups)), key=lambda place: comparison.groups[place].mean),
            contrasts=tables.contrast_rows(comparison),
            contrast_note=tables.contrast_note(comparison),
            group_counts=tables.group_count_tables(comparison),
            figure_list=[figure._replace(svg=Markup(figure.svg)) for figure in page_figures],
            hints=_HINTS,
            by_class=by_class,
            disagreements=disagreements,
            runs=[{key: shown(value) for key, value in row.items()} for row in runs[:_MOST_RUNS]],
            more_runs=max(0, len(runs) - _MOST_RUNS),
            equal={key: shown(value) for key, value in comparison.grouping.equal.items()},
            provenance=_provenance(comparison),
            images=_images(comparison),
            version=version("gn-transfer"),
        ),
    )
    write_text(output / "table.md", tables.markdown(comparison))
    write_text(output / "report.json", json.dumps(tables.as_dict(comparison), indent=2) + "\n")
    for name, records in (("table.csv", tables.group_records(comparison)), ("rows.csv", runs)):
        write_csv(
            output / name,
            list(map(spreadsheet_cell, records[0])),
            ([spreadsheet_cell(value) for value in record.values()] for record in records),
        )


def standalone(figure: PageFigure) -> str:
    """Give a figure as a file of its own: dark ink on white."""
    end = figure.svg.index(">") + 1
    return f"{figure.svg[:end]}{_STANDALONE}{figure.svg[end:]}\n"


def _images(comparison: Comparison) -> str:
    """Say in a line which images the runs are about; what differs between runs is left out."""

    def same(name: str) -> Any:
        values = {str(run.metrics.get(name)): run.metrics.get(name) for run in comparison.runs}
        return next(iter(values.values())) if len(values) == 1 else None

    split = "test" if comparison.metric.startswith("test") else "val"
    words = {"test": "test images", "val": "validation images"}
    root, classes, images = same("data_root"), same("classes"), same(f"{split}_images")
    parts = [f"{same('data') or ''} {Path(root).name if isinstance(root, str) else ''}".strip()]
    parts += [f"{classes} classes"] if classes else []
    parts += [f"{images} {words[split]}"] if images else []
    sizes = {run.settings.get("img_size") for run in comparison.runs}
    parts += [f"{sizes.pop()} px"] if len(sizes) == 1 else []
    return ", ".join(filter(None, parts))


def _provenance(comparison: Comparison) -> dict[str, str]:
    """List where the figures come from, each value once."""
    found: dict[str, str] = {}
    for name in _PROVENANCE:
        values = sorted({str(run.metrics[name]) for run in comparison.runs if run.metrics.get(name) not in (None, "")})
        if values:
            found[name] = "; ".join(values)
    versions = comparison.runs[0].versions.items()
    return found | {"versions": ", ".join(f"{package} {number}" for package, number in versions)}
