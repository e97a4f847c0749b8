"""Group norm by group count or by channels per group, alone and with an activation; LN and IN are its limits."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_transfer.config import ConfigError
from gn_transfer.layers.batch_norm import WithActivation


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


def fitting_group_count(channels: int, at_most: int = 32) -> int:
    """Choose the number of groups of a layer whose channels ``at_most`` may not divide.

    The largest divisor of the channels that is at most ``at_most`` and leaves two channels or more in a group: with
    one, group norm would be instance norm.

    Args:
        channels: Channels of the layer.
        at_most: Groups of a layer that is wide enough.

    Returns:
        Number of groups, a divisor of ``channels``.

    Example:
        >>> [fitting_group_count(channels) for channels in (64, 320, 144, 24, 16, 7)]
        [32, 32, 24, 12, 8, 1]
    """
    return max(
        groups for groups in range(1, at_most + 1) if channels % groups == 0 and (channels // groups > 1 or groups == 1)
    )


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    r"""Normalize groups of channels of each image by their own mean and variance.

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
        Shape and dtype of ``input``; on a CPU its memory format, too.

    Raises:
        ConfigError: Groups of a single value, whose output would be the bias whatever the input.
    """
    if math.prod(input.shape[1:]) == num_groups:
        raise ConfigError(
            f"{num_groups} groups over {tuple(input.shape[1:])} hold one value each, so the output would not depend on "
            "the input; use larger images (data.img_size), or fewer groups (model.num_groups, model.norm)."
        )
    half = input.dtype in (torch.bfloat16, torch.float16)
    if half:  # half-precision parameters would make half-precision statistics
        weight, bias = (p if p is None else p.float() for p in (weight, bias))
        if input.device.type != "cpu":  # and so would half-precision input there
            return F.group_norm(input.float(), num_groups, weight, bias, eps).to(input.dtype)
    affine_trains = any(p is not None and p.requires_grad for p in (weight, bias))
    if _needs_own_kernel(input, num_groups, affine_trains=affine_trains):
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


class GroupNormAct(WithActivation, GroupNorm):
    """Group norm and an activation behind it, laid out as timm's norm+activation layers.

    The state dict holds ``weight`` and ``bias`` only, and ``.drop`` and ``.act`` are modules, so the layer stands in
    for timm's ``BatchNormAct2d`` or ``GroupNormAct``.
    """


def _needs_own_kernel(input: Tensor, num_groups: int, *, affine_trains: bool) -> bool:
    """Whether torch's CPU kernel for channels-last input is to be avoided.

    It walks the channels of a group one by one where the group is narrower than a vector register, which costs up to a
    hundred times as much (measured with torch 2.11 on AVX-512: 16 channels in bf16, 8 in float32; backward always,
    forward below 1,024 positions). And its backward crashes where the affine has a gradient and the input has none, as
    behind a frozen stem (seen with torch 2.11).
    """
    narrow = input.shape[1] // num_groups < 16
    crashes = affine_trains and not input.requires_grad and torch.is_grad_enabled()
    return (
        (narrow or crashes)
        and input.ndim == 4
        and input.device.type == "cpu"
        and not input.is_contiguous()  # a batch of no images is
        and input.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """Group norm in channels-last, where torch's own kernel is to be avoided.

    Small maps are normalized in NCHW: two or three transposes and torch's fast kernel. Large ones take torch's
    channels-last kernel forward, which is fast from 1,024 positions, and its batch-norm kernels backward. That forward
    takes the variance as E[x^2] - E[x]^2, as torch does there: at a mean of 1,000 standard deviations in float32 it is
    wrong by a third. Where a graph of the gradient is wanted (``create_graph``), torch's operations make it.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        N, C, H, W = input.shape
        fast = input if H * W >= 1024 else input.contiguous()
        output, mean, rstd = torch.native_group_norm(fast, weight, bias, N, C, H * W, num_groups, eps)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.num_groups, ctx.eps = num_groups, eps
        return output.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        N, C, H, W = input.shape
        mask = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        if torch.is_grad_enabled():
            output = F.group_norm(input, ctx.num_groups, weight, bias, ctx.eps)
            wanted = [tensor for tensor, needed in zip((input, weight, bias), mask, strict=True) if needed]
            found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
            grad_input, grad_weight, grad_bias = (next(found) if needed else None for needed in mask)
        elif C * H * W >= 400_000:
            gradients = _backward_by_channel_sums(
                grad.contiguous(memory_format=torch.channels_last), input, weight, mean, rstd
            )
            grad_input, grad_weight, grad_bias = (g if m else None for g, m in zip(gradients, mask, strict=True))
        else:
            grad_input, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
                grad.contiguous(), input.contiguous(), mean, rstd, weight, N, C, H * W, mean.shape[1], mask
            )
            grad_input = grad_input.contiguous(memory_format=torch.channels_last) if mask[0] else None
        return grad_input, None, grad_weight, grad_bias, None


def _backward_by_channel_sums(
    grad: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of group norm by torch's batch-norm kernels, image by image.

    Sums over positions are taken per channel and combined over the channels of a group; what is left is
    ``a * dy + b * x + c`` with numbers per image and channel, as torch's own kernel computes it.

    Args:
        grad: Of the output, shape ``(N, C, H, W)``, channels-last.
        input: Of the layer, as ``grad``.
        weight: gamma, shape ``(C,)``; None is 1.
        mean: Of the groups, shape ``(N, G)``.
        rstd: As ``mean``.

    Returns:
        Gradients of input, weight and bias.
    """
    N, C, H, W = input.shape
    G = mean.shape[1]
    zero, one = torch.zeros(C, dtype=mean.dtype), torch.ones(C, dtype=mean.dtype)
    sums = [
        torch.ops.aten.native_batch_norm_backward(dy, x, None, zero, one, None, None, False, 0.0, (False, True, True))
        for dy, x in zip(torch.split(grad, 1), torch.split(input, 1), strict=True)
    ]
    dy_x, dy = (torch.stack([s[i] for s in sums]).view(N, G, -1) for i in (1, 2))  # sums over positions
    gamma = one.view(G, -1) if weight is None else weight.view(G, -1)
    mean, rstd = mean[..., None], rstd[..., None]
    group_dy_x, group_dy = ((gamma * s).sum(2, keepdim=True) / (C // G * H * W) for s in (dy_x, dy))
    of_x = (group_dy * mean - group_dy_x) * rstd**3
    of_one = -of_x * mean - group_dy * rstd
    of_x, of_one, of_dy = (t.expand(N, G, C // G).reshape(N, C) for t in (of_x, of_one, rstd * gamma))

    unused = torch.empty(0, dtype=mean.dtype)
    grad_input = torch.empty_like(input)
    for n in range(N):  # in evaluation batch norm computes x * weight + bias here, in float32
        out = (grad_input[n : n + 1], unused, unused.clone())
        torch.native_batch_norm(input[n : n + 1], of_x[n], of_one[n], zero, one, False, 0.0, 0.0, out=out)
    grad_input.addcmul_(grad, of_dy[:, :, None, None].to(grad.dtype))
    grad_weight = ((dy_x - dy * mean) * rstd).sum(0).view(C)
    return grad_input, grad_weight, dy.sum(0).view(C)
