"""Convert a detector of torchvision to GroupNorm, and train it on one image at a time.

    python examples/torchvision_detector.py

torchvision's detectors have batch norms in the backbone. Convert that; the heads have none. ``gn_ws`` would also
standardize convolutions: give it the backbone alone.
"""

import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from gn_transfer.layers import convert_norm, group_counts


def main() -> dict[str, float]:
    """Take three steps at batch size 1."""
    torch.manual_seed(0)
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=96, max_size=128
    )
    # With pretrained weights, add calibration=batches: tensors (B, 3, H, W), normalized as the detector does it.
    convert_norm(detector.backbone, "gn", group_size=8)
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.005)
    image = torch.rand(3, 96, 128)
    target = {"boxes": torch.tensor([[8.0, 8.0, 64.0, 80.0]]), "labels": torch.tensor([1])}
    detector.train()
    for _ in range(3):
        losses = detector([image], [target])
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{len(group_counts(detector))} group norms; losses {', '.join(f'{k} {v:.3f}' for k, v in losses.items())}")
    return {name: loss.item() for name, loss in losses.items()}


if __name__ == "__main__":
    main()
