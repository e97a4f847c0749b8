"""Build a backbone under a norm.

A backbone is built as timm builds it, its norms (and, under Weight Standardization, its convolutions) are replaced by
:func:`gn_transfer.layers.convert_norm`, and weights are copied over with a report of what was loaded, dropped,
re-initialized and converted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from gn_transfer.backbones.fitting import ProgressBar, TrainingImages, fit_norms, no_progress
from gn_transfer.backbones.pretrained import ALIASES, OWN, resolve_pretrained
from gn_transfer.backbones.transfer import (
    BN_FAMILY,
    FITTED,
    Conversion,
    TransferReport,
    check_norm,
    has_batch_norm,
    notes_on,
    transfer,
)
from gn_transfer.backbones.weights import Weights, read_weights, refuse_bomb
from gn_transfer.config import ConfigError, DecoderName, Norm, shortened
from gn_transfer.layers import convert_norm, default_groups, is_norm


@dataclass(frozen=True)
class Backbone:
    """A model ready to train.

    Attributes:
        model: Maps normalized images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``.
        mean: Pixel mean per channel, on pixels scaled to [0, 1].
        std: Pixel standard deviation per channel, likewise.
        head: Name of the classifier module inside :attr:`model`.
        report: What was transferred.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: str
    report: TransferReport


def create_backbone(
    name: str,
    *,
    norm: Norm,
    num_classes: int,
    pretrained: str | None = None,
    num_groups: int | None = None,
    group_size: int | None = None,
    conversion: Conversion = "error",
    calibration: Tensor | None = None,
    in_chans: int = 3,
    output_stride: int = 32,
    progress: ProgressBar = no_progress,
    conversion_cache: Path | None = None,
) -> Backbone:
    """Build a timm model under a norm, with or without pretrained weights.

    Initialization from scratch is timm's, and per norm: ResNet v1 with an affine norm starts each block's last norm
    at zero weight (Goyal et al. 2017, arXiv:1706.02677), which is safe under Weight Standardization since no
    *convolution* is zero; ResNetV2 starts all convolutions at He's normal, none at zero, because a zero filter under
    Weight Standardization with eps 1e-8 has its gradient amplified 1e4 times; ``norm: none`` starts each block's last
    convolution at zero, so that an unnormalized model begins as the identity (after Zhang et al. 2019,
    arXiv:1901.09321).

    Args:
        name: timm architecture without a tag (``resnet18``, ``resnetv2_50``), ``resnetv2_26`` or ``cnn_mnist``.
        norm: The normalization.
        num_classes: Width of the new head, at least 2.
        pretrained: ``None`` for none, ``"auto"`` for the weights that fit (name, norm), a timm tag (``a1h_in1k`` or
            ``resnetv2_50.a1h_in1k``), released weights (``resnetv2_18.bn.tinyimagenet``), or a local file
            (.safetensors, .pth, .bin, .ckpt, BiT .npz) or folder.
        num_groups: GroupNorm's number of groups; not beside ``group_size``. None takes 32, or 4 with
            ``calibrated``, and less in narrow layers; see :func:`gn_transfer.layers.convert_norm`.
        group_size: Channels per group instead of a number of groups.
        conversion: ``error`` weights of another norm, ``copy`` their parameters unchanged, or set the affine of
            each group norm in closed form to reproduce a BN model (``calibrated``), and train the model to give the BN
            model's features (``distilled``).
        calibration: Training images for these two, uint8 ``(N, in_chans, H, W)``, preprocessed as in evaluation; the
            first 256 calibrate, all of them distill.
        in_chans: Channels of the images.
        output_stride: Side of the image over that of the last feature map; less than 32 dilates the last convolutions.
        progress: Shows how far a conversion is; :func:`gn_transfer.data.progress.progress_bar` or one like it.
        conversion_cache: Folder where what came of ``calibrated`` and ``distilled`` is kept: the same weights, images
            and settings are converted once. None converts anew.

    Returns:
        The model with its pixel statistics, head name and transfer report.

    Raises:
        ConfigError: Unknown architecture, groups that do not divide, weights that are missing, unreadable or of
            another norm or architecture, or a conversion that cannot be.
    """
    weights = resolve_pretrained(name, norm, pretrained, conversion)
    architecture = name if weights is None else weights.architecture
    model = _build(architecture, num_classes=num_classes, in_chans=in_chans, output_stride=output_stride)
    config: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    head = str(config["classifier"])
    mean, std = (_per_channel(config[key], in_chans) for key in ("mean", "std"))
    if weights is not None:
        mean, std = (
            _per_channel(stated or default, in_chans) for stated, default in ((weights.mean, mean), (weights.std, std))
        )
    _check_norms(model, norm)
    groups: dict[str, Any] = {"num_groups": num_groups, "group_size": group_size}

    if weights is None:
        replace_norms(model, norm, head=head, **groups)
        if norm == "none":
            _zero_last_convolutions(model)
        report = TransferReport("from scratch", architecture, norm, notes=notes_on(architecture, norm))
        return Backbone(model, mean, std, head, report)

    state = _read_npz(weights) if weights.file is not None and weights.file.suffix == ".npz" else read_weights(weights)
    wanted = default_groups(calibrated=False) if num_groups is None else num_groups
    check_norm(weights, state, norm, conversion, num_groups=wanted, group_size=group_size)
    fitted = conversion in FITTED and norm not in BN_FAMILY and has_batch_norm(state)
    replace_norms(model, "bn" if fitted else norm, head=head, **groups)
    if norm == "none":
        _zero_last_convolutions(model)
    report = transfer(state, model, weights=weights, norm=norm, head=head)
    if fitted:
        if calibration is None:
            raise ConfigError(f"model.conversion={conversion} needs training images; none were given.")
        images = TrainingImages(calibration, mean, std)
        report = fit_norms(
            model,
            norm,
            images,
            report,
            head=head,
            groups=groups,
            conversion=conversion,
            show=progress,
            cache=conversion_cache,
        )
    return Backbone(model, mean, std, head, report)


def rebuild(
    architecture: str,
    *,
    norm: Norm,
    num_classes: int,
    head: str | None,
    num_groups: int | Mapping[str, int],
    group_size: int | None,
    in_chans: int = 3,
    output_stride: int = 32,
) -> nn.Module:
    """Build the model that a checkpoint describes, without looking for any pretrained weights.

    Args:
        architecture: timm's name, as :attr:`TransferReport.architecture` stored it.
        norm: The normalization.
        num_classes: Width of the head.
        head: Name of the classifier module; None asks the model.
        num_groups: See :func:`create_backbone`; or the groups of each layer by name. A number, which every checkpoint
            has, means nothing beside ``group_size``.
        group_size: See :func:`create_backbone`.
        in_chans: Channels of the images.
        output_stride: See :func:`create_backbone`.

    Returns:
        Freshly initialized model, ready for ``load_state_dict``.
    """
    model = _build(architecture, num_classes=num_classes, in_chans=in_chans, output_stride=output_stride)
    groups = None if group_size is not None and isinstance(num_groups, int) else num_groups
    classifier = head or str(model.pretrained_cfg["classifier"])  # type: ignore[index]
    replace_norms(model, norm, head=classifier, num_groups=groups, group_size=group_size)
    return model


def replace_norms(
    model: nn.Module, norm: Norm, *, head: str, num_groups: int | Mapping[str, int] | None, group_size: int | None
) -> None:
    """Replace the norms of a model in place, leaving a model that already has them as it is.

    Args:
        model: The model, mapping ``(B, C, H, W)`` to logits.
        norm: The normalization.
        head: Name of the classifier module, which is neither normalized nor standardized.
        num_groups: See :func:`create_backbone`.
        group_size: See :func:`create_backbone`.
    """
    convert_norm(model, norm, num_groups=num_groups, group_size=group_size, skip={head})


def _check_norms(model: nn.Module, norm: Norm) -> None:
    """Refuse a model whose norms ``model.norm`` cannot replace."""
    model_name = type(model).__name__
    if not any(is_norm(layer) for layer in model.modules()):
        kinds = sorted({type(layer).__name__ for layer in model.modules() if "Norm" in type(layer).__name__})
        found = f"its norms are {', '.join(kinds)}" if kinds else "it has no norms"
        raise ConfigError(
            f"model.backbone: {model_name} has no BatchNorm or GroupNorm for model.norm to replace ({found}); choose a "
            "convolutional model with BatchNorm, such as resnet50 or efficientnet_b0."
        )
    flat = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm3d)]
    if flat and norm != "bn":
        raise ConfigError(
            f"model.backbone: {model_name} has {len(flat)} norms of another kind than BatchNorm2d ({flat[0]} and "
            f"others), which model.norm={norm} cannot replace; choose model.norm=bn or another backbone."
        )


def parameter_depths(model: nn.Module) -> dict[str, int]:
    """Number the parameters by depth for layer-wise learning rates.

    Args:
        model: A timm model.

    Returns:
        Parameter name to depth: 0 for the stem, rising towards the head, which is the deepest.
    """
    if hasattr(model, "encoder"):  # a segmentation model: the decoder is the head
        depths = {f"encoder.model.{name}": d for name, d in parameter_depths(model.encoder.model).items()}  # type: ignore[union-attr,arg-type]
        deepest = max(depths.values()) + 1
        return {name: depths.get(name, deepest) for name, _ in model.named_parameters()}
    matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
    depths = group_with_matcher(model.named_parameters(), matcher, reverse=True)
    order = {depth: rank for rank, depth in enumerate(sorted(set(depths.values())))}
    return {name: order[depth] for name, depth in depths.items()}


def check_input(
    model: nn.Module,
    norm: Norm,
    *,
    batch_size: int,
    img_size: int,
    in_chans: int = 3,
    decoder: DecoderName | None = None,
) -> None:
    """Refuse a batch that the model cannot normalize, before anything is trained; computes shapes only.

    Args:
        model: The model; left untouched.
        norm: The normalization, for the message.
        batch_size: Images per forward pass.
        img_size: Their side, in pixels.
        in_chans: Their channels.
        decoder: The decoder of a segmentation model, for the message.

    Raises:
        ConfigError: A norm would see a single value per channel (or per group), as BN does at batch size 1 where a
            stride-32 model leaves a 1x1 map.
    """
    shadow = deepcopy(model).to("meta").train()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shadow(torch.empty(batch_size, in_chans, img_size, img_size, device="meta"))
    except (ValueError, RuntimeError) as error:
        if decoder in ("deeplabv3plus", "upernet"):  # they pool the whole image to one value per channel
            more = ", or raise data.batch_size" if "per channel" in str(error) else ""
            raise ConfigError(
                f"data.batch_size={batch_size} cannot be trained with model.decoder={decoder} and this norm of the "
                f"decoder: {str(error).rstrip('.')}. Set model.decoder_norm=gn, or choose model.decoder=unet "
                f"or fpn{more}."
            ) from error
        raise ConfigError(
            f"data.img_size={img_size} with data.batch_size={batch_size} cannot be trained with model.norm={norm}: "
            f"{error}. Set data.img_size to 64 or more, raise data.batch_size, or choose model.norm=gn_ws."
        ) from error


def _zero_last_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "zero_init_last") or hasattr(module, "conv2"):
            last = getattr(module, "conv3", None) or getattr(module, "conv2", None)
            if isinstance(last, nn.Conv2d):
                nn.init.zeros_(last.weight)


def _per_channel(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == in_chans else tuple(values[:1]) * in_chans


def _read_npz(weights: Weights) -> Mapping[str, Tensor]:
    base, arguments = ALIASES.get(weights.architecture, (weights.architecture, {}))
    overlay = {"file": str(weights.file), "custom_load": True}
    assert weights.file is not None
    refuse_bomb(weights.file)
    try:
        model = timm.create_model(base, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except Exception as error:  # numpy, zipfile and timm have their own errors for a corrupt file
        raise ConfigError(
            f"model.pretrained={weights.file} cannot be read as weights of {weights.architecture} "
            f"({type(error).__name__}); give a BiT .npz of that model, or fetch the file again."
        ) from error
    state: Mapping[str, Tensor] = model.state_dict()
    return state


def default_channels(name: str) -> int:
    """Tell how many channels of an image a model takes unless it is told otherwise: 1 for ``cnn_mnist``, else 3."""
    return 1 if name in OWN else 3


def _build(architecture: str, *, num_classes: int, in_chans: int, output_stride: int = 32) -> nn.Module:
    if architecture in OWN:
        return OWN[architecture](num_classes, in_chans)
    base, arguments = ALIASES.get(architecture, (architecture, {}))
    if not timm.is_model(base):  # timm would look for hf-hub:NAME on the hub, and for local-dir:PATH on the disk
        raise ConfigError(f"{shortened(architecture)} is no model of timm {timm.__version__}.")
    if output_stride == 32:
        model: nn.Module = timm.create_model(base, num_classes=num_classes, in_chans=in_chans, **arguments)
        return model
    try:
        model = timm.create_model(
            base, num_classes=num_classes, in_chans=in_chans, output_stride=output_stride, **arguments
        )
    except (TypeError, AssertionError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"model.backbone={architecture} cannot be built with an output stride of {output_stride}, which "
            "model.decoder=deeplabv3plus needs; choose another backbone, such as resnet50, or another decoder."
        ) from error
    return model
