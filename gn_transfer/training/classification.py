"""Image classification: cross entropy, Mixup and CutMix, accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from gn_transfer.backbones.model_config import ModelConfig
from gn_transfer.config import ConfigError, check_range
from gn_transfer.data import ImageDataModule
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.segmentation import SegmentationDataModule
from gn_transfer.training.classification_figures import ClassificationFigures, training_contact_sheet
from gn_transfer.training.mixing import MixupCutmix
from gn_transfer.training.optimizer import OptimizerConfig
from gn_transfer.training.task import TransferTask

_LARGEST_ALPHA = 1000.0  # Beta(1000, 1000) is one half already


@dataclass
class RegularizationConfig:
    """Regularization of a classifier.

    Args:
        label_smoothing: Weight of the uniform distribution in the training target, in [0, 1).
        mixup: alpha of Mixup with the previous image of the accumulation step. 0 disables it.
        cutmix: alpha of CutMix with that image. 0 disables it. With both, each image gets one of them at random.
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_range("regularization.label_smoothing", self.label_smoothing, low=0.0, high=1.0)
        check_range("regularization.mixup", self.mixup, low=0.0, high=_LARGEST_ALPHA, open_high=False)
        check_range("regularization.cutmix", self.cutmix, low=0.0, high=_LARGEST_ALPHA, open_high=False)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0


class TransferClassifier(TransferTask):
    """Fine-tune a timm model to classify images.

    Args:
        model: Backbone, norm and weights; None takes the defaults.
        optimizer: Optimizer and learning rates; None takes the defaults.
        regularization: Label smoothing, Mixup and CutMix; None disables them.

    Example:
        >>> module = TransferClassifier(ModelConfig("resnet18", "gn_ws"), OptimizerConfig(lr=0.01))
        >>> module.build(["cat", "dog"])
        >>> module(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([1, 2])
    """

    monitor: ClassVar[str] = "val/acc1"

    def __init__(
        self,
        model: ModelConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        regularization: RegularizationConfig | None = None,
    ) -> None:
        super().__init__(model, optimizer)
        if self.model_config.decoder is not None:
            raise ConfigError(
                f"model.decoder={self.model_config.decoder} is for segmentation, and these images are classified as a "
                "whole; leave it out, or give images with masks."
            )
        self.regularization = regularization or RegularizationConfig()
        self._mixer: MixupCutmix | None = None

    def build_for(self, data: object) -> None:
        """Build the model for a data module that is set up; see :meth:`BackboneModule.build_for`."""
        if isinstance(data, SegmentationDataModule):
            raise ConfigError(
                f"{type(data).__name__} has masks, and this module classifies whole images; train a "
                "TransferSegmenter, or give images by class."
            )
        super().build_for(data)

    def configure_metrics(self, num_classes: int) -> MetricCollection:
        """Create top-1 accuracy over images (``acc1``) and averaged over classes (``acc_per_class``)."""
        return MetricCollection(
            {
                "acc1": MulticlassAccuracy(num_classes, average="micro"),
                "acc_per_class": MulticlassAccuracy(num_classes, average="macro"),
            }
        )

    def training_sheet(self, data: ImageDataModule, count: int) -> np.ndarray:
        """Draw training images with their labels, mixed as in training."""
        return training_contact_sheet(data, self.create_mixer(data.seed, 0), count)

    def create_figures(self) -> ClassificationFigures:
        """Create the confusion matrix and the worst predictions."""
        return ClassificationFigures(self.classes, self.device)

    def own_config(self) -> dict[str, dict[str, Any]]:
        """Give the keys ``regularization``."""
        return {"regularization": asdict(self.regularization)}

    def on_fit_start(self) -> None:
        """Prepare Mixup and CutMix, and compile."""
        super().on_fit_start()
        self._mixer = self.create_mixer(getattr(self.trainer.datamodule, "seed", 0), self.global_rank)  # type: ignore[attr-defined]

    def create_mixer(self, seed: int, rank: int) -> MixupCutmix | None:
        """Create what mixes training images; None without Mixup and CutMix."""
        config = self.regularization
        return MixupCutmix(config.mixup, config.cutmix, (seed, rank)) if config.mixes else None

    def check_accumulation(self, images_per_step: int) -> None:
        """Refuse Mixup and CutMix where an accumulation step has one image only.

        Raises:
            ConfigError: There is nothing to mix it with.
        """
        config = self.regularization
        if images_per_step < 2 and config.mixes:
            raise ConfigError(
                f"regularization.mixup={config.mixup:g}, regularization.cutmix={config.cutmix:g}: images are mixed "
                "within an accumulation step, and this one has a single image; set "
                "accumulation.effective_batch_size to 2 or more, or both to 0."
            )

    def describe_recipe(self) -> list[str]:
        """Say how images are mixed."""
        config = self.regularization
        return [f"mixup {config.mixup:g}, cutmix {config.cutmix:g}, with the previous image"] if config.mixes else []

    def training_loss(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Compute cross entropy with label smoothing, class weights and mixed images.

        Args:
            pixels: Normalized pixels, shape ``(B, in_chans, H, W)``.
            targets: Class indices, int64, shape ``(B,)``.
        """
        if self._mixer is None:
            return self._cross_entropy(self.compute_logits(pixels), targets).mean()
        mixed = self._mixer(pixels, targets, step=self.micro_batch.step, offset=self.micro_batch.offset)
        logits = self.compute_logits(mixed.pixels)
        own, partners = self._cross_entropy(logits, targets), self._cross_entropy(logits, mixed.partners)
        return torch.lerp(partners, own, mixed.weights).mean()

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.float(),
            targets,
            weight=self.class_weight,
            label_smoothing=self.regularization.label_smoothing,
            reduction="none",
        )

    def score_images(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Give the predicted class, and the probabilities of the true and of the predicted class."""
        probs = logits.double().softmax(dim=1)
        of_target = probs.gather(1, targets.unsqueeze(1)).squeeze(1)
        highest, predicted = probs.max(dim=1)
        return torch.stack([predicted.double(), of_target, highest])

    def describe_scores(
        self, scores: Tensor, images: Sequence[LabeledImage]
    ) -> tuple[Sequence[str], Iterable[Sequence[object]]]:
        """Name path and classes; target and predicted are followed by the probabilities of either."""
        rows = (
            [image.path, self.classes[image.target], self.classes[int(index)], f"{target:.5g}", f"{predicted:.5g}"]
            for image, (index, target, predicted) in zip(images, scores.t().tolist(), strict=True)
        )
        return ("path", "target", "predicted", "prob_target", "prob_predicted"), rows

    def guess(self, scores: Tensor, images: Sequence[LabeledImage]) -> float:
        """Give the share of the most frequent class."""
        return max(Counter(image.target for image in images).values()) / len(images)

    def evaluation_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute plain cross entropy: no smoothing, no class weights."""
        return F.cross_entropy(logits.float(), targets, reduction="none")
