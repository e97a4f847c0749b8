"""Which model a run trains: the keys ``model.*``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gn_transfer.backbones.create import default_channels
from gn_transfer.backbones.transfer import Conversion
from gn_transfer.config import Norm
from gn_transfer.layers import default_groups


@dataclass
class ModelConfig:
    """Backbone, norm and weights of a model.

    Args:
        backbone: timm's name of the model, without a weights tag: resnet18, resnetv2_50, ...
        norm: The normalization: bn, bn_frozen, bn_sync, gn, gn_ws (GroupNorm + Weight Standardization), bn_ws, ln, in,
            none.
        num_groups: Number of groups of GroupNorm. null means 32, or 4 with conversion calibrated.
        group_size: Channels per group, instead of num_groups.
        pretrained: null trains from scratch. auto takes the weights that fit backbone and norm. A timm tag or a local
            file is also allowed.
        conversion: What happens when the weights were trained with BN and the norm is another one. error refuses
            them. copy keeps their scale and shift. calibrated sets scale and shift of each norm (gn, ln, in) in closed
            form on a few hundred training images, so that the model starts near the BN model.
        in_chans: Channels of the images, 3 or 1 (grey). null means 1 for cnn_mnist, else 3.
        channels_last: Memory format of images and activations. auto takes the format that measured faster.
        compile: Compile the model with torch.compile.
        gradient_checkpointing: Recompute activations in the backward pass. This needs less memory and about a third
            more time.
    """

    backbone: str = "resnetv2_18"
    norm: Norm = "gn_ws"
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
        return (
            default_groups(calibrated=self.conversion == "calibrated") if self.num_groups is None else self.num_groups
        )

    @property
    def resolved_in_chans(self) -> int:
        """Channels of the images, with the default filled in."""
        return default_channels(self.backbone) if self.in_chans is None else self.in_chans
