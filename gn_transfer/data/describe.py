"""What the plan of a run says about its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from gn_transfer.config import ConfigError
from gn_transfer.data.datamodule import ImageDataModule
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.folder import Folder
from gn_transfer.data.masks import describe_shares
from gn_transfer.data.segmentation import SegmentationDataModule
from gn_transfer.data.workers import core_count


def describe_data(data: ImageDataModule) -> list[tuple[str, str]]:
    """Give the rows that ``fit`` prints about its data.

    Args:
        data: The data module, set up.
    """
    datasets = data.datasets()
    images = ", ".join(f"{split} {len(dataset):,}" for split, dataset in datasets.items())
    trains = "train" in datasets
    if trains and (held := len(test_images(data))):
        images += f", test {held:,} (held back)"
    crops = "" if data.min_crop_scale is None else f", crops from {data.min_crop_scale:.0%} of the area"
    recipe = f"recipe {data.recipe}{crops}" if data.augmentation is None else f"augmentation {data.augmentation}"
    per_class = data.class_counts(datasets.get("train", next(iter(datasets.values()))).images)
    balance = describe_shares(per_class) if isinstance(data, SegmentationDataModule) else _balance(per_class)
    rows = [
        ("data", f"{type(data).__name__} in {data.root}"),
        ("images", f"{images}; {data.img_size} px{f', {recipe}' if trains else ''}"),
        *([("files", data.count_files().describe())] if isinstance(data, Folder) else []),
        ("classes", f"{data.num_classes}: {_shortened(data.classes)}"),
        ("class balance", f"{balance}; class weights {data.class_weights}"),
        ("cache", data.decoded_cache.describe(next(iter(datasets.values())))),
        ("threads", f"{torch.get_num_threads()} compute, {data.worker_count()} data workers, {core_count()} cores"),
    ]
    if data.bad_images:
        names = _shortened([f"{path} ({reason})" for path, reason in data.bad_images], most=3)
        rows.append(("skipped", f"{len(data.bad_images)} that cannot be decoded: {names}"))
    return rows


def test_images(data: ImageDataModule) -> list[LabeledImage]:
    """List the test images; none where the data have no test split."""
    try:
        return data.list_test()
    except ConfigError:
        return []


def _shortened(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


def _balance(per_class: Mapping[str, int]) -> str:
    fewest, most = min(per_class, key=per_class.__getitem__), max(per_class, key=per_class.__getitem__)
    if per_class[fewest] == per_class[most]:
        return f"{per_class[most]} images each"
    ratio = f" ({per_class[most] / per_class[fewest]:.1f} to 1)" if per_class[fewest] else ""
    return f"from {per_class[fewest]} ({fewest}) to {per_class[most]} ({most}){ratio}"
