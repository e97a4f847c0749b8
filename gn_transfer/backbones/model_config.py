"""Which model a run trains: the keys ``model.*``, and building it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from gn_transfer.backbones.create import Backbone, create_backbone, default_channels, rebuild
from gn_transfer.backbones.fitting import ProgressBar, no_progress
from gn_transfer.backbones.transfer import BN_FAMILY, FITTED, Conversion, TransferReport
from gn_transfer.config import DecoderName, Norm
from gn_transfer.layers import default_groups, group_counts

_ANY_CLASSES = 2  # of a head that a decoder replaces


DEFAULT_DECODER: DecoderName = "unet"
"""The decoder of a segmentation that names none."""


@dataclass
class ModelConfig:
    """Backbone, norm and weights of a model.

    Args:
        backbone: timm's name of the model, without a weights tag: resnet18, resnetv2_50, ...
        norm: The normalization: bn, bn_frozen, bn_sync, gn, gn_ws (GroupNorm + Weight Standardization), bn_ws, ln, in,
            none.
        decoder: For segmentation, what turns the feature maps of the backbone into classes of pixels: unet, fpn,
            deeplabv3plus, upernet. null means unet.
        decoder_norm: For segmentation, the normalization of the decoder. null means that of norm; with bn_frozen it
            means gn, because a decoder starts from random weights and has no statistics to freeze.
        num_groups: Number of groups of GroupNorm. null means 32, or 4 with conversion calibrated or distilled, and less
            in narrow layers: the largest divisor of the channels that leaves two channels or more in a group.
        group_size: Channels per group, instead of num_groups.
        pretrained: null trains from scratch. auto takes the weights that fit backbone and norm. A timm tag or a local
            file is also allowed.
        conversion: What happens when the weights were trained with BN and the norm is another one. error refuses
            them. copy keeps their scale and shift. calibrated sets scale and shift of each norm (gn, ln, in) in closed
            form on a few hundred training images, so that the model starts near the BN model. distilled trains the
            calibrated model on 1,024 training images, without their labels, to give the features of the BN model.
        in_chans: Channels of the images, 3 or 1 (grey). null means 1 for cnn_mnist, else 3.
        channels_last: Memory format of images and activations. auto takes the format that measured faster.
        compile: Compile the model with torch.compile.
        gradient_checkpointing: Recompute activations in the backward pass. This needs less memory and about a third
            more time.
    """

    backbone: str = "resnetv2_18"
    norm: Norm = "gn_ws"
    decoder: DecoderName | None = None
    decoder_norm: Norm | None = None
    num_groups: int | None = None
    group_size: int | None = None
    pretrained: str | None = None
    conversion: Conversion = "error"
    in_chans: Literal[1, 3] | None = None
    channels_last: bool | Literal["auto"] = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False

    @property
    def resolved_num_groups(self) -> int:
        """Number of groups, with the default filled in."""
        return default_groups(calibrated=self.conversion in FITTED) if self.num_groups is None else self.num_groups

    @property
    def resolved_decoder_norm(self) -> Norm:
        """Normalization of the decoder, with the default filled in."""
        if self.decoder_norm is not None:
            return self.decoder_norm
        return "gn" if self.norm == "bn_frozen" else self.norm

    @property
    def norms(self) -> list[Norm]:
        """Normalization of the backbone and, where there is one, of the decoder."""
        return [self.norm, *([self.resolved_decoder_norm] if self.decoder or self.decoder_norm else [])]

    @property
    def norm_over_batch(self) -> Norm | None:
        """The norm, of backbone or decoder, whose training statistics are those of the micro-batch; None without one.

        Accumulation does not help such a norm, and another micro-batch trains another model.
        """
        return next((norm for norm in self.norms if norm in BN_FAMILY and norm != "bn_frozen"), None)

    @property
    def output_stride(self) -> int:
        """Side of the image over that of the last feature map."""
        return 16 if self.decoder == "deeplabv3plus" else 32

    @property
    def resolved_in_chans(self) -> int:
        """Channels of the images, with the default filled in."""
        return default_channels(self.backbone) if self.in_chans is None else self.in_chans


def build_backbone(
    config: ModelConfig,
    num_classes: int,
    *,
    calibration: Tensor | None = None,
    progress: ProgressBar = no_progress,
    conversion_cache: Path | None = None,
) -> Backbone:
    """Build the model of a configuration; see :func:`gn_transfer.backbones.create_backbone`."""
    built = create_backbone(
        config.backbone,
        norm=config.norm,
        num_classes=_ANY_CLASSES if config.decoder else num_classes,
        pretrained=config.pretrained,
        num_groups=config.num_groups,
        group_size=config.group_size,
        conversion=config.conversion,
        calibration=calibration,
        progress=progress,
        conversion_cache=conversion_cache,
        in_chans=config.resolved_in_chans,
        output_stride=config.output_stride,
    )
    if config.decoder is None:
        return built
    return _with_decoder(built, config, num_classes, config.num_groups)


def rebuild_backbone(config: ModelConfig, stored: Mapping[str, Any], report: Mapping[str, Any]) -> Backbone:
    """Build the model that a checkpoint describes, without looking for any pretrained weights.

    Args:
        config: Norms, groups and decoder of the model.
        stored: The checkpoint's description of the architecture.
        report: Its transfer report.

    Returns:
        The model, freshly initialized and ready for ``load_state_dict``.

    Raises:
        KeyError: A norm without a number of groups.
    """
    groups: Mapping[str, int] = stored.get("groups") or {}
    prefix = "encoder.model." if config.decoder else ""
    of_encoder = {name.removeprefix(prefix): number for name, number in groups.items() if name.startswith(prefix)}
    if config.decoder and of_encoder:  # norms behind the last feature map are removed, whatever their groups
        of_encoder = defaultdict(lambda: 1, of_encoder)
    model = rebuild(
        stored["architecture"],
        norm=config.norm,
        num_classes=_ANY_CLASSES if config.decoder else stored["num_classes"],
        head=None if config.decoder else stored["head"],
        num_groups=of_encoder or config.resolved_num_groups,
        group_size=config.group_size,
        in_chans=config.resolved_in_chans,
        output_stride=config.output_stride,
    )
    built = Backbone(
        model, tuple(stored["mean"]), tuple(stored["std"]), stored["head"], TransferReport.from_dict(report)
    )
    if config.decoder is None:
        return built
    of_decoder = {
        name.removeprefix("decoder."): number for name, number in groups.items() if name.startswith("decoder.")
    }
    built = _with_decoder(built, config, stored["num_classes"], of_decoder or config.num_groups)
    if of_encoder and (missing := group_counts(built.model).keys() - groups.keys()):
        raise KeyError(f"groups of {min(missing)}")
    return built


def _with_decoder(
    built: Backbone, config: ModelConfig, num_classes: int, num_groups: int | Mapping[str, int] | None
) -> Backbone:
    from gn_transfer.backbones.segmentation import add_decoder  # its library takes a second to import

    assert config.decoder is not None
    return add_decoder(
        built,
        config.decoder,
        num_classes,
        config.resolved_decoder_norm,
        in_chans=config.resolved_in_chans,
        num_groups=num_groups,
        group_size=config.group_size,
    )
