"""A model of segmentation_models_pytorch at batch size 1: frozen BatchNorm in the encoder, GroupNorm in the decoder.

    python examples/smp_segmentation.py

A pretrained encoder has statistics that are worth keeping. A decoder starts from random weights and has none, so
freezing it would freeze nothing useful. The two are converted one after the other.
"""

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

from gn_transfer.layers import FrozenBatchNorm2d, GroupNorm, convert_norm


def main() -> torch.nn.Module:
    """Take two steps at batch size 1."""
    model = smp.Unet("resnet18", encoder_weights=None, classes=2)  # encoder_weights="imagenet" needs a network
    convert_norm(model.decoder, "gn")
    convert_norm(model.encoder, "bn_frozen")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    image, mask = torch.randn(1, 3, 64, 64), torch.randint(0, 2, (1, 64, 64))
    model.train()
    for _ in range(2):
        loss = F.cross_entropy(model(image), mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kinds = [type(layer) for layer in model.modules()]
    frozen, grouped = (sum(issubclass(kind, norm) for kind in kinds) for norm in (FrozenBatchNorm2d, GroupNorm))
    print(f"{frozen} frozen batch norms, {grouped} group norms, loss {loss:.3f}")
    return model


if __name__ == "__main__":
    main()
