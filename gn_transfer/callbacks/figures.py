"""Figures of a validation in TensorBoard: the confusion matrix and the pictures that went worst."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from gn_transfer.classifier import TransferClassifier
from gn_transfer.figures import confusion_figure, picture_grid


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
            pixels = images[index].permute(1, 2, 0).contiguous().cpu().numpy().copy()
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
