"""What bundle.json says of a checkpoint: classes, preprocessing, metrics, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gn_transfer.config import STRIDE
from gn_transfer.data.datamodule import ImageDataModule
from gn_transfer.data.preprocess import CROP_FRACTION
from gn_transfer.data.segmentation import SegmentationDataModule
from gn_transfer.files import read_json
from gn_transfer.inference.bundle_files import FORMAT, FORMAT_VERSION
from gn_transfer.inference.onnx_graph import OPSET
from gn_transfer.inference.parity import class_ious
from gn_transfer.training.ema import AS_TRAINED
from gn_transfer.training.environment import environment
from gn_transfer.training.run_folder import LAST, run_of_checkpoint


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
        "metrics": metrics_of(checkpoint, content),
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


def scores_by_class(confusion: npt.NDArray[np.int64], classes: Sequence[str], metric: str) -> dict[str, dict[str, Any]]:
    """Say of every class how often it occurs, and how well it was found: its recall, or the IoU of its pixels.

    Args:
        confusion: Images, or pixels, of each class (rows) that were given each class (columns).
        classes: Their names.
        metric: ``accuracy`` or ``mIoU``.
    """
    counts = confusion.sum(1)
    with np.errstate(invalid="ignore"):
        scores = class_ious(confusion) if metric == "mIoU" else np.diag(confusion) / counts
    score = "iou" if metric == "mIoU" else "recall"
    return {
        name: {"count": int(count), score: None if np.isnan(value) else float(value)}
        for name, count, value in zip(classes, counts, scores, strict=True)
    }


def metrics_of(checkpoint: Path, content: Mapping[str, Any]) -> dict[str, float]:
    """Take a checkpoint's figures from its run's metrics.json.

    Args:
        checkpoint: Path of a .ckpt file.
        content: What it holds.

    Returns:
        ``val/*`` of that checkpoint, for ``best.ckpt`` and a ``last.ckpt`` of the end of an epoch, and ``test/*`` where
        that very checkpoint was tested; empty where the checkpoint has left its run. A figure that could not be
        measured, such as the IoU of a class without pixels, is left out.
    """
    record = {name: value for name, value in _record_of(checkpoint).items() if value is not None}
    inside_an_epoch = content["gn_transfer"].get("position", {}).get("batch", 0) != 0
    prefix = {"best.ckpt": "best/val/", LAST: "" if inside_an_epoch else "val/"}.get(checkpoint.name, "")
    found = {name.removeprefix("best/"): value for name, value in record.items() if prefix and name.startswith(prefix)}
    if record.get("test/checkpoint") == checkpoint.name:
        found |= {
            name: value for name, value in record.items() if name.startswith("test/") and name != "test/checkpoint"
        }
    return found


def run_name(stored: Mapping[str, Any], checkpoint: Path) -> str:
    """Name the run of a checkpoint, with its configuration: ``pets_gnws/gn_ws-bs1-seed0``."""
    return f"{stored['config_name']}/{checkpoint.resolve().parent.name}"


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
    of_task = ("regularization", "segmentation")
    kept = ("seed_everything", "data", "model", "optimizer", *of_task, "accumulation", "batch_norm")
    config = {key: stored["config"][key] for key in kept if key in stored["config"]}
    arguments = {key: value for key, value in config["data"]["init_args"].items() if key not in ("root", "cache_dir")}
    if "augmentation" in arguments:
        arguments["augmentation"] = _without_folder(arguments["augmentation"])
    model = {**config["model"], "pretrained": _without_folder(config["model"].get("pretrained"))}
    report = {**stored["transfer_report"], "source": _without_folder(stored["transfer_report"]["source"])}
    trained_with = ("versions", "git_commit", "device", "samples_seen", "wall_time_s")
    return {
        "run": run_name(stored, checkpoint),
        "checkpoint": checkpoint.name,
        "epoch": content["epoch"] + 1 if "epoch" in content else None,
        "optimizer_steps": content.get("global_step"),
        "config": {**config, "data": {**config["data"], "init_args": arguments}, "model": model},
        "transfer_report": report,
        "trained_with": {key: record[key] for key in trained_with if key in record},
    }


def _without_folder(source: str | None) -> str | None:
    return source if source is None or ":" in source or "/" not in source else Path(source).name
