"""Images as a program has them, as pixels, decoded ahead of the graph that takes them. Needs no torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from gn_transfer.config import ConfigError
from gn_transfer.data.decode import BadImageError, decode_image, pillow_to_rgb

Pixels = npt.NDArray[np.uint8]
ImageSource: TypeAlias = str | os.PathLike[str] | bytes | bytearray | Pixels | Image.Image

Result = TypeVar("Result")


def read_image(image: ImageSource) -> Pixels:
    """Bring an image to pixels.

    Args:
        image: A path, the content of an image file, a uint8 RGB array ``(H, W, 3)``, or a Pillow image.

    Returns:
        Pixels, shape ``(H, W, 3)``, RGB.

    Raises:
        BadImageError: It cannot be decoded.
        ConfigError: An array of another shape or type, or something else.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ConfigError(
                f"an array of shape {image.shape} and type {image.dtype} is not an image; give uint8 RGB pixels of "
                "shape (height, width, 3)."
            )
        return image
    if isinstance(image, Image.Image):
        return pillow_to_rgb(image, getattr(image, "filename", "") or "the image")
    if isinstance(image, str | os.PathLike | bytes | bytearray):
        return decode_image(bytes(image) if isinstance(image, bytearray) else image)
    raise ConfigError(
        f"{type(image).__name__} is not an image; give a path, the content of an image file as bytes, a uint8 RGB "
        "array or a Pillow image."
    )


def path_of(image: ImageSource) -> str | None:
    """Give the path of an image that is a file."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else None


def prepared_batches(
    images: Iterable[ImageSource], prepare: Callable[[ImageSource], Pixels], batch_size: int
) -> Iterator[list[tuple[str | None, Pixels | BadImageError]]]:
    """Decode images while those before them are computed: two batches are held, no more.

    Args:
        images: Taken one by one as they are needed.
        prepare: Decodes an image; it runs in two threads, since decoding releases the GIL.
        batch_size: Images per batch.

    Yields:
        Batches: path and pixels, or the error of an image that cannot be decoded.

    Raises:
        ConfigError: A single image, or a batch size out of range.
    """
    if isinstance(images, str | os.PathLike | Image.Image | bytes | bytearray):
        raise ConfigError("predict takes a list of images; for a single image give a list of one: [image].")
    check_positive("batch_size", batch_size)

    def attempt(image: ImageSource) -> Pixels | BadImageError:
        try:
            return prepare(image)
        except BadImageError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        waiting: deque[list[tuple[str | None, Callable[[], Pixels | BadImageError]]]] = deque()
        source = iter(images)
        while batch := list(islice(source, batch_size)):
            waiting.append([(path_of(image), pool.submit(attempt, image).result) for image in batch])
            if len(waiting) > 1:
                yield [(path, result()) for path, result in waiting.popleft()]
        for last in waiting:
            yield [(path, result()) for path, result in last]


def without_errors(results: Iterable[Result | BadImageError]) -> list[Result]:
    """List results, and raise the first error among them."""
    found = []
    for result in results:
        if isinstance(result, BadImageError):
            raise result
        found.append(result)
    return found


def check_positive(name: str, value: int) -> None:
    """Refuse a number below 1."""
    if value < 1:
        raise ConfigError(f"{name}={value} is out of range; give an integer of at least 1.")
