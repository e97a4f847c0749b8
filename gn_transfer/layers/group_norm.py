"""Group norm by group count or by channels per group, alone and with an activation; LN and IN are its limits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_transfer.config import ConfigError


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
