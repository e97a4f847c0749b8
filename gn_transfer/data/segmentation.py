"""What all data modules of segmentation share: pairs of image and mask, whole images in evaluation."""

from __future__ import annotations

import contextlib
import statistics
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gn_transfer.config import STRIDE, ConfigError
from gn_transfer.data.augmentation import read_pipeline
from gn_transfer.data.datamodule import ImageDataModule
from gn_transfer.data.dataset import CachedFiles, ImageDataset, LabeledImage, raise_first, with_remedy
from gn_transfer.data.decode import BadImageError, read_size
from gn_transfer.data.loader import ImageLoader
from gn_transfer.data.masks import MaskValues, about_turned, check_masks, mask_files, turned_images, values_in
from gn_transfer.data.pair_augmentation import PairAugmentation, mirrored_middle
from gn_transfer.data.progress import progress_bar
from gn_transfer.data.resolution import Resolution
from gn_transfer.data.sampler import Key, sample_seed
from gn_transfer.data.tiles import padded
from gn_transfer.data.workers import core_count

_LOOKED_AT = 20  # masks, for a message
_MEASURED = 200  # images whose size is read for an estimate


class SegmentationDataset(ImageDataset):
    """Pairs of image and mask: crops of one size in training, whole images, one at a time, in evaluation.

    Args:
        root: What paths are relative to.
        images: Images with their masks.
        img_size: Side of the crops in pixels.
        values: What the values of the masks mean.
        short_side: Greatest length of the short side of an image; 0 for any.
        augmentation: None evaluates.
        seed: With (epoch, index) it decides the random parameters of each pair.
        channels: 3 for RGB, 1 for grey.
    """

    def __init__(
        self,
        root: Path,
        images: Sequence[LabeledImage],
        img_size: int,
        values: MaskValues,
        short_side: int,
        augmentation: PairAugmentation | None = None,
        seed: int = 0,
        channels: int = 3,
    ) -> None:
        super().__init__(root, images, img_size, None, seed, channels)
        self.resolution = Resolution("whole", short_side)
        self.values = values
        self.masks = mask_files(root, images, short_side)
        self._augment = augmentation

    @property
    def cached_files(self) -> Sequence[CachedFiles]:
        """Images and masks."""
        return [self, self.masks]

    @property
    def one_size(self) -> bool:
        """Whether all images have one size: in training they have."""
        return self._augment is not None

    def batch(self, keys: Sequence[Key | int]) -> tuple[Tensor, Tensor]:
        """Fetch several pairs, in evaluation only one.

        Args:
            keys: See :meth:`ImageDataset.__getitem__`.

        Returns:
            Images uint8 ``(B, channels, H, W)`` and targets uint8 ``(B, H, W)``, of which
            :data:`gn_transfer.data.masks.IGNORED` do not count.

        Raises:
            BadImageError: A file cannot be decoded, or a mask has values that are no class.
        """
        pairs = [self._pair(key) for key in keys]
        height, width = pairs[0][1].shape
        images = torch.empty((len(keys), self.channels, height, width), dtype=torch.uint8)
        targets = torch.empty((len(keys), height, width), dtype=torch.uint8)
        for image_CHW, target_HW, (pixels_HWC, mask_HW) in zip(images.numpy(), targets.numpy(), pairs, strict=True):
            if self.channels == 1:
                cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY, image_CHW[0])
            else:
                cv2.split(pixels_HWC, list(image_CHW))
            target_HW[:] = mask_HW
        return images, targets

    def _pair(self, key: Key | int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        epoch, index = (0, key) if isinstance(key, int) else key
        pixels_HWC = self._decoded(self, index)
        path = self.root / self.images[index].mask
        mask_HW = self.values.to_targets(self._decoded(self.masks, index)[:, :, 0], path)
        if mask_HW.shape != pixels_HWC.shape[:2]:
            raise with_remedy(BadImageError(path, "a mask of another size than its image"))
        if self._augment is None:
            return pixels_HWC, mask_HW
        try:
            return self._augment(pixels_HWC, mask_HW, sample_seed(self.seed, epoch, index))
        except ConfigError as error:  # of a pipeline of the user
            raise BadImageError(self.root / self.images[index].path, str(error)) from error


class SegmentationDataModule(ImageDataModule):
    """Pairs of image and mask, as batches ``(images uint8 (B, 3, H, W), targets uint8 (B, H, W))``.

    Training sees random crops. Validation and test see whole images, one at a time, so that no figure depends on the
    size of a batch.

    Args:
        root: Folder of the images.
        img_size: Side of the crops in training, in pixels; a multiple of 32.
        short_side: Larger images are reduced to this length of their short side, in training and in evaluation. Figures
            are measured at this size. null means img_size, 0 keeps all images as they are.
        tile_size: Side of the tiles in which larger images are evaluated, with an overlap of a quarter; a multiple of
            32. null evaluates all images whole.
        class_weights: Weights of the classes in the loss: none, or balanced (inverse frequency of pixels).
        **options: Those of :class:`gn_transfer.data.ImageDataModule`.

    Attributes:
        values: What the values of the masks mean; set by ``setup``.
    """

    NOT_OPTIONS = frozenset({"min_crop_scale", "shots_per_class"})
    """Arguments of the base that mean nothing here."""

    values: MaskValues

    def __init__(
        self,
        root: Path | str,
        img_size: int = 256,
        short_side: int | None = None,
        tile_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root, img_size=img_size, **options)
        for key, value in (("img_size", img_size), ("tile_size", tile_size)):
            if value is not None and (value < STRIDE or value % STRIDE):
                near = max(STRIDE, round(value / STRIDE) * STRIDE)
                raise ConfigError(
                    f"data.{key}={value} is not a multiple of {STRIDE}, by which a backbone reduces images; use {near}."
                )
        if short_side is not None and short_side < 0:
            raise ConfigError(f"data.short_side={short_side} is out of range; give a length in pixels, 0, or null.")
        for key in sorted(self.NOT_OPTIONS & options.keys()):
            if options[key] is not None and key in SegmentationDataModule.NOT_OPTIONS:
                raise ConfigError(f"data.{key}={options[key]} is for images by class; leave it out.")
        self.short_side = short_side
        self.tile_size = tile_size
        self._pixels: dict[str, npt.NDArray[np.int64]] = {}

    def setup(self, stage: str) -> None:
        """List, verify and split the images; see :meth:`ImageDataModule.setup`."""
        if self.evaluate_in_training_batches and self.batch_size > 1:
            raise ConfigError(
                "batch_norm.evaluation=batch: a segmentation is evaluated one whole image at a time, and "
                f"data.batch_size={self.batch_size}; use batch_norm.evaluation=running."
            )
        super().setup(stage)
        for split in ("val", "test"):
            dataset = self.datasets().get(split)
            if dataset is not None and not self.pixel_counts(dataset.images).any():
                raise ConfigError(
                    f"{self.root}: no mask of the {split} split has a pixel that counts, so there is nothing to "
                    "measure. Give masks with labels, or take the images out."
                )

    def cautions(self) -> list[str]:
        """Say what may spoil a training on these masks; see the base class."""
        images = [*self.train_dataset.images, *self.val_dataset.images]
        turned = turned_images(Path(self.root), images, threads=core_count())
        found = [about_turned(turned)] if turned else []
        sides = []
        for image in self.train_dataset.images[:_MEASURED] if self.augmentation is None else ():
            with contextlib.suppress(BadImageError):
                side = min(read_size(Path(self.root) / image.path))
                sides.append(min(side, self.resolved_short_side or side))
        if sides and (middle := statistics.median(sides)) < self.img_size:
            found.append(
                f"the short side of half of the images is seen at {middle:.0f} px or less, and a crop has "
                f"{self.img_size} (data.img_size): the rest of it is grey, which evaluation does not see. Choose a "
                "smaller crop."
            )
        return found

    @abstractmethod
    def mask_values(self) -> MaskValues:
        """Say what the values of the masks mean."""

    @property
    def resolved_short_side(self) -> int:
        """Greatest length of the short side, with the default filled in; 0 for any."""
        return self.img_size if self.short_side is None else self.short_side

    def evaluation_shape(self, batch_size: int) -> tuple[int, int, int]:
        """Give the shape of the largest image of the validation, of the first ones; see the base class."""
        shapes = []
        for path in self.val_dataset.paths[:_MEASURED]:
            with contextlib.suppress(BadImageError):
                shapes.append(self.val_dataset.resolution.stored_shape(*read_size(self.val_dataset.root / path)))
        height, width = max(shapes, key=lambda shape: shape[0] * shape[1], default=(self.img_size, self.img_size))
        most = self.tile_size or max(height, width)
        return 1, padded(min(height, most), STRIDE), padded(min(width, most), STRIDE)

    @property
    def class_weight_tensor(self) -> Tensor | None:
        """Weights of the classes in the loss, float32 ``(num_classes,)``; None with ``class_weights="none"``."""
        if self.class_weights == "none":
            return None
        counts = torch.from_numpy(self.pixel_counts(self.train_dataset.images)).double()
        return (counts.sum() / (len(counts) * counts)).float()

    def complain_of_missing(self, classes: Sequence[str], images: Sequence[LabeledImage]) -> str:
        """Say which values the masks have instead; see the base class."""
        values = self.mask_values()
        found = sorted(values_in(Path(self.root), images[:_LOOKED_AT]))
        instead = [value for value in found if value in values.ignored]
        hint = (
            "add masks with it, or remove the class; where one mask has it, another seed may choose that for training"
        )
        if instead and set(found) - values.ignored and len(classes) == 1:
            hint = f"if {instead[0]}, which does not count, stands for {classes[0]}, give it the value of the class"
        return (
            f"no training mask has a pixel of {', '.join(classes)}. The first masks hold the values "
            f"{', '.join(map(str, found))}; known are {values.describe()}: {hint}."
        )

    def pixel_counts(self, images: Sequence[LabeledImage]) -> npt.NDArray[np.int64]:
        """Count the pixels of each class over images, shape ``(num_classes,)``."""
        zeros = np.zeros(len(self.classes), np.int64)
        return sum((self._pixels[image.mask] for image in images), zeros)

    def class_counts(self, images: Sequence[LabeledImage]) -> Mapping[str, int]:
        """Count the pixels of each class by name."""
        return dict(zip(self.classes, self.pixel_counts(images).tolist(), strict=True))

    def _without_bad_images(self, images: list[LabeledImage]) -> list[LabeledImage]:
        self.values = self.mask_values()
        good = super()._without_bad_images(images)
        new = [image for image in good if image.mask not in self._pixels]
        with progress_bar("checking the masks", len(new)) as advance:
            found = check_masks(Path(self.root), new, self.values, threads=core_count(), advance=advance)
        bad = {image.path: error for image, error in zip(new, found, strict=True) if isinstance(error, BadImageError)}
        if self.on_bad_image == "raise":
            raise_first(bad.values())
        self._pixels |= {
            image.mask: counts
            for image, counts in zip(new, found, strict=True)
            if not isinstance(counts, BadImageError)
        }
        self.bad_images += [(path, error.reason) for path, error in bad.items()]
        return [image for image in good if image.path not in bad]

    def _calibration_dataset(self, images: list[LabeledImage]) -> SegmentationDataset:
        """Give the middle of each image, at the scale of evaluation; smaller ones are continued as in a mirror."""
        return self._dataset(images, PairAugmentation("none", self.img_size, mirrored_middle(self.img_size)))

    def _dataset(self, images: list[LabeledImage], augmentation: Any = None) -> SegmentationDataset:
        return SegmentationDataset(
            Path(self.root),
            images,
            self.img_size,
            self.values,
            self.resolved_short_side,
            augmentation,
            self.seed,
            self.channels,
        )

    def _augmentation(self) -> Any:
        pipeline = None if self.augmentation is None else read_pipeline(Path(self.augmentation))
        return PairAugmentation(self.recipe, self.img_size, pipeline)

    def _eval_loader(self, dataset: ImageDataset) -> ImageLoader:
        return self._loader(dataset, self._sampler(dataset, 1, shuffle=False))
