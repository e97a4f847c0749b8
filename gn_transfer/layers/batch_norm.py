"""Batch norm that never looks at the batch (frozen statistics), and batch norms with an activation behind them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.BatchNorm2d):
    r"""Batch norm that uses its running statistics in training too; the affine still learns.

    .. math:: y = \gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta

    with the stored mean and variance, which no forward pass changes. The state dict is that of ``nn.BatchNorm2d``.
    (torchvision's class of this name also freezes the affine, and is no ``nn.BatchNorm2d``.) Freeze the affine by
    ``requires_grad_(False)``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape ``(N, C, H, W)`` by the stored statistics."""
        self._check_input_dim(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class _Act(nn.Module):
    """What timm's norm+activation layers add to a norm: ``.drop`` and ``.act``; stands before the norm in the MRO."""

    drop: nn.Module
    act: nn.Module

    def add_act(self, act: nn.Module | None, drop: nn.Module | None) -> None:
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(input)))  # the norm behind it in the MRO
        return output


class BatchNormAct2d(_Act, nn.BatchNorm2d):
    """Batch norm and an activation behind it, laid out as timm's class of this name.

    Args:
        num_features: Channels C.
        eps: Added to the variance inside the root.
        momentum: Weight of the new batch in the running statistics.
        act: Activation; None is an in-place ReLU, ``nn.Identity()`` disables it.
        drop: What stands between norm and activation; None is nothing.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        act: nn.Module | None = None,
        drop: nn.Module | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.add_act(act, drop)


class FrozenBatchNormAct2d(_Act, FrozenBatchNorm2d):
    """:class:`FrozenBatchNorm2d` and an activation behind it; arguments as :class:`BatchNormAct2d`."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        act: nn.Module | None = None,
        drop: nn.Module | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.add_act(act, drop)


class SyncBatchNormAct(_Act, nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` (CUDA only) and an activation behind it; arguments as :class:`BatchNormAct2d`."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        act: nn.Module | None = None,
        drop: nn.Module | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.add_act(act, drop)


def cuda_available() -> bool:
    """Say whether ``nn.SyncBatchNorm`` can run here; a function of its own so that a test can pretend."""
    return torch.cuda.is_available()
