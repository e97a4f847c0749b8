"""Which images show the same: equal pixels, other sizes and qualities, watermarks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.decode import BadImageError, decode_image, describe_file

_THUMBNAIL = 16
_LEAST_SIDE_NEAR_DUPLICATE = 64  # smaller images have too little in them to tell copies from lookalikes
MOST_COMPARED = 30_000
"""Images that are compared pair by pair, for near-duplicates."""

_NEAR_DUPLICATE = 2.5
_NEAR_DUPLICATE_IN_PART = 1.0
_LEAST_STRUCTURE = 10.0  # standard deviation of what is compared, in levels
_WORTH_A_LOOK = 40.0  # difference beyond which two images are not compared in part
_MOST_IN_PART = 10_000  # images that are compared in part


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
    """Find pairs that show the same image in another size or quality, or with a watermark.

    Grey 16 x 16 thumbnails are compared, in levels of 0-255. Two images are near-duplicates where the root mean square
    of the difference is at most ``most_apart``, or where it is at most 1 over the three quarters of the thumbnail that
    agree best: a watermark or a caption changes the rest. A flat image is like every other flat one; pairs without
    structure in what is compared are left out. Up to 30,000 images are compared, pair by pair,
    up to 10,000 of them in part.

    Args:
        files: The files.
        most_apart: Greatest difference over the whole thumbnail.

    Returns:
        Pairs with their difference (``most_apart`` for those that are near in part), nearest first; not those with
        equal pixels.
    """
    some = [file for file in files if file.thumbnail is not None and file.thumbnail.std() > _LEAST_STRUCTURE]
    if len(some) > MOST_COMPARED:
        return []
    in_part = len(some) <= _MOST_IN_PART
    pairs = []
    vectors = np.array([file.thumbnail for file in some], dtype=np.float32).reshape(len(some), _THUMBNAIL**2)
    squares = (vectors**2).sum(axis=1)
    for one, vector in enumerate(vectors):
        # The squared distance by its expansion finds the candidates; rounding there is far below the margin.
        apart = (squares[one + 1 :] + squares[one] - 2 * vectors[one + 1 :] @ vector) / len(vector)
        near = one + 1 + np.flatnonzero(apart < (_WORTH_A_LOOK if in_part else 1.2 * most_apart) ** 2)
        difference = np.abs(vectors[near] - vector)
        order = np.argsort(difference, axis=1, kind="stable")[:, : len(vector) * 3 // 4]
        whole = np.sqrt(np.mean(difference**2, axis=1))
        part = np.sqrt(np.mean(np.take_along_axis(difference, order, axis=1) ** 2, axis=1))
        structure = np.take_along_axis(np.broadcast_to(vector, difference.shape), order, axis=1).std(axis=1)
        same = (part <= _NEAR_DUPLICATE_IN_PART) & (structure > _LEAST_STRUCTURE)
        for place in np.flatnonzero((whole <= most_apart) | same):
            other = int(near[place])
            if some[one].content != some[other].content:
                pairs.append((some[one], some[other], float(min(whole[place], most_apart))))
    return sorted(pairs, key=lambda pair: pair[2])


def group_duplicates(root: Path, images: Sequence[LabeledImage], threads: int = 1) -> list[list[int]]:
    """Group images that show the same, exactly or nearly.

    Args:
        root: What their paths are relative to.
        images: The images; those that cannot be decoded are in no group.
        threads: How many are decoded at a time.

    Returns:
        Positions in ``images``, in groups of two and more. Two images that are both near a third share its group.
    """
    with ThreadPoolExecutor(threads) as pool:
        files = list(pool.map(lambda image: _fingerprint(root, image), images))
    positions = {file.path: position for position, file in enumerate(files)}
    parent = list(range(len(files)))

    def first_of(position: int) -> int:
        while parent[position] != position:
            position = parent[position]
        return position

    pairs = [(group[0], other) for group in same_pixels(files) for other in group[1:]]
    pairs += [(one, other) for one, other, _ in find_near_duplicates(files)]
    for one, other in pairs:
        first, second = sorted((first_of(positions[one.path]), first_of(positions[other.path])))
        parent[second] = first
    groups: dict[int, list[int]] = {}
    for position in range(len(files)):
        groups.setdefault(first_of(position), []).append(position)
    return [group for group in groups.values() if len(group) > 1]


def _fingerprint(root: Path, image: LabeledImage) -> Inspected:
    try:
        status = (root / image.path).stat()
    except OSError as error:
        return Inspected(image.path, "", image.target, error=str(error))
    return _remembered(root, image, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _remembered(root: Path, image: LabeledImage, size: int, changed: int) -> Inspected:
    return inspect_image(root, "", image)
