"""What all data modules share: splits, loaders, verification, the rows of the plan."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import lightning
import torch
from torch import Tensor

from gn_transfer.config import ConfigError, check_range
from gn_transfer.data.augmentation import Augmentation, Recipe, read_pipeline
from gn_transfer.data.cache import CacheMode, DatasetCache, default_cache_dir
from gn_transfer.data.dataset import ImageDataset, LabeledImage, without_bad_images
from gn_transfer.data.hold_out import hold_out
from gn_transfer.data.loader import ImageLoader
from gn_transfer.data.sampler import EpochSampler
from gn_transfer.data.splits import balanced_weights, few_shots
from gn_transfer.data.workers import choose_num_workers, core_count

_MOST_WORKERS = 1024

EVAL_BATCH_SIZE = 16
"""Smallest batch of validation and test: without gradients it needs little memory, and no metric depends on it."""


class ListedImages(NamedTuple):
    """What a data module lists for training.

    Attributes:
        classes: Class names; a target is a position in it.
        train: Training images, or training and validation together where ``val`` is None.
        val: Validation images, or None: they are cut from ``train``.
    """

    classes: list[str]
    train: list[LabeledImage]
    val: list[LabeledImage] | None


def check_named_root(kind: type[ImageDataModule], root: object) -> None:
    """Refuse that images are written where a file from outside says: anywhere but below the working folder.

    Args:
        kind: The data module.
        root: What the file says for ``data.root``.

    Raises:
        ConfigError: The data module would write its images elsewhere.
    """
    if not kind.WRITTEN or not isinstance(root, str):
        return
    inside = Path(os.path.realpath(root)).is_relative_to(os.path.realpath("."))
    if not inside and not any((Path(root) / folder).exists() for folder in kind.WRITTEN):
        raise ConfigError(f"{kind.__name__} would write its images into {root}; give --data.root PATH to choose where.")


class ImageDataModule(lightning.LightningDataModule, ABC):
    """Labeled images as batches ``(images uint8 (B, 3, H, W), targets int64 (B,))``. The module normalizes them.

    Args:
        root: Folder of the images.
        img_size: Side of the square that the model sees, in pixels.
        batch_size: Images per forward pass and device. This is what BatchNorm sees. auto measures which number that
            divides accumulation.effective_batch_size is fastest and fits into memory; a norm that takes statistics from
            the batch does not allow it.
        num_workers: Threads that load images ahead. null takes as many as fit beside the compute threads, which on a
            CPU is usually 0.
        val_fraction: Fraction of the training images that is held out for validation, stratified by class, where the
            data has no validation split of its own.
        group_duplicates: Keep images that show the same, exactly or nearly, on one side where validation or test are
            cut from the rest. Of splits that are folders of yours, fit and test say how many images are in two. All
            images are decoded for it.
        recipe: Augmentation of the training images: none, light (resize, flip, cutout), crop_flip (random resized crop
            and flip), bit (resize, random crop, flip) or strong (crop_flip, color jitter, cutout).
        min_crop_scale: Smallest fraction of the area that a random crop keeps. null means 0.35 for crop_flip and 0.25
            for strong.
        augmentation: File of an albumentations pipeline that replaces the recipe, as albumentations.save writes it.
        cache: Where decoded images are kept, which changes speed and not a pixel: none, ram (this run), disk (shared
            with other and later runs), or auto. auto takes the disk if it has twice the room, else ram if a quarter of
            the free memory is enough, else none.
        cache_dir: Folder of the disk cache. null means $XDG_CACHE_HOME/gn_transfer or ~/.cache/gn_transfer.
        shots_per_class: Train on that many images of each class only, chosen by the seed. null takes all.
        on_bad_image: What happens with an image that cannot be decoded: raise an error with its path, or decode all
            images at the start and skip the bad ones.
        class_weights: Weights of the classes in the loss: none, or balanced (inverse frequency).
        seed: Seed of the split, the order and the augmentation.

    Attributes:
        batch_size: With ``auto`` it is 1 until :meth:`use_batch_size` says another number.
        batch_size_is_auto: Whether the number is to be measured.
        channels: 3 for RGB. Set it to 1 before ``setup`` for a model that takes grey images.
        evaluate_in_training_batches: Set it before ``setup`` where metrics depend on the batch. Validation and test
            then come in batches of ``batch_size``, in an order shuffled by the seed.
        classes: Class names; a target is a position in it. Set by ``setup``.
        train_dataset: Set by ``setup("fit")``.
        val_dataset: Set by ``setup("fit")`` and ``setup("validate")``.
        test_dataset: Set by ``setup("test")``.
        train_sampler: Order of training, set by ``setup("fit")``; its ``resume_at`` continues within an epoch.
        bad_images: Path and reason of each image that was left out.
        decoded_cache: The cache of decoded images.
    """

    WRITTEN: ClassVar[tuple[str, ...]] = ()
    """Folders below ``root`` that are written on first use; one of them."""

    classes: list[str]
    train_dataset: ImageDataset
    val_dataset: ImageDataset
    test_dataset: ImageDataset
    train_sampler: EpochSampler

    def __init__(
        self,
        root: Path | str,
        img_size: int = 224,
        batch_size: int | Literal["auto"] = 1,
        num_workers: int | None = None,
        val_fraction: float = 0.2,
        group_duplicates: bool = False,
        recipe: Recipe = "crop_flip",
        min_crop_scale: float | None = None,
        augmentation: Path | None = None,
        cache: CacheMode = "auto",
        cache_dir: Path | None = None,
        shots_per_class: int | None = None,
        on_bad_image: Literal["raise", "skip"] = "raise",
        class_weights: Literal["none", "balanced"] = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("img_size", img_size, 1),
            ("batch_size", None if batch_size == "auto" else batch_size, 1),
            ("seed", seed, 0),
            ("shots_per_class", shots_per_class, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"data.{key}={value} is out of range; give an integer of at least {least}.")
        if num_workers is not None:
            check_range("data.num_workers", num_workers, low=0, high=_MOST_WORKERS, open_high=False)
        if min_crop_scale is not None:
            check_range("data.min_crop_scale", min_crop_scale, low=0.0, high=1.0, open_low=True, open_high=False)
        self.root = root
        self.img_size = img_size
        self.batch_size_is_auto = batch_size == "auto"
        self.batch_size = 1 if batch_size == "auto" else batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.group_duplicates = group_duplicates
        self.recipe: Recipe = recipe
        self.min_crop_scale = min_crop_scale
        self.augmentation = augmentation
        self.shots_per_class = shots_per_class
        self.on_bad_image = on_bad_image
        self.class_weights = class_weights
        self.seed = seed
        self.channels = 3
        self.evaluate_in_training_batches = False
        self.bad_images: list[tuple[str, str]] = []
        self.classes = []
        self.decoded_cache = DatasetCache(cache, default_cache_dir() if cache_dir is None else Path(cache_dir))

    def __repr__(self) -> str:
        counts = ", ".join(f"{split} {len(dataset):,}" for split, dataset in self.datasets().items())
        return (
            f"{type(self).__name__}(root={str(self.root)!r}, img_size={self.img_size}, batch_size={self.batch_size}; "
            f"{counts or 'not set up'})"
        )

    __str__ = __repr__  # Lightning's own asks every loader for its length, and fails on ours

    @abstractmethod
    def list_fit(self) -> ListedImages:
        """List the images of training and validation, without opening any image.

        Raises:
            ConfigError: They are not there, or not as they should be.
        """

    @abstractmethod
    def list_test(self) -> list[LabeledImage]:
        """List the images of the test split, without opening any image.

        Raises:
            ConfigError: They are not there, or not as they should be.
        """

    @property
    def own_splits(self) -> Collection[str]:
        """Splits that are folders of the user; the others are cut from the rest, or come with the data set."""
        return ()

    def setup(self, stage: str) -> None:
        """List, verify and split the images; Lightning calls it in every process.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``, on the test images. ``fit`` opens no test image.

        Raises:
            ConfigError: The images are not there, or not as they should be.
            BadImageError: With ``on_bad_image="raise"``, an image is missing, empty, truncated or none at all.
        """
        if stage == "predict":  # Lightning asks for it whatever loaders it was given: predict_dataloader does the rest
            return
        if stage == "test":
            self.classes, _, _ = self.list_fit()
            found = self._without_bad_images(self.list_test())
            if not found:
                raise ConfigError(f"{self.root}: no image is left for the test.{self._why_none()}")
            self.test_dataset = self._eval_dataset(found)
            self.decoded_cache.plan_for([self.test_dataset])
            return
        self.classes, train, val = self.list_fit()
        train = self._without_bad_images(train)
        if val is None:
            root = Path(self.root) if self.group_duplicates else None
            train, val = hold_out(train, self.val_fraction, self.seed, root=root)
        else:
            val = self._without_bad_images(val)
        self.check_parts(train, val)
        if self.shots_per_class is not None:
            train = _few_images(train, self.shots_per_class, self.seed, self.classes)
        self.val_dataset = self._eval_dataset(val)
        if stage == "fit":
            if self.batch_size > len(train):
                raise ConfigError(
                    f"data.batch_size={self.batch_size} is more than the {len(train):,} training images; use fewer."
                )
            self.train_dataset = self._dataset(train, self._augmentation())
            self.train_sampler = self._sampler(self.train_dataset, self.batch_size, shuffle=True)
        self.decoded_cache.plan_for(list(self.datasets().values()))

    def evaluation_shape(self, batch_size: int) -> tuple[int, int, int]:
        """Give number, height and width of the images of the largest batch of an evaluation.

        Args:
            batch_size: That of training.
        """
        return max(batch_size, EVAL_BATCH_SIZE), self.img_size, self.img_size

    def use_batch_size(self, batch_size: int) -> None:
        """Take another number of images per forward pass, also after ``setup``.

        Args:
            batch_size: At least 1, at most the number of training images.
        """
        self.batch_size = batch_size
        if hasattr(self, "train_sampler"):
            self.train_sampler.batch_size = batch_size

    def train_dataloader(self) -> ImageLoader:
        """Batches of the training split in the order of :attr:`train_sampler`."""
        if getattr(self.trainer, "overfit_batches", 0):
            self.train_sampler.shuffle = False  # the same batches in every epoch
        return self._loader(self.train_dataset, self.train_sampler)

    def val_dataloader(self) -> ImageLoader:
        """Batches of the validation split, in order, of :data:`EVAL_BATCH_SIZE` or more unless figures depend on it."""
        return self._eval_loader(self.val_dataset)

    def test_dataloader(self) -> ImageLoader:
        """Batches of the test split, in order, of :data:`EVAL_BATCH_SIZE` or more unless figures depend on it."""
        return self._eval_loader(self.test_dataset)

    def predict_dataloader(self) -> ImageLoader:
        """Batches of the test split, in order."""
        if not hasattr(self, "test_dataset"):
            self.setup("test")
        return self.test_dataloader()

    @property
    def num_classes(self) -> int:
        """Number of classes; known after ``setup``."""
        return len(self.classes)

    @property
    def class_weight_tensor(self) -> Tensor | None:
        """Weights of the classes in the loss, float32 ``(num_classes,)``; None with ``class_weights="none"``."""
        if self.class_weights == "none":
            return None
        targets = [image.target for image in self.train_dataset.images]
        return torch.tensor(balanced_weights(targets, self.num_classes), dtype=torch.float32)

    def training_images(self, number: int) -> Tensor:
        """Fetch training images as evaluation would see them: to calibrate or re-estimate statistics on.

        Args:
            number: How many; all where there are fewer.

        Returns:
            Pixels, uint8, shape ``(number, channels, img_size, img_size)``: the same ones for the same seed.
        """
        images = self.train_dataset.images
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))[:number]
        chosen = [images[position] for position in order.tolist()]
        plain = self._calibration_dataset(chosen)
        return torch.cat([plain.batch([position])[0] for position in range(len(plain))])

    def _calibration_dataset(self, images: list[LabeledImage]) -> ImageDataset:
        """Give images as evaluation would see them, as far as squares of one size allow it."""
        return ImageDataset(Path(self.root), images, self.img_size, channels=self.channels)

    def split(self) -> dict[str, list[str]]:
        """List the files of each split that is set up, relative to ``root``: what a run stores."""
        return {split: [image.path for image in data.images] for split, data in self.datasets().items()}

    def worker_count(self) -> int:
        """Tell how many threads fetch images ahead: ``num_workers``, or what fits."""
        if self.num_workers is not None:
            return self.num_workers
        given = os.environ.get("LOCAL_WORLD_SIZE", "")  # set by torchrun
        processes = int(given) if given.isdecimal() and int(given) > 0 else 1
        return choose_num_workers(core_count(), torch.get_num_threads(), on_gpu=self._on_gpu(), processes=processes)

    def datasets(self) -> dict[str, ImageDataset]:
        """Give the splits that are set up, by name."""
        named = {split: getattr(self, f"{split}_dataset", None) for split in ("train", "val", "test")}
        return {split: dataset for split, dataset in named.items() if dataset is not None}

    def class_counts(self, images: Sequence[LabeledImage]) -> Mapping[str, int]:
        """Count images of each class by its name."""
        found = Counter(image.target for image in images)
        return {name: found[target] for target, name in enumerate(self.classes)}

    def check_parts(self, train: list[LabeledImage], val: list[LabeledImage]) -> None:
        """Refuse class names that cannot be printed, a training part without a class, and an empty validation."""
        if strange := [name for name in self.classes if not name.isprintable()]:
            raise ConfigError(
                f"{self.root}: the class name {strange[0]!r} holds control characters or is no UTF-8; rename it."
            )
        without = [name for name, count in self.class_counts(train).items() if count == 0]
        if without:
            raise ConfigError(f"{self.root}: {self.complain_of_missing(without, train)}")
        if not val:
            raise ConfigError(f"{self.root}: no image is left for validation.{self._why_none()}")

    def _why_none(self) -> str:
        skipped = f" {len(self.bad_images):,} cannot be decoded (data.on_bad_image=skip)." if self.bad_images else ""
        return skipped + (" Images that show the same stay together (data.group_duplicates)." * self.group_duplicates)

    def cautions(self) -> list[str]:
        """Say what may spoil a training on these images, a sentence each."""
        return []

    def complain_of_missing(self, classes: Sequence[str], images: Sequence[LabeledImage]) -> str:
        """Say that no training image shows some classes, and what to do.

        Args:
            classes: Their names.
            images: The training images.
        """
        return f"no training image of {', '.join(classes)}; add images or remove the class."

    def _without_bad_images(self, images: list[LabeledImage]) -> list[LabeledImage]:
        good, bad = without_bad_images(Path(self.root), images, skip=self.on_bad_image == "skip")
        self.bad_images += [item for item in bad if item not in self.bad_images]
        return good

    def _on_gpu(self) -> bool:
        return torch.cuda.is_available() if self.trainer is None else self.trainer.strategy.root_device.type != "cpu"

    def _sampler(self, dataset: ImageDataset, batch_size: int, *, shuffle: bool) -> EpochSampler:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        return EpochSampler(len(dataset), batch_size, self.seed, shuffle, rank, world_size)

    def _augmentation(self) -> Augmentation:
        pipeline = None if self.augmentation is None else read_pipeline(Path(self.augmentation))
        return Augmentation(self.recipe, self.img_size, self.min_crop_scale, pipeline)

    def _dataset(self, images: list[LabeledImage], augmentation: Augmentation | None = None) -> ImageDataset:
        return ImageDataset(Path(self.root), images, self.img_size, augmentation, self.seed, self.channels)

    def _eval_loader(self, dataset: ImageDataset) -> ImageLoader:
        size = self.batch_size if self.evaluate_in_training_batches else max(self.batch_size, EVAL_BATCH_SIZE)
        return self._loader(dataset, self._sampler(dataset, size, shuffle=False))

    def _eval_dataset(self, images: list[LabeledImage]) -> ImageDataset:
        if self.evaluate_in_training_batches:  # lists are sorted by class, and training has no batches of one class
            images = list(images)
            random.Random(self.seed).shuffle(images)
        return self._dataset(images)

    def _loader(self, dataset: ImageDataset, sampler: EpochSampler) -> ImageLoader:
        self.decoded_cache.fill(dataset, core_count())
        on_cuda = self._on_gpu() and torch.cuda.is_available()
        return ImageLoader(dataset, sampler, num_workers=self.worker_count(), pin_memory=on_cuda)


def _few_images(images: list[LabeledImage], shots: int, seed: int, classes: list[str]) -> list[LabeledImage]:
    """Choose equally many images of every class; see :func:`gn_transfer.data.splits.few_shots`."""
    paths, targets = [image.path for image in images], [image.target for image in images]
    return [images[position] for position in few_shots(paths, targets, shots, seed, names_of=classes)]
