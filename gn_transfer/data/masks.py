"""What the values of masks mean, and whether masks are what they should be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gn_transfer.data.cache_store import PixelStore
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.decode import BadImageError, decode_mask, is_turned, read_size
from gn_transfer.data.resolution import Resolution

Mask = npt.NDArray[np.uint8]

IGNORED = 255
"""Target of a pixel that counts neither in the loss nor in a metric."""

_SHOWN = 3
_MANY_VALUES = 8  # so many that are no class come from soft edges or from a photograph


@dataclass(frozen=True)
class MaskValues:
    """Which value of a mask stands for which class.

    Attributes:
        classes: Names of the classes; a target is a position in it.
        targets: Class by value.
        ignored: Values of pixels that do not count.
    """

    classes: tuple[str, ...]
    targets: Mapping[int, int]
    ignored: frozenset[int] = frozenset({IGNORED})

    def to_targets(self, mask_HW: Mask, path: str | Path) -> Mask:
        """Turn the values of a mask into targets.

        Args:
            mask_HW: Values, shape ``(H, W)``.
            path: Of the mask, for messages.

        Returns:
            Class indices and :data:`IGNORED`, shape ``(H, W)``.

        Raises:
            BadImageError: Values that are no class.
        """
        table = np.full(256, _UNKNOWN, np.uint8)
        table[list(self.ignored)] = IGNORED
        for value, target in self.targets.items():
            table[value] = target
        targets: Mask = table[mask_HW]
        if (targets == _UNKNOWN).any():
            raise BadImageError(path, self._complaint(np.unique(mask_HW[targets == _UNKNOWN]).tolist()))
        return targets

    def describe(self) -> str:
        """List the known values."""
        known = ", ".join(f"{value} {self.classes[target]}" for value, target in sorted(self.targets.items()))
        return known + "".join(f", {value} ignored" for value in sorted(self.ignored))

    def _complaint(self, unknown: list[int]) -> str:
        known = self.describe()
        if len(unknown) > _MANY_VALUES:
            return (
                f"a mask with {len(unknown)} values that are no class, from {unknown[0]} to {unknown[-1]}: soft edges "
                f"or a photograph. Save it without smoothing, with the values {known}"
            )
        listed = ", ".join(map(str, unknown))
        return f"a mask with the values {listed}, which are no class; known are {known}"


_UNKNOWN = 254  # no class has this number: at most 254 classes


@dataclass
class MaskFiles:
    """The masks of a data set, for the cache; see :class:`gn_transfer.data.dataset.CachedFiles`.

    Attributes:
        root: What the paths are relative to.
        paths: The masks.
        resolution: At which they are needed.
        store: Where decoded masks are kept; None decodes every time.
    """

    root: Path
    paths: list[str]
    resolution: Resolution
    store: PixelStore | None = None


def check_mask(root: Path, image: LabeledImage, values: MaskValues) -> npt.NDArray[np.int64]:
    """Decode a mask and compare it with its image.

    Args:
        root: What paths are relative to.
        image: Image and mask.
        values: What the values mean.

    Returns:
        Pixels of each class, shape ``(classes,)``; the ignored ones are in none.

    Raises:
        BadImageError: It is missing, cannot be decoded, has another size than its image, or values that are no class.
    """
    path = root / image.mask
    mask = decode_mask(path)
    size = read_size(root / image.path)
    if min(size) < 2:
        raise BadImageError(
            root / image.path, f"{size[1]} x {size[0]} pixels; an image for segmentation has two or more a side"
        )
    if mask.shape != size:
        hint = "; save the mask upright, as the image is seen" if mask.shape == size[::-1] else ""
        raise BadImageError(
            path,
            f"a mask of {mask.shape[1]} x {mask.shape[0]} pixels for an image of {size[1]} x {size[0]} "
            f"({image.path}); give both the same size{hint}",
        )
    targets = values.to_targets(mask, path)
    counts: npt.NDArray[np.int64] = np.bincount(targets.reshape(-1), minlength=256)[: len(values.classes)]
    return counts


def check_masks(
    root: Path,
    images: Sequence[LabeledImage],
    values: MaskValues,
    *,
    threads: int,
    advance: Callable[[], object] = lambda: None,
) -> list[npt.NDArray[np.int64] | BadImageError]:
    """Check many masks, several at a time; see :func:`check_mask`.

    Returns:
        The pixels of each class, or what is wrong, in the order of the images.
    """

    def check(image: LabeledImage) -> npt.NDArray[np.int64] | BadImageError:
        try:
            return check_mask(root, image, values)
        except BadImageError as error:
            return error
        finally:
            advance()

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(check, images))


def turned_images(root: Path, images: Sequence[LabeledImage], *, threads: int) -> list[str]:
    """List the images that EXIF turns or mirrors, and which masks do not follow."""
    with ThreadPoolExecutor(threads) as pool:
        turned = pool.map(lambda image: is_turned(root / image.path), images)
        return [image.path for image, yes in zip(images, turned, strict=True) if yes]


def first_of(names: Sequence[str]) -> str:
    """List the first names, and say whether there are more."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def about_turned(paths: Sequence[str]) -> str:
    """Say what :func:`turned_images` found."""
    return (
        f"{len(paths):,} images are turned or mirrored by EXIF: {first_of(paths)}. Their masks must fit the image as "
        "it is seen; look at them with gn-transfer data show."
    )


def values_in(root: Path, images: Iterable[LabeledImage]) -> set[int]:
    """Collect the values of masks; those that cannot be decoded are left out."""
    found: set[int] = set()
    for image in images:
        with contextlib.suppress(BadImageError):
            found |= set(np.unique(decode_mask(root / image.mask)).tolist())
    return found


def mask_files(root: Path, images: Sequence[LabeledImage], short_side: int) -> MaskFiles:
    """Describe the masks of images to the cache."""
    return MaskFiles(root, [image.mask for image in images], Resolution("mask", short_side))


def describe_shares(pixels: Mapping[str, int]) -> str:
    """Say how the labeled pixels are shared by the classes.

    Example:
        >>> describe_shares({"ground": 30, "cat": 10})
        'ground 75.0%, cat 25.0% of the pixels'
    """
    total = max(1, sum(pixels.values()))
    return ", ".join(f"{name} {count / total:.1%}" for name, count in pixels.items()) + " of the pixels"
