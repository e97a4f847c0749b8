"""How a folder of images is arranged: which folders are splits and classes, and what became of every file."""

from __future__ import annotations

import difflib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gn_transfer.config import ConfigError
from gn_transfer.data.decode import OPTIONAL_SUFFIXES, SUFFIXES

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training", "trainset", "train_set"),
    "val": ("val", "valid", "validation", "dev", "valset", "val_set"),
    "test": ("test", "testing", "testset", "test_set", "holdout"),
}
"""Names of split folders, in any case."""

IMAGE_FOLDERS = ("images", "image", "imgs", "img")
"""Names of the folder of images whose pixels are classified, in any case."""

MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "segmentation")
"""Names of the folder of their masks, in any case."""

_SYSTEM = frozenset({"__macosx", "@eadir", "$recycle.bin", "thumbs.db", "desktop.ini"})
_NEAR = 0.75  # likeness from which on a folder's name counts as a misspelled split


@dataclass(frozen=True)
class Layout:
    """How a folder is arranged.

    Attributes:
        root: The folder.
        classes: Names of the class folders of the training images, sorted.
        splits: Folder of each split. Where the class folders lie in ``root`` itself, ``train`` alone: ``root``.
        beside: Folders beside the splits that belong to none.
    """

    root: Path
    classes: list[str]
    splits: Mapping[str, Path]
    beside: Sequence[Path] = ()


@dataclass
class FileCount:
    """What became of the files below a folder.

    Attributes:
        used: Image files.
        ignored: The other files by reason, as paths relative to the folder.
    """

    used: int = 0
    ignored: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def describe(self) -> str:
        """Say it in a line.

        Example:
            >>> FileCount(36, {"not an image (.txt)": ["a.txt"]}).describe()
            '36 used, 1 ignored: 1 not an image (.txt)'
        """
        total = sum(map(len, self.ignored.values()))
        reasons = ", ".join(f"{len(files):,} {reason}" for reason, files in sorted(self.ignored.items()))
        return f"{self.used:,} used" + (f", {total:,} ignored: {reasons}" if total else ", none ignored")


def find_layout(root: Path) -> Layout:
    """Recognize how a folder of images is arranged.

    Either ``root/<split>/<class>/*`` with the names of :data:`SPLITS` in any case, or ``root/<class>/*``. A folder
    called ``train`` that holds no folders is a class of that name.

    Args:
        root: The folder.

    Returns:
        Its layout.

    Raises:
        ConfigError: Not a folder of class folders, or one that can be read in two ways.
    """
    if not root.is_dir():
        raise ConfigError(f"data.root={root}: no such folder; give the folder of your class folders.")
    folders = subfolders(root)
    splits: dict[str, Path] = {}
    beside = []
    for folder in folders:
        split = split_of(folder.name) if subfolders(folder) else None
        if split is None:
            beside.append(folder)
        elif split in splits:
            raise ConfigError(f"data.root={root}: {splits[split].name} and {folder.name}; keep one of them.")
        else:
            splits[split] = folder
    nested = [folder for folder in beside if subfolders(folder)]
    for folder in nested:
        near = difflib.get_close_matches(folder.name.lower(), _SPLIT_OF, n=1, cutoff=_NEAR)
        if near and (splits or len(nested) < len(folders)):
            meant = _SPLIT_OF[near[0]]
            raise ConfigError(
                f"data.root={root}: the folder {folder.name} holds class folders; is it {meant}? Rename it to {meant}, "
                f"or move it out of {root}."
            )
    if splits and "train" not in splits:
        found = next(iter(splits.values()))
        raise ConfigError(
            f"data.root={root}: {found} holds class folders, but there is no {root / 'train'}; "
            "move the class folders of the training images into it."
        )
    if "train" in splits:
        return Layout(root, classsubfolders(splits["train"]), splits, beside)
    return Layout(root, classsubfolders(root), {"train": root})


def named_folder(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """Find the first folder that has one of some names, in any case."""
    return next((folder for name in names for folder in folders if folder.name.lower() == name), None)


def holds_pairs(root: Path) -> bool:
    """Say whether a folder, or its split for training, holds images with masks rather than images by class."""
    folders = subfolders(root)
    train = next((folder for folder in folders if split_of(folder.name) == "train"), None)
    inside = [*([folders] if folders else []), *([subfolders(train)] if train is not None else [])]
    return any(named_folder(some, IMAGE_FOLDERS) and named_folder(some, MASK_FOLDERS) for some in inside)


def split_of(name: str) -> str | None:
    """Name the split that a folder's name stands for.

    Example:
        >>> split_of("Validation"), split_of("cats")
        ('val', None)
    """
    return _SPLIT_OF.get(name.lower())


_SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}


def classsubfolders(root: Path) -> list[str]:
    """List the classes: the names of the folders in ``root``, sorted; hidden ones are left out.

    Args:
        root: The folder.

    Raises:
        ConfigError: Fewer than two.
    """
    names = [folder.name for folder in subfolders(root)]
    if len(names) < 2:
        found = f"only one class folder ({names[0]})" if names else "no class folders"
        inner = subfolders(root / names[0]) if names else []
        kind = "splits" if any(split_of(folder.name) for folder in inner) else "classes"
        hint = f" Its own folders look like {kind}: give {root / names[0]}." if len(inner) > 1 else ""
        raise ConfigError(
            f"{root}: {found}. A classifier needs at least 2 classes: one folder per class with its images in it.{hint}"
        )
    return names


def image_files(folder: Path) -> list[Path]:
    """List the image files in and below a folder, sorted; hidden ones are left out.

    Args:
        folder: The folder; itself it may be a link, links to folders below it are not followed.
    """
    return sorted(path for path in files_below(folder) if _ignored(path, folder) is None and path.is_file())


def files_below(folder: Path) -> Iterator[Path]:
    """Walk through the files in and below a folder; links to folders are not followed.

    Raises:
        ConfigError: A folder cannot be read: it must not be left out in silence.
    """

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{os.fsdecode(error.filename)} cannot be read ({error.strerror}).") from error

    for parent, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(parent, name) for name in names)


def count_files(layout: Layout) -> FileCount:
    """Say for every file below the root whether it is used, and if not, why.

    Args:
        layout: The layout.
    """
    counted = FileCount()
    root = layout.root
    class_roots = set(layout.splits.values())
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            if not path.is_symlink() or _ignored(path, root) == "hidden":
                continue
            if path.parent in class_roots:
                counted.used += len(image_files(path))
            else:
                counted.ignored["link to a folder, not followed"].append(name)
        elif reason := _ignored(path, root):
            counted.ignored[reason].append(name)
        elif not class_roots & set(path.parents[1:]):
            beside = path.parent in {root, *class_roots}
            where = (
                "beside the class folders" if beside else f"in {path.relative_to(root).parts[0]}/, which is no split"
            )
            counted.ignored[where].append(name)
        else:
            counted.used += 1
    return counted


def describe_ignored(folder: Path) -> str:
    """Say how many files below a folder are no images of ours, by reason; empty where there are none."""
    reasons = Counter(_ignored(path, folder) for path in folder.rglob("*") if path.is_file())
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=str) if reason is not None)


def subfolders(root: Path) -> list[Path]:
    """List the folders in a folder, sorted; hidden ones and those of operating systems are left out."""
    try:
        found = [path for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name)]
    except OSError as error:
        raise ConfigError(f"{root} cannot be read ({error.strerror}).") from error
    return sorted(found, key=lambda path: path.name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _ignored(path: Path, root: Path) -> str | None:
    """Why a file is no image of ours, or None."""
    if any(_is_hidden(part) for part in path.relative_to(root).parts):
        return "hidden"
    suffix = path.suffix.lower()
    if path.is_symlink() and not path.exists():
        return "broken link"
    if suffix in SUFFIXES:
        return None
    if suffix in OPTIONAL_SUFFIXES:
        return f"{suffix} ({OPTIONAL_SUFFIXES[suffix]})"
    return f"not an image ({suffix or 'no ending'})"
