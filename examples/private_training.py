"""Differential privacy with Opacus: BatchNorm is forbidden there, because an image changes what its neighbours become.

    python examples/private_training.py

Opacus' own ``ModuleValidator.fix`` puts fresh group norms in place of the batch norms. A calibrated conversion keeps
most of what pretrained weights compute.
"""

import copy
import warnings

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import mobilenet_v2

from gn_transfer.layers import convert_norm


def out_of_place(model: nn.Module) -> nn.Module:
    """Let activations make new tensors, which the hooks of Opacus need.

    For the same reason this is no ResNet of torchvision: its blocks add in place, which fails with Opacus 1.6.
    """
    for layer in model.modules():
        if hasattr(layer, "inplace"):
            layer.inplace = False
    return model


def main(model: nn.Module | None = None, images: Tensor | None = None) -> dict[str, float]:
    """Convert, compare, and take a private step."""
    model = out_of_place(model or mobilenet_v2(num_classes=3)).eval()
    images = torch.randn(8, 3, 64, 64) if images is None else images
    ours = convert_norm(copy.deepcopy(model), "gn", num_groups=4, calibration=[images])
    theirs = ModuleValidator.fix(copy.deepcopy(model)).eval()
    with torch.no_grad():
        right = model(images)
        errors = {
            "opacus": float((theirs(images) - right).norm() / (right - right.mean(0)).norm()),
            "gn_transfer": float((ours.eval()(images) - right).norm() / (right - right.mean(0)).norm()),
        }
    print("; ".join(f"{name}: outputs {error:.0%} away from those of the model" for name, error in errors.items()))
    assert ModuleValidator.validate(ours.train(), strict=False) == []

    targets = torch.arange(len(images)) % right.shape[1]
    loader = DataLoader(TensorDataset(images, targets), batch_size=4)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus says that its random numbers are not for production
        private, optimizer, loader = PrivacyEngine().make_private(
            module=ours, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
        )
        for pixels, classes in loader:
            if len(pixels):  # Poisson sampling may choose no image
                F.cross_entropy(private(pixels), classes).backward()
                optimizer.step()
                optimizer.zero_grad()
    return errors


if __name__ == "__main__":
    main()
