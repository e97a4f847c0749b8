"""Group norm by group count or by channels per group, alone and with an activation; LN and IN are its limits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gn_transfer.config import ConfigError

Array = npt.NDArray[Any]


def group_count(channels: int, *, num_groups: int = 32, group_size: int | None = None, layer: str = "the layer") -> int:
    """Decide how many groups a layer gets.

    Args:
        channels: Channels of the layer.
        num_groups: Groups where ``group_size`` is None.
        group_size: Channels per group; None disables it.
        layer: Name of the layer for the message.

    Returns:
        Number of groups, a divisor of ``channels``.

    Raises:
        ConfigError: Not a divisor.

    Example:
        >>> group_count(64), group_count(64, group_size=16)
        (32, 4)
    """
    key, value = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    if value < 1 or channels % value:
        divisors = ", ".join(str(d) for d in range(1, channels + 1) if channels % d == 0)
        remedy = "set model.group_size" if group_size is None else "leave it out and set model.num_groups"
        raise ConfigError(
            f"model.{key}={value} does not divide {channels} channels of {layer}; use one of {divisors}, or {remedy}."
        )
    return num_groups if group_size is None else channels // group_size


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    r"""Normalize groups of channels of each picture by their own mean and variance.

    .. math:: y = \gamma (x - \mu_g) / \sqrt{\sigma_g^2 + \epsilon} + \beta

    with the biased variance over the ``C / num_groups`` channels of a group and all positions, both in float32 for
    half-precision input. Source: Wu and He 2018, arXiv:1803.08494. One group is layer norm over (C, H, W), C groups
    are instance norm.

    Args:
        input: Shape ``(N, C, *)``.
        num_groups: A divisor of C.
        weight: gamma, shape ``(C,)``; None is 1.
        bias: beta, shape ``(C,)``; None is 0.
        eps: Added to the variance inside the root.

    Returns:
        Shape, dtype and memory format of ``input``.

    Raises:
        ConfigError: Groups of a single value, whose output would be the bias whatever the input.
    """
    if input[0].numel() == num_groups:
        raise ConfigError(
            f"{num_groups} groups over {tuple(input.shape[1:])} hold one value each, so the output would not depend on "
            "the input; use larger pictures (data.img_size), or fewer groups (model.num_groups, model.norm)."
        )
    if input.dtype in (torch.bfloat16, torch.float16):  # half-precision parameters would make half-precision statistics
        weight, bias = (p if p is None else p.float() for p in (weight, bias))
    if _native_is_slow(input, num_groups):
        output: Tensor = _ChannelsLastGroupNorm.apply(input, num_groups, weight, bias, eps)  # type: ignore[no-untyped-call]
        return output
    return F.group_norm(input, num_groups, weight, bias, eps)


class GroupNorm(nn.GroupNorm):
    """Group norm by group count or by channels per group; see :func:`group_norm` for the formula.

    Args:
        num_channels: Channels C (first, as timm has it; ``nn.GroupNorm`` wants the groups first).
        num_groups: Groups where ``group_size`` is None; 1 is layer norm over (C, H, W), C is instance norm.
        group_size: Channels per group; None disables it.
        eps: Added to the variance inside the root.
        affine: Learn a scale and a shift per channel.
        device: As in ``nn.GroupNorm``.
        dtype: As in ``nn.GroupNorm``.

    Raises:
        ConfigError: A number that does not divide the channels.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        group_size: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        groups = group_count(num_channels, num_groups=num_groups, group_size=group_size)
        super().__init__(groups, num_channels, eps, affine, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape ``(N, C, *)``."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class GroupNormAct(GroupNorm):
    """Group norm and an activation behind it, laid out as timm's norm+activation layers.

    The state dict holds ``weight`` and ``bias`` only, and ``.drop`` and ``.act`` are modules, so the layer stands in
    for timm's ``BatchNormAct2d`` or ``GroupNormAct``.

    Args:
        num_channels: Channels C.
        num_groups: Groups where ``group_size`` is None.
        group_size: Channels per group; None disables it.
        eps: Added to the variance inside the root.
        affine: Learn a scale and a shift per channel.
        act: Activation; None is an in-place ReLU, ``nn.Identity()`` disables it.
        drop: What stands between norm and activation (drop block); None is nothing.
        device: As in ``nn.GroupNorm``.
        dtype: As in ``nn.GroupNorm``.

    Raises:
        ConfigError: A number that does not divide the channels.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        group_size: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        act: nn.Module | None = None,
        drop: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, num_groups, group_size, eps, affine, device, dtype)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape ``(N, C, *)`` and activate it."""
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


def _native_is_slow(input: Tensor, num_groups: int) -> bool:
    """Whether torch's CPU kernel walks the channels of a group one by one, which costs up to a hundred times as much.

    It does so for channels-last input where a group is narrower than a vector register (measured with torch 2.11 on
    AVX-512: 16 channels in bf16, 8 in float32; backward always, forward below 1,024 positions).
    """
    return (
        input.ndim == 4
        and input.device.type == "cpu"
        and input.shape[1] // num_groups < 16
        and not input.is_contiguous()
        and input.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """Group norm with narrow groups in channels-last, from torch's batch-norm kernels, which are fast there.

    Sums over positions are taken per channel and combined over the channels of a group; what is left is per channel
    ``a * x + b`` forward and ``a * dy + b * x + c`` backward, as torch's own kernel computes it. The N x C numbers in
    between are numpy's: some twenty operations on a few hundred values, for which torch's dispatch takes longer than
    the kernels for the pictures. Not twice differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        N, C, H, W = input.shape
        if H * W >= 1024:  # torch's forward kernel is the fast one here
            output, mean, rstd = torch.native_group_norm(input, weight, bias, N, C, H * W, num_groups, eps)
            ctx.mean, ctx.rstd = mean.numpy()[..., None], rstd.numpy()[..., None]
        else:
            # Running statistics are given for their dtype alone: without them bf16 input has bf16 statistics.
            zero, one = _zero_and_one(C, torch.float32 if input.dtype in _HALF else input.dtype)
            statistics = [torch.batch_norm_update_stats(x, zero, one, 0.0) for x in _each(input)]
            means, variances = (_grouped([s[i] for s in statistics], num_groups) for i in (0, 1))
            share = num_groups / C
            ctx.mean = _sum_over_groups(means) * share
            variance = _sum_over_groups(variances + (means - ctx.mean) ** 2) * share
            ctx.rstd = 1 / np.sqrt(variance + eps)
            scale = ctx.rstd * _affine(weight, num_groups, 1)
            output = _scale_and_shift(input, scale, _affine(bias, num_groups, 0) - scale * ctx.mean)
        ctx.save_for_backward(input, weight)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        input, weight = ctx.saved_tensors
        mean, rstd = ctx.mean, ctx.rstd
        N, C, H, W = input.shape
        G = mean.shape[1]
        grad = grad.contiguous(memory_format=torch.channels_last)
        zero, one = _zero_and_one(C, torch.float32 if input.dtype in _HALF else input.dtype)
        backward = torch.ops.aten.native_batch_norm_backward
        sums = [
            backward(dy, x, None, zero, one, None, None, False, 0.0, (False, True, True))
            for dy, x in zip(_each(grad), _each(input), strict=True)
        ]
        dy_x, dy = (_grouped([s[i] for s in sums], G) for i in (1, 2))  # sums over positions
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            gamma, share = _affine(weight, G, 1), 1 / (C // G * H * W)
            group_dy_x, group_dy = _sum_over_groups(gamma * dy_x) * share, _sum_over_groups(gamma * dy) * share
            of_x = (group_dy * mean - group_dy_x) * (rstd * rstd * rstd)
            grad_input = _scale_and_shift(input, of_x, -of_x * mean - group_dy * rstd)
            grad_input.addcmul_(grad, _per_channel(rstd * gamma, N, C)[:, :, None, None].to(grad.dtype))
        if ctx.needs_input_grad[2]:
            grad_weight = torch.from_numpy(((dy_x - dy * mean) * rstd).sum(0)).view(C)
        if ctx.needs_input_grad[3]:
            grad_bias = torch.from_numpy(dy.sum(0)).view(C)
        return grad_input, None, grad_weight, grad_bias, None


_HALF = (torch.bfloat16, torch.float16)


@functools.cache
def _zero_and_one(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Statistics that change nothing."""
    return torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)


def _each(images: Tensor) -> tuple[Tensor, ...]:
    return (images,) if len(images) == 1 else torch.split(images, 1)


def _grouped(rows: Sequence[Tensor], num_groups: int) -> Array:
    """Rows of ``(C,)`` as ``(N, G, C / G)``."""
    array: Array = rows[0].numpy() if len(rows) == 1 else torch.stack(tuple(rows)).numpy()
    return array.reshape(len(rows), num_groups, -1)


def _affine(parameter: Tensor | None, num_groups: int, default: float) -> Array | float:
    """Scale or shift as ``(G, C / G)``; ``default`` where there is none."""
    return default if parameter is None else parameter.detach().numpy().reshape(num_groups, -1)


def _per_channel(values: Array, batch_size: int, channels: int) -> Tensor:
    """``(N, G, C / G)`` or ``(N, G, 1)`` as ``(N, C)``."""
    if values.size < batch_size * channels:
        values = values * np.ones((1, 1, channels // values.shape[1]), dtype=values.dtype)
    return torch.from_numpy(values).view(batch_size, channels)


def _sum_over_groups(values: Array) -> Array:
    return np.add.reduce(values, 2, keepdims=True)


def _scale_and_shift(input: Tensor, scale: Array, shift: Array) -> Tensor:
    """``input * scale + shift`` in float32, by the batch-norm kernel.

    Args:
        input: Shape ``(N, C, H, W)``.
        scale: Shape ``(N, G, C / G)`` or ``(N, G, 1)``.
        shift: As ``scale``.

    Returns:
        Shape, dtype and memory format of ``input``.
    """
    N, C = input.shape[:2]
    scales, shifts = _per_channel(scale, N, C), _per_channel(shift, N, C)
    zero, one = _zero_and_one(C, scales.dtype)
    if N == 1:
        return torch.native_batch_norm(input, scales[0], shifts[0], zero, one, False, 0.0, 0.0)[0]
    output, unused = torch.empty_like(input), (torch.empty(0), torch.empty(0))
    for x, scale_C, shift_C, y in zip(_each(input), scales, shifts, _each(output), strict=True):
        torch.native_batch_norm(x, scale_C, shift_C, zero, one, False, 0.0, 0.0, out=(y, *unused))
    return output
