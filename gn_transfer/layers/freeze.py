"""Freeze the batch norms of any model, so that ``model.train()`` does not undo it."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gn_transfer.layers.batch_norm import FrozenBatchNorm2d
from gn_transfer.layers.convert import convert_norm, is_norm
from gn_transfer.layers.std_conv import StdConv2d


def freeze_batch_norm(model: nn.Module, *, affine: bool = True, skip: Collection[str] = ()) -> nn.Module:
    """Replace the batch norms of a model by :class:`FrozenBatchNorm2d`, in place; other norms stay.

    Evaluation mode is undone by the next ``model.train()``, and parameters that do not learn do not keep running
    statistics from moving. A frozen batch norm computes the same function in both modes, at every batch size.

    Args:
        model: Any model with batch norms over images, of torch or timm.
        affine: Whether scale and shift still learn.
        skip: Names of layers that stay as they are, with all below them.

    Returns:
        The model, or what stands in its place where it is itself a batch norm.

    Raises:
        ConfigError: A name in ``skip`` that the model lacks.

    Example:
        >>> model = freeze_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), affine=False)
        >>> type(model[1]).__name__, model[1].weight.requires_grad
        ('FrozenBatchNorm2d', False)
    """
    others = {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, StdConv2d) or (is_norm(layer) and not isinstance(layer, _BatchNorm))
    }
    before = {id(layer) for layer in model.modules()}
    model = convert_norm(model, "bn_frozen", skip=others | set(skip))
    if not affine:
        for layer in model.modules():
            if isinstance(layer, FrozenBatchNorm2d) and id(layer) not in before:
                layer.requires_grad_(False)
    return model
