"""A graph in int8: convolutions and linear layers compute with integers, for processors without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from gn_transfer.inference.bundle import open_graph
from gn_transfer.inference.image_source import Pixels
from gn_transfer.inference.onnx_graph import quiet

_LAYERS = ("Conv", "Gemm", "MatMul")
_OF_STATISTICS = ("LayerNormalization", "Sqrt")
"""Operators of norms that compute statistics of what they see."""

_IMAGES_OF_AN_ATTEMPT = 32
_WORTH_KEEPING = 0.9
"""A layer stays in float where that lowers the error of the logits below this share of it."""


@dataclass(frozen=True)
class Quantization:
    """How a graph was quantized. Errors are root mean squares of the logits' error over the spread of the logits.

    Attributes:
        images: Training images that the ranges come from. The errors are of 32 to 63 of them, or of fewer
            where there are fewer.
        error_without_exception: With every layer in int8.
        error_with_layer_in_float: With one layer left in float, by its place, ``first`` and ``last``.
        layers_in_float: Those that stayed in float.
        error: Of the result.
    """

    images: int
    error_without_exception: float
    error_with_layer_in_float: dict[str, float]
    layers_in_float: list[str]
    error: float

    def summary(self) -> str:
        """Say it in a line."""
        alone = ", ".join(
            f"with the {place} layer in float {error:.1%}" for place, error in self.error_with_layer_in_float.items()
        )
        return (
            f"ranges of {self.images} training images; error of the logits {self.error_without_exception:.1%} of their "
            f"spread, {alone}; in float: {' and '.join(self.layers_in_float) or 'none'}; in all {self.error:.1%}"
        )


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """Gives one image at a time, as onnxruntime's calibration asks for them."""

    def __init__(self, images: Sequence[Pixels]) -> None:
        self._rest = iter(images)

    def get_next(self) -> dict[str, Pixels] | None:
        """See the base class."""
        image = next(self._rest, None)
        return None if image is None else {"images": image[None]}


def quantize_graph(graph: Path, target: Path, images: Sequence[Pixels]) -> Quantization:
    """Write a graph in int8, by onnxruntime's static quantization.

    Weights are int8 with a scale per output channel, activations uint8 with the range that they have on the images.
    Weights use seven of the eight bits: processors without VNNI add two products in 16 bits, which eight bits
    overflow. Group norms stay in float, and with them all but the convolutions and linear layers of such a graph. The
    first and the last layer stay in float where that lowers the error of the logits on the images by a tenth or more.

    Args:
        graph: The ONNX file in float.
        target: The file to write.
        images: Training images as the graph takes them, uint8 ``(H, W, 3)``, which the ranges come from.

    Returns:
        What became of it.
    """
    with TemporaryDirectory() as scratch, quiet():
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(str(graph), str(prepared), skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        layers = [node.name for node in nodes if node.op_type in _LAYERS]
        computes_statistics = any(node.op_type in _OF_STATISTICS for node in nodes)
        kinds = list(_LAYERS) if computes_statistics else None
        some = images[:: max(1, len(images) // _IMAGES_OF_AN_ATTEMPT)]
        expected = _logits(graph, some)

        def attempt(in_float: list[str], ranges: Sequence[Pixels]) -> float:
            _quantize(prepared, target, ranges, kinds, in_float)
            return _relative_error(_logits(target, some), expected)

        ends = {"first": layers[0], "last": layers[-1]}
        error = attempt([], some)
        alone = {place: attempt([name], some) for place, name in ends.items()}
        kept = [place for place in ends if alone[place] < _WORTH_KEEPING * error]
        final = attempt([ends[place] for place in kept], images)
    return Quantization(len(images), error, alone, kept, final)


def _quantize(
    graph: Path, target: Path, images: Sequence[Pixels], kinds: list[str] | None, in_float: list[str]
) -> None:
    """Quantize the operators of some kinds, None: all that can be; but not those named."""
    quantize_static(
        graph,
        target,
        _Images(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=True,
        op_types_to_quantize=kinds,
        nodes_to_exclude=in_float,
    )


def _logits(graph: Path, images: Sequence[Pixels]) -> list[npt.NDArray[np.float32]]:
    session = open_graph(graph)
    return [session.run(["logits"], {"images": image[None]})[0] for image in images]


def _relative_error(found: Sequence[npt.NDArray[np.float32]], expected: Sequence[npt.NDArray[np.float32]]) -> float:
    """Root mean square of the difference over that of the logits around their mean, over all images."""
    mean = float(np.mean([logits.mean() for logits in expected]))
    difference = sum(float(((one - other) ** 2).sum()) for one, other in zip(found, expected, strict=True))
    spread = sum(float(((logits - mean) ** 2).sum()) for logits in expected)
    return float(np.sqrt(difference / max(spread, 1e-12)))
