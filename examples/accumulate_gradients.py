"""The accumulation engine in a plain loop: weights are standardized and cast once per optimizer step.

python examples/accumulate_gradients.py
"""

import torch
import torch.nn.functional as F
from torchvision.models import resnet18

from gn_transfer.layers import AccumulationEngine, convert_norm


def main(*, engine: bool = True) -> dict[str, torch.Tensor]:
    """Train on two steps of eight images, one at a time; without the engine the result is the same."""
    torch.manual_seed(0)
    model = convert_norm(resnet18(num_classes=3), "gn_ws", skip={"fc"}).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, targets = torch.randn(16, 3, 64, 64), torch.arange(16) % 3
    accumulation = AccumulationEngine(model) if engine else None
    for start in (0, 8):
        for index in range(start, start + 8):
            if accumulation is not None:
                accumulation.micro_batch(first=index == start, last=index == start + 7)
            loss = F.cross_entropy(model(images[index : index + 1]), targets[index : index + 1])
            (loss / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
    if accumulation is not None:
        accumulation.remove()
    print(f"loss of the last image {loss:.4f}")
    return model.state_dict()


if __name__ == "__main__":
    main()
