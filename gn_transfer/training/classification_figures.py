"""What TensorBoard shows of a classification: training images with their labels, confusion, the worst predictions."""

from __future__ import annotations

import heapq

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from gn_transfer.data import ImageDataModule
from gn_transfer.data.contact_sheet import contact_sheet
from gn_transfer.data.sampler import epoch_order
from gn_transfer.training.mixing import MixupCutmix
from gn_transfer.training.task import WORST


def training_contact_sheet(data: ImageDataModule, mixer: MixupCutmix | None, count: int) -> np.ndarray:
    """Show the first training images of epoch 0 as the model sees them, with their labels.

    Args:
        data: Set up for fit.
        mixer: What mixes training images, or None.
        count: How many to show, as one accumulation step where they are mixed.

    Returns:
        Pixels uint8, shape ``(H, W, 3)``.
    """
    dataset, sampler = data.train_dataset, data.train_sampler
    order = epoch_order(len(dataset), sampler.seed, 0, sampler.shuffle)[:count]
    images, targets = dataset.batch([(0, index) for index in order])
    captions = [[data.classes[target]] for target in targets.tolist()]
    if mixer is not None:
        mixed = mixer(images.float(), targets, step=0, offset=0)
        images = mixed.pixels.round().byte()
        for caption, partner, weight in zip(captions, mixed.partners.tolist(), mixed.weights.tolist(), strict=True):
            caption.append(f"{weight:.0%}, {data.classes[partner]} {1 - weight:.0%}" if weight < 1 else "100%")
    pixels = images.permute(0, 2, 3, 1).numpy()
    return contact_sheet(list(zip(pixels, captions, strict=True)))


class ClassificationFigures:
    """A confusion matrix and the images with the highest loss.

    Args:
        classes: Their names.
        device: Where the predictions are.
        worst: How many images to show.
    """

    def __init__(self, classes: list[str], device: torch.device, worst: int = 12) -> None:
        self.classes = classes
        self.worst = worst
        self._confusion = MulticlassConfusionMatrix(len(classes)).to(device)
        self._heap: list[tuple[float, int, np.ndarray, int, int, float]] = []
        self._serial = 0

    def update(self, logits: Tensor, images: Tensor, targets: Tensor) -> None:
        """Count, and keep the worst images so far; only those are copied."""
        self._confusion.update(logits, targets)
        probs = F.softmax(logits.float(), dim=1)
        preds = probs.argmax(dim=1)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        for index, loss in enumerate(losses.tolist()):
            if len(self._heap) == self.worst and loss <= self._heap[0][0]:
                continue
            self._serial += 1
            pixels = images[index].expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy().copy()  # grey, too
            pred = int(preds[index])
            entry = (loss, self._serial, pixels, int(targets[index]), pred, float(probs[index, pred]))
            (heapq.heappush if len(self._heap) < self.worst else heapq.heapreplace)(self._heap, entry)

    def draw(self) -> tuple[dict[str, Figure], dict[str, np.ndarray]]:
        """Draw both; nothing where nothing was evaluated."""
        if not self._heap:
            return {}, {}
        classes = self.classes
        labels = [name.replace("$", r"\$") for name in classes]  # between two dollars, matplotlib reads mathematics
        figure, _ = self._confusion.plot(labels=labels, add_text=len(classes) <= 20, cmap="Blues")
        size = min(14.0, 3.0 + 0.35 * len(classes))
        figure.set_size_inches(size, size)
        worst = contact_sheet(
            [
                (pixels, [classes[target], f"predicted {classes[pred]}", f"probability {prob:.0%}"])
                for _, _, pixels, target, pred, prob in sorted(self._heap, key=lambda entry: -entry[0])
            ],
            columns=4,
        )
        return {"val/confusion": figure}, {WORST: worst}
