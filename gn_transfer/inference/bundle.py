"""What bundles of every task share: a verified folder and its graph. Needs no torch."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gn_transfer.config import ConfigError
from gn_transfer.data.decode import BadImageError
from gn_transfer.inference.image_source import ImageSource, Pixels

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it writes an identifier of the machine into the user's cache
import onnxruntime


class Bundle(ABC):
    """A verified bundle, ready to run; :func:`gn_transfer.load_bundle` makes one.

    Args:
        folder: The bundle's folder.
        metadata: Content of its bundle.json.
        session: onnxruntime's session of its graph.

    Attributes:
        folder: The bundle's folder.
        metadata: Content of its bundle.json.
        classes: Names of the classes, in the order of the logits.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any], session: onnxruntime.InferenceSession) -> None:
        self.folder = folder
        self.metadata = metadata
        self.classes: list[str] = list(metadata["classes"])
        self._session = session

    @property
    def validation_metric(self) -> float:
        """Accuracy or mIoU of this graph, in int8 or not, on the validation images of the run."""
        return validation_metric(self.metadata)

    @abstractmethod
    def iter_predict(self, images: Iterable[ImageSource]) -> Iterator[Any | BadImageError]:
        """Predict any number of images in bounded memory, in their order; an undecodable one gives its error."""

    @abstractmethod
    def graph_input(self, image: ImageSource) -> Pixels:
        """Decode an image and bring it to the pixels that the graph takes, as training's evaluation does.

        Args:
            image: A path, the content of an image file, a uint8 RGB array ``(H, W, 3)``, or a Pillow image.

        Returns:
            Pixels, uint8 RGB, shape ``(H, W, 3)``.

        Raises:
            BadImageError: It cannot be decoded.
            ConfigError: It is no image.
        """

    def _run(self, images_BHWC: npt.NDArray[np.uint8], *outputs: str) -> list[npt.NDArray[Any]]:
        """Run the graph on pixels, uint8 RGB."""
        try:
            results = [np.asarray(output) for output in self._session.run(list(outputs), {"images": images_BHWC})]
        except Exception as error:  # onnxruntime's errors share no base class but this
            shape = "x".join(map(str, images_BHWC.shape))
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{self.folder}: the graph cannot be run on images of shape {shape} ({reason}). Where memory is short, "
                "predict fewer or smaller images; else export the checkpoint again."
            ) from error
        if any(result.shape[:2] != (len(images_BHWC), len(self.classes)) for result in results):
            raise ConfigError(f"{self.folder}: the graph gives results of another shape; export the checkpoint again.")
        if not all(np.isfinite(result).all() for result in results):
            raise ConfigError(f"{self.folder}: the graph gives numbers that are not finite; export another checkpoint.")
        return results


def validation_metric(metadata: Mapping[str, Any]) -> float:
    """Give accuracy or mIoU of a bundle's graph, in int8 or not, on the validation images of the run.

    Args:
        metadata: Content of bundle.json.

    Raises:
        ConfigError: It does not say it, as while it is being exported.
    """
    quantization = metadata.get("quantization")
    if "parity" not in metadata:
        raise ConfigError("the bundle was not compared with its checkpoint; export the checkpoint again.")
    return float(metadata["parity"]["metric_bundle"] if quantization is None else quantization["metric_int8"])


def open_graph(path: Path, threads: int | None = None) -> onnxruntime.InferenceSession:
    """Open a graph for the CPU.

    Args:
        path: An ONNX file.
        threads: Compute threads; None takes ``OMP_NUM_THREADS`` where it is set, else every core given to us.

    Returns:
        onnxruntime's session.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or thread_count()
    options.log_severity_level = 3  # errors come as exceptions
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def thread_count() -> int:
    """Count the compute threads to use: ``OMP_NUM_THREADS`` where it is set, else every core given to us."""
    wished = os.environ.get("OMP_NUM_THREADS", "")
    if wished.isdecimal() and int(wished) > 0:
        return int(wished)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
