"""The image encoder of a robot's policy: ResNet-18 of ImageNet, its batch norms turned into group norms.

    python examples/policy_encoder.py

Policies train with a moving average of the weights, on observations that come one after another: both go wrong with
BatchNorm. A plain replacement of the layers (``num_groups = channels // 16`` is usual) loses most of what the weights
compute. With images of the robot's cameras, the conversion is calibrated: no gradient step, some seconds.
"""

import copy

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from gn_transfer.layers import convert_norm


class SpatialSoftmax(nn.Module):
    """Turn every feature map into the place where it is strongest, in [-1, 1]."""

    def forward(self, features: Tensor) -> Tensor:
        """From ``(B, C, H, W)`` to ``(B, 2 C)``."""
        weights = features.flatten(2).softmax(2).view_as(features)
        rows = torch.linspace(-1, 1, features.shape[2], device=features.device)
        columns = torch.linspace(-1, 1, features.shape[3], device=features.device)
        return torch.cat([(weights.sum(3) * rows).sum(2), (weights.sum(2) * columns).sum(2)], dim=1)


def encoder(backbone: nn.Module) -> nn.Sequential:
    """Take the feature maps of a ResNet of torchvision."""
    return nn.Sequential(*list(backbone.children())[:-2], SpatialSoftmax())


def main(backbone: nn.Module | None = None, images: Tensor | None = None) -> tuple[float, float]:
    """Convert an encoder both ways; give the errors of its feature maps, as shares of their variance."""
    # weights="DEFAULT" loads those of ImageNet, and the images come from the cameras, normalized as the weights expect.
    original = encoder(backbone or resnet18(weights=None)).eval()
    images = torch.randn(16, 3, 96, 96) if images is None else images
    replaced = convert_norm(copy.deepcopy(original), "gn", group_size=16)
    calibrated = convert_norm(copy.deepcopy(original), "gn", num_groups=4, calibration=list(images.split(8)))
    with torch.no_grad():
        right = original[:-1](images)
        errors = [float((model[:-1](images) - right).var() / right.var()) for model in (replaced, calibrated)]
    print(f"error of the feature maps: replaced {errors[0]:.0%}, calibrated {errors[1]:.0%} of their variance")
    return errors[0], errors[1]


if __name__ == "__main__":
    main()
