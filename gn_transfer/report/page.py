"""The page of one run: what it reached, where it errs, what it was set to; one file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gn_transfer.config import ConfigError
from gn_transfer.files import read_json, write_text
from gn_transfer.report.evaluation import (
    Calibration,
    ClassScore,
    Mistake,
    calibration,
    class_names,
    class_scores,
    confused_pairs,
    confusion,
    mistakes,
    wilson_interval,
)
from gn_transfer.report.figures import create_figures
from gn_transfer.report.images import as_address, find_image, thumbnail
from gn_transfer.report.runs import (
    Predictions,
    Run,
    UnusableRunError,
    find_run_folders,
    read_mapping,
    read_run,
    runs_on_images,
)

MOST_IMAGES = 12
"""Errors of a kind that the page shows."""

_GENERATOR = 'content="gn-transfer '  # in the head of our pages
_MOST_CLASSES = 30  # a larger matrix is read by nobody; the most frequent confusions say it
_MOST_PAIRS = 10
_VALIDATION, _TEST = "best/val/acc1", "test/acc1"
_HINTS = {
    "images": "Validation images of the class.",
    "recall %": "Share of the images of the class that were given it: its accuracy.",
    "precision %": "Share of the images given this class that belong to it.",
    "F1 %": "Harmonic mean of precision and recall.",
    "test recall %": "The recall on the test images.",
    "taken for": "The class that its other images were given most often, and how many of them.",
}
_PROVENANCE = (
    "status", "architecture", "norm", "weights", "weights_pretrained_on", "data", "data_root", "train_split",
    "val_split", "test_split", "batch_size", "effective_batch_size", "seed", "epochs", "optimizer_steps",
    "samples_seen", "evaluated_weights", "images_per_sec", "peak_memory_mib", "wall_time_s", "device", "threads",
    "git_commit",
)  # fmt: skip


class _Cell(NamedTuple):
    """A cell of the confusion matrix."""

    images: int
    share: str
    right: bool
    said: str


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
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; name a file, such as {output / 'report.html'}.")
    try:
        if output.exists() and _GENERATOR not in output.read_text(encoding="utf-8", errors="replace")[:999]:
            raise ConfigError(f"--output {output} exists and is no page of gn-transfer; name another file.")
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, render(run))
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written ({error.strerror}); name another file.") from error
    return output


def render(run: Run) -> str:
    """Compose the page of a run as HTML."""
    validation, test = (
        run.predictions(metric, probabilities=True) if metric in run.metrics else None
        for metric in (_VALIDATION, _TEST)
    )
    found = None if validation is None else calibration(validation)
    wrong = [] if validation is None else mistakes(validation)
    roots = [Path(run.data_root)] if run.data_root else []
    scores = [] if validation is None else class_scores(validation)
    names = [] if validation is None else class_names(validation)
    plan = read_json(run.folder / "plan.json")
    sheet = run.folder / "training_images.jpg"
    best_epoch = run.metrics.get("best/epoch")
    page_figures = create_figures(run.epochs(), best_epoch if isinstance(best_epoch, int) else None, found)
    worst, confident = _two_kinds(wrong)
    return (
        environment()
        .get_template("run.html.j2")
        .render(
            title=run.name,
            answer=answer(run, validation, test, scores, found),
            warnings=[*_status(run), *map(str, plan.get("warnings", []))],
            figure_list=[figure._replace(svg=Markup(figure.svg)) for figure in page_figures],
            images_said=_images_said(validation, test),
            scores=list(_score_rows(scores, test)),
            hints=_HINTS,
            names=names,
            matrix=_matrix(validation) if validation is not None and len(names) <= _MOST_CLASSES else [],
            confused=_pair_rows(validation),
            worst=[(mistake, thumbnail(find_image(mistake.path, roots))) for mistake in worst],
            confident=[(mistake, thumbnail(find_image(mistake.path, roots))) for mistake in confident],
            training_images=as_address(sheet.read_bytes()) if sheet.is_file() else None,
            plan=_plan_rows(plan.get("rows", [])),
            provenance=list(_provenance(run)),
            settings=list(_flat(read_mapping(run.folder / "config.yaml"))),
            percent=_percent,
            folder=run.folder,
            version=version("gn-transfer"),
        )
    )


def answer(
    run: Run,
    validation: Predictions | None,
    test: Predictions | None,
    scores: Sequence[ClassScore],
    found: Calibration | None,
) -> list[str]:
    """Say in sentences what a run reached.

    Args:
        run: The run.
        validation: Its predictions on the validation images, by the weights of best.ckpt; None where not stored.
        test: Those on the test images; None where it was not tested.
        scores: Of each class on the validation images, the worst first.
        found: The calibration there.

    Returns:
        The accuracy first.
    """
    metrics = run.metrics
    accuracy = float(metrics.get(_VALIDATION, metrics["val/acc1"]))
    epoch, planned = metrics.get("best/epoch"), run.settings.get("trainer.max_epochs")
    epochs = metrics.get("epochs") if metrics["status"] == "finished" or not planned else planned
    lines = [
        f"{_share(accuracy, validation)} of the validation images are right"
        + (f" after epoch {epoch} of {epochs}" if epoch is not None else "")
        + (f", and {_share(float(metrics[_TEST]), test)} of the test images." if _TEST in metrics else ".")
    ]
    if _TEST in metrics:
        lines.append(
            "The test images give the honest figure: best.ckpt was chosen by the validation images, so that its "
            "accuracy there is a little too high."
        )
    if scores and scores[0].recall < 1:
        score = scores[0]
        taken = f"; {score.taken_for[1]} were taken for {score.taken_for[0]}" if score.taken_for else ""
        lines.append(
            f"The hardest class is {score.name}: {_percent(score.recall)} of {score.images} images are right{taken}."
        )
    elif scores:
        lines.append("No validation image is wrong.")
    if found is not None:
        images = sum(one.images for one in found.bins)
        low, high = wilson_interval(round(found.accuracy * images), images)
        tendency = "overconfident" if found.confidence > high else "underconfident" if found.confidence < low else None
        said = "The confidence fits the accuracy" if tendency is None else f"The model is {tendency}"
        lines.append(
            f"{said}: mean confidence {_percent(found.confidence)}, accuracy "
            f"{_percent(found.accuracy)}, expected calibration error {100 * found.error:.1f} points."
        )
    return lines


def environment(*folders: Path) -> Environment:
    """Create the environment of a page's template.

    Args:
        *folders: Where templates lie, beside those here.
    """
    return Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _status(run: Run) -> list[str]:
    status = run.metrics["status"]
    if status == "finished":
        return []
    said = "running, or was killed" if status == "running" else status
    return [f"The run is not finished (status: {said}). This page shows what it had reached after its last validation."]


def _two_kinds(wrong: Sequence[Mistake]) -> tuple[list[Mistake], list[Mistake]]:
    """Choose the worst errors, and the most confident of the others."""
    worst = list(wrong[:MOST_IMAGES])
    rest = [mistake for mistake in wrong[MOST_IMAGES:] if mistake.prob_predicted is not None]
    return worst, sorted(rest, key=lambda mistake: -(mistake.prob_predicted or 0))[:MOST_IMAGES]


def _images_said(validation: Predictions | None, test: Predictions | None) -> str:
    said = (
        ""
        if validation is None
        else f"On the {len(validation.paths):,} validation images, with the weights of best.ckpt."
    )
    return said if test is None else f"{said} The test recall is on the {len(test.paths):,} test images."


def _score_rows(scores: Sequence[ClassScore], test: Predictions | None) -> Iterator[dict[str, str]]:
    tested = {} if test is None else {score.name: score for score in class_scores(test)}
    for score in scores:
        row = {
            "class": score.name,
            "images": f"{score.images:,}",
            "recall %": f"{100 * score.recall:.1f}",
            "precision %": f"{100 * score.precision:.1f}",
            "F1 %": f"{100 * score.f1:.1f}",
        }
        if tested:
            row["test recall %"] = f"{100 * tested[score.name].recall:.1f}" if score.name in tested else "-"
        yield row | {"taken for": "-" if score.taken_for is None else f"{score.taken_for[0]} ({score.taken_for[1]})"}


def _matrix(predictions: Predictions) -> list[tuple[str, list[_Cell]]]:
    names, counts = class_names(predictions), confusion(predictions)
    rows = []
    for place, name in enumerate(names):
        total = max(1, int(counts[place].sum()))
        cells = [
            _Cell(
                count,
                f"{count / total:.2f}",
                place == column,
                f"{count} of {total} images of {name} ({count / total:.0%}) were "
                + ("recognized" if place == column else f"taken for {names[column]}"),
            )
            for column, count in enumerate(counts[place].tolist())
        ]
        rows.append((name, cells))
    return rows


def _pair_rows(predictions: Predictions | None) -> list[dict[str, str]]:
    pairs = [] if predictions is None else confused_pairs(predictions, _MOST_PAIRS)
    return [{"class": target, "taken for": predicted, "images": str(count)} for target, predicted, count in pairs]


def _plan_rows(rows: Any) -> list[tuple[str, str]]:
    return [(str(row[0]), str(row[1])) for row in rows if isinstance(row, list) and len(row) == 2]


def _provenance(run: Run) -> Iterator[tuple[str, str]]:
    for name in _PROVENANCE:
        if run.metrics.get(name) not in (None, ""):
            yield name, str(run.metrics[name])
    versions = run.metrics.get("versions")
    if isinstance(versions, dict):
        yield "versions", ", ".join(f"{package} {number}" for package, number in versions.items())
    for note in run.notes:
        yield "weights: note", note


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", str(value)


def _share(accuracy: float, predictions: Predictions | None) -> str:
    """Write an accuracy with its interval, which needs the number of images."""
    if predictions is None:
        return _percent(accuracy)
    right, images = int(predictions.correct.sum()), len(predictions.paths)
    low, high = wilson_interval(right, images)
    return f"{_percent(right / images)} [{100 * low:.1f}, {100 * high:.1f}] ({right:,} of {images:,})"


def _percent(share: float) -> str:
    return "-" if not math.isfinite(share) else f"{100 * share:.1f}\u00a0%"  # never broken over two lines
