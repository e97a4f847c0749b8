"""Convolutions with TensorFlow's "same" padding, as in the EfficientNets whose names begin with ``tf_``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gn_transfer.layers.std_conv import StdConv2d


def pad_same(input: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Pad an image with zeros so that a convolution gives ``ceil(size / stride)`` positions a side.

    Where the padding is odd, the further row or column stands at the end.

    Args:
        input: Shape ``(N, C, H, W)``.
        kernel_size: Height and width of the kernel.
        stride: Of the convolution, likewise.
        dilation: Of the convolution, likewise.

    Returns:
        Shape ``(N, C, H', W')``.

    Example:
        >>> import torch
        >>> pad_same(torch.ones(1, 1, 5, 6), (3, 3), (2, 2), (1, 1)).shape
        torch.Size([1, 1, 7, 7])
    """
    pads: list[int] = []
    for size, kernel, step, spread in zip(input.shape[2:], kernel_size, stride, dilation, strict=True):
        missing = max(0, (-(-size // step) - 1) * step + (kernel - 1) * spread + 1 - size)
        pads = [missing // 2, missing - missing // 2, *pads]  # the last dimension comes first
    return F.pad(input, pads) if any(pads) else input


class Conv2dSame(nn.Conv2d):
    """``nn.Conv2d`` with "same" padding at any stride; its own ``padding`` is not used."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve; shapes as in :func:`pad_same`."""
        padded = pad_same(input, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StdConv2dSame(StdConv2d):
    """:class:`StdConv2d` with "same" padding at any stride; its own ``padding`` is not used."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the standardized filters; shapes as in :func:`pad_same`."""
        padded = pad_same(input, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(padded, self.standardized_weight(), self.bias, self.stride, 0, self.dilation, self.groups)
