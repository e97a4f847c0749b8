"""What every task shares: one step for training, validation and test, the optimizer."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from gn_transfer.backbones import ModelConfig, parameter_depths
from gn_transfer.config import ConfigError
from gn_transfer.data import ImageDataModule
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.training.accumulation import GradientAccumulation, MicroBatch
from gn_transfer.training.backbone_module import BackboneModule
from gn_transfer.training.optimizer import OptimizerConfig

Batch = tuple[Tensor, Tensor]

WORST = "val/worst_predictions"
"""Name of the sheet of the worst images in TensorBoard."""


class EvaluationFigures(Protocol):
    """Figures of an evaluation, made batch by batch."""

    def update(self, logits: Tensor, images: Tensor, targets: Tensor) -> None:
        """Take a batch: the model's output, pixels uint8 ``(B, C, H, W)``, and targets."""

    def draw(self) -> tuple[dict[str, Figure], dict[str, np.ndarray]]:
        """Give figures and images (uint8, ``(H, W, 3)``) by their name in TensorBoard."""
        ...


class TransferTask(BackboneModule):
    """Fine-tune a model: a task names its losses and metrics, this class runs the steps.

    Args:
        model: Backbone, norm and weights; None takes the defaults.
        optimizer: Optimizer and learning rates; None takes the defaults.

    Attributes:
        micro_batch: Place of the micro-batch in its accumulation step; the accumulation callback sets it.
    """

    monitor: ClassVar[str]
    """The metric that chooses the best checkpoint, such as ``val/acc1``; higher is better."""

    def __init__(self, model: ModelConfig | None = None, optimizer: OptimizerConfig | None = None) -> None:
        super().__init__(model)
        self.optimizer_config = optimizer or OptimizerConfig()
        self.micro_batch = MicroBatch()
        self._images_left = sys.maxsize
        self.own_images_of_batch = 0

    # -- what a task defines ------------------------------------------------------------------------------------

    @abstractmethod
    def training_loss(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean loss of a micro-batch of normalized pixels; scalar, float32."""

    @abstractmethod
    def evaluation_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss in evaluation of each image that counts; float32, shape ``(n,)`` with n at most ``B``."""

    @abstractmethod
    def score_images(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Tell what is kept of every image of an evaluation: shape ``(S, B)``, float64."""

    @abstractmethod
    def describe_scores(
        self, scores: Tensor, images: Sequence[LabeledImage]
    ) -> tuple[Sequence[str], Iterable[Sequence[object]]]:
        """Give the table of the scores of images, shape ``(S, N)``: its columns and a row for every image."""

    @abstractmethod
    def guess(self, scores: Tensor, images: Sequence[LabeledImage]) -> float:
        """Tell what :attr:`monitor` is for a model that always names the most frequent class.

        Args:
            scores: Of the validation images, shape ``(S, N)``.
            images: The validation images.
        """

    @abstractmethod
    def training_sheet(self, data: ImageDataModule, count: int) -> np.ndarray:
        """Lay out the first training images as the model sees them: pixels uint8, shape ``(H, W, 3)``."""

    @abstractmethod
    def create_figures(self) -> EvaluationFigures:
        """Create the figures of a validation for TensorBoard."""

    @abstractmethod
    def own_config(self) -> dict[str, dict[str, Any]]:
        """Give the keys that only this task has, by group."""

    def check_accumulation(self, images_per_step: int) -> None:
        """Refuse an accumulation step that the task cannot use; nothing to refuse here.

        Args:
            images_per_step: Images of an accumulation step, on one device.
        """

    def describe_recipe(self) -> list[str]:
        """Lines of the plan about the task's own training recipe; none here."""
        return []

    # -- the steps ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Train on a micro-batch; its loss is scaled by its place in the accumulation step."""
        images, targets = batch
        loss = self.training_loss(self.normalize(images), targets)
        return {"loss": loss * self.micro_batch.loss_scale, "mean_loss": loss.detach()}

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Evaluate a batch of validation images."""
        return self._evaluation_step(batch, self.val_metrics, self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Evaluate a batch of test images."""
        return self._evaluation_step(batch, self.test_metrics, self.test_loss)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the probabilities of the classes, float32."""
        with torch.autocast(self.device.type, enabled=False):
            probs: Tensor = self(batch[0]).softmax(dim=1)
        return probs

    def _evaluation_step(self, batch: Batch, metrics: MetricCollection, mean_loss: MeanMetric) -> Tensor:
        images, targets = batch
        with torch.autocast(self.device.type, enabled=False):  # evaluation is float32 whatever the training precision
            logits: Tensor = self(images)
            own = self.own_images_of_batch = min(len(targets), self._images_left)
            self._images_left -= own
            if own:
                mean_loss.update(self.evaluation_losses(logits[:own], targets[:own]))
        if own:
            metrics.update(logits[:own], targets[:own])
        return logits

    def on_validation_epoch_start(self) -> None:
        """Count the images of this process that are no repetitions."""
        self._images_left = self._own_images("val_dataset")

    def on_test_epoch_start(self) -> None:
        """Count the images of this process that are no repetitions."""
        self._images_left = self._own_images("test_dataset")

    def _own_images(self, dataset: str) -> int:
        """Count the images that this process has to evaluate; what fills up the processes' last batches comes after."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, dataset):  # loaders of the user's own
            return sys.maxsize
        return len(range(self.trainer.global_rank, len(getattr(data, dataset)), self.trainer.world_size))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics and the loss of a validation."""
        self._log_epoch(self.val_metrics, self.val_loss, "val/loss")

    def on_test_epoch_end(self) -> None:
        """Log the metrics and the loss of a test."""
        self._log_epoch(self.test_metrics, self.test_loss, "test/loss")

    def _log_epoch(self, metrics: MetricCollection, mean_loss: MeanMetric, loss_name: str) -> None:
        self.log_dict({**metrics.compute(), loss_name: mean_loss.compute()}, prog_bar=False)
        metrics.reset()
        mean_loss.reset()

    def on_load_checkpoint(self, content: dict[str, Any]) -> None:
        """Refuse a checkpoint of other classes, and to train on from one that lacks a part of the training's state.

        Lightning would begin that part anew in silence.

        Raises:
            ConfigError: See there.
        """
        super().on_load_checkpoint(content)
        loops = content.get("loops")
        if self.trainer.state.fn == "fit" and not (
            all(content.get(key) for key in ("callbacks", "optimizer_states", "lr_schedulers"))
            and isinstance(loops, dict)
            and "epoch_progress" in loops.get("fit_loop", {})
            and _has_numbers(content)
        ):
            raise ConfigError(
                "the checkpoint lacks a part of the state of its training (optimizer, schedule, loops or callbacks), "
                "so no run can go on from it; to start a new run from its weights, set model.pretrained to it."
            )

    # -- optimization -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the fused optimizer and the schedule over optimizer steps."""
        assert self.model is not None
        config = self.optimizer_config
        depths = parameter_depths(self.model) if config.layer_decay < 1 else None
        # A fused optimizer unscales fp16 gradients inside its step, so their norm before it would be another one.
        fused = config.clip_norm is None or self.trainer.precision != "16-mixed"
        optimizer = config.create_optimizer(self.model, self.head, depths, fused=fused)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulation):
                callback.count_micro_batches(self.trainer)
        scheduler = config.create_scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Scale down the gradient of an optimizer step whose norm exceeds ``optimizer.clip_norm``."""
        if gradient_clip_val is not None:  # of a Trainer that was made in Python
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.optimizer_config.clip_norm is not None:
            assert self.model is not None
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizer_config.clip_norm)


def _has_numbers(content: dict[str, Any]) -> bool:
    """Say whether optimizer and schedule of a checkpoint hold numbers where they calculate with them."""
    try:
        groups = [group for state in content["optimizer_states"] for group in state["param_groups"]]
        values = [group[key] for group in groups for key in ("lr", "initial_lr", "weight_decay")]
        for schedule in content["lr_schedulers"]:
            values += [schedule["last_epoch"], *schedule["base_lrs"]]
    except (TypeError, KeyError, AttributeError):
        return False
    return bool(groups) and all(isinstance(value, int | float) for value in values)
