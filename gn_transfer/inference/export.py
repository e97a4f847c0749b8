"""From a checkpoint to a bundle that computes what was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.torch import save

from gn_transfer import data as data_modules
from gn_transfer.config import STRIDE, ConfigError
from gn_transfer.data.datamodule import ImageDataModule
from gn_transfer.data.preprocess import CROP_FRACTION
from gn_transfer.data.progress import working
from gn_transfer.data.segmentation import SegmentationDataModule
from gn_transfer.files import parse_json, read_json, read_text, sha256, whole_folder, write_json
from gn_transfer.inference.bundle_files import (
    CARD,
    FORMAT,
    FORMAT_VERSION,
    GRAPH,
    METADATA,
    WEIGHTS,
    metadata_sha256,
)
from gn_transfer.inference.load import load_bundle
from gn_transfer.inference.model_card import confused_pairs, model_card
from gn_transfer.inference.onnx_graph import OPSET, InferenceModel, write_onnx
from gn_transfer.inference.onnx_segmentation import write_segmentation_onnx
from gn_transfer.inference.parity import Parity, ParityError, class_ious, compare_with_checkpoint
from gn_transfer.report.runs import runs_on_images
from gn_transfer.training.checkpoint import check_classes, read_checkpoint
from gn_transfer.training.ema import AS_TRAINED
from gn_transfer.training.environment import environment
from gn_transfer.training.run_folder import run_of_checkpoint
from gn_transfer.training.segmentation import TransferSegmenter
from gn_transfer.training.task import TransferTask
from gn_transfer.training.tasks import load_task


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


def export_bundle(
    checkpoint: Path, output: Path, *, data_root: str | None = None, say: Callable[[str], Any] = lambda line: None
) -> Parity:
    """Write a checkpoint as a bundle, and compare the two.

    Args:
        checkpoint: A .ckpt file of ours.
        output: Folder to write; an older bundle of the same run is replaced.
        data_root: Where the run's images lie; None takes the path that the checkpoint knows.
        say: Prints a line of progress.

    Returns:
        The comparison with the checkpoint, which holds.

    Raises:
        ConfigError: A checkpoint, images or an output folder that do not fit.
        ParityError: The bundle does not compute what was trained; none is left.
    """
    check_output(output, checkpoint)
    content = read_checkpoint(checkpoint, argument="export")
    stored = content["gn_transfer"]
    _check_exportable(stored, checkpoint)
    data = validation_data(stored["config"], stored["classes"], data_root)
    task = load_task(content, checkpoint)

    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output) as folder:
        say(f"checkpoint  {checkpoint}: {_described(stored, data)}")
        assert task.model is not None
        with working("writing the graph"):
            _write_graph(task, stored["architecture"], data, folder / GRAPH)
        weights = {name: tensor.contiguous() for name, tensor in task.model.state_dict().items()}
        (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))  # save_file would make it private
        metadata = describe_bundle(content, checkpoint, data)
        _seal(folder, metadata)  # the comparison goes the user's way, through a bundle that loads
        bundle = load_bundle(folder)
        meter = compare_with_checkpoint(task, bundle, data)
        parity = meter.compute()
        same = _same_split(checkpoint, data)
        metadata["parity"] = asdict(parity)
        metadata["validation"] = {
            "images": parity.images,
            "by_class": _by_class(meter.confusion, bundle.classes, parity.metric),
            "confused": confused_pairs(meter.confusion, bundle.classes),
            "same_images_as_the_run": same,
        }
        if same is False:
            say(
                "warning     the validation images are not those of the run (see its split.json). Some may have been "
                "trained on, so figures here may be too high."
            )
        if not parity.holds:
            raise ParityError(f"the bundle differs from {checkpoint}: {parity.summary()}. No bundle was written.")
        (folder / CARD).write_text(model_card(metadata), encoding="utf-8")
        _seal(folder, metadata)
    return parity


def describe_bundle(content: Mapping[str, Any], checkpoint: Path, data: ImageDataModule) -> dict[str, Any]:
    """Collect what bundle.json says beside the comparison.

    Args:
        content: The checkpoint.
        checkpoint: Its path.
        data: The run's data, which says how images are preprocessed.
    """
    stored = content["gn_transfer"]
    architecture = stored["architecture"]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "classes": stored["classes"],
        **_inputs_and_outputs(data, len(stored["classes"])),
        "mean": architecture["mean"],
        "std": architecture["std"],
        "opset": OPSET,
        "norm": architecture["norm"],
        "backbone": architecture["backbone"],
        "architecture": architecture,
        "weights": stored.get("weights", AS_TRAINED),
        "metrics": metrics_of(checkpoint),
        "evaluated_images": evaluated_images(checkpoint),
        "provenance": provenance(content, checkpoint),
        "versions": {**environment()["versions"], **{name: version(name) for name in ("onnx", "onnxruntime")}},
    }


def _inputs_and_outputs(data: ImageDataModule, classes: int) -> dict[str, Any]:
    """Say what the graph takes and gives, and how an image is brought to it."""
    if isinstance(data, SegmentationDataModule):
        scores = f"float32 (batch, {classes}, height, width)"
        return {
            "task": "segmentation",
            "short_side": data.resolved_short_side,
            "tile_size": data.tile_size,
            "preprocessing": "RGB, upright; where its short side exceeds short_side (0: any length), reduced to it, "
            "averaged over areas; then (x / 255 - mean) / std and zeros below and to the right up to a multiple of "
            f"{STRIDE}, which the graph does itself and cuts off again",
            "inputs": {"images": "uint8 (batch, height, width, 3), RGB, of any height and width"},
            "outputs": {"logits": scores, "probs": scores, "classes": "uint8 (batch, height, width)"},
        }
    return {
        "task": "classification",
        "img_size": data.img_size,
        "crop_fraction": CROP_FRACTION,
        "preprocessing": "RGB, upright; the centre square of crop_fraction of the short side; resized to img_size "
        "(averaged over areas where it shrinks, bilinear where it grows); then (x / 255 - mean) / std, which the "
        "graph does itself",
        "inputs": {"images": f"uint8 (batch, {data.img_size}, {data.img_size}, 3), RGB"},
        "outputs": dict.fromkeys(("logits", "probs"), f"float32 (batch, {classes})"),
    }


def _described(stored: Mapping[str, Any], data: ImageDataModule) -> str:
    architecture = stored["architecture"]
    parts = [architecture["architecture"], f"norm {architecture['norm']}"]
    if "decoder" in architecture:
        parts += [f"decoder {architecture['decoder']} with {architecture['decoder_norm']}", "images of any size"]
    else:
        parts += [f"{data.img_size} px"]
    return ", ".join([*parts, f"{len(stored['classes'])} classes"])


def _write_graph(task: TransferTask, architecture: Mapping[str, Any], data: ImageDataModule, path: Path) -> None:
    assert task.model is not None
    mean, std = architecture["mean"], architecture["std"]
    if isinstance(task, TransferSegmenter):
        write_segmentation_onnx(task.model, mean, std, len(task.classes), path)
    else:
        write_onnx(InferenceModel(task.model, mean, std), data.img_size, path)


def _by_class(confusion: npt.NDArray[np.int64], classes: Sequence[str], metric: str) -> dict[str, dict[str, Any]]:
    """Say of every class how often it occurs, and how well it was found: its recall, or the IoU of its pixels."""
    counts = confusion.sum(1)
    with np.errstate(invalid="ignore"):
        scores = class_ious(confusion) if metric == "mIoU" else np.diag(confusion) / counts
    score = "iou" if metric == "mIoU" else "recall"
    return {
        name: {"count": int(count), score: None if np.isnan(value) else float(value)}
        for name, count, value in zip(classes, counts, scores, strict=True)
    }


def check_output(output: Path, checkpoint: Path) -> None:
    """Refuse to write over anything but a bundle of the same run.

    Args:
        output: The folder to write.
        checkpoint: What is exported.

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
        run = str(known["provenance"]["run"]).rpartition("/")[2]
    except (OSError, ValueError, KeyError, TypeError):
        extra = sorted(found) or [output.name]
    if extra:
        raise ConfigError(
            f"--output {output} exists and holds something that is no bundle ({', '.join(extra[:3])}), which would be "
            "lost; name a new folder."
        )
    if run != checkpoint.resolve().parent.name:
        raise ConfigError(
            f"--output {output} holds the bundle of another run ({known['provenance']['run']}), which would be lost; "
            "name a new folder, or remove this one first."
        )


def validation_data(config: Mapping[str, Any], classes: Sequence[str], root: str | None) -> ImageDataModule:
    """Set up the validation split of a run as the run had it.

    Args:
        config: The run's configuration.
        classes: The checkpoint's classes.
        root: Where the images lie; None takes the configuration's path.

    Returns:
        The data, set up for validation.

    Raises:
        ConfigError: The images are gone, have other classes, or come from a data module that is not ours.
    """
    class_path, arguments = config["data"]["class_path"], dict(config["data"]["init_args"])
    package, _, name = class_path.rpartition(".")
    kind = getattr(data_modules, name, None) if name in data_modules.__all__ else None
    if package not in ("", "gn_transfer", "gn_transfer.data") or not (
        isinstance(kind, type) and issubclass(kind, ImageDataModule)
    ):
        raise ConfigError(f"the run was trained on {class_path}, and export runs only data modules of gn_transfer.")
    arguments["seed"] = config["seed_everything"]
    if root is not None:
        arguments["root"] = root
    if "download" in arguments:
        arguments["download"] = False
    try:
        data: ImageDataModule = kind(**arguments)
        data.prepare_data()
        data.setup("validate")
    except ConfigError as error:
        raise ConfigError(
            f"the run's validation images cannot be used: {error} A bundle is written only after it was compared "
            "with its checkpoint on them: give --data.root PATH, where they lie now."
        ) from error
    check_classes(classes, data.classes)
    return data


def metrics_of(checkpoint: Path) -> dict[str, float]:
    """Take a checkpoint's figures from its run's metrics.json.

    Args:
        checkpoint: Path of a .ckpt file.

    Returns:
        ``val/*`` of that checkpoint, and ``test/*`` where that very checkpoint was tested; empty where the
        checkpoint has left its run.
    """
    record = _record_of(checkpoint)
    prefix = "best/" if checkpoint.name == "best.ckpt" else ""
    found = {name.removeprefix("best/"): value for name, value in record.items() if name.startswith(f"{prefix}val/")}
    if record.get("test/checkpoint") == checkpoint.name:
        found |= {
            name: value for name, value in record.items() if name.startswith("test/") and name != "test/checkpoint"
        }
    return found


def _record_of(checkpoint: Path) -> dict[str, Any]:
    """Read the metrics.json of a checkpoint's run; empty where the checkpoint has left its run."""
    run_folder = run_of_checkpoint(checkpoint)
    return read_json(None if run_folder is None else run_folder.logs / "metrics.json")


def evaluated_images(checkpoint: Path) -> dict[str, int]:
    """Count the images that ``val/*`` and ``test/*`` were measured on, as far as the run's metrics.json says it."""
    record = _record_of(checkpoint)
    return {split: record[f"{split}_images"] for split in ("val", "test") if f"{split}_images" in record}


def provenance(content: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Say where a bundle comes from, without paths of the machine it was trained on.

    Args:
        content: The checkpoint.
        checkpoint: Its path.

    Returns:
        Plain values: run, checkpoint, configuration, transfer report, and with what it was trained.
    """
    stored = content["gn_transfer"]
    record = _record_of(checkpoint)
    kept = ("seed_everything", "data", "model", "optimizer", "regularization", "accumulation", "batch_norm")
    config = {key: stored["config"].get(key) for key in kept}
    arguments = {key: value for key, value in config["data"]["init_args"].items() if key != "root"}
    model = {**config["model"], "pretrained": _without_folder(config["model"]["pretrained"])}
    report = {**stored["transfer_report"], "source": _without_folder(stored["transfer_report"]["source"])}
    trained_with = ("versions", "git_commit", "device", "samples_seen", "wall_time_s")
    return {
        "run": f"{stored['config_name']}/{checkpoint.resolve().parent.name}",
        "checkpoint": checkpoint.name,
        "epoch": content["epoch"] + 1,
        "optimizer_steps": content["global_step"],
        "config": {**config, "data": {**config["data"], "init_args": arguments}, "model": model},
        "transfer_report": report,
        "trained_with": {key: record[key] for key in trained_with if key in record},
    }


def _check_exportable(stored: Mapping[str, Any], checkpoint: Path) -> None:
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


def _same_split(checkpoint: Path, data: ImageDataModule) -> bool | None:
    """Say whether the validation images are the run's; None where its split.json is gone."""
    run_folder = run_of_checkpoint(checkpoint)
    recorded = read_json(None if run_folder is None else run_folder.logs / "split.json").get("val")
    return None if recorded is None else sorted(recorded) == sorted(data.split()["val"])


def _seal(folder: Path, metadata: dict[str, Any]) -> None:
    """Write bundle.json over the files that are there."""
    metadata["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != METADATA}
    metadata["sha256"] = metadata_sha256(metadata)
    write_json(folder / METADATA, metadata)


def _without_folder(source: str | None) -> str | None:
    return source if source is None or ":" in source or "/" not in source else Path(source).name
