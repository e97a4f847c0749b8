"""Figures in TensorBoard: what the net sees; of a validation, the confusion matrix and the pictures that went worst."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from gn_transfer.classifier import TransferClassifier
from gn_transfer.data import PictureData
from gn_transfer.data.sampler import epoch_order
from gn_transfer.data.sheet import contact_sheet
from gn_transfer.figures import confusion_figure, picture_grid
from gn_transfer.mixing import WindowMixer


def training_sheet(data: PictureData, mixer: WindowMixer | None, count: int) -> np.ndarray:
    """Show the first training pictures of epoch 0 as the net sees them, with their labels.

    Args:
        data: Set up for fit.
        mixer: What mixes training pictures, or None.
        count: How many to show, as one window where they are mixed.

    Returns:
        Pixels uint8, shape ``(H, W, 3)``.
    """
    dataset, sampler = data.train_dataset, data.train_sampler
    order = epoch_order(len(dataset), sampler.seed, 0, sampler.shuffle)[:count]
    images, targets = dataset.batch([(0, index) for index in order])
    captions = [[data.classes[target]] for target in targets.tolist()]
    if mixer is not None:
        mixed = mixer(images.float(), targets, window=0, offset=0)
        images = mixed.pixels.round().byte()
        for caption, partner, weight in zip(captions, mixed.partners.tolist(), mixed.weights.tolist(), strict=True):
            caption.append(f"{weight:.0%}, {data.classes[partner]} {1 - weight:.0%}" if weight < 1 else "100%")
    pixels = images.permute(0, 2, 3, 1).numpy()
    return contact_sheet(list(zip(pixels, captions, strict=True)))


class TrainingPictures(Callback):
    """Log a contact sheet of training pictures to TensorBoard at the start of ``fit``.

    Args:
        count: How many pictures to show.
    """

    def __init__(self, count: int = 24) -> None:
        self.count = count

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw into each TensorBoard logger."""
        assert isinstance(pl_module, TransferClassifier)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not loggers or not trainer.is_global_zero:
            return
        data: PictureData = trainer.datamodule  # type: ignore[attr-defined]
        sheet = training_sheet(data, pl_module.create_mixer(data.seed, 0), self.count)
        for logger in loggers:
            logger.experiment.add_image("train/pictures", sheet, trainer.global_step, dataformats="HWC")


class ValidationFigures(Callback):
    """Log a confusion matrix and the worst predictions of each validation to TensorBoard.

    Args:
        worst: How many pictures to show, those with the highest loss.
    """

    def __init__(self, worst: int = 12) -> None:
        self.worst = worst
        self._confusion: np.ndarray | None = None
        self._heap: list[tuple[float, int, np.ndarray, int, int, float]] = []
        self._serial = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the validation before."""
        assert isinstance(pl_module, TransferClassifier)
        self._confusion = np.zeros((len(pl_module.classes),) * 2, dtype=np.int64)
        self._heap, self._serial = [], 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count, and keep the worst pictures seen so far; copies only those."""
        assert self._confusion is not None
        images, targets = batch
        probs = F.softmax(outputs.float(), dim=1)
        preds = probs.argmax(dim=1)
        losses = F.cross_entropy(outputs.float(), targets, reduction="none")
        np.add.at(self._confusion, (targets.cpu().numpy(), preds.cpu().numpy()), 1)
        for index, loss in enumerate(losses.tolist()):
            if len(self._heap) == self.worst and loss <= self._heap[0][0]:
                continue
            self._serial += 1
            pixels = images[index].expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy().copy()  # grey, too
            pred = int(preds[index])
            entry = (loss, self._serial, pixels, int(targets[index]), pred, float(probs[index, pred]))
            (heapq.heappush if len(self._heap) < self.worst else heapq.heapreplace)(self._heap, entry)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw into each TensorBoard logger."""
        assert isinstance(pl_module, TransferClassifier)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or not loggers or not self._heap or not trainer.is_global_zero:
            return
        assert self._confusion is not None
        classes = pl_module.classes
        confusion = confusion_figure(self._confusion, classes)
        worst = picture_grid(
            [
                (pixels, f"{classes[target]}\nseen as {classes[pred]} ({prob:.0%})")
                for _, _, pixels, target, pred, prob in sorted(self._heap, key=lambda entry: -entry[0])
            ]
        )
        for logger in loggers:
            logger.experiment.add_figure("val/confusion", confusion, global_step=trainer.global_step)
            logger.experiment.add_figure("val/worst_predictions", worst, global_step=trainer.global_step)
