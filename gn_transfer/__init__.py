"""Fine-tune a timm model on your own images at batch size 1-4: GroupNorm + Weight Standardization against BatchNorm."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gn_transfer.backbones.model_config import ModelConfig
    from gn_transfer.data import (
        Digits,
        Folder,
        ImageDataModule,
        Pets,
        PetsSegmentation,
        Sample,
        SegmentationDataModule,
        SegmentationFolder,
        SegmentationSample,
        TinyImageNet,
    )
    from gn_transfer.data.decode import BadImageError
    from gn_transfer.inference.bundle import Bundle
    from gn_transfer.inference.classification import ClassificationBundle, Prediction
    from gn_transfer.inference.load import load, load_bundle, load_for_training
    from gn_transfer.inference.segmentation import Segmentation, SegmentationBundle
    from gn_transfer.layers import convert_norm, diagnose
    from gn_transfer.training.accumulation import GradientAccumulation
    from gn_transfer.training.batch_norm_statistics import BatchNormStatistics
    from gn_transfer.training.classification import RegularizationConfig, TransferClassifier
    from gn_transfer.training.ema import ExponentialMovingAverage
    from gn_transfer.training.freezing import BackboneFreezing, FreezeBatchNorm
    from gn_transfer.training.optimizer import OptimizerConfig
    from gn_transfer.training.segmentation import SegmentationConfig, TransferSegmenter

__version__ = "0.1.0"

# Names are imported on first use: `gn-transfer --help` and `predict` must not pay for torch.
_HOMES = {
    "BackboneFreezing": "training.freezing",
    "BadImageError": "data.decode",
    "BatchNormStatistics": "training.batch_norm_statistics",
    "Bundle": "inference.bundle",
    "ClassificationBundle": "inference.classification",
    "Digits": "data",
    "ExponentialMovingAverage": "training.ema",
    "Folder": "data",
    "FreezeBatchNorm": "training.freezing",
    "GradientAccumulation": "training.accumulation",
    "ImageDataModule": "data",
    "ModelConfig": "backbones.model_config",
    "OptimizerConfig": "training.optimizer",
    "Pets": "data",
    "PetsSegmentation": "data",
    "Prediction": "inference.classification",
    "RegularizationConfig": "training.classification",
    "Sample": "data",
    "Segmentation": "inference.segmentation",
    "SegmentationBundle": "inference.segmentation",
    "SegmentationConfig": "training.segmentation",
    "SegmentationDataModule": "data",
    "SegmentationFolder": "data",
    "SegmentationSample": "data",
    "TinyImageNet": "data",
    "TransferClassifier": "training.classification",
    "TransferSegmenter": "training.segmentation",
    "convert_norm": "layers",
    "diagnose": "layers",
    "load": "inference.load",
    "load_bundle": "inference.load",
    "load_for_training": "inference.load",
}

__all__ = [
    "BackboneFreezing",
    "BadImageError",
    "BatchNormStatistics",
    "Bundle",
    "ClassificationBundle",
    "Digits",
    "ExponentialMovingAverage",
    "Folder",
    "FreezeBatchNorm",
    "GradientAccumulation",
    "ImageDataModule",
    "ModelConfig",
    "OptimizerConfig",
    "Pets",
    "PetsSegmentation",
    "Prediction",
    "RegularizationConfig",
    "Sample",
    "Segmentation",
    "SegmentationBundle",
    "SegmentationConfig",
    "SegmentationDataModule",
    "SegmentationFolder",
    "SegmentationSample",
    "TinyImageNet",
    "TransferClassifier",
    "TransferSegmenter",
    "convert_norm",
    "diagnose",
    "load",
    "load_bundle",
    "load_for_training",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
