"""Is a data set sound? Decode everything, and look for what would stop or spoil a training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from gn_transfer.config import ConfigError
from gn_transfer.data.datamodule import ImageDataModule
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.decode import SUFFIXES, BadImageError, decode_image, describe_file

_THUMBNAIL = 16
_LEAST_SIDE_NEAR_DUPLICATE = 64  # smaller images have too little in them to tell copies from lookalikes
_MOST_NEAR_DUPLICATE = 30_000  # images that are compared pair by pair
_NEAR_DUPLICATE = 2.5


@dataclass(frozen=True)
class Inspected:
    """What one file is.

    Attributes:
        path: Relative to the root.
        split: Where it is used.
        target: Class index.
        format: What its content is (``JPEG``, ``PNG``, ...), whatever its name says; empty where unknown.
        mode: Pillow's name of its channels: RGB, L, CMYK, RGBA, P, ...
        height: In pixels, upright; 0 where it cannot be decoded.
        width: Likewise.
        error: Why it cannot be decoded, or empty.
        warning: What is suspicious about it although it can, or empty.
        content: Hash of its pixels.
        thumbnail: Its grey thumbnail, float32 ``(256,)``; None where it is too small to compare.
    """

    path: str
    split: str
    target: int
    format: str = ""
    mode: str = ""
    height: int = 0
    width: int = 0
    error: str = ""
    warning: str = ""
    content: str = ""
    thumbnail: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        files: Every image.
        problems: What would stop a training, one sentence each.
        warnings: What may spoil it.
        duplicates: Groups of files with the same pixels.
        near_duplicates: Pairs of files with nearly the same image, and how far their thumbnails are apart (0-255).
        class_counts: Images per split and class.
    """

    files: list[Inspected]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    duplicates: list[list[Inspected]] = field(default_factory=list)
    near_duplicates: list[tuple[Inspected, Inspected, float]] = field(default_factory=list)
    class_counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def unreadable(self) -> list[Inspected]:
        """The files that cannot be decoded."""
        return [file for file in self.files if file.error]

    @property
    def suspicious(self) -> list[Inspected]:
        """The files that decode, but are not what they seem."""
        return [file for file in self.files if file.warning]

    @property
    def leaks(self) -> list[list[Inspected]]:
        """Groups of the same image, exactly or nearly, in more than one split."""
        groups = [*self.duplicates, *([one, other] for one, other, _ in self.near_duplicates)]
        return [group for group in groups if len({file.split for file in group} - {"unlisted"}) > 1]

    def as_dict(self) -> dict[str, Any]:
        """Give the report as plain values."""

        def names(group: Sequence[Inspected]) -> list[dict[str, str]]:
            return [{"path": file.path, "split": file.split} for file in group]

        sides = [min(file.height, file.width) for file in self.files if not file.error]
        return {
            "images": len(self.files),
            "class_counts": self.class_counts,
            "formats": dict(Counter(file.format for file in self.files if not file.error)),
            "modes": dict(Counter(file.mode for file in self.files if not file.error)),
            "short_side": {"least": min(sides), "median": int(np.median(sides)), "greatest": max(sides)}
            if sides
            else {},
            "unreadable": [{"path": file.path, "split": file.split, "error": file.error} for file in self.unreadable],
            "suspicious": [
                {"path": file.path, "split": file.split, "warning": file.warning} for file in self.suspicious
            ],
            "duplicates": [names(group) for group in self.duplicates],
            "near_duplicates": [
                {"files": names([one, other]), "distance": round(distance, 2)}
                for one, other, distance in self.near_duplicates
            ],
            "in_several_splits": [names(group) for group in self.leaks],
            "warnings": self.warnings,
            "problems": self.problems,
        }


def check_images(
    root: Path,
    splits: Mapping[str, Sequence[LabeledImage]],
    classes: Sequence[str],
    *,
    skips_bad: bool,
    threads: int,
    advance: Callable[[], object] = lambda: None,
) -> CheckResult:
    """Check the images of all splits.

    Args:
        root: What their paths are relative to.
        splits: The images by split, those for training first; ``unlisted`` are in none.
        classes: Names of the classes.
        skips_bad: Whether training leaves out what cannot be decoded.
        threads: How many at a time, >= 1.
        advance: Called after every image.

    Returns:
        The report.
    """

    def inspect(job: tuple[str, LabeledImage]) -> Inspected:
        split, image = job
        found = inspect_image(root, split, image)
        advance()
        return found

    with ThreadPoolExecutor(threads) as pool:
        files = list(pool.map(inspect, [(split, image) for split, some in splits.items() for image in some]))
    counts = {
        split: dict.fromkeys(classes, 0) | dict(Counter(classes[image.target] for image in some))
        for split, some in splits.items()
        if split != "unlisted"
    }
    report = CheckResult(
        files, duplicates=same_pixels(files), near_duplicates=find_near_duplicates(files), class_counts=counts
    )
    used = [file for file in report.unreadable if file.split != "unlisted"]
    if used and not skips_bad:
        report.problems.append(
            f"{len(used)} files cannot be decoded; repair or remove them, or set data.on_bad_image to skip."
        )
    sound = {file.target for file in files if file.split == next(iter(splits)) and not file.error}
    missing = [name for target, name in enumerate(classes) if target not in sound]
    if missing:
        report.problems.append(f"no sound training image of {', '.join(missing)}.")
    beside = splits.get("unlisted", [])
    if beside:
        names = ", ".join(image.path for image in beside[:3]) + (", ..." if len(beside) > 3 else "")
        report.warnings.append(f"{len(beside)} images are in no split: {names}.")
    if report.suspicious:
        report.warnings.append(f"{len(report.suspicious)} files decode, but are not what they seem.")
    if report.duplicates:
        more = sum(len(group) - 1 for group in report.duplicates)
        report.warnings.append(f"{more} files repeat the pixels of another.")
    conflicting = [
        group for group in report.duplicates if len({file.target for file in group if file.split != "unlisted"}) > 1
    ]
    if conflicting:
        report.warnings.append(f"{len(conflicting)} images are there under more than one class.")
    if report.leaks:
        report.warnings.append(
            f"{len(report.leaks)} images are on both sides of a split, exactly or nearly: its figures flatter."
        )
    return report


def list_all(data: ImageDataModule) -> tuple[dict[str, list[LabeledImage]], list[str]]:
    """List the images of all splits, and those beside them that are in none, without opening any.

    Args:
        data: The data module.

    Returns:
        Images by split, ``train`` (``trainval`` where validation is cut from it) first, ``unlisted`` last, the
        latter with target 0; and what there is to say about it.

    Raises:
        ConfigError: They are not there, or not as they should be.
    """
    data.classes, train, val = data.list_fit()
    splits, notes = {"trainval": train} if val is None else {"train": train, "val": val}, []
    try:
        splits["test"] = data.list_test()
    except ConfigError as error:
        notes.append(f"test is not checked: {error}")
    root = Path(data.root)
    listed = {image.path for some in splits.values() for image in some}
    beside = {
        path.relative_to(root).as_posix()
        for folder in {(root / path).parent for path in listed}
        if folder.is_dir()
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    }
    if beside - listed:
        splits["unlisted"] = [LabeledImage(path, 0) for path in sorted(beside - listed)]
    return splits, notes


def inspect_image(root: Path, split: str, image: LabeledImage) -> Inspected:
    """Decode a file and describe it.

    Args:
        root: What its path is relative to.
        split: Where it is used.
        image: The file.
    """
    path = root / image.path
    try:
        kind = describe_file(path)
        pixels_HWC = decode_image(path)
    except BadImageError as error:
        return Inspected(image.path, split, image.target, error=error.reason)
    height, width = pixels_HWC.shape[:2]
    thumbnail = None
    if min(height, width) >= _LEAST_SIDE_NEAR_DUPLICATE:
        grey = cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY)
        small = cv2.resize(grey, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA)
        thumbnail = np.asarray(small, dtype=np.float32).reshape(-1)
    shape = f"{height}x{width}".encode()
    return Inspected(
        image.path,
        split,
        image.target,
        kind.format,
        kind.mode,
        height,
        width,
        warning=kind.warning,
        content=hashlib.blake2b(shape + pixels_HWC.tobytes(), digest_size=16).hexdigest(),
        thumbnail=thumbnail,
    )


def same_pixels(files: Sequence[Inspected]) -> list[list[Inspected]]:
    """Group files whose decoded pixels are equal.

    Args:
        files: The files.

    Returns:
        Groups of two and more, in the order of the files.
    """
    groups: dict[str, list[Inspected]] = {}
    for file in files:
        if not file.error:
            groups.setdefault(file.content, []).append(file)
    return [group for group in groups.values() if len(group) > 1]


def find_near_duplicates(
    files: Sequence[Inspected], most_apart: float = _NEAR_DUPLICATE
) -> list[tuple[Inspected, Inspected, float]]:
    """Find pairs that show the same image in another size or quality.

    The root mean square difference of grey 16 x 16 thumbnails, in levels of 0-255; a flat image is like every other
    flat one and is left out. Up to 30,000 images are compared, pair by pair.

    Args:
        files: The files.
        most_apart: Greatest difference.

    Returns:
        Pairs with their difference, nearest first; not those with equal pixels.
    """
    some = [file for file in files if file.thumbnail is not None and file.thumbnail.std() > 4 * most_apart]
    if len(some) > _MOST_NEAR_DUPLICATE:
        return []
    pairs = []
    vectors = np.array([file.thumbnail for file in some], dtype=np.float32).reshape(len(some), _THUMBNAIL**2)
    squares = (vectors**2).sum(axis=1)
    for start in range(0, len(some), 1024):
        block = slice(start, start + 1024)
        distances = squares[block, None] + squares[None, :] - 2 * vectors[block] @ vectors.T
        for row, column in np.argwhere(distances < 1.2 * most_apart**2 * vectors.shape[1]):
            one, other = start + int(row), int(column)
            apart = float(np.sqrt(np.mean((vectors[one] - vectors[other]) ** 2)))  # exact, where the product rounds
            if one < other and apart <= most_apart and some[one].content != some[other].content:
                pairs.append((some[one], some[other], apart))
    return sorted(pairs, key=lambda pair: pair[2])
