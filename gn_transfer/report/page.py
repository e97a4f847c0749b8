"""The page of one run: what it reached, where it errs, what it was set to; one file that needs no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gn_transfer.config import ConfigError, printable
from gn_transfer.files import read_json
from gn_transfer.report.classification import classification_parts
from gn_transfer.report.figures import create_figures
from gn_transfer.report.html import environment, save_page
from gn_transfer.report.images import sheet_address
from gn_transfer.report.runs import (
    Run,
    UnusableRunError,
    find_run_folders,
    read_mapping,
    read_run,
    runs_on_images,
)
from gn_transfer.report.segmentation import segmentation_parts
from gn_transfer.report.sentences import percent

_PROVENANCE = (
    "status", "architecture", "norm", "weights", "weights_pretrained_on", "data", "data_root", "train_split",
    "val_split", "test_split", "test/checkpoint", "batch_size", "effective_batch_size", "seed", "epochs",
    "optimizer_steps", "samples_seen", "evaluated_weights", "images_per_sec", "peak_memory_mib", "wall_time_s",
    "device", "threads", "git_commit",
)  # fmt: skip


def choose_run_folder(source: Path) -> Path:
    """Find the run that is meant.

    Args:
        source: A run's folder, a folder that holds some, or the folder of images that runs below ``runs/`` were
            trained on.

    Returns:
        The run; of several the one that started last.

    Raises:
        ConfigError: There is none.
    """
    if trained := runs_on_images(source, Path()):
        return trained[0]
    return max(find_run_folders([source]), key=_started)


def _started(folder: Path) -> float:
    config = folder / "config.yaml"
    return config.stat().st_mtime if config.is_file() else 0.0


def write_page(folder: Path, output: Path) -> Path:
    """Write the page of a run.

    Args:
        folder: The run's folder; a run that is not finished gives a page with a warning.
        output: File to write; a page of an earlier call is replaced.

    Returns:
        The file.

    Raises:
        ConfigError: The run cannot be read, or the file not written, or it is not one of ours.
    """
    try:
        run = read_run(folder, unfinished=True)
    except UnusableRunError as error:
        raise ConfigError(f"{folder}: {error}.") from error
    return save_page(output, render(run))


def render(run: Run) -> str:
    """Compose the page of a run as HTML."""
    metric = run.main_metric
    validation, test = (
        run.predictions(f"{evaluation}/{metric}", probabilities=True)
        if f"{evaluation}/{metric}" in run.metrics
        else None
        for evaluation in ("best/val", "test")
    )
    roots = [Path(run.data_root)] if run.data_root else []
    parts = segmentation_parts if metric == "miou" else classification_parts
    of_task = parts(run, validation, test, roots)
    plan = read_json(run.folder / "plan.json")
    best_epoch = run.metrics.get("best/epoch")
    page_figures = create_figures(
        run.epochs(), best_epoch if isinstance(best_epoch, int) else None, metric, of_task.get("calibration")
    )
    return (
        environment()
        .get_template("run.html.j2")
        .render(
            **{
                "matrix": [],
                "confused": [],
                "confident": [],
                "worst": [],
                "low_images": [],
                "worst_sheet": None,
                **of_task,
            },
            title=run.name,
            warnings=[*_status(run), *(printable(str(said)) for said in _list(plan.get("warnings")))],
            figure_list=[figure._replace(svg=Markup(figure.svg)) for figure in page_figures],
            training_images=sheet_address(run.folder / "training_images.jpg"),
            plan=_plan_rows(plan.get("rows", [])),
            provenance=list(_provenance(run)),
            settings=list(_flat(read_mapping(run.folder / "config.yaml"))),
            percent=percent,
            folder=run.folder,
            version=version("gn-transfer"),
        )
    )


def _status(run: Run) -> list[str]:
    status = run.metrics["status"]
    if status == "finished":
        return []
    said = "running, or was killed" if status == "running" else status
    return [f"The run is not finished (status: {said}). This page shows what it had reached after its last validation."]


def _plan_rows(rows: Any) -> list[tuple[str, str]]:
    pairs = [row for row in _list(rows) if isinstance(row, list) and len(row) == 2]
    return [(printable(str(name)), printable(str(value))) for name, value in pairs]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _provenance(run: Run) -> Iterator[tuple[str, str]]:
    for name in _PROVENANCE:
        if run.metrics.get(name) not in (None, ""):
            yield name, str(run.metrics[name])
    if run.versions:
        yield "versions", ", ".join(f"{package} {number}" for package, number in run.versions.items())
    for note in run.notes:
        yield "weights: note", note


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", str(value)
