"""What the model says of each image of an evaluation, so that two runs can be compared image by image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from gn_transfer.data.dataset import LabeledImage
from gn_transfer.files import write_csv


class ImagePredictions(Callback):
    """Keep what the latest validation or test says of every image; what that is, the task decides.

    Attributes:
        scores: Shape ``(S, N)``, float64, the images in the order of the split; complete when the evaluation has ended.
    """

    def __init__(self) -> None:
        self.scores = torch.empty(0, 0, dtype=torch.float64)
        self._parts: list[Tensor] = []

    @property
    def count(self) -> int:
        """Number of images that were evaluated."""
        return self.scores.shape[1]

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget the evaluation before."""
        self._parts = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch; nothing waits for the device."""
        self._parts.append(pl_module.score_images(outputs, batch[1]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Bring the images of all processes back into the order of the split."""
        ranks = pl_module.all_gather(torch.cat(self._parts, dim=1))
        assert isinstance(ranks, Tensor)
        self.scores = in_order(ranks.reshape(-1, *ranks.shape[-2:])).cpu()
        self._parts = []

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def write(self, path: Path, images: list[LabeledImage], task: Any) -> None:
        """Write the file.

        Args:
            path: Its folder exists.
            images: The split in order; where only its beginning was evaluated, only that is written.
            task: The module that gave the scores.
        """
        evaluated = images[: self.count]
        columns, rows = task.describe_scores(self.scores[:, : len(evaluated)], evaluated)
        write_csv(path, columns, rows)


def in_order(ranks: Tensor) -> Tensor:
    """Undo the dealing of an unshuffled split to ranks in turn.

    Args:
        ranks: What each rank has, shape ``(world_size, K, N)``: rank r's n-th is image ``r + n * world_size``.

    Returns:
        Shape ``(K, world_size * N)``; at the end the images repeat that filled the ranks up.
    """
    return ranks.permute(1, 2, 0).flatten(1)
