"""What all data modules share: splits to loaders, verification, the rows of the plan."""

from __future__ import annotations

import os
import random
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import lightning
import torch
from torch import Tensor

from gn_transfer.config import ConfigError
from gn_transfer.data.cache import (
    CacheMode,
    CachePlan,
    DiskStore,
    Filled,
    RamStore,
    available_ram_bytes,
    cache_folder,
    choose_cache,
    default_cache_dir,
    estimate_bytes,
    fill,
    free_disk_bytes,
    mib,
)
from gn_transfer.data.dataset import Picture, PictureDataset, find_bad_images, with_remedy
from gn_transfer.data.decode import SUFFIXES
from gn_transfer.data.loader import PictureLoader
from gn_transfer.data.progress import progress_bar
from gn_transfer.data.sampler import EpochSampler
from gn_transfer.data.splits import balanced_weights, few_shots, stratified_split
from gn_transfer.data.transforms import Augmentation, Backend, Recipe

EVAL_BATCH_SIZE = 16
"""Least batch of validation and test: without gradients it takes little memory, and no figure depends on it."""


class FitPictures(NamedTuple):
    """What a data module lists for training.

    Attributes:
        classes: Class names; a target is a position in it.
        train: Training pictures, or training and validation together where ``val`` is None.
        val: Validation pictures, or None: cut them from ``train``.
    """

    classes: list[str]
    train: list[Picture]
    val: list[Picture] | None


class PictureData(lightning.LightningDataModule, ABC):
    """Labelled pictures as batches ``(images uint8 (B, 3, H, W), targets int64 (B,))``; the model normalizes them.

    Args:
        root: Folder of the pictures.
        img_size: Side of the square that the net sees, in pixels.
        batch_size: Pictures per forward and device; what BatchNorm sees.
        num_workers: Threads that fetch pictures ahead; None: as many as fit, so that compute threads and they do not
            exceed the cores (on a CPU that is usually 0).
        val_fraction: Share of the training pictures that is held out for validation, stratified by class, where
            the data has no validation split of its own.
        recipe: Augmentation of the training pictures: none, light (squash, flip, cutout), crop_flip (random resized
            crop and flip), bit (squash, random crop, flip) or strong (crop_flip, colours, cutout).
        crop_area: Least share of a picture's area that a random crop keeps; null: 0.35 for crop_flip, 0.25 for strong.
        backend: Library that carries out the recipe: opencv (fastest), albumentations or torchvision; the draws are
            the same.
        cache: Where decoded pictures are kept, which changes speed and not a pixel: none, ram (this run), disk (shared
            with other and later runs), or auto: disk if it has twice the room, else ram if a quarter of the free memory
            is enough, else none.
        cache_dir: Folder of the disk cache; null: $XDG_CACHE_HOME/gn_transfer or ~/.cache/gn_transfer.
        shots_per_class: Train on so many pictures of each class only, chosen by the seed; null: on all.
        on_bad_image: A picture that cannot be decoded: stop with its path, or decode all at the start and skip
            those.
        class_weights: Weights of the classes in the loss: none, or balanced (inverse frequency).
        seed: Seed of the split, the order and the augmentation.

    Attributes:
        channels: 3 for RGB; set it to 1 before ``setup`` for a net that takes grey pictures.
        evaluate_in_training_batches: Set it before ``setup`` where figures depend on the batch: validation and test
            then come in batches of ``batch_size``, in an order shuffled by the seed.
        classes: Class names; a target is a position in it. Set by ``setup``.
        train_dataset: Set by ``setup("fit")``.
        val_dataset: Set by ``setup("fit")`` and ``setup("validate")``.
        test_dataset: Set by ``setup("test")``.
        train_sampler: Order of training, set by ``setup("fit")``; its ``resume_at`` goes on within an epoch.
        bad_images: Path and reason of each picture that was left out.
        cache_plan: Which cache is used, and why; set by ``setup``.
    """

    classes: list[str]
    train_dataset: PictureDataset
    val_dataset: PictureDataset
    test_dataset: PictureDataset
    train_sampler: EpochSampler

    def __init__(
        self,
        root: Path | str,
        img_size: int = 224,
        batch_size: int = 1,
        num_workers: int | None = None,
        val_fraction: float = 0.2,
        recipe: Recipe = "crop_flip",
        crop_area: float | None = None,
        backend: Backend = "opencv",
        cache: CacheMode = "auto",
        cache_dir: Path | None = None,
        shots_per_class: int | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
        class_weights: Literal["none", "balanced"] = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = root
        self.img_size = img_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.recipe: Recipe = recipe
        self.crop_area = crop_area
        self.backend: Backend = backend
        self.cache: CacheMode = cache
        self.cache_dir = default_cache_dir() if cache_dir is None else cache_dir
        self.shots_per_class = shots_per_class
        self.channels = 3
        self.evaluate_in_training_batches = False
        self.on_bad_image = on_bad_image
        self.class_weights = class_weights
        self.seed = seed
        self.bad_images: list[tuple[str, str]] = []
        self.cache_plan = CachePlan("none", "", 0)
        for key, value, least in (
            ("img_size", img_size, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("shots_per_class", shots_per_class, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"data.{key}={value} is out of range; give an integer of at least {least}.")
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"data.num_workers={num_workers} is out of range; give 0 or more, or null to choose.")

    @abstractmethod
    def list_fit(self) -> FitPictures:
        """List the pictures of training and validation, without opening any picture.

        Raises:
            ConfigError: They are not there, or not as they should be.
        """

    @abstractmethod
    def list_test(self) -> list[Picture]:
        """List the pictures of the test split, without opening any picture.

        Raises:
            ConfigError: They are not there, or not as they should be.
        """

    def list_all(self) -> tuple[dict[str, list[Picture]], list[str]]:
        """List the pictures of all splits, and those beside them that are in none, without opening any.

        Returns:
            Pictures by split, ``train`` (``trainval`` where validation is cut from it) first, ``unlisted`` last, the
            latter with target 0; and what there is to say about it.

        Raises:
            ConfigError: They are not there, or not as they should be.
        """
        self.classes, train, val = self.list_fit()
        splits, notes = {"trainval": train} if val is None else {"train": train, "val": val}, []
        try:
            splits["test"] = self.list_test()
        except ConfigError as error:
            notes.append(f"test is not checked: {error}")
        root = Path(self.root)
        listed = {picture.path for some in splits.values() for picture in some}
        beside = {
            path.relative_to(root).as_posix()
            for folder in {(root / path).parent for path in listed}
            if folder.is_dir()
            for path in folder.iterdir()
            if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
        }
        if beside - listed:
            splits["unlisted"] = [Picture(path, 0) for path in sorted(beside - listed)]
        return splits, notes

    def setup(self, stage: str) -> None:
        """List, verify and split the pictures; Lightning calls it in every process.

        Args:
            stage: ``fit``, ``validate`` or ``test``. ``fit`` opens no test picture.

        Raises:
            ConfigError: The pictures are not there, or not as they should be.
            BadImageError: With ``on_bad_image="stop"``, a picture is missing, empty, truncated or none at all.
        """
        if stage == "test":
            self.classes, _, _ = self.list_fit()
            self.test_dataset = self._eval_dataset(self._sound(self.list_test()))
            self.cache_plan = self._plan_cache()
            return
        self.classes, train, val = self.list_fit()
        train = self._sound(train)
        if val is None:
            kept, held_out = stratified_split(
                [picture.path for picture in train],
                [picture.target for picture in train],
                self.val_fraction,
                self.seed,
            )
            train, val = [train[position] for position in kept], [train[position] for position in held_out]
        else:
            val = self._sound(val)
        self._check_all_classes_occur(train)
        if not val:
            raise ConfigError(f"{self.root}: no picture is left for validation.")
        if self.shots_per_class is not None:
            paths, targets = [picture.path for picture in train], [picture.target for picture in train]
            chosen = few_shots(paths, targets, self.shots_per_class, self.seed, names_of=self.classes)
            train = [train[position] for position in chosen]
        self.val_dataset = self._eval_dataset(val)
        if stage == "fit":
            augmentation = Augmentation(self.recipe, self.img_size, self.backend, self.crop_area)
            self.train_dataset = self._dataset(train, augmentation)
            self.train_sampler = self._sampler(self.train_dataset, self.batch_size, shuffle=True)
        self.cache_plan = self._plan_cache()

    def train_dataloader(self) -> PictureLoader:
        """Batches of the training split in the order of :attr:`train_sampler`."""
        return self._loader(self.train_dataset, self.train_sampler)

    def val_dataloader(self) -> PictureLoader:
        """Batches of the validation split, in order, of :data:`EVAL_BATCH_SIZE` or more unless figures depend on it."""
        return self._eval_loader(self.val_dataset)

    def test_dataloader(self) -> PictureLoader:
        """Batches of the test split, in order, of :data:`EVAL_BATCH_SIZE` or more unless figures depend on it."""
        return self._eval_loader(self.test_dataset)

    @property
    def num_classes(self) -> int:
        """Number of classes; known after ``setup``."""
        return len(self.classes)

    @property
    def class_counts(self) -> dict[str, dict[str, int]]:
        """Pictures per split and class, of the splits that are set up."""
        counts = {}
        for split, dataset in self._datasets().items():
            found = Counter(picture.target for picture in dataset.pictures)
            counts[split] = {name: found[target] for target, name in enumerate(self.classes)}
        return counts

    @property
    def class_weight_tensor(self) -> Tensor | None:
        """Weights of the classes in the loss, float32 ``(num_classes,)``; None with ``class_weights="none"``."""
        if self.class_weights == "none":
            return None
        targets = [picture.target for picture in self.train_dataset.pictures]
        return torch.tensor(balanced_weights(targets, self.num_classes), dtype=torch.float32)

    def training_pictures(self, number: int) -> Tensor:
        """Fetch training pictures as evaluation would see them: to calibrate or re-estimate statistics on.

        Args:
            number: How many; all where there are fewer.

        Returns:
            Pixels, uint8, shape ``(number, channels, img_size, img_size)``: the same ones for the same seed.
        """
        pictures = self.train_dataset.pictures
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(self.seed))[:number]
        chosen = [pictures[position] for position in order.tolist()]
        plain = PictureDataset(Path(self.root), chosen, self.img_size, channels=self.channels)
        return torch.stack([plain[position][0] for position in range(len(plain))])

    def split(self) -> dict[str, list[str]]:
        """List the files of each split that is set up, relative to ``root``: what a run stores."""
        return {split: [picture.path for picture in data.pictures] for split, data in self._datasets().items()}

    def describe(self) -> list[tuple[str, str]]:
        """Give the rows that ``fit`` prints about its data; after ``setup``."""
        counts = self.class_counts
        pictures = ", ".join(f"{split} {sum(per_class.values()):,}" for split, per_class in counts.items())
        crops = "" if self.crop_area is None else f", crops from {self.crop_area:.0%} of the area"
        per_class = counts.get("train", next(iter(counts.values())))
        rows = [
            ("data", f"{type(self).__name__} in {self.root}"),
            ("pictures", f"{pictures}; {self.img_size} px, recipe {self.recipe}{crops}"),
            ("classes", f"{self.num_classes}: {_shortened(self.classes)}"),
            ("class balance", f"{_balance(per_class)}; class weights {self.class_weights}"),
            ("cache", self._describe_cache()),
            ("threads", f"{torch.get_num_threads()} compute, {self.worker_count()} data workers, {core_count()} cores"),
        ]
        if self.bad_images:
            names = _shortened([f"{path} ({reason})" for path, reason in self.bad_images], most=3)
            rows.append(("skipped", f"{len(self.bad_images)} that cannot be decoded: {names}"))
        return rows

    def worker_count(self) -> int:
        """Tell how many threads fetch pictures ahead: ``num_workers``, or what fits."""
        if self.num_workers is not None:
            return self.num_workers
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
        return choose_num_workers(core_count(), torch.get_num_threads(), on_gpu=self._on_gpu(), processes=processes)

    def _datasets(self) -> dict[str, PictureDataset]:
        named = {split: getattr(self, f"{split}_dataset", None) for split in ("train", "val", "test")}
        return {split: dataset for split, dataset in named.items() if dataset is not None}

    def _sound(self, pictures: list[Picture]) -> list[Picture]:
        """Verify pictures: stop at a bad one, or leave it out and remember it."""
        skip = self.on_bad_image == "skip"
        errors = find_bad_images(
            Path(self.root), [picture.path for picture in pictures], decode=skip, threads=core_count()
        )
        if errors and not skip:
            first = errors[0]
            more = f" ({len(errors) - 1} more like it)" if len(errors) > 1 else ""
            raise with_remedy(type(first)(first.path, first.reason + more))
        root = Path(self.root)
        bad = {Path(error.path).relative_to(root).as_posix(): error.reason for error in errors}
        self.bad_images += [item for item in bad.items() if item not in self.bad_images]
        return [picture for picture in pictures if picture.path not in bad]

    def _check_all_classes_occur(self, train: Sequence[Picture]) -> None:
        missing = sorted(set(range(self.num_classes)) - {picture.target for picture in train})
        if missing:
            names = ", ".join(self.classes[target] for target in missing)
            raise ConfigError(f"{self.root}: no training picture of {names}; add pictures or remove the class.")

    def _on_gpu(self) -> bool:
        if self.trainer is not None:
            return self.trainer.strategy.root_device.type != "cpu"
        return torch.cuda.is_available()

    def _sampler(self, dataset: PictureDataset, batch_size: int, *, shuffle: bool) -> EpochSampler:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        return EpochSampler(len(dataset), batch_size, self.seed, shuffle, rank, world_size)

    def _dataset(self, pictures: list[Picture], augmentation: Augmentation | None = None) -> PictureDataset:
        return PictureDataset(Path(self.root), pictures, self.img_size, augmentation, self.seed, self.channels)

    def _eval_loader(self, dataset: PictureDataset) -> PictureLoader:
        size = self.batch_size if self.evaluate_in_training_batches else max(self.batch_size, EVAL_BATCH_SIZE)
        return self._loader(dataset, self._sampler(dataset, size, shuffle=False))

    def _eval_dataset(self, pictures: list[Picture]) -> PictureDataset:
        if self.evaluate_in_training_batches:  # lists are sorted by class, and a batch of one class is none of training
            pictures = list(pictures)
            random.Random(self.seed).shuffle(pictures)
        return self._dataset(pictures)

    def _loader(self, dataset: PictureDataset, sampler: EpochSampler) -> PictureLoader:
        self.fill_cache(dataset)
        on_cuda = self._on_gpu() and torch.cuda.is_available()
        return PictureLoader(dataset, sampler, num_workers=self.worker_count(), pin_memory=on_cuda)

    # -- cache --------------------------------------------------------------------------------------------------

    def fill_cache(self, dataset: PictureDataset) -> Filled | None:
        """Give a data set its cache and decode what that lacks; says what went wrong, and goes on without.

        Args:
            dataset: One of those that are set up for fit or validate.

        Returns:
            What became of it; None without a cache, or where it stands already.
        """
        mode = self.cache_plan.mode
        if mode == "none" or dataset.store is not None:
            return None
        store = self._disk_store(dataset) if mode == "disk" else RamStore()
        paths = [picture.path for picture in dataset.pictures]
        with progress_bar("decoding into the cache", len(paths)) as advance:
            filled = fill(store, dataset.view, dataset.root, paths, threads=core_count(), advance=advance)
        dataset.store = store
        if filled.problem is not None:
            where = f"{self.cache_dir}: {filled.problem}" if mode == "disk" else filled.problem
            print(
                f"warning: the cache could not be completed ({where}). {filled.present:,} of {len(paths):,} pictures "
                "are in it; the others are decoded every time. Free some room, or set data.cache_dir or data.cache.",
                file=sys.stderr,
            )
        return filled

    def _plan_cache(self) -> CachePlan:
        needed = 0
        for dataset in self._datasets().values():
            paths = [picture.path for picture in dataset.pictures]
            missing = len(paths) - (self._disk_store(dataset).count() if self.cache in ("auto", "disk") else 0)
            needed += estimate_bytes(dataset.view, dataset.root, paths) * missing // max(1, len(paths))
        return choose_cache(
            self.cache, needed, free_disk=free_disk_bytes(self.cache_dir), available_ram=available_ram_bytes()
        )

    def _disk_store(self, dataset: PictureDataset) -> DiskStore:
        folder = cache_folder(self.cache_dir, dataset.root, dataset.view)
        return DiskStore(folder, dataset.root, [picture.path for picture in dataset.pictures])

    def _describe_cache(self) -> str:
        plan = self.cache_plan
        if plan.mode == "none":
            return f"none{plan.reason and ': '}{plan.reason}"
        why = f" (auto: {plan.reason})" if plan.reason else ""
        size = f", about {mib(plan.bytes_needed)} to decode first" if plan.bytes_needed else ", all there"
        row = f"{plan.mode}{why}" + (f" in {self.cache_dir}" if plan.mode == "disk" else "") + size
        view = next(iter(self._datasets().values())).view
        if view.kind == "short":
            row += (
                f"; large pictures with a short side of {view.side} px, so that no crop has less than {self.img_size}"
            )
        return row


def choose_num_workers(cores: int, compute_threads: int, *, on_gpu: bool, processes: int = 1) -> int:
    """Choose how many data threads fit.

    On a CPU a data thread beside a full set of compute threads makes every barrier wait: they take only the
    cores that are left. Beside a GPU the main thread needs one core, and more than 8 do not help.

    Args:
        cores: Cores that this machine gives us.
        compute_threads: torch's threads per process; not counted on a GPU.
        on_gpu: Whether the net runs on an accelerator.
        processes: Training processes on this machine, each with its own data threads.

    Returns:
        Data threads per training process, >= 0.

    Example:
        >>> choose_num_workers(2, 2, on_gpu=False), choose_num_workers(16, 16, on_gpu=True)
        (0, 8)
    """
    share = cores // processes
    return max(0, min(8, share - 1)) if on_gpu else max(0, share - compute_threads)


def core_count() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shortened(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


def _balance(per_class: dict[str, int]) -> str:
    fewest, most = min(per_class, key=per_class.__getitem__), max(per_class, key=per_class.__getitem__)
    if per_class[fewest] == per_class[most]:
        return f"{per_class[most]} pictures each"
    ratio = f" ({per_class[most] / per_class[fewest]:.1f} to 1)" if per_class[fewest] else ""
    return f"from {per_class[fewest]} ({fewest}) to {per_class[most]} ({most}){ratio}"
