"""Images of a page as ``data:`` addresses, so that the page is one file."""

from __future__ import annotations

import base64
from contextlib import suppress
from pathlib import Path

import cv2
from simplejpeg import encode_jpeg

from gn_transfer.data.decode import BadImageError, decode_image

_LARGEST_SHEET = 32 * 2**20  # bytes

THUMBNAIL_SIDE = 112
"""Longer side of an image on a page, in pixels."""


def find_image(path: str, roots: list[Path]) -> Path | None:
    """Find an image of a run.

    Args:
        path: Relative to the folder of the data.
        roots: Where this folder may be.

    Returns:
        Its path; None where it is not there any more, or leads out of the folder.
    """
    if Path(path).is_absolute() or ".." in Path(path).parts:
        return None
    with suppress(OSError):  # a name that is too long
        return next((root / path for root in roots if (root / path).is_file()), None)
    return None


def thumbnail(file: Path | None) -> str | None:
    """Give an image as a small ``data:`` address.

    Args:
        file: Its path, or None.

    Returns:
        A JPEG of at most :data:`THUMBNAIL_SIDE` pixels; None where the file is gone or cannot be decoded.
    """
    if file is None:
        return None
    try:
        pixels = decode_image(file, least_side=THUMBNAIL_SIDE)
    except BadImageError:
        return None
    height, width = pixels.shape[:2]
    scale = min(1.0, THUMBNAIL_SIDE / max(height, width))
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    return as_address(encode_jpeg(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), quality=80))


def sheet_address(file: Path) -> str | None:
    """Give the address of an image that a run has written.

    Args:
        file: A JPEG in the run's folder.

    Returns:
        None where it is not there, or is no such file: a link could lead to any file, and the page is passed on.
    """
    if file.is_symlink() or not file.is_file() or file.stat().st_size > _LARGEST_SHEET:
        return None
    content = file.read_bytes()
    return as_address(content) if content.startswith(b"\xff\xd8\xff") else None


def as_address(jpeg: bytes) -> str:
    """Give the bytes of a JPEG as a ``data:`` address."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
