"""Cutting one list of images in two: pure functions of names, targets and a seed."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gn_transfer.config import ConfigError

_END_BYTES = 4096

_FEW_SHOTS = 1  # keeps the choice of shots apart from the shuffle that holds out validation


def stratified_split(
    names: Sequence[str],
    targets: Sequence[int],
    fraction: float,
    seed: int,
    *,
    key: str = "data.val_fraction",
    together: Iterable[Sequence[int]] = (),
) -> tuple[list[int], list[int]]:
    """Move the same fraction of every class to the second part.

    Each class is sorted by name and shuffled by a generator of (seed, class), so the result depends neither on
    the order of a folder's listing nor on the images of other classes. A class of n images gives ``round(n *
    fraction)``, at least one and at most n - 1. What has to stay together counts for the class of its first image, and
    is moved as a whole where it fits; where nothing fits, the smallest is. The first part keeps an image of every
    class.

    Args:
        names: One name per image, all different.
        targets: Class index per image.
        fraction: Share of the second part, between 0 and 1, both excluded.
        seed: Seed of the shuffle, >= 0.
        key: The configuration key that ``fraction`` came from, for the message.
        together: Groups of positions that stay in one part, such as images that show the same; none is in two groups.

    Returns:
        Positions in ``names`` of the first and of the second part, each in ascending order.

    Raises:
        ConfigError: ``fraction`` out of range, or a class with fewer than two images.

    Example:
        >>> stratified_split(["a", "b", "c", "d"], [0, 0, 1, 1], 0.5, seed=0)
        ([1, 3], [0, 2])
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"{key}={fraction} is out of range; give a share between 0 and 1, for example 0.2.")
    group_of = {position: sorted(group) for group in together for position in group}
    by_class: dict[int, list[list[int]]] = {}
    seen: set[int] = set()
    for position in sorted(range(len(names)), key=lambda position: names[position]):
        if position not in seen:
            unit = group_of.get(position, [position])
            seen.update(unit)
            by_class.setdefault(targets[position], []).append(unit)
    sizes = Counter(targets)
    for name, target in sorted(zip(names, targets, strict=True)):
        if sizes[target] < 2:
            raise ConfigError(
                f"The class of {name} has 1 image, {key}={fraction} needs at least 2, one for each part; add images or "
                "remove the class."
            )
    second: list[int] = []
    moved: Counter[int] = Counter()

    def may_move(unit: Sequence[int]) -> bool:
        of_class = Counter(targets[position] for position in unit)
        return all(moved[target] + number < sizes[target] for target, number in of_class.items())

    def move(unit: Sequence[int]) -> None:
        second.extend(unit)
        moved.update(targets[position] for position in unit)

    for target, units in sorted(by_class.items()):
        left = min(max(1, round(sizes[target] * fraction)), sizes[target] - 1)
        shuffled = [units[place] for place in np.random.default_rng([seed, target]).permutation(len(units))]
        before = len(second)
        for unit in shuffled:
            if len(unit) <= left and may_move(unit):
                move(unit)
                left -= len(unit)
        if len(second) == before and (fitting := [unit for unit in shuffled if may_move(unit)]):
            move(min(fitting, key=len))
    taken = set(second)
    return [position for position in range(len(names)) if position not in taken], sorted(second)


def few_shots(
    names: Sequence[str], targets: Sequence[int], shots: int, seed: int, *, names_of: Sequence[str]
) -> list[int]:
    """Choose equally many images of every class; more shots contain fewer ones of the same seed.

    Args:
        names: One name per image, all different.
        targets: Class index per image.
        shots: Images per class, at least 1.
        seed: Seed of the choice, >= 0.
        names_of: Names of the classes, for the message.

    Returns:
        Positions in ``names``, in ascending order.

    Raises:
        ConfigError: A class has fewer images.

    Example:
        >>> few_shots(["a", "b", "c", "d"], [0, 0, 1, 1], 1, seed=0, names_of=["cat", "dog"])
        [1, 3]
    """
    by_class: dict[int, list[int]] = {}
    for position in sorted(range(len(names)), key=lambda position: names[position]):
        by_class.setdefault(targets[position], []).append(position)
    poor = {names_of[target]: len(positions) for target, positions in by_class.items() if len(positions) < shots}
    if poor:
        fewest = min(poor, key=poor.__getitem__)
        raise ConfigError(
            f"data.shots_per_class={shots}: {len(poor)} classes have fewer training images, {fewest} only "
            f"{poor[fewest]}; use at most {poor[fewest]}, or null for all."
        )
    chosen = []
    for target, positions in by_class.items():
        order = np.random.default_rng([seed, target, _FEW_SHOTS]).permutation(len(positions))
        chosen += [positions[place] for place in order[:shots]]
    return sorted(chosen)


def split_digest(paths: Iterable[str]) -> str:
    """Fingerprint a list of files, whatever their order: equal lists have equal digests.

    Args:
        paths: Paths relative to the data's root.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.

    Example:
        >>> split_digest(["b.jpg", "a.jpg"]) == split_digest(["a.jpg", "b.jpg"]) != split_digest(["a.jpg"])
        True
    """
    joined = "\0".join(sorted(paths)).encode("utf-8", "surrogateescape")
    return hashlib.sha256(joined).hexdigest()[:16]


def file_identities(root: Path, paths: Iterable[str]) -> dict[str, int]:
    """Note what tells files apart without reading them: path and size. A path alone may stand for other images.

    Args:
        root: What the paths are relative to.
        paths: The files.

    Returns:
        Size in bytes by path; -1 for a file that is not there.
    """
    sizes = {}
    for path in paths:
        try:
            sizes[path] = os.stat(f"{root}/{path}").st_size  # noqa: PTH116 - of 100,000 files
        except OSError:
            sizes[path] = -1
    return sizes


def find_copies(root: Path, paths: Iterable[str], other_root: Path, others: Iterable[str]) -> dict[str, str]:
    """Find files that are copies, byte for byte, of files of another list. Reads only files of equal size.

    Args:
        root: What ``paths`` are relative to.
        paths: The files.
        other_root: What ``others`` are relative to.
        others: The other list.

    Returns:
        The first file of the other list with the same bytes, by path.
    """
    by_end: dict[tuple[int, bytes], list[str]] = {}
    ours = file_identities(root, paths)
    sizes = set(ours.values())
    for path, size in file_identities(other_root, others).items():
        if size in sizes and size > 0:
            by_end.setdefault((size, _end(f"{other_root}/{path}", size)), []).append(path)
    there = {size for size, _ in by_end}
    copies = {}
    for path, size in ours.items():
        if size in there:
            candidates = by_end.get((size, _end(f"{root}/{path}", size)), [])
            same = (other for other in candidates if _equal(root / path, other_root / other))
            if (found := next(same, None)) is not None:
                copies[path] = found
    return copies


def _end(path: str, size: int) -> bytes:
    """Read the end of a file, which differs where images do: few pairs are left, however many files there are."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - see decode.check_image
            file.seek(max(0, size - _END_BYTES))
            return file.read(_END_BYTES)
    except OSError:
        return b""


def _equal(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def balanced_weights(targets: Sequence[int], num_classes: int) -> list[float]:
    """Weigh classes by the inverse of how often they occur: ``n / (num_classes * n_c)``.

    Args:
        targets: Class index per training image; every class occurs.
        num_classes: Number of classes.

    Returns:
        One weight per class; their mean over the images is 1.

    Example:
        >>> balanced_weights([0, 0, 0, 1], 2)
        [0.6666666666666666, 2.0]
    """
    counts = Counter(targets)
    return [len(targets) / (num_classes * counts[target]) for target in range(num_classes)]
