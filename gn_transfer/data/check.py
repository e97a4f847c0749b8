"""Is a data set sound? Decode everything, and look for what would stop or spoil a training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gn_transfer.config import ConfigError
from gn_transfer.data.datamodule import ImageDataModule
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.decode import SUFFIXES
from gn_transfer.data.duplicates import Inspected, find_near_duplicates, inspect_image, same_pixels


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
            f"{_files(len(used))} cannot be decoded; repair or remove, or leave out with --data.on_bad_image skip."
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
        report.warnings.append(
            f"{_files(len(report.suspicious))} can be decoded, but should be looked at: see suspicious."
        )
    if report.duplicates:
        more = sum(len(group) - 1 for group in report.duplicates)
        report.warnings.append(f"{_files(more)} with the same pixels as another one.")
    conflicting = [
        group for group in report.duplicates if len({file.target for file in group if file.split != "unlisted"}) > 1
    ]
    if conflicting:
        report.warnings.append(f"{len(conflicting)} image{'s' * (len(conflicting) != 1)} under more than one class.")
    if report.leaks:
        pairs = Counter(" and ".join(sorted({file.split for file in group} - {"unlisted"})) for group in report.leaks)
        where = ", ".join(f"{count} in {splits}" for splits, count in pairs.items())
        report.warnings.append(
            f"{len(report.leaks)} images are in two splits, exactly or nearly ({where}): what is measured there "
            "is too high. Remove them from one of the two."
        )
    return report


def _files(number: int) -> str:
    return f"{number:,} file{'s' * (number != 1)}"


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
