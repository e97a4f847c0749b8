"""From a trained model to a graph for inference: plain convolutions, preprocessing inside, ONNX or torch.export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_transfer.config import ConfigError
from gn_transfer.layers import GroupNorm, StdConv2d, plain_conv

OPSET = 18
"""Operator set of the graph: the one that torch's exporter writes by itself, old enough for every runtime in use."""

_LONGEST_SUM = 2**15  # values of a group; beyond, and where the size is not known, the sum is taken in parts
_MOST_PARAMETERS = 480_000_000  # an ONNX file is one protobuf message, at most 2 GiB


class InferenceModel(nn.Module):
    """Pixels in, logits and probabilities out: what leaves as a graph.

    Args:
        model: Trained model, mapping normalized images ``(B, 3, H, W)`` to logits; copied, not changed.
        mean: Pixel mean per channel, on pixels scaled to [0, 1].
        std: Pixel standard deviation per channel, likewise.
        temperature: Divides the logits before the softmax; the logits themselves stay.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], temperature: float = 1.0) -> None:
        super().__init__()
        self.model = plain(model)
        self.temperature = temperature
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255.0)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255.0)

    def forward(self, images_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Classify.

        Args:
            images_BHWC: Pixels, uint8, shape ``(B, H, W, 3)``, RGB: as decoders lay them out.

        Returns:
            Logits and probabilities, shape ``(B, classes)``, float32.
        """
        logits = self.model((images_BHWC.permute(0, 3, 1, 2).float() - self.mean) / self.std)
        return logits, F.softmax(logits / self.temperature, dim=1)


class _ExportedGroupNorm(nn.Module):
    """Group norm in the form that onnxruntime runs fastest, or where groups are large, in one that is exact.

    ``F.group_norm`` exports as InstanceNormalization with shapes computed at run time; ``LayerNormalization`` over the
    group runs on all threads, with constant shapes. Measured by ``benchmarks/inference.py``. But onnxruntime adds up in
    float32, one value after the other: over 200,000 values, four of the seven digits are lost. Means over rows, then
    columns, then the channels of the group lose none.
    """

    def __init__(self, norm: GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.act = getattr(norm, "act", nn.Identity())  # dropout between norm and activation does nothing here

    def forward(self, input: Tensor) -> Tensor:
        N, C, H, W = input.shape
        weight, bias = self.weight.view(1, C, 1, 1), self.bias.view(1, C, 1, 1)
        if isinstance(H, int) and isinstance(W, int) and (size := C // self.num_groups * H * W) <= _LONGEST_SUM:
            normal = F.layer_norm(input.reshape(N, self.num_groups, size), (size,), eps=self.eps).reshape(N, C, H, W)
            output = normal * weight + bias
        else:
            centred = input - self._group_mean(input)
            output = centred * ((self._group_mean(centred * centred) + self.eps).rsqrt() * weight) + bias
        activated: Tensor = self.act(output)
        return activated

    def _group_mean(self, input: Tensor) -> Tensor:
        """Give each channel the mean of its group, shape ``(N, C, 1, 1)``."""
        N, C = input.shape[:2]
        size = C // self.num_groups
        means = input.mean(3).mean(2).reshape(N, self.num_groups, size).mean(2)
        return means.repeat_interleave(size, dim=1).view(N, C, 1, 1)


def plain(model: nn.Module) -> nn.Module:
    """Copy a model for inference: standardized weights become those of plain convolutions, group norms exportable.

    Args:
        model: Any model; not changed.

    Returns:
        Copy in float32 and evaluation mode that computes the same, without gradients.
    """
    copy = deepcopy(model).float().eval().requires_grad_(False)
    with torch.no_grad():
        for name, layer in list(copy.named_modules()):
            new: nn.Module
            if isinstance(layer, StdConv2d):
                new = plain_conv(layer)
                new.weight = nn.Parameter(layer.standardized_weight().clone(), requires_grad=False)
            elif isinstance(layer, GroupNorm):
                new = _ExportedGroupNorm(layer)
            else:
                continue
            parent, _, child = name.rpartition(".")
            setattr(copy.get_submodule(parent), child, new)
    return copy


def write_onnx(model: InferenceModel, img_size: int, path: Path) -> None:
    """Write the graph of a classification as one ONNX file and check it.

    The exporter folds a BatchNorm into the convolution before it, where nothing stands between them. One that comes
    before a convolution (ResNetV2's, behind a ReLU's sum) cannot be folded and stays.

    Args:
        model: The model.
        img_size: Side of the images, in pixels.
        path: File to write.

    Raises:
        ConfigError: A model of more than 1.9 GB, which one ONNX file cannot hold.
    """
    example = torch.zeros(2, img_size, img_size, 3, dtype=torch.uint8)  # two images: one would fix the batch to one
    sizes = {0: torch.export.Dim("batch")}
    save_graph(export_graph(model, example, sizes, "images", ["logits", "probs"]), path)


def export_graph(
    model: nn.Module, example: Tensor, sizes: Mapping[int, Any], name: str, outputs: list[str]
) -> onnx.ModelProto:
    """Trace a model of one input.

    Args:
        model: The model, in evaluation mode.
        example: An input.
        sizes: Which of its dimensions are free, as :func:`torch.export.export` takes them.
        name: Of the input.
        outputs: Names of the outputs.

    Returns:
        The graph, without the exporter's notes, which quote its source files by their paths.

    Raises:
        ConfigError: A model of more than 1.9 GB, which one ONNX file cannot hold.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > _MOST_PARAMETERS:
        raise ConfigError(
            f"the model has {parameters / 1e6:,.0f} million parameters; an ONNX file holds at most "
            f"{_MOST_PARAMETERS / 1e6:,.0f} million. Take a smaller backbone."
        )
    with quiet():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[name],
            output_names=outputs,
            dynamic_shapes=(sizes,),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    graph: onnx.ModelProto = program.model_proto
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        del value.metadata_props[:]
    del graph.graph.metadata_props[:]
    return graph


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Check a graph and write it as one file."""
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' warnings and log messages: none of them asks anything of the user."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
