"""Images per second of the data path, per core: ours, cold and cached, against timm, fastai and torchvision v2.

All sides read the same files (60 originals of Oxford-IIIT Pet, repeated), draw a random resized crop of 35-100 % of
the area, aspect 3/4-4/3, resize it to 224 px bilinearly, flip half of them, and hand out batches of uint8
``(B, 3, 224, 224)``: normalization is left out on all sides (timm and fastai are stopped before theirs). One process,
one thread; then with workers, ours as threads, theirs as processes. They take turns, the first round warms up.

    python benchmarks/data.py --root PET_ORIGINALS --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import torch

from gn_transfer.data import Folder
from gn_transfer.training.environment import environment

SIDE = 224
SCALE, RATIO = (0.35, 1.0), (3 / 4, 4 / 3)


def copies(originals: Path, root: Path, repeat: int) -> list[Path]:
    """Link the originals ``repeat`` times into class folders."""
    for path in sorted(originals.glob("*.jpg")):
        for number in range(repeat):
            place = root / path.stem.rpartition("_")[0] / f"{number}_{path.name}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())
    return sorted(root.glob("*/*.jpg"))


def ours(root: Path, batch_size: int, workers: int, cache: str, cache_dir: Path) -> Callable[[], Iterable[Any]]:
    """Our loader on all images but two per class."""
    data = Folder(
        root,
        val_fraction=0.01,
        img_size=SIDE,
        batch_size=batch_size,
        num_workers=workers,
        cache=cache,
        cache_dir=cache_dir,
    )
    data.setup("fit")
    loader = data.train_dataloader()
    epoch = iter(range(10**6))

    def batches() -> Iterable[Any]:
        data.train_sampler.set_epoch(next(epoch))
        return (images for images, _ in loader)

    return batches


def timm_loader(root: Path, batch_size: int, workers: int) -> Callable[[], Iterable[Any]]:
    """timm's create_loader; its inner loader, which hands out uint8 before the prefetcher normalizes."""
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root),
        (3, SIDE, SIDE),
        batch_size,
        is_training=True,
        scale=SCALE,
        ratio=RATIO,
        hflip=0.5,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=workers,
        use_prefetcher=True,
        device=torch.device("cpu"),
        persistent_workers=workers > 0,
    )
    return lambda: (images for images, _ in loader.loader)


def fastai_loader(root: Path, batch_size: int, workers: int) -> Callable[[], Iterable[Any]]:
    """fastai's DataLoaders with its RandomResizedCrop per item; no batch transforms, so uint8."""
    from fastai.vision.all import FlipItem, ImageDataLoaders, RandomResizedCrop, ToTensor

    loaders = ImageDataLoaders.from_folder(
        root,
        valid_pct=0.02,
        seed=0,
        bs=batch_size,
        num_workers=workers,
        item_tfms=[RandomResizedCrop(SIDE, min_scale=SCALE[0], ratio=RATIO), FlipItem(0.5), ToTensor],
        batch_tfms=[],
    )
    loaders.train.after_batch.fs.clear()
    return lambda: (batch[0] for batch in loaders.train)


def torchvision_loader(root: Path, batch_size: int, workers: int) -> Callable[[], Iterable[Any]]:
    """torchvision v2 on tensors, decoded by torchvision.io, through torch's DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [v2.RandomResizedCrop(SIDE, scale=SCALE, ratio=RATIO, antialias=True), v2.RandomHorizontalFlip()]
    )
    dataset = ImageFolder(str(root), transform, loader=lambda path: decode_image(path, mode=ImageReadMode.RGB))
    loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda: (images for images, _ in loader)


def images_per_sec(batches: Callable[[], Iterable[Any]], seconds: float) -> float:
    """Go through whole epochs for at least so long."""
    count, start = 0, time.perf_counter()
    while True:
        for images in batches():
            assert images.dtype == torch.uint8
            assert tuple(images.shape[1:]) == (3, SIDE, SIDE)
            count += len(images)
        spent = time.perf_counter() - start
        if spent >= seconds:
            return count / spent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the 60 originals")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    warnings.filterwarnings("ignore")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder) / "images", Path(folder) / "cache"
        copies(options.root, root, options.repeat)
        for workers in options.workers:
            for batch_size in options.batch_sizes:
                sides: dict[str, Callable[[], Iterable[Any]]] = {
                    "ours cold": ours(root, batch_size, workers, "none", cache),
                    "ours cached": ours(root, batch_size, workers, "disk", cache),
                    "timm": timm_loader(root, batch_size, workers),
                    "torchvision v2": torchvision_loader(root, batch_size, workers),
                    "fastai": fastai_loader(root, batch_size, workers),
                }
                speeds: dict[str, list[float]] = {name: [] for name in sides}
                for number in range(options.rounds + 1):
                    for name, batches in sides.items():
                        speed = images_per_sec(batches, options.seconds if number else 0.0)
                        if number:
                            speeds[name].append(speed)
                median = {name: statistics.median(found) for name, found in speeds.items()}
                ratios = {
                    name: statistics.median(a / b for a, b in zip(speeds[name], speeds["timm"], strict=True))
                    for name in ("ours cold", "ours cached")
                }
                results.append(
                    {
                        "workers": workers,
                        "batch_size": batch_size,
                        "images_per_sec": {name: round(value, 1) for name, value in median.items()},
                        "spread": {
                            name: [round(min(found), 1), round(max(found), 1)] for name, found in speeds.items()
                        },
                        "times_timm": {name: round(value, 2) for name, value in ratios.items()},
                    }
                )
    result = {
        "what": "images/s of the data path; crop, flip, 224 px, uint8 out; one compute thread",
        "rounds": options.rounds,
        "results": results,
        "libraries": {name: version(name) for name in ("fastai", "opencv-python-headless", "pillow", "simplejpeg")},
        "cores": os.cpu_count(),
        **environment(),
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for row in results:
        print(f"workers {row['workers']}, batch {row['batch_size']}: {row['images_per_sec']} {row['times_timm']}")


if __name__ == "__main__":
    main()
