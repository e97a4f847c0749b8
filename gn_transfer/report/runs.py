"""Run folders into memory: what a run was set to, what it reached, and why a folder cannot be used."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from gn_transfer.config import ConfigError, printable
from gn_transfer.files import parse_json, read_json, read_text
from gn_transfer.report.predictions import SplitPredictions, read_predictions
from gn_transfer.yaml_files import read_yaml

Setting: TypeAlias = bool | int | float | str | None

FORMAT_VERSION = 1
"""The newest ``format_version`` of metrics.json that is understood here."""

STUDY = "study.json"
"""Title, notes and names of the final runs of a study, in the folder of its runs."""

_LARGEST = 2**63  # of a whole number that numpy and the figures take

MAIN_METRICS = {"acc1": "accuracy", "miou": "mIoU"}
"""The metric of each task that runs are compared by, and its name in sentences."""

PREDICTIONS = {"test": "predictions_test.csv", "val": "predictions_val.csv", "best/val": "predictions_best_val.csv"}
"""The evaluations that runs can be compared by, with the file that holds each image's part in them."""

# Where the images lie and who fetches them changes nothing that is learned; the seed is a dimension of its own.
_NOT_SETTINGS = {"root", "num_workers", "cache", "cache_dir", "download", "on_bad_image", "seed"}
_SECTIONS = ("batch_norm", "freezing", "mixed_precision", "ema", "early_stopping")
_OF_TASK = ("regularization.", "segmentation.")
_TRAINER = ("max_epochs", "max_steps", "limit_train_batches")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Its folder.
        metrics: Its metrics.json.
        settings: What it was set to, by short name (``norm``, ``batch_size``, ``lr``, ``ema.decay``); None where a
            setting does not apply, such as ``num_groups`` without GroupNorm, and ``"null"`` where it is null.
        seed: Its seed.
        notes: What its transfer report says that a reader must know.
        data_root: The folder of its images when it ran.
    """

    folder: Path
    metrics: dict[str, Any]
    settings: dict[str, Setting]
    seed: int
    notes: tuple[str, ...] = ()
    data_root: str = ""

    @property
    def name(self) -> str:
        """``<config>/<norm>-bs<batch>-seed<seed>[-k]``."""
        return printable(str(self.metrics.get("run") or self.folder.name))

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries, by name."""
        found = self.metrics.get("versions")
        return {name: str(number) for name, number in found.items()} if isinstance(found, dict) else {}

    def epochs(self) -> list[dict[str, float]]:
        """Read the curve: one row per validation; empty where none was stored or it is corrupt."""
        try:
            rows = list(csv.DictReader(io.StringIO(read_text(self.folder / "epochs.csv"), newline="")))
            found = [{name: float(value or "nan") for name, value in row.items()} for row in rows]
        except (OSError, ValueError, TypeError, csv.Error):
            return []
        counts = [
            row.get(name, missing) for row in found for name, missing in (("epoch", math.nan), ("samples_seen", 0))
        ]
        return found if all(abs(count) < _LARGEST for count in counts) else []

    @property
    def main_metric(self) -> str:
        """Metric of its task, ``acc1`` or ``miou``."""
        return main_metric(self.metrics)

    def predictions(self, metric: str, *, probabilities: bool = False) -> SplitPredictions | None:
        """Read what the model said of each image.

        Args:
            metric: Such as ``test/acc1``; its evaluation is one of :data:`PREDICTIONS`.
            probabilities: Read them too.

        Returns:
            None where that was not stored, is corrupt, or does not fit the metric.
        """
        file = self.folder / PREDICTIONS[metric.rpartition("/")[0]]
        found = read_predictions(file, probabilities=probabilities)
        return found if found and math.isclose(found.value, self.metrics[metric], abs_tol=1e-4) else None


def main_metric(metrics: Mapping[str, Any]) -> str:
    """Give the metric of the task of a run, ``acc1`` or ``miou``.

    Args:
        metrics: Its metrics.json.
    """
    return "miou" if "decoder" in metrics else "acc1"


@dataclass(frozen=True)
class Problem:
    """A folder that could not be used, and why."""

    folder: Path
    reason: str


def find_run_folders(sources: Sequence[Path]) -> list[Path]:
    """Find the runs in folders and in all below them; a run does not hold others.

    Args:
        sources: Run folders, or folders that hold some.

    Returns:
        Each once, sorted within a source.

    Raises:
        ConfigError: A source is not there, or there is no run in any of them.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        if not source.is_dir():
            raise ConfigError(f"{source}: no such folder; give runs, or folders of runs, such as runs/pets_gnws.")
        for parent, folders, names in os.walk(source):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if {"metrics.json", "config.yaml", "split.json"} & set(names):
                folders.clear()
                found.setdefault(Path(parent).resolve(), Path(parent))
    if not found:
        said = ", ".join(map(str, sources)) or "nothing"
        raise ConfigError(f"{said}: no run in there; gn-transfer fit writes them to runs/CONFIG/RUN.")
    return list(found.values())


def read_study(sources: Sequence[Path]) -> tuple[str, list[str]] | None:
    """Read what a study says about its own runs.

    Args:
        sources: What the user wants to compare: the folder of a study, or runs in it.

    Returns:
        Its title and its notes; None where the sources do not all belong to one study.
    """
    folders = {next((f for f in (source, *source.parents[:1]) if (f / STUDY).is_file()), None) for source in sources}
    if len(folders) != 1 or (folder := folders.pop()) is None:
        return None
    record = read_json(folder / STUDY)
    notes = record.get("notes")
    notes = notes if isinstance(notes, list) else []
    return printable(str(record.get("title", folder.name))), [printable(str(note)) for note in notes]


def final_runs(folder: Path) -> list[str]:
    """Name the final runs of the study that a run belongs to; those of an older file, or of none, are all.

    Args:
        folder: The run's folder.
    """
    names = read_json(folder.parent / STUDY).get("final_runs")
    return [str(name) for name in names] if isinstance(names, list) else [folder.name]


def runs_on_images(images: Path, root: Path) -> list[Path]:
    """Find the runs that were trained on a folder of images, the one that started last first.

    Args:
        images: The folder.
        root: Folder that contains ``runs/``.
    """
    configs = sorted(root.glob("runs/*/*/config.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [config.parent for config in configs if _data_root(config) == images.resolve()]


def _data_root(config: Path) -> Path | None:
    try:
        return Path(str(read_mapping(config)["data"]["init_args"]["root"])).resolve()
    except (UnusableRunError, KeyError, TypeError):
        return None


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Problem]]:
    """Read what can be read.

    Args:
        folders: Run folders.

    Returns:
        The finished runs, and the others with the reason.
    """
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UnusableRunError as error:
            problems.append(Problem(folder, str(error)))
    return runs, problems


class UnusableRunError(ValueError):
    """A folder is not a finished run that this version understands; the message says why."""


def read_run(folder: Path, *, unfinished: bool = False) -> Run:
    """Read a finished run.

    Args:
        folder: Its folder.
        unfinished: Read one that is running, was interrupted or failed as well, once it was validated.

    Returns:
        The run; its curve and predictions stay on the disk until they are asked for.

    Raises:
        UnusableRunError: See there.
    """
    metrics = read_mapping(folder / "metrics.json")
    if not {"norm", "status", "samples_seen"} <= metrics.keys() or not isinstance(metrics["norm"], str):
        raise UnusableRunError("metrics.json is not one of gn-transfer fit (norm, status or samples_seen is missing)")
    version = metrics.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise UnusableRunError(f"metrics.json has format_version {version}; repeat the run with this gn-transfer")
    if version > FORMAT_VERSION:
        raise UnusableRunError(
            f"a newer gn-transfer wrote it (format_version {version}, this one reads {FORMAT_VERSION}); update this one"
        )
    status = metrics["status"]
    figure = f"val/{main_metric(metrics)}"
    if unfinished and figure not in metrics:
        raise UnusableRunError(f"the run is {status} and has no validation yet; its run.log says more")
    if status == "running" and not unfinished:
        minutes = (time.time() - (folder / "metrics.json").stat().st_mtime) / 60
        raise UnusableRunError(f"still running, or killed: metrics.json was last written {minutes:,.0f} minutes ago")
    if status == "fast_dev_run":
        raise UnusableRunError("a trial of a batch or two (trainer.fast_dev_run), not a training")
    if status != "finished" and not unfinished:
        raise UnusableRunError(f"the run {'was ' if status == 'interrupted' else ''}{status}; its run.log says more")
    seed = metrics.get("seed")
    if not isinstance(seed, int):
        raise UnusableRunError(f"metrics.json has seed {seed}, not a whole number")
    # A test on images without any label has no figure.
    metrics = {name: value for name, value in metrics.items() if value is not None or not name.startswith("test/")}
    for name in (figure, "samples_seen", "effective_batch_size", "images_per_sec", "peak_memory_mib"):
        value = metrics.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UnusableRunError(f"metrics.json has {name} {value}, not a number")
    for name, value in metrics.items():
        if name.rpartition("/")[2] in MAIN_METRICS and not (isinstance(value, int | float) and 0 <= value <= 1):
            raise UnusableRunError(f"metrics.json has {name} {value}, not a number from 0 to 1")
    config = read_mapping(folder / "config.yaml")
    try:
        settings = flat_settings(config, metrics)
    except (KeyError, TypeError, AttributeError) as error:
        raise UnusableRunError(
            f"config.yaml is not one of gn-transfer fit ({error} is missing or misplaced)"
        ) from error
    sizes = {"img_size": settings.get("img_size"), "batch_size": settings.get("batch_size")}
    if sizes["batch_size"] == "auto":
        sizes["batch_size"] = metrics.get("micro_batch_size")
    for name, value in sizes.items():
        if value not in (None, "null") and not (isinstance(value, int) and 0 <= value < _LARGEST):
            raise UnusableRunError(f"config.yaml has {name} {printable(str(value))[:40]}, not a whole number")
    notes = read_json(folder / "transfer_report.json").get("notes")
    notes = [printable(str(note)) for note in notes] if isinstance(notes, list) else []
    return Run(folder, metrics, settings, seed, tuple(notes), str(metrics.get("data_root") or ""))


def flat_settings(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Setting]:
    """List what decides the course of a training, but for the seed.

    Args:
        config: The resolved configuration of the run, nested.
        metrics: Its metrics.json, which knows what null became.

    Returns:
        Values by short name, the norm and the batch first.
    """
    data, model = config["data"], config["model"]
    flat: dict[str, Any] = {
        "norm": model["norm"],
        "batch_size": data["init_args"]["batch_size"],
        "effective_batch_size": metrics["effective_batch_size"],
        "num_groups": metrics["num_groups"],
        "group_size": model["group_size"],
        "backbone": model["backbone"],
        "data": str(data["class_path"]).rsplit(".", 1)[-1],
        "arm": metrics.get("arm") or None,  # before what a study chose for each arm
    }
    optimizer = {("optimizer" if name == "name" else name): value for name, value in config["optimizer"].items()}
    of_task = {**config.get("regularization", {}), **config.get("segmentation", {})}
    if "decoder" in metrics:
        flat |= {"decoder": model["decoder"], "decoder_norm": metrics["decoder_norm"]}
    for name, value in (*model.items(), *optimizer.items(), *of_task.items(), *data["init_args"].items()):
        if name not in _NOT_SETTINGS:
            flat.setdefault(name, value)
    for section in _SECTIONS:
        flat |= {f"{section}.{name}": value for name, value in config.get(section, {}).items()}
    flat |= {f"trainer.{name}": config.get("trainer", {}).get(name) for name in _TRAINER}
    plain: dict[str, Setting] = {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in flat.items()
    }
    if flat["arm"] is None:
        plain["arm"] = None
    with_groups = flat["norm"] in ("gn", "gn_ws")
    if not with_groups or flat["group_size"] is not None:
        plain["num_groups"] = None
    if not with_groups or flat["group_size"] is None:
        plain["group_size"] = None
    return plain


def short_name(key: str) -> str:
    """Give the short name of a configuration key.

    Example:
        >>> short_name("model.norm"), short_name("data.init_args.batch_size"), short_name("ema.decay")
        ('norm', 'batch_size', 'ema.decay')
    """
    if key == "optimizer.name":
        return "optimizer"
    for prefix in (
        "data.init_args.",
        "data.",
        "model.",
        "optimizer.",
        "regularization.",
        "segmentation.",
        "accumulation.",
    ):
        key = key.removeprefix(prefix)
    return key


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file of a run.

    Args:
        path: The file.

    Returns:
        The mapping that it holds.

    Raises:
        UnusableRunError: It is not there, or holds something else.
    """
    try:
        content = parse_json(read_text(path)) if path.suffix == ".json" else read_yaml(path)
    except FileNotFoundError:
        raise UnusableRunError(f"it has no {path.name}: not a run, or one that stopped before its first step") from None
    except (OSError, ValueError) as error:
        raise UnusableRunError(f"{path.name} cannot be read ({error}): corrupt or half-written") from error
    if not isinstance(content, dict):
        raise UnusableRunError(f"{path.name} holds no mapping: not of gn-transfer, or corrupt")
    try:
        mapping: dict[str, Any] = _harmless(content, path.name)
    except RecursionError:
        raise UnusableRunError(f"{path.name} is nested too deeply: not of gn-transfer") from None
    return mapping


def _harmless(value: Any, name: str) -> Any:
    """Write texts so that a terminal shows them, and refuse numbers that nothing can calculate with."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise UnusableRunError(f"{name} holds a number of {len(str(abs(value)))} digits")
    if isinstance(value, dict):
        return {printable(str(key)): _harmless(item, name) for key, item in value.items()}
    return [_harmless(item, name) for item in value] if isinstance(value, list) else value
