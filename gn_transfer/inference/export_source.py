"""What export starts from: the checkpoint that is meant, the run's validation images, a folder that may be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gn_transfer import data as data_modules
from gn_transfer.config import ConfigError, shortened
from gn_transfer.data.datamodule import ImageDataModule, check_named_root
from gn_transfer.data.dataset import ImageDataset
from gn_transfer.files import parse_json, read_json, read_text
from gn_transfer.inference.bundle_files import FORMAT, METADATA
from gn_transfer.report.runs import runs_on_images
from gn_transfer.training.checkpoint import check_classes
from gn_transfer.training.run_folder import run_of_checkpoint


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that is meant.

    Args:
        path: A .ckpt file, a folder ``checkpoints/CONFIG/RUN`` or ``runs/CONFIG/RUN``, or the folder of images that a
            run was trained on: the newest such run.

    Returns:
        The file; of a folder best.ckpt, or last.ckpt where no epoch was validated.

    Raises:
        ConfigError: There is none.
    """
    if path.is_file():
        return path
    folders = [path]
    if path.resolve().parent.parent.name == "runs":
        run = path.resolve()
        folders.append(run.parent.parent.parent / "checkpoints" / run.parent.name / run.name)
    for folder in folders:
        for name in ("best.ckpt", "last.ckpt"):
            if (folder / name).is_file():
                return folder / name
    for run in runs_on_images(path, Path()) if path.is_dir() else []:
        best = Path("checkpoints", run.parent.name, run.name, "best.ckpt")
        if best.is_file():
            return best
    what = "has no best.ckpt or last.ckpt" if path.is_dir() else "no such file or folder"
    raise ConfigError(f"{path}: {what}; give a checkpoint, such as checkpoints/pets_gnws/RUN/best.ckpt, or its folder.")


def check_exportable(stored: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse a checkpoint that no bundle can be made of.

    Args:
        stored: What the checkpoint says under ``gn_transfer``.
        checkpoint: Its path, for the message.

    Raises:
        ConfigError: Something is missing, it takes no RGB images, or it was evaluated with batch statistics.
    """
    missing = [
        key for key in ("classes", "architecture", "transfer_report", "config", "config_name") if key not in stored
    ]
    if missing:
        raise ConfigError(
            f"{checkpoint} lacks {', '.join(missing)}, which export needs: it was not written by gn-transfer fit, or "
            "by an older one. Continue its run for an epoch with gn-transfer fit --ckpt_path, and export the result."
        )
    if stored["architecture"].get("in_chans", 3) != 3:
        raise ConfigError(
            f"{checkpoint} is a model of {stored['architecture']['in_chans']}-channel images, and a bundle takes RGB "
            "images; train with model.in_chans=3 to export it."
        )
    if stored["config"].get("batch_norm", {}).get("evaluation") == "batch":
        raise ConfigError(
            f"{checkpoint} was evaluated with the statistics of each batch (batch_norm.evaluation=batch), and a bundle "
            "looks at one image at a time; train with batch_norm.evaluation=running."
        )


def check_output(output: Path, run: str) -> None:
    """Refuse to write over anything but a bundle of the same run.

    Args:
        output: The folder to write.
        run: The run that is exported, with its configuration: ``pets_gnws/gn_ws-bs1-seed0``.

    Raises:
        ConfigError: A file, or a folder that holds something else than one bundle of this run.
    """
    if output.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError(
            f"--output {output} is the folder that you are in, or one above it; name a folder of its own."
        )
    if not output.exists() and not output.is_symlink():
        return
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if output.is_dir() and not found:
        return
    try:
        known = parse_json(read_text(output / METADATA))
        extra = sorted(found - {METADATA, *known["files"]}) if known["format"] == FORMAT else sorted(found)
        there = str(known["provenance"]["run"])
    except (OSError, ValueError, KeyError, TypeError):
        extra = sorted(found) or [output.name]
    if extra:
        raise ConfigError(
            f"--output {output} exists and holds something that is no bundle ({', '.join(extra[:3])}), which would be "
            "lost; name a new folder."
        )
    if there != run:
        raise ConfigError(
            f"--output {output} holds the bundle of another run ({shortened(there)}), which would be lost; "
            "name a new folder, or remove this one first."
        )


def run_data(config: object, classes: Sequence[str], root: str | None, stage: str = "validate") -> ImageDataModule:
    """Set up the images of a run as the run had them.

    Args:
        config: The run's configuration, from a checkpoint or a bundle.
        classes: The checkpoint's classes.
        root: Where the images lie; None takes the configuration's path.
        stage: ``validate``, or ``fit`` for the training images too.

    Returns:
        The data, set up.

    Raises:
        ConfigError: The images are gone, have other classes, or come from a data module that is not ours.
    """
    config = config if isinstance(config, Mapping) else {}
    named = config.get("data")
    class_path, arguments = (
        (named.get("class_path"), named.get("init_args")) if isinstance(named, Mapping) else (None,) * 2
    )
    if not isinstance(class_path, str) or not isinstance(arguments, Mapping):
        raise ConfigError("the run's configuration names no data, so it was not written by gn-transfer fit.")
    package, _, name = class_path.rpartition(".")
    kind = getattr(data_modules, name, None) if name in data_modules.__all__ else None
    if package not in ("", "gn_transfer", "gn_transfer.data") or not (
        isinstance(kind, type) and issubclass(kind, ImageDataModule)
    ):
        raise ConfigError(f"the run was trained on {class_path}, and only data modules of gn_transfer are run.")
    arguments = {key: value for key, value in arguments.items() if key not in ("cache_dir", "download")}
    arguments["seed"] = config.get("seed_everything", 0)
    if root is not None:
        arguments["root"] = root
    try:
        if root is None:
            check_named_root(kind, arguments.get("root"))
        data: ImageDataModule = kind(**arguments)
        data.prepare_data()
        data.setup(stage)
    except ConfigError as error:
        raise ConfigError(
            f"the run's images cannot be used: {error} Give --data.root PATH, where they lie now."
        ) from error
    except (TypeError, ValueError, AttributeError) as error:  # values of a kind that no run has
        raise ConfigError(f"the run's configuration of its data does not fit this gn-transfer: {error}.") from error
    check_classes(classes, data.classes)
    return data


def evenly_spaced(dataset: ImageDataset, most: int) -> list[Path]:
    """Choose images evenly over a list that is sorted by class.

    Args:
        dataset: The images.
        most: How many, at most.
    """
    places = np.unique(np.linspace(0, len(dataset.images) - 1, most).round().astype(int))
    return [dataset.root / dataset.images[place].path for place in places]


def same_split(checkpoint: Path, data: ImageDataModule) -> bool | None:
    """Say whether the validation images are the run's; None where its split.json is gone.

    Args:
        checkpoint: The checkpoint.
        data: Set up for validation.
    """
    run_folder = run_of_checkpoint(checkpoint)
    recorded = read_json(None if run_folder is None else run_folder.logs / "split.json").get("val")
    if not isinstance(recorded, list) or not all(isinstance(path, str) for path in recorded):
        return None
    return sorted(recorded) == sorted(data.split()["val"])
