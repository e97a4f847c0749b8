"""The graph of a segmentation: images of any height and width in, padded inside, classes of pixels out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_transfer.config import STRIDE
from gn_transfer.inference.onnx_graph import OPSET, export_graph, plain, save_graph

_EXAMPLE = (2, 3, 6 * STRIDE, 8 * STRIDE)

# The model takes sides that are multiples of its stride. What stands around it is written by hand: torch's exporter
# does not follow all decoders through a padding that depends on the size. Pad names no axes: onnxruntime's transpose
# optimizer takes pads of some axes for those of all, and an int8 graph then fails.
_BEFORE = """
<ir_version: 10, opset_import: ["" : {opset}]>
before (uint8[batch, height, width, 3] images) => (float[batch, 3, padded_height, padded_width] pixels, int64[2] size)
<float[1, 3, 1, 1] mean = {{{mean}}}, float[1, 3, 1, 1] std = {{{std}}}, int64 stride = {{{stride}}},
 int64[6] no_pads = {{0, 0, 0, 0, 0, 0}}>
{{
    size = Shape <start = 1, end = 3> (images)
    channels_first = Transpose <perm = [0, 3, 1, 2]> (images)
    raw = Cast <to = 1> (channels_first)
    centred = Sub (raw, mean)
    normal = Div (centred, std)
    negative = Neg (size)
    missing = Mod (negative, stride)
    pads = Concat <axis = 0> (no_pads, missing)
    pixels = Pad (normal, pads)
}}
"""
_AFTER = """
<ir_version: 10, opset_import: ["" : {opset}]>
after (float[batch, {classes}, padded_height, padded_width] padded, int64[2] size) =>
    (float[batch, {classes}, height, width] logits, float[batch, {classes}, height, width] probs,
     uint8[batch, height, width] classes)
<int64[2] start = {{0, 0}}, int64[2] cut_axes = {{2, 3}}>
{{
    logits = Slice (padded, start, size, cut_axes)
    probs = Softmax <axis = 1> (logits)
    best = ArgMax <axis = 1, keepdims = 0> (logits)
    classes = Cast <to = 2> (best)
}}
"""


def write_segmentation_onnx(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], classes: int, path: Path
) -> None:
    """Write the graph of a segmentation as one ONNX file and check it.

    It takes ``images``, uint8 ``(batch, height, width, 3)``, and gives ``logits`` and ``probs``, float32 ``(batch,
    classes, height, width)``, and ``classes``, uint8 ``(batch, height, width)``.

    Args:
        model: Trained model, mapping normalized images ``(B, 3, H, W)`` of sides that are multiples of 32 to logits of
            the same height and width; copied, not changed.
        mean: Pixel mean per channel, on pixels scaled to [0, 1].
        std: Pixel standard deviation per channel, likewise.
        classes: Classes of a pixel.
        path: File to write.

    Raises:
        ConfigError: A model of more than 1.9 GB, which one ONNX file cannot hold.
    """
    rows, columns = torch.export.Dim("rows", min=1, max=1024), torch.export.Dim("columns", min=1, max=1024)
    sizes = {0: torch.export.Dim("batch"), 2: STRIDE * rows, 3: STRIDE * columns}
    core = export_graph(for_any_size(model), torch.zeros(_EXAMPLE), sizes, "pixels", ["padded"])
    numbers = {
        key: ", ".join(f"{255.0 * value:.9g}" for value in values) for key, values in (("mean", mean), ("std", std))
    }
    before = onnx.parser.parse_model(_BEFORE.format(opset=OPSET, stride=STRIDE, **numbers))
    after = onnx.parser.parse_model(_AFTER.format(opset=OPSET, classes=classes))
    core = onnx.compose.add_prefix(core, "model/", rename_inputs=False, rename_outputs=False)
    before.ir_version = after.ir_version = core.ir_version
    merged = onnx.compose.merge_models(before, core, [("pixels", "pixels")])
    merged = onnx.compose.merge_models(merged, after, [("padded", "padded"), ("size", "size")])
    del merged.opset_import[1:]  # the same one of each part; onnxruntime quantizes a graph with a single one
    save_graph(merged, path)


def for_any_size(model: nn.Module) -> nn.Module:
    """Copy a model for inference on images of any size whose sides are multiples of 32.

    Args:
        model: Any model; not changed.

    Returns:
        Copy that computes the same there, of layers that the exporter follows without knowing the size.
    """
    copy = plain(model)
    for name, layer in list(copy.named_modules()):
        new: nn.Module
        if type(layer).__name__ == "Conv2dSame":  # timm's, or ours
            new = _padded_conv(layer)
        elif isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size not in (1, (1, 1)):
            new = _ExportedPooling(layer.output_size)  # type: ignore[arg-type]
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(copy.get_submodule(parent), child, new)
    return copy


def _padded_conv(conv: nn.Conv2d) -> nn.Module:
    """Write TensorFlow's "same" padding as a fixed one: of sides that the stride divides, it knows the amount."""
    plain_conv = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    plain_conv.weight, plain_conv.bias = conv.weight, conv.bias
    pads: list[int] = []
    for kernel, stride, dilation in zip(conv.kernel_size, conv.stride, conv.dilation, strict=True):
        missing = max(0, (kernel - 1) * dilation + 1 - stride)
        pads = [missing // 2, missing - missing // 2, *pads]  # the last dimension comes first
    return nn.Sequential(nn.ZeroPad2d(tuple(pads)), plain_conv) if any(pads) else plain_conv  # type: ignore[arg-type]


class _ExportedPooling(nn.Module):
    """Adaptive average pooling as two matrix products: the exporter knows no other form for any size."""

    def __init__(self, output_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else output_size

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = (
            _averages(length, bins) for length, bins in zip(input.shape[2:], self.output_size, strict=True)
        )
        return rows @ input @ columns.t()


def _averages(length: int, bins: int) -> Tensor:
    """Weights of ``length`` places in ``bins`` averages, shape ``(bins, length)``; the bins may overlap."""
    places, numbers = torch.arange(length)[None, :], torch.arange(bins)[:, None]
    inside = (places >= numbers * length // bins) & (places < -(-(numbers + 1) * length // bins))
    return F.normalize(inside.float(), p=1.0, dim=1)
