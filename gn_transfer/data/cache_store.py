"""Where decoded images are kept: one file per image on disk, or this process's memory.

A file is written beside its place and renamed: a kill leaves a whole file or none, two writers at once write the same
bytes. A file is used only if it was made of the very image that is there now.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Pixels = npt.NDArray[np.uint8]

_HEADER = struct.Struct("<4s3I4QQ8x")  # magic, height, width, channels, fingerprint, checksum
HEADER_BYTES = _HEADER.size
"""Bytes before the pixels of a file."""

_MAGIC = b"GNTX"
_MOST_MAPS = 12_288  # per data set; Linux allows 65,530 per process
_STALE_SECONDS = 600.0

Fingerprint = tuple[int, int, int, int]


class PixelStore(Protocol):
    """Where decoded images are kept, by the image's position in its data set."""

    def get(self, index: int) -> Pixels | None:
        """Return an image, read-only, shape ``(H, W, 3)``; None where it is not kept."""

    def put(self, index: int, pixels_HWC: Pixels) -> None:
        """Keep an image. Raises OSError where there is no room."""

    def has(self, index: int) -> bool:
        """Tell whether an image is kept."""


class DiskStore:
    """Images in files, memory-mapped, so that threads and runs at the same time share one copy in memory.

    A file counts only while the image has the path, size, modification time, change time and inode that it had when
    it was decoded; a content that changes behind all of these is not noticed. The folder's name holds the resolution
    and the versions of decoders and of this code. A checksum finds corruption.

    Args:
        folder: Where the files go; made by the first :meth:`put`.
        root: What the images' paths are relative to.
        paths: The images.
    """

    def __init__(self, folder: Path, root: Path, paths: Sequence[str]) -> None:
        self.folder = folder
        self.root = root
        self.paths = list(paths)
        self._fingerprints: dict[int, Fingerprint] = {}
        self._maps: dict[int, Pixels] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": {}}

    def get(self, index: int) -> Pixels | None:
        """See :meth:`PixelStore.get`; a corrupt file is removed."""
        pixels = self._maps.get(index)
        if pixels is None:
            pixels = self._open(index)
            if pixels is not None:
                if len(self._maps) >= _MOST_MAPS:
                    self._maps.clear()
                self._maps[index] = pixels
        return pixels

    def put(self, index: int, pixels_HWC: Pixels) -> None:
        """See :meth:`PixelStore.put`."""
        place = self.place(index)
        place.parent.mkdir(parents=True, exist_ok=True)
        content = np.zeros(_padded(pixels_HWC.size), np.uint8)
        content[: pixels_HWC.size] = pixels_HWC.reshape(-1)
        header = _HEADER.pack(_MAGIC, *pixels_HWC.shape, *self._fingerprint(index), _checksum(content))
        partial = place.with_name(f".{place.name}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            partial.unlink(missing_ok=True)  # a link would be followed
            with partial.open("xb") as file:
                file.write(header)
                file.write(content.data)
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)

    def has(self, index: int) -> bool:
        """See :meth:`PixelStore.has`; of very many images, the pixels are not looked at."""
        if len(self.paths) <= _MOST_MAPS:
            return self.get(index) is not None
        try:
            with self.place(index).open("rb") as file:
                return self._fits(index, file.read(_HEADER.size), os.fstat(file.fileno()).st_size)
        except OSError:
            return False

    def place(self, index: int) -> Path:
        """Name the file of an image."""
        name = hashlib.blake2b(os.fsencode(self.paths[index]), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.px"

    def count(self) -> int:
        """Count the images that have a file, of whatever age."""
        found = {f"{name.parent.name}/{name.name}" for name in self.folder.glob("*/*.px")}
        places = (self.place(index) for index in range(len(self.paths)))
        return sum(f"{place.parent.name}/{place.name}" in found for place in places)

    def sweep(self) -> None:
        """Remove what builders that were killed left half-written, more than ten minutes ago."""
        for partial in self.folder.glob("*/.*.part"):
            try:
                if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                    partial.unlink(missing_ok=True)
            except OSError:
                continue  # another builder was quicker

    def _open(self, index: int) -> Pixels | None:
        place = self.place(index)
        try:
            size = place.stat().st_size
            if size < _HEADER.size:
                return None
            # Python's mmap holds a file descriptor per map, and many systems allow 1,024; this one closes it.
            mapped: Pixels = torch.from_file(str(place), shared=False, size=size, dtype=torch.uint8).numpy()
        except (OSError, RuntimeError):  # gone, or replaced by a shorter one since
            return None
        header = mapped[: _HEADER.size].tobytes()
        if not self._fits(index, header, size):
            return None
        mapped.setflags(write=False)
        _, height, width, channels, *_, checksum = _HEADER.unpack(header)
        content = mapped[_HEADER.size :]
        if _checksum(content) != checksum:
            self.place(index).unlink(missing_ok=True)
            return None
        return content[: height * width * channels].reshape(height, width, channels)

    def _fits(self, index: int, header: bytes, size: int) -> bool:
        if len(header) < _HEADER.size:
            return False
        magic, height, width, channels, *fingerprint, _ = _HEADER.unpack(header)
        whole = size == _HEADER.size + _padded(height * width * channels)
        try:
            return magic == _MAGIC and whole and tuple(fingerprint) == self._fingerprint(index)
        except OSError:
            return False

    def _fingerprint(self, index: int) -> Fingerprint:
        found = self._fingerprints.get(index)
        if found is None:
            found = self._fingerprints[index] = fingerprint(self.root / self.paths[index])
        return found


class RamStore:
    """Images in this process's memory."""

    def __init__(self) -> None:
        self._images: dict[int, Pixels] = {}

    def get(self, index: int) -> Pixels | None:
        """See :meth:`PixelStore.get`."""
        return self._images.get(index)

    def put(self, index: int, pixels_HWC: Pixels) -> None:
        """See :meth:`PixelStore.put`."""
        self._images[index] = pixels_HWC

    def has(self, index: int) -> bool:
        """See :meth:`PixelStore.has`."""
        return index in self._images


def fingerprint(path: Path) -> Fingerprint:
    """Tell one content of a file from the next: size, modification and change time (ns), inode.

    Clocks of file systems tick: a file that was changed within the present tick might change again unnoticed, so that
    tick is waited out: 20 ms, or 2 s where times have whole seconds only.

    Args:
        path: The file.

    Raises:
        OSError: It is not there.
    """
    while True:
        stat = path.stat()
        tick = 2.0 if stat.st_ctime_ns % 1_000_000_000 == 0 else 0.02
        age = time.time() - stat.st_ctime
        if not 0.0 <= age < tick:
            return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
        time.sleep(tick - age)


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _checksum(content: Pixels) -> int:
    """Compute the CRC-32, which finds pages that are lost and pages that have changed places."""
    return zlib.crc32(content.data)
