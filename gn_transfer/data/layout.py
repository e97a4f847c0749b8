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
    splits, nested = split_folders(root, [folder for folder in folders if subfolders(folder)])
    beside = [folder for folder in folders if folder not in splits.values()]
    if splits or len(nested) < len(folders):
        refuse_misspelled_splits(root, nested, "class folders")
    if splits and "train" not in splits:
        found = next(iter(splits.values()))
        raise ConfigError(
            f"data.root={root}: {found} holds class folders, but there is no {root / 'train'}; "
            "move the class folders of the training images into it."
        )
    if "train" in splits:
        return Layout(root, classsubfolders(splits["train"]), splits, beside)
    return Layout(root, classsubfolders(root), {"train": root})


def split_folders(root: Path, folders: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """Tell the folders of splits from others, by their names.

    Args:
        root: The folder that holds them, for messages.
        folders: The folders.

    Returns:
        The folder of each split, and the other folders.

    Raises:
        ConfigError: Two folders of one split.
    """
    splits: dict[str, Path] = {}
    beside = []
    for folder in folders:
        split = split_of(folder.name)
        if split is None:
            beside.append(folder)
        elif split in splits:
            raise ConfigError(f"data.root={root}: {splits[split].name} and {folder.name}; keep one of them.")
        else:
            splits[split] = folder
    return splits, beside


def refuse_misspelled_splits(root: Path, folders: Sequence[Path], what: str) -> None:
    """Refuse folders that are called nearly like a split, whose images would be left out in silence.

    Args:
        root: The folder that holds them, for messages.
        folders: The folders that are no splits.
        what: What they hold, for messages.

    Raises:
        ConfigError: Such a name.
    """
    for folder in folders:
        if near := difflib.get_close_matches(folder.name.lower(), _SPLIT_OF, n=1, cutoff=_NEAR):
            meant = _SPLIT_OF[near[0]]
            raise ConfigError(
                f"data.root={root}: the folder {folder.name} holds {what}; is it {meant}? Rename it to {meant}, "
                f"or move it out of {root}."
            )


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

    Raises:
        ConfigError: A folder cannot be read: it must not be left out in silence.
    """
    found = [entry.path for entry in _entries(folder, hidden=False) if _ignored(entry) is None]
    return [Path(path) for path in sorted(found, key=_parts)]


def count_files(layout: Layout) -> FileCount:
    """Say for every file below the root whether it is used, and if not, why.

    Args:
        layout: The layout.
    """
    counted = FileCount()
    root = str(layout.root)
    class_roots = {str(folder) for folder in layout.splits.values()}
    for entry in sorted(_entries(layout.root), key=lambda entry: _parts(entry.path)):
        name = entry.path[len(root.rstrip(os.sep)) + 1 :]
        parts = _parts(name)
        shown = "/".join(parts)
        parent = entry.path[: -len(entry.name) - 1]
        if any(map(_is_hidden, parts)):
            if not _is_folder(entry):
                counted.ignored["hidden"].append(shown)
        elif _is_folder(entry):  # a link to one: others were walked through
            if parent in class_roots:
                counted.used += len(image_files(Path(entry.path)))
            else:
                counted.ignored["link to a folder, not followed"].append(shown)
        elif reason := _ignored(entry):
            counted.ignored[reason].append(shown)
        elif parent in {root, *class_roots}:
            counted.ignored["beside the class folders"].append(shown)
        elif root in class_roots or os.path.join(root, parts[0]) in class_roots:  # noqa: PTH118 - texts are faster
            counted.used += 1
        else:
            counted.ignored[f"in {parts[0]}/, which is no split"].append(shown)
    return counted


def describe_ignored(folder: Path) -> str:
    """Say how many files below a folder are no images of ours, by reason; empty where there are none."""
    files = (entry for entry in _entries(folder) if not _is_folder(entry))
    skip = len(str(folder).rstrip(os.sep)) + 1
    reasons = Counter(
        "hidden" if any(map(_is_hidden, _parts(entry.path[skip:]))) else _ignored(entry) for entry in files
    )
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=str) if reason is not None)


def subfolders(root: Path) -> list[Path]:
    """List the folders in a folder, sorted; hidden ones and those of operating systems are left out."""
    names = [entry.name for entry in _scan(root) if not _is_hidden(entry.name) and _is_folder(entry)]
    return [root / name for name in sorted(names)]


def _entries(folder: Path | str, *, hidden: bool = True) -> Iterator[os.DirEntry[str]]:
    """Walk through everything in and below a folder that is no folder; links to folders are not followed."""
    for entry in _scan(folder):
        if not hidden and _is_hidden(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path, hidden=hidden)
        else:
            yield entry


def _scan(folder: Path | str) -> list[os.DirEntry[str]]:
    """List a folder. The system tells with each name what it is, which spares a look at every file."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read ({error.strerror}).") from error


def _parts(path: str) -> list[str]:
    return path.split(os.sep)  # noqa: PTH206 - a hundred thousand paths are sorted; texts are faster


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _ignored(entry: os.DirEntry[str]) -> str | None:
    """Why something that is not hidden is no image of ours, or None."""
    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - texts are faster
    if entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
        return "broken link"
    if not entry.is_file():
        return "pipe or device"  # reading it may never end; or a link to a folder, which is not shown
    if suffix in SUFFIXES:
        return None
    if suffix in OPTIONAL_SUFFIXES:
        return f"{suffix} ({OPTIONAL_SUFFIXES[suffix]})"
    return f"not an image ({suffix or 'no ending'})"
