"""Convolution by matrix products where a CPU is faster that way: few positions, many weights.

At batch size 1 the deep layers of a ResNet have 49 to 784 positions and up to two million weights. oneDNN reorders
those weights into its own layout for every call, forward and backward, and its weight gradient for few positions runs
at a fraction of the machine's speed; a matrix product on the channels-last image does neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ByMatmul(NamedTuple):
    """Which of a convolution's three computations are done as a matrix product."""

    output: bool
    grad_input: bool
    grad_weight: bool


def by_matmul(kernel: int, positions: int, in_channels: int, out_channels: int, dtype: torch.dtype) -> ByMatmul:
    """Choose by the ratio of weights to activations; a rule read off measurements (``benchmarks/README.md``).

    Args:
        kernel: Height and width of the kernel.
        positions: Output positions over the batch, ``N * H * W``.
        in_channels: Input channels.
        out_channels: Output channels.
        dtype: Of input and weight.

    Returns:
        What is done as a matrix product.
    """
    ratio = kernel * kernel * in_channels * out_channels / (positions * (in_channels + out_channels))
    half = dtype != torch.float32
    if kernel == 1:
        product = ratio > (0.1 if half else 4)
        return ByMatmul(product, product, ratio > (0.1 if half else 1))
    return ByMatmul(half and ratio > 10, False, ratio > 10)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: str | tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    held: HeldProducts | None = None,
) -> Tensor:
    """``F.conv2d``, by matrix products where that is faster.

    Args:
        input: Shape ``(N, C, H, W)``; only channels-last input on a CPU takes the fast path.
        weight: Shape ``(O, C / groups, kH, kW)``.
        bias: Shape ``(O,)`` or None.
        stride: As in ``F.conv2d``, and so the following.
        padding: See ``stride``.
        dilation: See ``stride``.
        groups: See ``stride``.
        held: Where the backward may hold weight gradients that are matrix products; None has it compute them.

    Returns:
        Shape ``(N, O, H', W')``.
    """
    if (
        input.device.type == "cpu"
        and input.ndim == 4
        and groups == 1
        and dilation == (1, 1)
        and not isinstance(padding, str)
        and padding[0] == padding[1] == (weight.shape[2] - 1) // 2
        and weight.shape[2] == weight.shape[3]
        and weight.shape[2] in (1, 3)
        and stride[0] == stride[1]
        and input.is_contiguous(memory_format=torch.channels_last)
        and weight.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    ):
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            input, weight = input.to(dtype), weight.to(dtype)
        if input.dtype == weight.dtype:
            kernel = weight.shape[2]
            positions = input.shape[0] * -(-input.shape[2] // stride[0]) * -(-input.shape[3] // stride[0])
            plan = by_matmul(kernel, positions, weight.shape[1], weight.shape[0], input.dtype)
            if any(plan):
                bias = None if bias is None else bias.to(input.dtype)
                output: Tensor = _MatmulConv.apply(input, weight, bias, stride[0], plan, held)  # type: ignore[no-untyped-call]
                return output
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def is_depthwise(layer: nn.Module) -> bool:
    """Tell whether a layer is a convolution with a group for each of its input channels, of which it has several.

    Args:
        layer: Any layer.
    """
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels


class HeldProducts:
    """Weight gradients of few positions, put off until many make one matrix product.

    The gradient of a 1x1 convolution is ``grad.T @ input`` over the positions. With 49 positions, writing it (and
    adding it up over micro-batches) takes longer than computing it; over 49 positions of eight images it does not.
    Held are input and output gradient, until they take as much memory as the product.
    """

    def __init__(self) -> None:
        self.hold = False
        self._products: list[tuple[Tensor, Tensor, int]] = []
        self._bytes = 0

    def add(self, input: Tensor, grad: Tensor, stride: int) -> None:
        """Note a product.

        Args:
            input: Of the convolution, shape ``(N, I, H, W)``, channels-last.
            grad: Of its output, shape ``(N, O, H', W')``, channels-last.
            stride: Of the convolution.
        """
        # detached: what autograd saved would keep its whole graph alive
        self._products.append((input.detach(), grad.detach(), stride))
        self._bytes += input.nbytes + grad.nbytes

    def product(self, weight: Tensor) -> Tensor | None:
        """Compute the sum of what was noted, unless it is to be held longer.

        Args:
            weight: Gives the shape, ``(O, I, k, k)``.

        Returns:
            Gradient of the weight, channels-last, or None.
        """
        if not self._products or (self.hold and self._bytes < weight.nbytes):
            return None
        kernel = weight.shape[2]
        columns = [_columns(input, kernel, stride) for input, _, stride in self._products]
        rows = [_rows(grad) for _, grad, _ in self._products]
        self.clear()
        product = torch.cat(rows).t() @ torch.cat(columns) if len(rows) > 1 else rows[0].t() @ columns[0]
        return product.view(len(weight), kernel, kernel, -1).permute(0, 3, 1, 2)

    def clear(self) -> None:
        """Forget what was noted."""
        self._products.clear()
        self._bytes = 0


class _MatmulConv(torch.autograd.Function):
    """1x1 or 3x3 convolution with "same" padding in channels-last. Not twice differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        plan: ByMatmul,
        held: HeldProducts | None,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.stride, ctx.plan, ctx.held = stride, plan, held
        kernel = weight.shape[2]
        if not plan.output:
            return F.conv2d(input, weight, bias, stride, kernel // 2)
        columns, filters = _columns(input, kernel, stride), _weight_rows(weight).t()
        N, _, H, W = input.shape
        size = (N, len(weight), -(-H // stride), -(-W // stride))
        # not the product's view: an activation behind a folded norm works on it in place
        output = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
        if bias is None:
            torch.mm(columns, filters, out=_rows(output))
        else:
            torch.addmm(bias, columns, filters, out=_rows(output))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        stride, plan, kernel = ctx.stride, ctx.plan, weight.shape[2]
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_input = grad_weight = None
        if ctx.needs_input_grad[1] and plan.grad_weight:
            held = HeldProducts() if ctx.held is None else ctx.held
            held.add(input, grad, stride)
            grad_weight = held.product(weight)
        if ctx.needs_input_grad[0] and plan.grad_input:  # kernel 1
            grad_input = _to_image(_rows(grad) @ weight.flatten(1), *_hw(grad))
            if stride > 1:
                wide = torch.zeros_like(input, memory_format=torch.channels_last)
                wide[:, :, ::stride, ::stride] = grad_input
                grad_input = wide
        mask = [
            ctx.needs_input_grad[0] and grad_input is None,
            ctx.needs_input_grad[1] and not plan.grad_weight,
            False,
        ]
        if any(mask):
            rest = torch.ops.aten.convolution_backward(
                grad, input, weight, None, [stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], 1, mask
            )
            grad_input = rest[0] if mask[0] else grad_input
            grad_weight = rest[1] if mask[1] else grad_weight
        grad_bias = _rows(grad).sum(0) if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, None, None, None


def _hw(image: Tensor) -> tuple[int, int, int]:
    return image.shape[0], image.shape[2], image.shape[3]


def _rows(image: Tensor) -> Tensor:
    """``(N * H * W, C)``; a view of a channels-last image."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _to_image(rows: Tensor, N: int, H: int, W: int) -> Tensor:
    """Rows of channels ``(N * H * W, C)`` as a channels-last image; a view."""
    return rows.view(N, H, W, -1).permute(0, 3, 1, 2)


def _weight_rows(weight: Tensor) -> Tensor:
    """Shape ``(O, kH * kW * I)``, the order of :func:`_columns`; a view of a channels-last weight."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _columns(input: Tensor, kernel: int, stride: int) -> Tensor:
    """What each output position sees: ``(N * H' * W', kH * kW * C)``; a view for kernel 1 and stride 1."""
    image = input.permute(0, 2, 3, 1)
    if kernel == 1:
        return (image if stride == 1 else image[:, ::stride, ::stride]).flatten(0, 2)
    N, H, W, C = image.shape
    pad = kernel // 2
    padded = F.pad(image, (0, 0, pad, pad, pad, pad))
    n, h, w, _ = padded.stride()
    # A row of the kernel is kernel * C neighbours in memory.
    windows = padded.as_strided(
        (N, -(-H // stride), -(-W // stride), kernel, kernel * C), (n, h * stride, w * stride, h, 1)
    )
    return windows.reshape(-1, kernel * kernel * C)
