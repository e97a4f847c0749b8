"""A segmentation model: an encoder that was built for classification, and a decoder on its feature maps.

Decoders are those of segmentation-models-pytorch. Their batch norms and group norms are replaced by the norm of the
decoder (:func:`gn_transfer.layers.convert_norm`), as those of the encoder were. UPerNet keeps four layer norms over
channels, whatever the norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from gn_transfer.backbones.create import Backbone
from gn_transfer.config import STRIDE, ConfigError, DecoderName, Norm
from gn_transfer.layers import convert_norm, fitting_group_count, is_norm

_UNET_CHANNELS = (256, 128, 64, 32, 16)
_CHANNELS = 256  # of the other decoders, as in their papers
_FPN_CHANNELS = 128
_MIXED: dict[DecoderName, tuple[int, ...]] = {"unet": (1, 2, 3, 4), "fpn": (2, 3, 4)}
"""Maps that a decoder concatenates with the enlarged last map, or adds to it. The others normalize them themselves."""
_PROBE = 128  # side of the image that finds what an encoder uses


class Encoder(nn.Module):
    """The feature maps of a timm model at strides 2, 4, 8, 16 and 32.

    Args:
        model: A timm model for classification; its head, and what only that used, is removed from it.
        in_chans: Channels of the images.

    Attributes:
        channels: Channels of the image and of each map; 0 where the model has no map of stride 2.

    Raises:
        ConfigError: The model does not give such maps.
    """

    def __init__(self, model: nn.Module, in_chans: int) -> None:
        super().__init__()
        name = type(model).__name__
        info = list(getattr(model, "feature_info", ()))
        if not hasattr(model, "forward_intermediates") or len(info) < 4:
            raise ConfigError(
                f"model.backbone: {name} gives no feature maps that a decoder could use; choose another, such as "
                "resnet50, resnetv2_50 or tf_efficientnet_lite0."
            )
        strides = _undilated([int(stage["reduction"]) for stage in info])
        kept = [index for index, stride in enumerate(strides) if 2 <= stride <= STRIDE]
        if [strides[index] for index in kept] not in ([2, 4, 8, 16, 32], [4, 8, 16, 32]):
            raise ConfigError(
                f"model.backbone: {name} has feature maps of strides {', '.join(map(str, strides))}, and a decoder "
                "needs 4, 8, 16 and 32; choose another, such as resnet50."
            )
        self.indices = kept
        self._lacks_stride_2 = strides[kept[0]] == 4
        maps = [int(info[index]["num_chs"]) for index in kept]
        self.channels = [in_chans, *([0] if self._lacks_stride_2 else []), *maps]
        self.model = model
        self._arguments = {"indices": kept, "intermediates_only": True}
        if "norm" in inspect.signature(model.forward_intermediates).parameters:  # type: ignore[arg-type]
            self._arguments["norm"] = True  # a pre-activation model ends with a norm
        _remove_unused(model, self._arguments, in_chans)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Compute the feature maps of normalized pixels, shape ``(B, in_chans, H, W)``; the pixels come first."""
        maps: list[Tensor] = self.model.forward_intermediates(pixels, **self._arguments)  # type: ignore[operator]
        if self._lacks_stride_2:
            none = maps[0].new_empty(len(pixels), 0, pixels.shape[2] // 2, pixels.shape[3] // 2)
            maps = [none, *maps]
        return [pixels, *maps]


class Decoder(nn.Module):
    """A decoder and the layer that classifies every pixel.

    U-Net and FPN begin with a norm for each map but the last, which segmentation-models-pytorch does not have. The
    maps of pretrained models differ in scale, up to 200 times in a ResNetV2 under GroupNorm + Weight Standardization.
    The last one, which tells most about the classes, had under 1 % of influence on a new U-Net without these norms.

    Args:
        name: Which decoder.
        channels: Of the encoder's feature maps; see :attr:`Encoder.channels`.
        num_classes: Classes of a pixel.
    """

    def __init__(self, name: DecoderName, channels: list[int], num_classes: int) -> None:
        super().__init__()
        if name == "unet":
            self.body: nn.Module = UnetDecoder(channels, _UNET_CHANNELS)
            width = _UNET_CHANNELS[-1]
        elif name == "fpn":
            self.body = FPNDecoder(channels, pyramid_channels=_CHANNELS, segmentation_channels=_FPN_CHANNELS)
            width = _FPN_CHANNELS
        elif name == "upernet":
            self.body = UPerNetDecoder(channels, decoder_channels=_CHANNELS)
            width = _CHANNELS
        else:
            self.body = DeepLabV3PlusDecoder(
                channels,
                encoder_depth=5,
                out_channels=_CHANNELS,
                atrous_rates=(6, 12, 18),  # of the paper, at this output stride
                output_stride=16,
                aspp_separable=True,
                aspp_dropout=0.5,
            )
            width = _CHANNELS
        mixed = [index for index in _MIXED.get(name, ()) if channels[index]]
        self.map_norms = nn.ModuleDict({str(index): nn.BatchNorm2d(channels[index]) for index in mixed})
        kernel = 1 if name == "deeplabv3plus" else 3
        self.classifier = nn.Conv2d(width, num_classes, kernel, padding=kernel // 2)
        initialize_decoder(self.body)
        initialize_head(self.classifier)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Compute logits, shape ``(B, num_classes, H, W)``, from the encoder's maps."""
        maps = list(maps)
        for index, norm in self.map_norms.items():
            maps[int(index)] = norm(maps[int(index)])
        logits: Tensor = self.classifier(self.body(maps))
        if logits.shape[2:] == maps[0].shape[2:]:
            return logits
        return F.interpolate(logits, size=maps[0].shape[2:], mode="bilinear", align_corners=False)


class SegmentationModel(nn.Module):
    """Encoder and decoder.

    Args:
        encoder: The encoder, its norms already replaced.
        decoder: Name of the decoder.
        num_classes: Classes of a pixel, at least 2.
        norm: Normalization of the decoder.
        num_groups: Groups of its group norms, fewer in narrow layers: a decoder ends with a few channels. Or those of
            each layer.
        group_size: Channels per group instead.

    Raises:
        ConfigError: Groups that do not divide, or a norm that a decoder cannot have.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: DecoderName,
        num_classes: int,
        norm: Norm,
        *,
        num_groups: int | Mapping[str, int] | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        if norm == "bn_frozen":
            raise ConfigError(
                "model.decoder_norm=bn_frozen: a decoder starts from random weights, so its norms have no statistics "
                "to freeze; choose gn, or bn with a larger data.batch_size."
            )
        self.encoder = encoder
        self.decoder = Decoder(decoder, encoder.channels, num_classes)
        groups = num_groups if group_size is None else None
        if isinstance(groups, int):
            named = self.decoder.named_modules()
            groups = {name: fitting_group_count(_width(layer), groups) for name, layer in named if is_norm(layer)}
        convert_norm(self.decoder, norm, num_groups=groups, group_size=group_size, skip={"classifier"})

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute logits.

        Args:
            pixels: Normalized pixels, shape ``(B, in_chans, H, W)``; sides are multiples of 32.

        Returns:
            Shape ``(B, num_classes, H, W)``.
        """
        logits: Tensor = self.decoder(self.encoder(pixels))
        return logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Have the encoder's blocks computed again in the backward pass."""
        self.encoder.model.set_grad_checkpointing(enable)  # type: ignore[operator]


def _width(norm: nn.Module) -> int:
    return int(norm.num_features if isinstance(norm, nn.BatchNorm2d) else norm.num_channels)  # type: ignore[arg-type]


def add_decoder(
    built: Backbone,
    decoder: DecoderName,
    num_classes: int,
    norm: Norm,
    *,
    in_chans: int,
    num_groups: int | Mapping[str, int] | None,
    group_size: int | None,
) -> Backbone:
    """Make a segmentation model of a classification model.

    Args:
        built: The classification model; its head is removed.
        decoder: Name of the decoder.
        num_classes: Classes of a pixel, at least 2.
        norm: Normalization of the decoder.
        in_chans: Channels of the images.
        num_groups: See :class:`SegmentationModel`.
        group_size: Likewise.

    Returns:
        The model, whose head is the decoder.

    Raises:
        ConfigError: No feature maps, groups that do not divide, or a norm that a decoder cannot have.
    """
    encoder = Encoder(built.model, in_chans)
    model = SegmentationModel(encoder, decoder, num_classes, norm, num_groups=num_groups, group_size=group_size)
    report = replace(built.report, reinitialized=("decoder",))
    return replace(built, model=model, head="decoder", report=report)


def _undilated(strides: list[int]) -> list[int]:
    """The strides that the maps would have without dilation: each new stage halves the map."""
    found = strides[:1]
    for before, stride in pairwise(strides):
        found.append(found[-1] * 2 if stride == before else stride)
    return found


def _remove_unused(model: nn.Module, arguments: dict[str, Any], in_chans: int) -> None:
    """Remove the modules that the feature maps do not need: DDP waits for the gradient of every parameter."""
    shadow = deepcopy(model).to("meta").eval().requires_grad_(True)
    maps = shadow.forward_intermediates(torch.empty(1, in_chans, _PROBE, _PROBE, device="meta"), **arguments)  # type: ignore[operator]
    named = dict(shadow.named_parameters())
    gradients = torch.autograd.grad(
        sum(each.sum() for each in maps), list(named.values()), allow_unused=True, materialize_grads=False
    )
    used = {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
    removed: list[str] = []
    for name, layer in list(model.named_modules()):
        inside = [f"{name}.{inner}" for inner, _ in layer.named_parameters()]
        if name and inside and used.isdisjoint(inside) and not name.startswith(tuple(f"{gone}." for gone in removed)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
            removed.append(name)
