"""From a checkpoint to a bundle that computes what was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from scipy.special import softmax

from gn_transfer.config import ConfigError, check_range
from gn_transfer.data.datamodule import ImageDataModule
from gn_transfer.data.decode import BadImageError
from gn_transfer.data.progress import working
from gn_transfer.files import whole_folder
from gn_transfer.inference.bundle import open_graph
from gn_transfer.inference.bundle_description import describe_bundle, run_name, scores_by_class
from gn_transfer.inference.bundle_files import CARD, GRAPH, WEIGHTS, seal
from gn_transfer.inference.classification import ClassificationBundle
from gn_transfer.inference.confidence import Temperature, choose_threshold, fit_temperature
from gn_transfer.inference.export_source import check_exportable, check_output, evenly_spaced, run_data, same_split
from gn_transfer.inference.hub_repository import check_hub, find_arguments, push_bundle
from gn_transfer.inference.image_source import Pixels
from gn_transfer.inference.load import load_bundle
from gn_transfer.inference.model_card import confused_pairs, model_card
from gn_transfer.inference.onnx_graph import InferenceModel, write_onnx
from gn_transfer.inference.onnx_segmentation import write_segmentation_onnx
from gn_transfer.inference.parity import (
    Evaluated,
    Parity,
    ParityError,
    compare_with_checkpoint,
    evaluate_checkpoint,
)
from gn_transfer.inference.quantize import quantize_graph
from gn_transfer.inference.segmentation import SegmentationBundle
from gn_transfer.training.checkpoint import read_checkpoint
from gn_transfer.training.segmentation import TransferSegmenter
from gn_transfer.training.task import TransferTask
from gn_transfer.training.tasks import load_task

MAX_DROP = 1.0
"""What int8 may cost if nothing else is said, in points of accuracy or mIoU."""

CALIBRATION_IMAGES = {"classification": 128, "segmentation": 32}
"""Training images that the ranges of an int8 graph come from, by task."""


def export_bundle(
    checkpoint: Path,
    output: Path,
    *,
    data_root: str | None = None,
    precision: float | None = None,
    int8: bool = False,
    max_drop: float = MAX_DROP,
    push_to_hub: str | None = None,
    say: Callable[[str], Any] = lambda line: None,
) -> Parity:
    """Write a checkpoint as a bundle, and compare the two.

    Args:
        checkpoint: A .ckpt file of ours.
        output: Folder to write; an older bundle of the same run is replaced.
        data_root: Where the run's images lie; None takes the path that the checkpoint knows.
        precision: Wanted share of right answers, in (0, 1]: the bundle calls what is less certain unknown. None: it
            always answers. For classifications.
        int8: Whether the graph computes with 8-bit integers. Its ranges come from training images of the run.
        max_drop: How much int8 may cost on the validation images, in points of accuracy or mIoU.
        push_to_hub: ``USER/NAME``, the repository of the Hugging Face hub to push the bundle to; None: to none. For
            classifications.
        say: Prints a line of progress.

    Returns:
        The comparison of the graph in float with the checkpoint, which holds.

    Raises:
        ConfigError: A checkpoint, images or an output folder that do not fit; a precision that is not reached; int8
            costs more than ``max_drop``; a hub that cannot be used.
        ParityError: The bundle does not compute what was trained; none is left.
    """
    content = read_checkpoint(checkpoint, argument="export")
    stored = content["gn_transfer"]
    check_exportable(stored, checkpoint)
    run = run_name(stored, checkpoint)
    check_output(output, run)
    if precision is not None:
        check_range("--precision", precision, low=0, high=1, open_low=True, open_high=False)
    for option, value in (("--precision", precision), ("--push_to_hub", push_to_hub)):
        if value is not None and "decoder" in stored["architecture"]:
            raise ConfigError(f"{option} is for models that classify images, and this checkpoint segments them.")
    if push_to_hub is not None:
        check_hub(push_to_hub)
    data = run_data(stored["config"], stored["classes"], data_root, "fit" if int8 else "validate")
    task = load_task(content, checkpoint)

    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output) as folder:
        say(f"checkpoint  {checkpoint}: {_described(stored, data)}")
        metadata = describe_bundle(content, checkpoint, data)
        assert task.model is not None
        if push_to_hub is not None:
            find_arguments(task.model, metadata)  # what timm cannot build is refused before the work
        evaluated: Evaluated = evaluate_checkpoint(task, data)
        temperature = 1.0
        if metadata["task"] == "classification":
            with working("evaluating the checkpoint"):
                evaluated = list(evaluated)
            fitted = _fit_temperature(evaluated)
            say(f"confidence  {fitted.summary()}")
            metadata["confidence"] = {"temperature": asdict(fitted), "threshold": None}
            temperature = fitted.value
        with working("writing the graph"):
            _write_graph(task, stored["architecture"], data, folder / GRAPH, temperature)
        weights = {name: tensor.contiguous() for name, tensor in task.model.state_dict().items()}
        (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))  # save_file would make it private
        seal(folder, metadata)  # the comparison goes the user's way, through a bundle that loads
        bundles = [load_bundle(folder)]
        in_int8 = folder / "int8.onnx"
        if int8:
            images = _training_images(bundles[0], data, CALIBRATION_IMAGES[metadata["task"]])
            with working("quantizing"):
                quantization = quantize_graph(folder / GRAPH, in_int8, images)
            say(f"int8        {quantization.summary()}")
            bundles.append(type(bundles[0])(folder, metadata, open_graph(in_int8)))
        meters = compare_with_checkpoint(evaluated, bundles, data)
        parity, confusion = meters[0].compute(), meters[-1].confusion
        same = same_split(checkpoint, data)
        if same is False:
            say(
                "warning     the validation images are not those of the run (see its split.json). Some may have been "
                "trained on, so figures here may be too high."
            )
        if not parity.holds:
            raise ParityError(f"the bundle differs from {checkpoint}: {parity.summary()}. No bundle was written.")
        if int8:
            metadata["quantization"] = {
                **asdict(quantization),
                **_check_drop(parity, meters[-1].compute(), max_drop, say),
            }
            in_int8.replace(folder / GRAPH)
        if precision is not None:  # on the graph that leaves, in int8 or not
            probs = softmax(np.stack(meters[-1].logits) / temperature, axis=1)
            threshold = choose_threshold(probs, np.array(meters[-1].targets), precision)
            say(f"threshold   {threshold.summary()}")
            metadata["confidence"]["threshold"] = asdict(threshold)
        metadata["parity"] = asdict(parity)
        metadata["validation"] = {
            "images": parity.images,
            "by_class": scores_by_class(confusion, bundles[0].classes, parity.metric),
            "confused": confused_pairs(confusion, bundles[0].classes),
            "same_images_as_the_run": same,
        }
        (folder / CARD).write_text(model_card(metadata), encoding="utf-8")
        seal(folder, metadata)
        check_output(output, run)  # minutes have passed, and others may have written there
    if push_to_hub is not None:
        with working("pushing to the hub"):
            address = push_bundle(output, push_to_hub)
        say(f'hub         {address}: timm.create_model("hf-hub:{push_to_hub}", pretrained=True)')
    return parity


def _fit_temperature(evaluated: Evaluated) -> Temperature:
    logits = np.stack([scores for scores, _ in evaluated])
    if not np.isfinite(logits).all():
        raise ConfigError("the checkpoint's logits are not finite on its validation images; use another checkpoint.")
    return fit_temperature(logits, np.array([int(target) for _, target in evaluated]))


def _training_images(
    bundle: ClassificationBundle | SegmentationBundle, data: ImageDataModule, most: int
) -> list[Pixels]:
    """Take training images, evenly spaced over the list, which is sorted by class, as the graph takes them."""
    images = []
    for path in evenly_spaced(data.train_dataset, most):
        try:
            images.append(bundle.graph_input(path))
        except BadImageError:  # data.on_bad_image=skip
            continue
    if not images:
        raise ConfigError("--quantize: no training image of the run can be decoded, and the ranges come from them.")
    return images


def _check_drop(in_float: Parity, in_int8: Parity, max_drop: float, say: Callable[[str], Any]) -> dict[str, Any]:
    """Say what int8 costs, and refuse too much."""
    drop = 100 * (in_float.metric_bundle - in_int8.metric_bundle)
    what = "images" if in_int8.compared == in_int8.images else "labeled pixels"
    say(
        f"int8        {in_float.metric} {in_int8.metric_bundle:.4f}, float {in_float.metric_bundle:.4f}: "
        f"{drop:+.2f} points lost; top class equal to the checkpoint's on {in_int8.same_class:,} of "
        f"{in_int8.compared:,} {what}"
    )
    if drop > max_drop + 1e-9:  # 0.89 - 0.88 is more than 0.01
        raise ConfigError(
            f"--quantize int8 costs {drop:.2f} points of {in_float.metric} on the validation images, more than "
            f"--max_drop {max_drop:g}; no bundle was written. Export without --quantize, or allow more."
        )
    return {
        "kind": "int8",
        "metric_float": in_float.metric_bundle,
        "metric_int8": in_int8.metric_bundle,
        "same_class": in_int8.same_class,
        "max_drop": max_drop,
    }


def _described(stored: Mapping[str, Any], data: ImageDataModule) -> str:
    architecture = stored["architecture"]
    parts = [architecture["architecture"], f"norm {architecture['norm']}"]
    if "decoder" in architecture:
        parts += [f"decoder {architecture['decoder']} with {architecture['decoder_norm']}", "images of any size"]
    else:
        parts += [f"{data.img_size} px"]
    return ", ".join([*parts, f"{len(stored['classes'])} classes"])


def _write_graph(
    task: TransferTask, architecture: Mapping[str, Any], data: ImageDataModule, path: Path, temperature: float
) -> None:
    assert task.model is not None
    mean, std = architecture["mean"], architecture["std"]
    if isinstance(task, TransferSegmenter):
        write_segmentation_onnx(task.model, mean, std, len(task.classes), path)
    else:
        write_onnx(InferenceModel(task.model, mean, std, temperature), data.img_size, path)
