"""Closed-form affine parameters for group norms that take the place of batch norms with known statistics."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gn_transfer.config import ConfigError
from gn_transfer.layers.batch_norm import inputs_of

_FEWEST_IMAGES = 8  # of fewer the fit says nothing about other images
_LOST = 0.1  # below this share of the variance a layer is as good as lost


@dataclass(frozen=True)
class BatchNormFunction:
    """What a batch norm computes in evaluation: ``scale * x + shift``, each of shape ``(C,)``, float32."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, layer: nn.Module) -> BatchNormFunction | None:
        """Read it off a layer.

        Args:
            layer: A batch norm of torch, timm or torchvision, frozen or not.

        Returns:
            Copies; None for a layer without running statistics.

        Example:
            >>> BatchNormFunction.of(nn.BatchNorm2d(1, eps=0.0)).scale
            tensor([1.])
        """
        mean, variance = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
        if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
            return None
        weight, bias = (getattr(layer, name, None) for name in ("weight", "bias"))
        scale = (variance.detach().float() + float(getattr(layer, "eps", 1e-5))).rsqrt()
        if isinstance(weight, Tensor):
            scale = scale * weight.detach().float()
        shift = -mean.detach().float() * scale
        return cls(scale, shift + bias.detach().float() if isinstance(bias, Tensor) else shift)

    def __call__(self, input: Tensor) -> Tensor:
        """Compute it for ``input`` of shape ``(N, C, *)``."""
        shape = (1, -1) + (1,) * (input.ndim - 2)
        return input.float() * self.scale.view(shape) + self.shift.view(shape)


def calibrate(
    module: nn.Module, originals: Mapping[nn.GroupNorm, BatchNormFunction], batches: Iterable[Any]
) -> dict[nn.GroupNorm, float]:
    r"""Set the affine of group norms so that a model reproduces its original with batch norms as well as it can.

    .. math:: \gamma_c = \mathrm{Cov}(y_c, z_c) / \mathrm{Var}(z_c), \qquad \beta_c = E[y_c] - \gamma_c E[z_c]

    least squares over images and positions, where ``y`` is what the batch norm gave in the original model and ``z``
    the group-normalized input in the converted model so far. Both models run at once: every batch is doubled, its first
    half goes the way of the original, its second that of the converted model, and a layer is set from all that it has
    seen before its output goes on, so that later layers correct what earlier ones lost. One batch solves layer by
    layer exactly; of several, the first meet layers that are not settled yet.

    Where a layer's input has not one row per image (the region heads of a detection model) the rows of the two halves
    do not correspond; there ``y`` is what the batch norm gives for the converted model's own input.

    Args:
        module: The converted model, its group norms in place; of it only their affine changes.
        originals: These group norms, each with what the batch norm in its place computed.
        batches: Inputs of ``module``: tensors ``(N, C, H, W)``, or lists of images ``(C, H, W)`` as detection models
            take them; either may come with targets behind it, as data loaders give them.

    Returns:
        Share of the variance of ``y``, summed over channels, that each layer reproduces, at most 1; layers that no
        batch has reached (auxiliary heads) are left out.

    Raises:
        ConfigError: No batch, one that the model cannot compute, or activations that are not finite.
    """
    modes = {layer: layer.training for layer in module.modules()}
    fits = {layer: _Fit(layer, original) for layer, original in originals.items()}
    module.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                images = inputs_of(batch)
                for fit in fits.values():
                    fit.images = len(images)
                    fit.seen += len(images)
                doubled = torch.cat([images] * 2) if isinstance(images, Tensor) else [*images, *images]
                try:
                    module(doubled)
                except (RuntimeError, TypeError, ValueError) as error:
                    shape = f"shape {tuple(images.shape)}, {images.dtype}" if isinstance(images, Tensor) else "a list"
                    raise ConfigError(
                        f"the model cannot compute a batch of the calibration ({shape}): {error}. Give batches of the "
                        "model's input, preprocessed as in evaluation."
                    ) from error
    finally:
        for norm in fits:
            del norm.forward
        for layer, training in modes.items():
            layer.training = training
    r2 = {layer: fit.r2 for layer, fit in fits.items() if fit.r2 is not None}
    if not r2:
        raise ConfigError("the calibration reached no norm; give a few hundred images as batches of the model's input.")
    if bad := [value for value in r2.values() if value != value]:
        raise ConfigError(f"{len(bad)} norms met activations that are not finite; calibrate on other images.")
    if (seen := sum(fit.seen for fit in fits.values()) // len(fits)) < _FEWEST_IMAGES:
        warnings.warn(
            f"calibrated on {seen} images, which fits them and not the data; give a few hundred.", stacklevel=3
        )
    if lost := sum(value < _LOST for value in r2.values()):
        warnings.warn(
            f"{lost} of {len(r2)} calibrated norms reproduce less than {_LOST:.0%} of their batch norm's variance. "
            "Were its running statistics ever trained? An untrained model needs no calibration.",
            stacklevel=3,
        )
    return r2


class _Fit:
    """Stands in for a group norm's forward: computes both models' outputs and keeps the affine at its optimum.

    The sums over images and positions that the optimum needs follow from the moments of each channel in each image, so
    that no further activations are held.

    Args:
        layer: The group norm.
        original: The batch norm in its place.
    """

    def __init__(self, layer: nn.GroupNorm, original: BatchNormFunction) -> None:
        self.layer, self.original = layer, original
        self.plain_forward = layer.forward
        self.images = self.seen = 0
        self.r2: float | None = None
        self._sums: Tensor | None = None
        layer.forward = self.forward  # type: ignore[method-assign]

    def forward(self, input: Tensor) -> Tensor:
        """Compute both halves; ``input`` has shape ``(2 * N, C, *)``, or any number of rows (see :func:`calibrate`)."""
        rows = self.images if len(input) == 2 * self.images else 0
        theirs, ours = input[:rows], input[rows:]
        self._set(theirs if rows else ours, ours)
        output = self.plain_forward(ours)
        if not rows:
            return output
        target = self.original(theirs)
        for part in ("drop", "act"):
            target = getattr(self.layer, part, nn.Identity())(target)
        return torch.cat([target.to(output.dtype), output])

    def _set(self, theirs: Tensor, ours: Tensor) -> None:
        moments = _moments(theirs.float(), ours.float())
        sums = _affine_sums(moments, ours[0, 0].numel(), self.original, self.layer.num_groups, self.layer.eps)
        self._sums = sums if self._sums is None else self._sums + sums
        gamma, beta, self.r2 = solve_affine(*self._sums)
        self.layer.weight.copy_(gamma)
        self.layer.bias.copy_(beta)


class _Moments(NamedTuple):
    """Of each channel of each image, in both models; each float64 ``(N, C)``."""

    their_mean: Tensor
    their_var: Tensor
    our_mean: Tensor
    our_var: Tensor
    cov: Tensor


def _moments(theirs: Tensor, ours: Tensor) -> _Moments:
    over = tuple(range(2, ours.ndim))
    their_var, their_mean = torch.var_mean(theirs, over, correction=0)
    if theirs is ours:
        return _Moments(*(value.double() for value in (their_mean, their_var, their_mean, their_var, their_var)))
    our_var, our_mean = torch.var_mean(ours, over, correction=0)
    centred = theirs - their_mean.view(*their_mean.shape, *(1 for _ in over))
    cov = (centred * ours).mean(over)
    return _Moments(*(value.double() for value in (their_mean, their_var, our_mean, our_var, cov)))


def _affine_sums(moments: _Moments, positions: int, original: BatchNormFunction, groups: int, eps: float) -> Tensor:
    """Sum up what :func:`solve_affine` takes, shape ``(6, C)``, for group norm with a number of groups."""
    their_mean, their_var, our_mean, our_var, cov = moments
    N, C = our_mean.shape
    group_mean = our_mean.view(N, groups, -1).mean(2, keepdim=True)
    group_var = (our_var.view(N, groups, -1) + (our_mean.view(N, groups, -1) - group_mean) ** 2).mean(2, keepdim=True)
    rstd = (group_var + eps).rsqrt()
    z_mean = ((our_mean.view(N, groups, -1) - group_mean) * rstd).view(N, C)
    per_channel = rstd.expand(N, groups, C // groups).reshape(N, C)
    scale = original.scale.double()
    y_mean = their_mean * scale + original.shift.double()
    means = [
        torch.ones_like(our_mean),
        y_mean,
        z_mean,
        their_var * scale**2 + y_mean**2,
        our_var * per_channel**2 + z_mean**2,
        cov * scale * per_channel + y_mean * z_mean,
    ]
    return torch.stack(means).sum(1) * positions


def solve_affine(
    count: Tensor, y: Tensor, z: Tensor, yy: Tensor, zz: Tensor, yz: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Least squares of ``y = gamma * z + beta`` per channel, from sums.

    Args:
        count: Number of values, shape ``(C,)``, as the others.
        y: Sum of the targets.
        z: Sum of the inputs.
        yy: Sum of squares of the targets.
        zz: Sum of squares of the inputs.
        yz: Sum of the products.

    Returns:
        gamma, beta (0 and the mean where an input does not vary), and the share of the targets' variance, summed
        over channels, that they explain.

    Example:
        y = 2 z + 1 at z = 0, 1, 2:

        >>> sums = torch.tensor([[3.0], [9.0], [3.0], [35.0], [5.0], [13.0]], dtype=torch.float64)
        >>> gamma, beta, r2 = solve_affine(*sums)
        >>> round(gamma.item(), 6), round(beta.item(), 6), round(r2, 6)
        (2.0, 1.0, 1.0)
    """
    mean_y, mean_z = y / count, z / count
    var_y, var_z, cov = yy / count - mean_y**2, zz / count - mean_z**2, yz / count - mean_y * mean_z
    gamma = torch.where(var_z > 1e-12, cov / var_z, 0.0)
    r2 = (gamma * cov).sum() / var_y.sum()
    return gamma, mean_y - gamma * mean_z, float(r2)
