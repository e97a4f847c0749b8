"""Batch norm that never looks at the batch (frozen statistics), and batch norms with an activation behind them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gn_transfer.config import ConfigError


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


class WithActivation(nn.Module):
    """What timm's norm+activation layers add to a norm: ``.drop`` and ``.act``. Stands before the norm in the MRO.

    Args:
        *args: Arguments of the norm.
        act: Activation; None is an in-place ReLU, ``nn.Identity()`` disables it.
        drop: What stands between norm and activation (drop block); None is nothing.
        **kwargs: Arguments of the norm.
    """

    def __init__(self, *args: Any, act: nn.Module | None = None, drop: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape ``(N, C, *)`` and activate it."""
        output: Tensor = self.act(self.drop(super().forward(input)))  # the norm behind it in the MRO
        return output


class BatchNormAct2d(WithActivation, nn.BatchNorm2d):
    """Batch norm and an activation behind it, laid out as timm's class of this name."""


class FrozenBatchNormAct2d(WithActivation, FrozenBatchNorm2d):
    """:class:`FrozenBatchNorm2d` and an activation behind it."""


class SyncBatchNormAct(WithActivation, nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` (CUDA only) and an activation behind it."""


def corrected_momentum(batch_size: int, momentum: float = 0.1, reference: int = 16) -> float:
    r"""Momentum with which small micro-batches forget as fast, per image, as batches of ``reference`` do.

    .. math:: 1 - (1 - m)^{b / r}

    Args:
        batch_size: Images per forward pass, b.
        momentum: Weight of the new batch at ``reference`` images, m in (0, 1).
        reference: Images per forward pass that ``momentum`` is meant for, r.

    Returns:
        Weight of the new micro-batch in the running statistics.

    Example:
        >>> round(corrected_momentum(1), 5), corrected_momentum(16)
        (0.00656, 0.1)
    """
    return momentum if batch_size == reference else 1.0 - (1.0 - momentum) ** (batch_size / reference)


def reestimate_statistics(
    model: nn.Module, batches: Iterable[Any], *, layers: Collection[nn.Module] | None = None
) -> int:
    r"""Set running means and variances of batch norms to those of whole images, pooled over all batches.

    .. math:: \mu = E[x], \qquad \sigma^2 = E[x^2] - E[x]^2

    (unbiased, as torch keeps it) over all images and positions, each batch normalized by its own statistics as in
    training ("precise BN", Wu and Johnson 2021, arXiv:2105.07576). The moments are pooled, not the variances: the
    variance within a batch of one image lacks what images differ by. Frozen batch norms are treated as if they
    were not frozen. Weights, modes and ``num_batches_tracked`` stay.

    Args:
        model: A model with batch norms of torch or of this package.
        batches: Inputs of the model, shape ``(B, C, H, W)``, of the size that it trains with; also with targets behind
            them, as data loaders give them.
        layers: The batch norms to set; None sets all of the model. The others work as in evaluation.

    Returns:
        Number of layers that were set.

    Raises:
        ConfigError: No batch.
    """
    every = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    moments = [_Moments(layer) for layer in every if layers is None or layer in layers]
    modes = {layer: layer.training for layer in model.modules()}
    model.eval()  # what is neither frozen nor a batch norm (dropout) is as in evaluation
    try:
        with torch.no_grad():
            for batch in batches:
                model(inputs_of(batch))
    finally:
        for each in moments:
            del each.layer.forward
        for module, training in modes.items():
            module.training = training
    if any(each.count == 0 for each in moments):
        raise ConfigError("statistics cannot be re-estimated: no image reached all batch norms.")
    for each in moments:
        each.write()
    return len(moments)


def batch_norms(model: nn.Module, *, frozen: bool) -> list[_BatchNorm]:
    """List the batch norms of a model: those with frozen statistics, or the others."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and isinstance(layer, FrozenBatchNorm2d) == frozen
    ]


def inputs_of(batch: Any) -> Any:
    """Take the inputs from a data loader's ``(inputs, targets)``; a list of images is inputs itself."""
    if isinstance(batch, list | tuple) and batch:
        first = batch[0]
        if isinstance(first, list | tuple) or (isinstance(first, Tensor) and first.ndim == 4):
            return first
    return batch


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms normalize by the batch at hand, and leave their running statistics alone.

    What is evaluated so is the function that was trained; evaluated with running statistics it may be another. Frozen
    batch norms stay as they are.

    Args:
        model: A model with batch norms of torch, timm or this package; its mode is restored at the end.

    Raises:
        ConfigError: It has none, or frozen ones only.
    """
    layers = batch_norms(model, frozen=False)
    if not layers:
        raise ConfigError("the model has no batch norm that looks at its batch, so there are no batch statistics.")
    before = [(layer, layer.training, layer.track_running_stats) for layer in layers]
    for layer in layers:
        layer.training, layer.track_running_stats = True, False  # torch then passes no running statistics on
    try:
        yield
    finally:
        for layer, training, tracked in before:
            layer.training, layer.track_running_stats = training, tracked


def normalize_by_batch(layer: _BatchNorm, input: Tensor) -> Tensor:
    """Do what a batch norm does in training, whatever its mode, frozen or not; its running statistics stay.

    Args:
        layer: The batch norm, also with timm's activation inside.
        input: Shape ``(N, C, *)``.

    Returns:
        Normalized and activated, of the same shape.
    """
    output = F.batch_norm(input, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
    for part in ("drop", "act"):
        output = getattr(layer, part, nn.Identity())(output)
    return output


class _Moments:
    """Stands in for a batch norm's forward: normalizes by the batch, and gathers E[x] and E[x^2].

    Args:
        layer: The batch norm.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.count = 0
        self.sums = torch.zeros(())
        layer.forward = self.forward  # type: ignore[method-assign]

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape ``(N, C, *)`` by its own statistics, and activate it as the layer does."""
        values = input.transpose(0, 1).flatten(1).double()
        self.count += values.shape[1]
        self.sums = self.sums + torch.stack([values.sum(1), values.square().sum(1)])
        return normalize_by_batch(self.layer, input)

    def write(self) -> None:
        """Set the layer's running statistics."""
        mean, square = self.sums / self.count
        variance = (square - mean.square()).clamp_min(0.0) * (self.count / max(1, self.count - 1))
        assert self.layer.running_mean is not None
        assert self.layer.running_var is not None
        self.layer.running_mean.copy_(mean)
        self.layer.running_var.copy_(variance)


def cuda_available() -> bool:
    """Say whether ``nn.SyncBatchNorm`` can run here; a function of its own so that a test can pretend."""
    return torch.cuda.is_available()
