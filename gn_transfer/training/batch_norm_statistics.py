"""Running statistics of batch norms during a training: their momentum, re-estimation and use in evaluation."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from gn_transfer.backbones import BN_FAMILY, ModelConfig
from gn_transfer.config import ConfigError, check_range
from gn_transfer.layers import batch_statistics, corrected_momentum, reestimate_statistics
from gn_transfer.layers.batch_norm import batch_norms

FROZEN_STATISTICS_BATCH = 32
"""Batch size with which the statistics of frozen batch norms are re-estimated; they never see the training batch."""


class BatchNormStatistics(Callback):
    """Control the running statistics of batch norms.

    Args:
        momentum: Weight of a micro-batch in the running statistics, in (0, 1]. corrected means
            1 - 0.9^(batch_size / 16), so that small micro-batches forget no faster per image. null keeps 0.1.
        reestimate_images: Number of training images on which the statistics are re-estimated, by pooling E[x] and
            E[x^2]: before each validation, those of frozen batch norms once before training. 0 disables it.
        evaluation: Statistics used in evaluation: running, or batch. batch uses those of the current batch, which then
            has data.batch_size images as in training. It separates bad running statistics from a bad function.
    """

    def __init__(
        self,
        momentum: float | Literal["corrected"] | None = None,
        reestimate_images: int = 0,
        evaluation: Literal["running", "batch"] = "running",
    ) -> None:
        if isinstance(momentum, float):
            check_range("batch_norm.momentum", momentum, low=0.0, high=1.0, open_low=True, open_high=False)
        check_range("batch_norm.reestimate_images", reestimate_images, low=0)
        self.momentum = momentum
        self.reestimate_images = reestimate_images
        self.evaluation: Literal["running", "batch"] = evaluation
        self._batch_statistics = ExitStack()

    def check(self, model: ModelConfig) -> None:
        """Refuse settings that mean nothing for the norms of a model.

        Raises:
            ConfigError: Norms without batch statistics.
        """
        for key, given in (("momentum", self.momentum is not None), ("reestimate_images", self.reestimate_images > 0)):
            if given and BN_FAMILY.isdisjoint(model.norms):
                raise ConfigError(
                    f"batch_norm.{key} is for batch norms, and model.norm={model.norm} has none; leave it out."
                )
        if self.evaluation == "batch" and model.norm_over_batch is None:
            raise ConfigError(
                f"batch_norm.evaluation=batch: model.norm={model.norm} takes no statistics from a batch; use running, "
                f"or a norm of {', '.join(sorted(BN_FAMILY - {'bn_frozen'}))}."
            )

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Check the settings against the norm."""
        self.check(pl_module.model_config)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Set the momentum, and re-estimate frozen statistics where a run begins."""
        if self.momentum is not None:
            batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
            value = corrected_momentum(batch_size) if self.momentum == "corrected" else self.momentum
            for layer in pl_module.model.modules():
                if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
                    layer.momentum = value
        if trainer.ckpt_path is None:
            self._reestimate(trainer, pl_module, FROZEN_STATISTICS_BATCH, frozen=True)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Re-estimate the statistics with the size of the training batch, and switch to batch statistics.

        An average of the weights has taken the place of the weights before.
        """
        if trainer.state.fn == "fit":
            self._reestimate(trainer, pl_module, trainer.datamodule.batch_size, frozen=False)  # type: ignore[attr-defined]
        self.on_test_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave batch statistics."""
        self._batch_statistics.close()

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Switch to batch statistics."""
        if self.evaluation == "batch":
            self._batch_statistics.enter_context(batch_statistics(pl_module.model))

    on_test_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave batch statistics."""
        self._batch_statistics.close()

    def _reestimate(self, trainer: Trainer, pl_module: Any, batch_size: int, *, frozen: bool) -> None:
        layers = batch_norms(pl_module.model, frozen=frozen)
        if self.reestimate_images and layers:
            images = trainer.datamodule.training_images(self.reestimate_images)  # type: ignore[attr-defined]
            batches = (pl_module.normalize(part.to(pl_module.device)) for part in torch.split(images, batch_size))
            reestimate_statistics(pl_module.model, batches, layers=layers)
