"""Where the tiles of a large image lie, and how their overlaps are blended. numpy only, so that a bundle repeats it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

OVERLAP = 4
"""Tiles overlap by their side divided by this number, at least."""


def padded(length: int, stride: int) -> int:
    """Give the next multiple of a stride.

    Example:
        >>> padded(100, 32), padded(128, 32)
        (128, 128)
    """
    return -(-length // stride) * stride


def tile_starts(length: int, tile: int) -> list[int]:
    """Place tiles along one side of an image, evenly, so that they cover it.

    Args:
        length: Of the side, in pixels.
        tile: Of a tile, likewise.

    Returns:
        First pixel of each tile; a single 0 where the side is not longer than a tile.

    Example:
        >>> tile_starts(100, 128), tile_starts(300, 128)
        ([0], [0, 86, 172])
    """
    if length <= tile:
        return [0]
    count = -(-(length - tile) // (tile - tile // OVERLAP)) + 1
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def tile_places(height: int, width: int, tile: int) -> list[tuple[slice, slice]]:
    """Place tiles over an image, row by row.

    Args:
        height: Of the image, in pixels.
        width: Likewise.
        tile: Side of a tile, in pixels; a shorter side of the image is covered by one.

    Returns:
        Rows and columns of each tile.

    Example:
        >>> tile_places(100, 300, 200)
        [(slice(0, 100, None), slice(0, 200, None)), (slice(0, 100, None), slice(100, 300, None))]
    """
    rows, columns = (
        [slice(start, start + min(tile, length)) for start in tile_starts(length, tile)] for length in (height, width)
    )
    return [(row, column) for row in rows for column in columns]


def blending_window(height: int, width: int) -> npt.NDArray[np.float32]:
    """Weigh the pixels of a tile: 1 in its middle, falling in a straight line over the overlap towards its edges.

    Args:
        height: Of the tile, in pixels.
        width: Likewise.

    Returns:
        Weights above 0, shape ``(height, width)``.
    """

    def ramp(length: int) -> npt.NDArray[np.float32]:
        distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
        return np.minimum(1.0, distance / max(1, length // OVERLAP)).astype(np.float32)

    return np.outer(ramp(height), ramp(width)).astype(np.float32)
