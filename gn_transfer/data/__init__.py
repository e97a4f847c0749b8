"""From a folder of images to batches. Read in the order: datamodule, folder, pets, sample | decode, splits,
augmentation.

Names are imported on first use: ``decode`` and ``preprocess`` serve ``predict``, which must not pay for lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gn_transfer.data.datamodule import ImageDataModule
    from gn_transfer.data.decode import BadImageError, decode_image
    from gn_transfer.data.digits import Digits
    from gn_transfer.data.folder import Folder
    from gn_transfer.data.pets import Pets
    from gn_transfer.data.pets_segmentation import PetsSegmentation, SegmentationSample
    from gn_transfer.data.preprocess import preprocess_image
    from gn_transfer.data.sample import Sample
    from gn_transfer.data.sampler import EpochSampler
    from gn_transfer.data.segmentation import SegmentationDataModule
    from gn_transfer.data.segmentation_folder import SegmentationFolder
    from gn_transfer.data.tiny_imagenet import TinyImageNet

__all__ = [
    "BadImageError",
    "Digits",
    "EpochSampler",
    "Folder",
    "ImageDataModule",
    "Pets",
    "PetsSegmentation",
    "Sample",
    "SegmentationDataModule",
    "SegmentationFolder",
    "SegmentationSample",
    "TinyImageNet",
    "decode_image",
    "preprocess_image",
]

_HOMES = {
    "BadImageError": "decode",
    "Digits": "digits",
    "EpochSampler": "sampler",
    "Folder": "folder",
    "Pets": "pets",
    "PetsSegmentation": "pets_segmentation",
    "SegmentationDataModule": "segmentation",
    "SegmentationFolder": "segmentation_folder",
    "SegmentationSample": "pets_segmentation",
    "ImageDataModule": "datamodule",
    "Sample": "sample",
    "TinyImageNet": "tiny_imagenet",
    "decode_image": "decode",
    "preprocess_image": "preprocess",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
