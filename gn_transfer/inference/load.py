"""One call for what a training leaves: a checkpoint to train on, or a bundle to predict with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

from gn_transfer.config import ConfigError
from gn_transfer.inference.bundle import open_graph
from gn_transfer.inference.bundle_files import GRAPH, METADATA, WEIGHTS, read_metadata, verify_files
from gn_transfer.inference.classification import ClassificationBundle
from gn_transfer.inference.graph_check import check_graph
from gn_transfer.inference.segmentation import SegmentationBundle

if TYPE_CHECKING:
    from gn_transfer.training.task import TransferTask


def load(path: str | os.PathLike[str]) -> ClassificationBundle | SegmentationBundle | TransferTask:
    """Load a bundle, or a checkpoint of ``gn-transfer fit``. No code in it is run.

    Args:
        path: Folder of a bundle; a ``.ckpt`` file; or the folder of a run under ``checkpoints/``, of which the best
            checkpoint is taken.

    Returns:
        A bundle, which needs no torch; or the module on the CPU, in evaluation mode.

    Raises:
        ConfigError: Neither of these, or it is corrupt.
    """
    path = Path(path)
    if (path / METADATA).is_file():
        return load_bundle(path)
    if (path / "best.ckpt").is_file():
        path = path / "best.ckpt"
    if not path.is_file():
        raise ConfigError(
            f"{path}: neither a bundle (a folder with {METADATA}) nor a checkpoint; give the folder of a bundle, a "
            ".ckpt file, or a folder checkpoints/CONFIG/RUN."
        )
    from gn_transfer.training.checkpoint import read_checkpoint
    from gn_transfer.training.tasks import load_task

    return load_task(read_checkpoint(path, argument="load"), path)


def load_bundle(
    folder: str | os.PathLike[str], *, threads: int | None = None
) -> ClassificationBundle | SegmentationBundle:
    """Verify a bundle and make it ready to run. No code of the bundle is run, only its graph.

    ``model.safetensors``, which training needs and this does not, may have been left out of a copy.

    Args:
        folder: The bundle's folder.
        threads: Compute threads; None takes ``OMP_NUM_THREADS`` where it is set, else every core given to us.

    Returns:
        The bundle, of the class of its task.

    Raises:
        ConfigError: Not a bundle, written by a newer version, a file missing or changed, or a graph that the installed
            onnxruntime cannot run.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    needed = {name: digest for name, digest in metadata["files"].items() if name != WEIGHTS or (folder / name).exists()}
    verify_files(folder, needed)
    check_graph(folder / GRAPH)
    try:
        session = open_graph(folder / GRAPH, threads)
    except Exception as error:  # onnxruntime's errors share no base class but this
        raise ConfigError(
            f"{folder / GRAPH}: onnxruntime {onnxruntime.__version__} cannot run it ({error}); it needs a version that "
            f"knows opset {metadata.get('opset')}. Update onnxruntime, or export the checkpoint again."
        ) from error
    _check_interface(folder, session, metadata)
    kind = SegmentationBundle if metadata["task"] == "segmentation" else ClassificationBundle
    return kind(folder, metadata, session)


def _check_interface(folder: Path, session: onnxruntime.InferenceSession, metadata: Mapping[str, Any]) -> None:
    """Refuse a graph with other inputs and outputs than those of its task."""
    rank = 4 if metadata["task"] == "segmentation" else 2
    inputs = [(found.name, found.type, len(found.shape)) for found in session.get_inputs()]
    outputs = {found.name: found for found in session.get_outputs()}
    scores = [outputs.get("logits"), outputs.get("probs")]
    sound = inputs == [("images", "tensor(uint8)", 4)] and all(
        found is not None and found.type == "tensor(float)" and len(found.shape) == rank for found in scores
    )
    if not sound:
        raise ConfigError(
            f"{folder / GRAPH} has not the inputs and outputs of a {metadata['task']}; export the checkpoint again."
        )
    number = outputs["logits"].shape[1]
    if number != len(metadata["classes"]):
        raise ConfigError(
            f"{folder}: the graph knows {number} classes and {METADATA} names {len(metadata['classes'])}; export the "
            "checkpoint again."
        )


def load_for_training(folder: str | os.PathLike[str]) -> TransferTask:
    """Build the module of a bundle with its weights, to train on.

    Args:
        folder: The bundle's folder, with ``model.safetensors``.

    Returns:
        The module on the CPU, in training mode.

    Raises:
        ConfigError: Not a bundle, a file missing or changed, or weights that do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from gn_transfer.training.checkpoint import check_description
    from gn_transfer.training.tasks import load_task

    folder = Path(folder)
    metadata = read_metadata(folder)
    if WEIGHTS not in metadata["files"]:
        raise ConfigError(f"{folder} has no {WEIGHTS}, which training needs; export the checkpoint again.")
    verify_files(folder, {WEIGHTS: metadata["files"][WEIGHTS]})
    provenance = metadata.get("provenance")
    if not isinstance(provenance, dict) or not isinstance(provenance.get("config"), dict):
        raise ConfigError(f"{folder / METADATA} does not say how the model was trained; export the checkpoint again.")
    stored = {key: metadata.get(key) for key in ("classes", "architecture")}
    stored |= {key: provenance.get(key) for key in ("config", "transfer_report")}
    try:
        weights = {f"model.{name}": tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder / WEIGHTS} cannot be read ({error}); copy the bundle again, whole.") from error
    content = {"gn_transfer": stored, "state_dict": weights}
    check_description(content, str(folder))
    return load_task(content, folder).train()
