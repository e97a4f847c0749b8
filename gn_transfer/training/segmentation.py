"""Semantic segmentation: cross entropy and Dice over labeled pixels, intersection over union, whole images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import DiceLoss
from torch import Tensor
from torchmetrics import ClasswiseWrapper, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex

from gn_transfer.backbones.model_config import DEFAULT_DECODER, ModelConfig
from gn_transfer.config import STRIDE, ConfigError
from gn_transfer.data import ImageDataModule
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.masks import IGNORED
from gn_transfer.data.segmentation import SegmentationDataModule
from gn_transfer.data.tiles import blending_window, padded, tile_places
from gn_transfer.training.optimizer import OptimizerConfig
from gn_transfer.training.pixel_counts import count_pixels, mean_iou
from gn_transfer.training.segmentation_figures import SegmentationFigures, training_pairs
from gn_transfer.training.task import TransferTask


@dataclass
class SegmentationConfig:
    """The loss of a segmentation.

    Args:
        loss: cross_entropy, dice (mean over the classes of an image), or both (their sum).
    """

    loss: Literal["cross_entropy", "dice", "both"] = "both"


class TransferSegmenter(TransferTask):
    """Fine-tune a timm model with a decoder to classify every pixel.

    The loss of an image is the mean over its labeled pixels, and every image has the same weight, so that one batch of
    8 images and 8 batches of one image have the same gradient.

    Args:
        model: Backbone, decoder, norms and weights; None takes the defaults.
        optimizer: Optimizer and learning rates; None takes the defaults. The decoder is the head.
        segmentation: The loss; None takes the default.

    Attributes:
        tile_size: Side of the tiles in which larger images are evaluated; None evaluates all images whole.

    Example:
        >>> module = TransferSegmenter(ModelConfig("resnet18", "gn", decoder="fpn"), OptimizerConfig(lr=0.01))
        >>> module.build(["background", "cat", "dog"])
        >>> module.eval()(torch.zeros(1, 3, 50, 70, dtype=torch.uint8)).shape
        torch.Size([1, 3, 50, 70])
    """

    monitor: ClassVar[str] = "val/miou"

    def __init__(
        self,
        model: ModelConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        segmentation: SegmentationConfig | None = None,
    ) -> None:
        model = model or ModelConfig()
        super().__init__(model if model.decoder else replace(model, decoder=DEFAULT_DECODER), optimizer)
        self.segmentation = segmentation or SegmentationConfig()
        self.tile_size: int | None = None
        self._dice = DiceLoss("multiclass", from_logits=True, ignore_index=IGNORED)

    def configure_metrics(self, num_classes: int) -> MetricCollection:
        """Create mean intersection over union (``miou``), that of each class, Dice, and accuracy over pixels.

        All are computed from the labeled pixels of all images together. The IoU of a class that neither occurs nor was
        given is nan, and does not count in the mean.
        """
        of_class = MulticlassJaccardIndex(num_classes, average="none", ignore_index=IGNORED, zero_division=float("nan"))
        return MetricCollection(
            {
                "miou": MulticlassJaccardIndex(num_classes, average="macro", ignore_index=IGNORED),
                "dice": MulticlassF1Score(num_classes, average="macro", ignore_index=IGNORED),
                "pixel_acc": MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED),
                "iou": ClasswiseWrapper(of_class, labels=self.classes, prefix="iou_"),
            }
        )

    def training_sheet(self, data: ImageDataModule, count: int) -> np.ndarray:
        """Draw training images with their masks over them."""
        return training_pairs(data, count)

    def create_figures(self) -> SegmentationFigures:
        """Create the figure of the images that were segmented worst."""
        return SegmentationFigures(self.classes)

    def own_config(self) -> dict[str, dict[str, Any]]:
        """Give the keys ``segmentation``."""
        return {"segmentation": asdict(self.segmentation)}

    def build_for(self, data: object) -> None:
        """Build the model for a data module that is set up; see :meth:`BackboneModule.build_for`."""
        if hasattr(data, "classes") and not isinstance(data, SegmentationDataModule):
            raise ConfigError(
                f"{type(data).__name__} has no masks, which a segmentation needs; give a SegmentationFolder, or train "
                "a TransferClassifier."
            )
        weights = getattr(data, "class_weights", "none")
        if self.segmentation.loss == "dice" and weights != "none":
            raise ConfigError(
                f"data.class_weights={weights} does nothing with segmentation.loss=dice, in which every class counts "
                "the same; leave it out, or choose another loss."
            )
        super().build_for(data)
        self.tile_size = getattr(data, "tile_size", None)

    def restore(self, stored: dict[str, Any]) -> None:
        """Build from a checkpoint's description later, and evaluate as its run did; see the base class."""
        super().restore(stored)
        self.tile_size = stored.get("config", {}).get("data", {}).get("init_args", {}).get("tile_size")

    def training_loss(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss, with class weights in the cross entropy.

        Args:
            pixels: Normalized pixels, shape ``(B, in_chans, H, W)``.
            targets: Class indices, uint8, shape ``(B, H, W)``; :data:`gn_transfer.data.masks.IGNORED` does not count.
        """
        logits, targets = self.compute_logits(pixels).float(), targets.long()
        loss = torch.zeros((), device=logits.device)
        if self.segmentation.loss != "dice":
            loss = loss + losses_over_labeled(logits, targets, self.class_weight).mean()
        if self.segmentation.loss != "cross_entropy":
            pairs = zip(logits, targets, strict=True)
            loss = loss + torch.stack([self._dice_loss(one, target) for one, target in pairs]).mean()
        return loss

    def _dice_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Average 1 - Dice over the classes of an image; smp divides by all classes, and absent ones add 0 there."""
        number = len(logits)
        there = targets.new_zeros(IGNORED + 1, dtype=torch.float32).scatter_(0, targets.flatten(), 1.0)[:number].sum()
        over_all: Tensor = self._dice(logits[None], targets[None])
        return over_all * number / there.clamp_min(1.0)

    def evaluation_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute plain cross entropy of each image with labeled pixels: no Dice, no class weights."""
        labeled = (targets != IGNORED).flatten(1).any(1)
        return losses_over_labeled(logits[labeled].float(), targets[labeled].long())

    def score_images(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Count the pixels of every class; see :func:`gn_transfer.training.pixel_counts.count_pixels`."""
        return count_pixels(logits.argmax(1), targets.long(), len(self.classes)).double()

    def describe_scores(
        self, scores: Tensor, images: Sequence[LabeledImage]
    ) -> tuple[Sequence[str], Iterable[Sequence[object]]]:
        """Give path, the mean IoU over the classes that are there, and the three counts of each class."""
        columns = ["path", "miou"]
        for name in self.classes:
            columns += [f"{count}:{name}" for count in ("intersection", "union", "pixels")]
        rows = []
        for image, pixels in zip(images, scores.t().tolist(), strict=True):
            miou = mean_iou(pixels)
            rows.append([image.path, "" if miou is None else f"{miou:.5f}", *(int(pixel) for pixel in pixels)])
        return columns, rows

    def guess(self, scores: Tensor, images: Sequence[LabeledImage]) -> float:
        """Give the mean IoU of the most frequent class everywhere."""
        pixels = scores[2::3].sum(1)
        return float(pixels.max() / pixels.sum() / (pixels > 0).sum())

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of whole images, padded to the stride or in tiles.

        Args:
            images: Pixels, uint8, shape ``(B, in_chans, H, W)``.

        Returns:
            Shape ``(B, num_classes, H, W)``.
        """
        height, width = images.shape[2:]
        tile = self.tile_size
        if tile is None or (height <= tile and width <= tile):
            return self._padded_logits(images)
        window = torch.from_numpy(blending_window(min(tile, height), min(tile, width))).to(images.device)
        total = images.new_zeros((len(images), len(self.classes), height, width), dtype=torch.float32)
        weights = images.new_zeros((height, width), dtype=torch.float32)
        for place in tile_places(height, width, tile):
            total[..., *place] += window * self._padded_logits(images[..., *place]).float()
            weights[place] += window
        return total / weights

    def _padded_logits(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        pixels = self.normalize(images)
        pixels = F.pad(pixels, (0, padded(width, STRIDE) - width, 0, padded(height, STRIDE) - height))
        return self.compute_logits(pixels)[:, :, :height, :width]


def losses_over_labeled(logits: Tensor, targets: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Cross entropy of each image: the mean over its labeled pixels.

    Args:
        logits: Shape ``(B, K, H, W)``.
        targets: int64, shape ``(B, H, W)``; :data:`gn_transfer.data.masks.IGNORED` does not count.
        class_weight: Factor of the loss of each class, shape ``(K,)``. An image of one class keeps it, as its loss is
            divided by the number of its pixels, not by the sum of their weights.

    Returns:
        Shape ``(B,)``; 0 for an image without a labeled pixel.
    """
    losses = F.cross_entropy(logits, targets, weight=class_weight, ignore_index=IGNORED, reduction="none")
    return losses.sum((1, 2)) / (targets != IGNORED).sum((1, 2)).clamp_min(1)
