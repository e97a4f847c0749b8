"""The keys of a training on the command line, by group, and the classes that they configure."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from lightning.pytorch import Callback, Trainer

from gn_transfer.backbones.model_config import ModelConfig
from gn_transfer.data import (
    Digits,
    Folder,
    ImageDataModule,
    Pets,
    PetsSegmentation,
    Sample,
    SegmentationFolder,
    SegmentationSample,
    TinyImageNet,
)
from gn_transfer.training.accumulation import GradientAccumulation
from gn_transfer.training.batch_norm_statistics import BatchNormStatistics
from gn_transfer.training.checkpoint_callbacks import LastCheckpoint
from gn_transfer.training.classification import RegularizationConfig
from gn_transfer.training.early_stopping import EarlyStopping
from gn_transfer.training.ema import ExponentialMovingAverage
from gn_transfer.training.freezing import BackboneFreezing
from gn_transfer.training.optimizer import OptimizerConfig
from gn_transfer.training.precision import MixedPrecisionConfig
from gn_transfer.training.segmentation import SegmentationConfig

DATA: tuple[type[ImageDataModule], ...] = (
    Sample,
    Pets,
    Folder,
    TinyImageNet,
    Digits,
    SegmentationSample,
    PetsSegmentation,
    SegmentationFolder,
)
"""What ``--data NAME`` offers; jsonargparse finds subclasses of ImageDataModule that are imported."""

CONFIGS: dict[str, type] = {
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "regularization": RegularizationConfig,
    "segmentation": SegmentationConfig,
    "mixed_precision": MixedPrecisionConfig,
}
"""Groups of keys that configure the module and its precision."""

CALLBACKS: dict[str, type[Callback]] = {
    "accumulation": GradientAccumulation,
    "batch_norm": BatchNormStatistics,
    "freezing": BackboneFreezing,
    "ema": ExponentialMovingAverage,
    "checkpoint": LastCheckpoint,
    "early_stopping": EarlyStopping,
}
"""Groups of keys that configure a callback each."""


def known_keys() -> list[str]:
    """List the keys that a configuration may have, over all data modules."""
    groups: list[tuple[str, type]] = [
        *(("data", kind) for kind in DATA),
        *CONFIGS.items(),
        *CALLBACKS.items(),
        ("trainer", Trainer),
    ]
    keys = [f"{group}.{name}" for group, kind in groups for _, name in parameters_of(kind)]
    return ["seed_everything", *dict.fromkeys(keys), "samples", "memory_limit", "ckpt_path", "dry_run"]


def parameters_of(kind: type) -> Iterator[tuple[type, str]]:
    """Name the arguments of a class, each with the class that has it.

    Data modules pass what they do not name themselves on to their base, so that bases count as well.
    """
    for part in kind.__mro__[:-1]:
        if part.__module__.startswith("gn_transfer") or part is Trainer:
            for name, parameter in inspect.signature(part).parameters.items():
                if parameter.kind is not parameter.VAR_KEYWORD:
                    yield part, name
