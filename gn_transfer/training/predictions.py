"""What the model says of each image of an evaluation, so that two runs can be compared image by image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gn_transfer.data.dataset import LabeledImage
from gn_transfer.files import write_csv

COLUMNS = ("path", "target", "predicted", "prob_target", "prob_predicted")
"""Columns of the file; target and predicted are class names, followed by the probabilities of either."""


class ImagePredictions(Callback):
    """Keep the predictions of the latest validation or test; a softmax per batch and three numbers per image.

    Attributes:
        predicted: Class index per image, in the order of the split; complete when the evaluation has ended.
        prob_target: Probability of the true class, likewise.
        prob_predicted: Probability of the predicted class, likewise.
    """

    def __init__(self) -> None:
        self.predicted: list[int] = []
        self.prob_target: list[float] = []
        self.prob_predicted: list[float] = []
        self._parts: list[Tensor] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the evaluation before."""
        self._parts = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch; nothing waits for the device."""
        probs = outputs.double().softmax(dim=1)
        of_target = probs.gather(1, batch[1].unsqueeze(1)).squeeze(1)
        highest, predicted = probs.max(dim=1)
        self._parts.append(torch.stack([predicted.double(), of_target, highest]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the images of all processes back into the order of the split."""
        ranks = pl_module.all_gather(torch.cat(self._parts, dim=1))
        assert isinstance(ranks, Tensor)
        predicted, self.prob_target, self.prob_predicted = in_order(ranks.reshape(-1, 3, ranks.shape[-1])).tolist()
        self.predicted = [int(index) for index in predicted]
        self._parts = []

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def write(self, path: Path, images: list[LabeledImage], classes: list[str]) -> None:
        """Write the file.

        Args:
            path: Its folder exists.
            images: The split in order; where only its beginning was evaluated, only that is written.
            classes: Class names.
        """
        rows = zip(images, self.predicted, self.prob_target, self.prob_predicted, strict=False)
        write_csv(
            path,
            COLUMNS,
            (
                [image.path, classes[image.target], classes[index], f"{of_target:.5g}", f"{of_predicted:.5g}"]
                for image, index, of_target, of_predicted in rows
            ),
        )


def in_order(ranks: Tensor) -> Tensor:
    """Undo the dealing of an unshuffled split to ranks in turn.

    Args:
        ranks: What each rank has, shape ``(world_size, K, N)``: rank r's n-th is image ``r + n * world_size``.

    Returns:
        Shape ``(K, world_size * N)``; at the end the images repeat that filled the ranks up.
    """
    return ranks.permute(1, 2, 0).flatten(1)
