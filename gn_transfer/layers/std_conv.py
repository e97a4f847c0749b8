"""Weight Standardization: convolutions whose filters have zero mean and unit variance.

Shape suffixes: O output channels, I input channels per group, H and W kernel height and width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_transfer.config import ConfigError


def standardize_weight(weight_OIHW: Tensor, eps: float) -> Tensor:
    r"""Give every filter zero mean and unit variance over its fan-in.

    .. math:: \hat{w}_o = (w_o - \mu_o) / \sqrt{\sigma_o^2 + \epsilon}

    with the biased variance over ``I * H * W``. Source: Qiao et al. 2019, arXiv:1903.10520; eps stands inside the root
    as in BiT (big_vision divides by ``std + eps`` instead). This is layer norm over the flattened filter, which on a
    CPU runs 2-6 times faster than the same thing written as batch norm over an image of ``O`` channels.

    Args:
        weight_OIHW: Convolution weight, shape ``(O, I, H, W)``; contiguous and channels-last need no copy.
        eps: Added to the variance, in squared weight units.

    Returns:
        Standardized weight, same shape, dtype and memory format; mean and variance are taken in float32 (in float64
        for a float64 weight), under autocast too.

    Example:
        >>> standardize_weight(torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1), eps=0.0).flatten().tolist()
        [-1.0, 1.0]
    """
    rows = filter_rows(weight_OIHW)
    exact = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    return rows_to_filters(F.layer_norm(exact, exact.shape[1:], eps=eps).to(weight_OIHW.dtype), weight_OIHW)


def filter_rows(weight_OIHW: Tensor) -> Tensor:
    """Flatten every filter without a copy: the order within a filter follows the memory format, statistics ignore it.

    Args:
        weight_OIHW: Convolution weight, shape ``(O, I, H, W)``.

    Returns:
        Shape ``(O, I * H * W)``; a view where the weight is contiguous or channels-last.
    """
    if _is_channels_last(weight_OIHW):
        return weight_OIHW.permute(0, 2, 3, 1).flatten(1)
    return weight_OIHW.flatten(1)


def rows_to_filters(rows: Tensor, like_OIHW: Tensor) -> Tensor:
    """Undo :func:`filter_rows`.

    Args:
        rows: Shape ``(O, I * H * W)`` as :func:`filter_rows` laid it out for ``like_OIHW``.
        like_OIHW: Gives shape and memory format, shape ``(O, I, H, W)``.

    Returns:
        Resolution of ``rows``, shape ``(O, I, H, W)``.
    """
    O, I, H, W = like_OIHW.shape  # noqa: E741
    if _is_channels_last(like_OIHW):
        return rows.view(O, H, W, I).permute(0, 3, 1, 2)
    return rows.view(O, I, H, W)


def _is_channels_last(weight_OIHW: Tensor) -> bool:
    return not weight_OIHW.is_contiguous() and weight_OIHW.is_contiguous(memory_format=torch.channels_last)


class StdConv2d(nn.Conv2d):
    r"""Convolution with standardized filters; state dict as ``nn.Conv2d`` (and timm's ``StdConv2d``).

    .. math:: y = \hat{w} * x + b, \quad \hat{w} = (w - \mu) / \sqrt{\sigma^2 + \epsilon}

    Under ``no_grad`` or ``inference_mode`` in evaluation the standardized filters are computed once and kept until
    the weight changes (its ``_version`` or its storage), ``train()`` is called, or a forward pass with gradient is
    made. Edits in place of ``weight.data`` in between leave none of these signs: call ``train(False)`` after one.

    A filter of equal weights has the output zero and its gradient multiplied by ``1 / sqrt(eps)``: do not initialize
    the last convolution of a residual block with zeros, but the norm behind it.

    Args:
        in_channels: As in ``nn.Conv2d``, and so the following; every padding mode and number of groups works.
        out_channels: See ``in_channels``.
        kernel_size: See ``in_channels``.
        stride: See ``in_channels``.
        padding: See ``in_channels``.
        dilation: See ``in_channels``.
        groups: See ``in_channels``.
        bias: See ``in_channels``.
        padding_mode: See ``in_channels``.
        eps: Added to the variance inside the root; 1e-8 is timm's for the BiT weights. Copies of the original code have
            1e-10, with which the outputs differ by about 1e-5.
        device: As in ``nn.Conv2d``.
        dtype: As in ``nn.Conv2d``.

    Raises:
        ConfigError: Filters of one weight, which standardization would turn to zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        if self.weight[0].numel() == 1:
            raise ConfigError(
                f"a {kernel_size} convolution of {in_channels} channels in {groups} groups has filters of one weight, "
                "which weight standardization would turn to zero; use nn.Conv2d there."
            )
        self.eps = eps
        self._eval_weight: tuple[tuple[object, ...], Tensor] | None = None

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, eps: float = 1e-8) -> StdConv2d:
        """Take over another convolution's geometry and its very parameters.

        Args:
            conv: Any convolution with the attributes of ``nn.Conv2d``.
            eps: Added to the variance inside the root.

        Returns:
            A layer that shares ``weight`` and ``bias`` with ``conv``.
        """
        with torch.device("meta"):
            new = cls(*conv_geometry(conv), eps=eps)
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def standardized_weight(self) -> Tensor:
        """Standardize now, or look up what evaluation has kept.

        Returns:
            Shape ``(O, I, H, W)``, dtype of the weight.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.weight.is_inference():
            if self._eval_weight is not None:  # an optimizer's step follows, and fused ones leave _version as it was
                self._eval_weight = None
            return standardize_weight(self.weight, self.eps)
        key = (self.weight._version, self.weight.data_ptr(), self.weight.dtype, self.eps)
        if self._eval_weight is None or self._eval_weight[0] != key:
            self._eval_weight = (key, standardize_weight(self.weight, self.eps))
        return self._eval_weight[1]

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the standardized filters.

        Args:
            input: Shape ``(N, C, H, W)``.

        Returns:
            Shape ``(N, O, H', W')`` as ``nn.Conv2d`` gives it.
        """
        output: Tensor = self._conv_forward(input, self.standardized_weight(), self.bias)
        return output

    def train(self, mode: bool = True) -> StdConv2d:
        """Switch between training and evaluation; drops the standardized filters that evaluation keeps."""
        self._eval_weight = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_eval_weight": None}

    def extra_repr(self) -> str:
        """Name eps beside the geometry."""
        return f"{super().extra_repr()}, eps={self.eps:g}"  # type: ignore[no-untyped-call]


def conv_geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    """Read a convolution's constructor arguments off it, in the order of ``nn.Conv2d``.

    Args:
        conv: Any convolution with the attributes of ``nn.Conv2d``.

    Returns:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode.
    """
    return (
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
    )
