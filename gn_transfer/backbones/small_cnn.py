"""The two-convolution model of the MNIST study; plain torch, with the attributes that a timm model has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class SmallCnn(nn.Module):
    """conv 5x5 (32) - norm - ReLU - max-pool - conv 5x5 (64) - norm - ReLU - max-pool - linear.

    Built with BatchNorm, which :func:`gn_transfer.layers.convert_norm` replacements. Convolutions are padded, so that a
    28 x 28 image leaves 7 x 7 x 64; other sizes are averaged to that.

    Args:
        num_classes: Width of the head.
        in_chans: Channels of the images.
    """

    def __init__(self, num_classes: int, in_chans: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 32, 5, padding=2)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.norm2 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.max_pool = nn.MaxPool2d(2)
        self.average = nn.AdaptiveAvgPool2d(7)
        self.fc = nn.Linear(64 * 7 * 7, num_classes)
        self.pretrained_cfg: dict[str, Any] = {
            "mean": (0.5,) * in_chans,
            "std": (0.5,) * in_chans,
            "input_size": (in_chans, 28, 28),
            "interpolation": "bilinear",
            "classifier": "fc",
        }

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``(B, num_classes)`` of normalized images ``(B, in_chans, H, W)``."""
        features = self.max_pool(self.relu(self.norm1(self.conv1(images))))
        features = self.max_pool(self.relu(self.norm2(self.conv2(features))))
        logits: Tensor = self.fc(self.average(features).flatten(1))
        return logits

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Number the layers for layer-wise learning rates, as timm's models do."""
        return {"stem": r"^(conv1|norm1)", "blocks": [(r"^(conv2|norm2)", (0,)), (r"^fc", (99999,))]}
