"""Replace the norm layers of any torch model, and its convolutions where the norm wants standardized ones."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gn_transfer.config import NORMS, ConfigError, Norm, did_you_mean
from gn_transfer.layers.batch_norm import (
    BatchNormAct2d,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    SyncBatchNormAct,
    cuda_available,
)
from gn_transfer.layers.calibrate import BatchNormFunction, calibrate
from gn_transfer.layers.conv import is_depthwise
from gn_transfer.layers.group_norm import GroupNorm, GroupNormAct, fitting_group_count, group_count
from gn_transfer.layers.same_padding import Conv2dSame, StdConv2dSame
from gn_transfer.layers.std_conv import StdConv2d, conv_geometry

GroupsOf: TypeAlias = Callable[[nn.Module, int, str], int]
"""Function from (old layer, channels, name) to the number of groups of the layer in its place."""

DEFAULT_GROUPS = 32
"""Groups of a group norm where nothing else is said (Wu and He 2018), or less: see
:func:`gn_transfer.layers.group_norm.fitting_group_count`."""

CALIBRATED_GROUPS = 4
"""The same for a calibrated conversion: fewer groups lose less of what a batch norm let through."""


def default_groups(*, calibrated: bool) -> int:
    """Number of groups where the user names none."""
    return CALIBRATED_GROUPS if calibrated else DEFAULT_GROUPS


@dataclass(frozen=True)
class Replacement:
    """One layer that :func:`convert_norm` replaced, for the transfer report."""

    name: str
    """Name of the layer as in ``named_modules``."""
    before: str
    """Class before."""
    after: str
    """Class after."""
    channels: int
    """Channels that are normalized; output channels of a convolution."""
    groups: int | None = None
    """Groups of a group norm; None for the others."""
    reinitialized: bool = False
    """A convolution whose zero weights cannot be standardized and were initialized anew."""
    r2: float | None = None
    """Share of the batch norm's output variance that a calibrated layer reproduces, at most 1."""


def uses_weight_standardization(norm: Norm) -> bool:
    """Say whether a norm comes with standardized convolutions."""
    return norm in ("gn_ws", "bn_ws")


def convert_norm(
    module: nn.Module,
    norm: Norm,
    *,
    num_groups: int | Mapping[str, int] | None = None,
    group_size: int | None = None,
    depthwise: bool = False,
    skip: Collection[str] = (),
    calibration: Iterable[Any] | None = None,
    report: list[Replacement] | None = None,
) -> nn.Module:
    """Replace the norms of a model, in place.

    Replaced are ``nn.BatchNorm2d``, ``nn.SyncBatchNorm``, ``nn.GroupNorm``, ``nn.InstanceNorm2d``, the frozen batch
    norms of torchvision and timm, each also with timm's activation inside, and ``nn.Conv2d`` for :class:`StdConv2d` or
    back. A layer that already is what is wanted stays. Weight standardization takes the convolutions that a norm can
    follow: those without bias, and those with one that a norm follows at once (VGG). It leaves those of
    squeeze-and-excitation and of a detector's heads, and depthwise ones, whose filters have a handful of weights.

    Parameters and buffers of equal meaning are carried over as the same objects: ``weight`` and ``bias`` always (from
    BN to GN they fit in shape, not in function), running statistics among batch norms, eps always. With ``none`` the
    activation of a norm+activation layer stays; convolutions without bias stay without. A convolution of zeros (timm's
    zero-initialized last convolution of a pre-activation block) under weight standardization would have its gradient
    multiplied by ``1 / sqrt(eps)``: it is initialized anew, He normal over the fan-out.

    A trained batch-norm model whose affine is merely carried over to group norms is far from what it was. With
    ``calibration`` images the affine of each group norm is set in closed form to reproduce the original's
    activations as well as it can, without gradient steps; see :func:`gn_transfer.layers.calibrate.calibrate`.

    Args:
        module: Any model; changed in place, unless it is itself a layer to replace.
        norm: The normalization.
        num_groups: Groups of ``gn`` and ``gn_ws`` where ``group_size`` is None, or those of each layer by name. None
            takes 32, or 4 with a calibration, and in narrow layers the largest divisor of the channels below that
            leaves two channels or more in a group; a group norm keeps the number that it has.
        group_size: Channels per group of ``gn`` and ``gn_ws``; None disables it.
        depthwise: Standardize depthwise convolutions, too.
        skip: Names (as in ``named_modules``) of layers to leave alone with all that is below them: the head.
        calibration: A few hundred training images, preprocessed as in evaluation, as batches of the model's input
            (tensors, lists of images for a detection model, or a data loader); None carries the affine over as it is.
        report: A list to which the replacements are appended.

    Returns:
        ``module``, or what stands in its place where it is itself such a layer.

    Raises:
        ConfigError: A number of groups that does not divide a layer's channels, ``bn_sync`` without CUDA, an unknown
            norm, a name in ``skip`` that the model lacks, a convolution that cannot be (un-)standardized, or a
            calibration of anything but batch norms with statistics towards ``gn``, ``ln`` or ``in``.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"convert_norm takes a model (nn.Module), not {type(module).__name__}; build it first.")
    if norm not in NORMS:
        raise ConfigError(f"model.norm={norm!r} is not a norm; {did_you_mean(norm, NORMS)}.")
    if norm == "bn_sync" and not cuda_available():
        raise ConfigError("model.norm=bn_sync needs CUDA and none was found; use bn on one device.")
    layers = dict(module.named_modules(remove_duplicate=False))
    skip = {skip} if isinstance(skip, str) else set(skip)
    if missing := sorted(skip - set(layers), key=str):
        last = [name for name in layers if name.rpartition(".")[2] == str(missing[0]).rpartition(".")[2]]
        near = last or difflib.get_close_matches(str(missing[0]), layers, n=3)
        guess = f"; did you mean {' or '.join(near[:3])}?" if near else "; see model.named_modules() for its layers."
        raise ConfigError(f"skip names {missing[0]}, which the model lacks{guess}")

    if isinstance(num_groups, int) and group_size is not None:
        raise ConfigError(f"num_groups={num_groups} and group_size={group_size} exclude each other; give one of them.")
    if calibration is not None and norm not in ("gn", "ln", "in"):
        raise ConfigError(
            f"calibration leads from batch norm to gn, ln or in, not to norm={norm}; leave it out, or choose gn."
        )

    make = _norm_maker(norm, _groups_of(norm, num_groups, group_size, calibrated=calibration is not None))
    standardized = standardizable(layers, depthwise=depthwise) if uses_weight_standardization(norm) else set()
    originals: dict[nn.GroupNorm, BatchNormFunction] = {}
    replacements: list[Replacement] = []
    # All new layers are made before the first one is put in place: an error leaves the model as it was.
    new_layers: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        if layer in new_layers or any(name == s or name.startswith(f"{s}.") for s in skip):
            continue
        label = name or type(layer).__name__
        if (channels := _norm_channels(layer)) is not None:
            new = make(layer, channels, label)
        elif isinstance(layer, nn.Conv2d):
            channels, new = layer.out_channels, _convert_conv(layer, label, layer in standardized)
        else:
            continue
        new_layers[layer] = new
        if calibration is not None and isinstance(new, nn.GroupNorm) and (original := BatchNormFunction.of(layer)):
            originals[new] = original
        if new is not layer:
            zero = isinstance(new, StdConv2d) and not new.weight.is_meta and not bool(new.weight.any())
            groups = new.num_groups if isinstance(new, nn.GroupNorm) else None
            replacements.append(Replacement(name, type(layer).__name__, type(new).__name__, channels, groups, zero))

    kept = [
        name
        for name, layer in layers.items()
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm3d)
        and not any(name == s or name.startswith(f"{s}.") for s in skip)
    ]
    if kept and norm not in ("bn", "bn_ws"):
        warnings.warn(
            f"norms over sequences or volumes stay as they are and look at the batch ({len(kept)}): "
            f"{', '.join(kept[:3])}{', ...' if len(kept) > 3 else ''}. Only norms over images are replaced.",
            stacklevel=2,
        )
    if not replacements and not any(is_norm(layer) for layer in new_layers):
        warnings.warn(
            f"the model has no batch norm, group norm or instance norm over images, so norm={norm} replaces nothing.",
            stacklevel=2,
        )
    if calibration is not None and not originals:
        raise ConfigError("calibration: the model has no batch norm with running statistics to reproduce.")

    for replacement in replacements:
        if replacement.reinitialized:
            nn.init.kaiming_normal_(new_layers[layers[replacement.name]].weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
    for name, layer in layers.items():
        if name and new_layers.get(layer, layer) is not layer:
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, new_layers[layer])
    converted = new_layers.get(module, module)
    if calibration is not None:
        affine = {parameter: parameter.detach().clone() for norm in originals for parameter in norm.parameters()}
        try:
            r2: dict[nn.Module, float] = dict(calibrate(converted, originals, calibration).items())
        except BaseException:  # an interruption as well
            with torch.no_grad():
                for parameter, value in affine.items():
                    parameter.copy_(value)
            for name, layer in layers.items():
                if name and layer in new_layers:
                    parent, _, child = name.rpartition(".")
                    setattr(module.get_submodule(parent), child, layer)
            raise
        replacements = [replace(found, r2=r2.get(new_layers[layers[found.name]])) for found in replacements]
    if report is not None:
        report.extend(replacements)
    return converted


def _norm_channels(layer: nn.Module) -> int | None:
    """Channels that a norm layer normalizes; None for a layer that is none of the norms that we replace."""
    if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm | nn.InstanceNorm2d):
        return layer.num_features
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    # torchvision's FrozenBatchNorm2d and timm's FrozenBatchNormAct2d are plain modules that hold four buffers.
    if dict(layer.named_buffers(recurse=False)).keys() >= {"weight", "bias", "running_mean", "running_var"}:
        return len(layer.get_buffer("running_mean"))
    return None


def standardizable(layers: Mapping[str, nn.Module], *, depthwise: bool = False) -> set[nn.Module]:
    """Find the convolutions that weight standardization is meant for; see :func:`convert_norm`.

    Args:
        layers: The modules of a model by name, in order.
        depthwise: Take depthwise convolutions, too.

    Returns:
        Those that are to be standardized, or are already.
    """
    leaves = [layer for layer in layers.values() if not any(True for _ in layer.children()) or is_norm(layer)]
    found: set[nn.Module] = set()
    for layer, following in zip(leaves, [*leaves[1:], None], strict=True):
        if not isinstance(layer, nn.Conv2d) or (is_depthwise(layer) and not depthwise):
            continue
        followed = following is not None and _norm_channels(following) == layer.out_channels
        if layer.bias is None or followed or "StdConv2d" in type(layer).__name__:
            found.add(layer)
    return found


def is_norm(layer: nn.Module) -> bool:
    """Say whether a layer is one of the norms that :func:`convert_norm` replaces."""
    return _norm_channels(layer) is not None


def group_counts(module: nn.Module) -> dict[str, int]:
    """List the number of groups of each group norm by its name."""
    return {name: layer.num_groups for name, layer in module.named_modules() if isinstance(layer, nn.GroupNorm)}


def _is_limit(layer: nn.GroupNorm) -> bool:
    """Whether a group norm is a layer norm (one group) or an instance norm (a group per channel), but for 32 groups."""
    return layer.num_groups == 1 or layer.num_groups == layer.num_channels != DEFAULT_GROUPS


def _groups_of(
    norm: Norm, num_groups: int | Mapping[str, int] | None, group_size: int | None, *, calibrated: bool
) -> GroupsOf:
    """Choose how the number of groups is found."""

    def groups_of(old: nn.Module, channels: int, name: str) -> int:
        if norm == "ln":
            return 1
        if norm == "in":
            return channels
        if isinstance(num_groups, Mapping):
            try:
                return group_count(channels, num_groups=num_groups[name], layer=name)
            except KeyError:
                raise ConfigError(
                    f"num_groups names no groups for {name}; give those of every norm, or one number."
                ) from None
        if num_groups is None and group_size is None:
            if isinstance(old, nn.GroupNorm) and not _is_limit(old):
                return old.num_groups
            return fitting_group_count(channels, default_groups(calibrated=calibrated))
        return group_count(channels, num_groups=num_groups or 0, group_size=group_size, layer=name)

    return groups_of


def _norm_maker(
    norm: Norm, groups_of: Callable[[nn.Module, int, str], int]
) -> Callable[[nn.Module, int, str], nn.Module]:
    """Function from (old layer, channels, name) to the layer that the norm wants there."""

    def make(old: nn.Module, channels: int, name: str) -> nn.Module:
        act, drop = _activation(old)
        has_act = act is not None or drop is not None
        eps = float(getattr(old, "eps", 1e-5))
        momentum = getattr(old, "momentum", 0.1)
        new: nn.Module
        if norm == "none":
            return nn.Sequential(*_without_identities(drop, act)) if has_act else nn.Identity()
        if norm in ("gn", "gn_ws", "ln", "in"):
            groups = groups_of(old, channels, name)
            if isinstance(old, GroupNorm) and old.num_groups == groups:
                return old
            new = (
                GroupNormAct(channels, groups, eps=eps, act=act, drop=drop)
                if has_act
                else GroupNorm(channels, groups, eps=eps)
            )
        else:
            plain, with_act = {
                "bn": (nn.BatchNorm2d, BatchNormAct2d),
                "bn_ws": (nn.BatchNorm2d, BatchNormAct2d),
                "bn_frozen": (FrozenBatchNorm2d, FrozenBatchNormAct2d),
                "bn_sync": (nn.SyncBatchNorm, SyncBatchNormAct),
            }[norm]
            is_frozen = isinstance(old, FrozenBatchNorm2d)
            if isinstance(old, plain) and is_frozen == (norm == "bn_frozen"):
                return old
            new = (
                with_act(channels, eps=eps, momentum=momentum, act=act, drop=drop)
                if has_act
                else plain(channels, eps=eps, momentum=momentum)
            )
        _carry_over(old, new)
        return new.train(old.training)

    return make


def _activation(layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The ``.act`` and ``.drop`` of a norm+activation layer."""
    found = [getattr(layer, name, None) for name in ("act", "drop")]
    act, drop = (m if isinstance(m, nn.Module) else None for m in found)
    if (act is None) != (drop is None):
        act, drop = act or nn.Identity(), drop or nn.Identity()
    return act, drop


def _without_identities(*modules: nn.Module | None) -> list[nn.Module]:
    return [m for m in modules if m is not None and not isinstance(m, nn.Identity)]


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Move parameters and buffers of the same name and shape; put the rest where the old layer's tensors are."""
    like = next((t for t in (*old.parameters(recurse=False), *old.buffers(recurse=False)) if t.ndim == 1), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    for name in ("weight", "bias"):
        value = getattr(old, name, None)
        if isinstance(value, nn.Parameter):
            setattr(new, name, value)
        elif isinstance(value, Tensor):  # a buffer of a frozen batch norm learns again
            setattr(new, name, nn.Parameter(value))
    for name, buffer in old.named_buffers(recurse=False):
        if name in dict(new.named_buffers(recurse=False)):
            setattr(new, name, buffer)


def _convert_conv(conv: nn.Conv2d, name: str, standardize: bool) -> nn.Conv2d:
    """Replace ``nn.Conv2d`` and (our or timm's) ``StdConv2d`` as wanted; refuse what computes something else."""
    kind = type(conv)
    if isinstance(conv, StdConv2d):
        return conv if standardize else plain_conv(conv)
    if kind.__name__ == "Conv2dSame":  # timm's, or ours
        return StdConv2dSame.from_conv(conv) if standardize and conv.weight[0].numel() > 1 else conv
    if kind.__name__ == "StdConv2d" and hasattr(conv, "eps"):  # timm's
        return StdConv2d.from_conv(conv, eps=float(conv.eps)) if standardize else plain_conv(conv)  # type: ignore[arg-type]
    if kind.forward is nn.Conv2d.forward:
        one_weight = conv.weight[0].numel() == 1
        return StdConv2d.from_conv(conv) if standardize and not one_weight else conv
    if standardize or "Std" in kind.__name__:
        raise ConfigError(
            f"{name} is a {kind.__module__}.{kind.__name__}, which cannot be made "
            f"{'a standardized' if standardize else 'a plain'} convolution; use another backbone, or name it in skip."
        )
    return conv


def plain_conv(conv: nn.Conv2d) -> nn.Conv2d:
    """Make an ``nn.Conv2d`` of a convolution's geometry and its very parameters, standardized no longer."""
    kind = Conv2dSame if isinstance(conv, StdConv2dSame) else nn.Conv2d
    with torch.device("meta"):
        new = kind(*conv_geometry(conv))
    new.weight, new.bias = conv.weight, conv.bias
    return new.train(conv.training)
