"""Decoded pictures kept for the next epoch and the next run.

One file per picture, written beside its place and renamed: a kill leaves a whole file or none, two builders at once
write the same bytes, and a full disk costs the pictures that did not fit. A file is used only if it was made of the
very picture that is there now; anything else is decoded anew.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import PIL
import simplejpeg
import torch

from gn_transfer.config import ConfigError
from gn_transfer.data.decode import BadImageError, read_size
from gn_transfer.data.view import View

Pixels = npt.NDArray[np.uint8]
CacheMode = Literal["auto", "none", "ram", "disk"]

_VERSION = 1  # raise it with every change of how a view is computed
_HEADER = struct.Struct("<4s3I4QQ8x")  # magic, height, width, channels, fingerprint, checksum
_MAGIC = b"GNTX"
_MOST_MAPS = 12_288  # per data set; Linux allows 65,530 per process
_STALE_SECONDS = 600.0
_RAM_SHARE = 0.25

Fingerprint = tuple[int, int, int, int]


class PixelStore(Protocol):
    """Where views are kept, by the picture's position in its data set."""

    def get(self, index: int) -> Pixels | None:
        """Give a view, read-only, shape ``(H, W, 3)``; None where it is not kept."""

    def put(self, index: int, pixels_HWC: Pixels) -> None:
        """Keep a view. Raises OSError where there is no room."""

    def has(self, index: int) -> bool:
        """Tell whether a view is kept."""


class DiskStore:
    """Views in files, memory-mapped, so that threads and runs at the same time share one copy in memory.

    A file counts only while the picture has the path, size, modification time, change time and inode that it had when
    it was decoded; a content that changes behind all of these is not noticed. Its folder names the view, and the
    versions of decoders and of our code. A checksum finds damage.

    Args:
        folder: Where the files go; made by the first :meth:`put`.
        root: What the pictures' paths are relative to.
        paths: The pictures.
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
        """See :meth:`PixelStore.get`; a damaged file is removed."""
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
            with partial.open("wb") as file:
                file.write(header)
                file.write(content.data)
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)

    def has(self, index: int) -> bool:
        """See :meth:`PixelStore.has`; of very many pictures, the pixels are not looked at."""
        if len(self.paths) <= _MOST_MAPS:
            return self.get(index) is not None
        try:
            with self.place(index).open("rb") as file:
                return self._fits(index, file.read(_HEADER.size), os.fstat(file.fileno()).st_size)
        except OSError:
            return False

    def place(self, index: int) -> Path:
        """Name the file of a picture."""
        name = hashlib.blake2b(self.paths[index].encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.px"

    def count(self) -> int:
        """Count the pictures that have a file, of whatever age."""
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
    """Views in this process's memory."""

    def __init__(self) -> None:
        self._views: dict[int, Pixels] = {}

    def get(self, index: int) -> Pixels | None:
        """See :meth:`PixelStore.get`."""
        return self._views.get(index)

    def put(self, index: int, pixels_HWC: Pixels) -> None:
        """See :meth:`PixelStore.put`."""
        self._views[index] = pixels_HWC

    def has(self, index: int) -> bool:
        """See :meth:`PixelStore.has`."""
        return index in self._views


class Filled(NamedTuple):
    """What became of building a cache.

    Attributes:
        present: Pictures that are in it now.
        decoded: How many of them were decoded just now.
        bad: Pictures that could not be decoded; training will stop at them, or has left them out.
        problem: Why it could not be completed, or None.
    """

    present: int
    decoded: int
    bad: int
    problem: str | None


def fill(
    store: PixelStore, view: View, root: Path, paths: Sequence[str], *, threads: int, advance: Callable[[], object]
) -> Filled:
    """Decode what a store lacks, until it has everything or no more room.

    Several processes may fill the same store: each begins elsewhere and leaves out what it finds done.

    Args:
        store: The store.
        view: How to decode.
        root: What the paths are relative to.
        paths: The pictures; positions in it are the store's keys.
        threads: How many at a time, >= 1.
        advance: Called after every picture.

    Returns:
        What became of it.
    """
    if isinstance(store, DiskStore):
        store.sweep()
    stop = threading.Event()

    def one(index: int) -> Literal["there", "decoded", "bad", "left"]:
        if store.has(index):
            return "there"
        if stop.is_set():
            return "left"
        try:
            pixels_HWC = view.load(root / paths[index])
        except BadImageError:
            return "bad"
        try:
            store.put(index, pixels_HWC)
        except OSError:
            stop.set()
            raise
        return "decoded"

    order = random.Random(os.getpid()).sample(range(len(paths)), len(paths))
    outcomes, problem = [], None
    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in as_completed([pool.submit(one, index) for index in order]):
                try:
                    outcomes.append(done.result())
                except OSError as error:
                    problem = problem or error.strerror or str(error)
                advance()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    decoded = outcomes.count("decoded")
    return Filled(outcomes.count("there") + decoded, decoded, outcomes.count("bad"), problem)


class CachePlan(NamedTuple):
    """Which cache a run uses.

    Attributes:
        mode: What it comes to.
        reason: Why, for the plan; empty where the user chose.
        bytes_needed: Size of all its views, estimated from some.
    """

    mode: Literal["none", "ram", "disk"]
    reason: str
    bytes_needed: int


def choose_cache(mode: CacheMode, bytes_needed: int, *, free_disk: int, available_ram: int | None) -> CachePlan:
    """Choose where decoded pictures are kept.

    ``auto`` takes the disk if it has twice the room that is needed, else memory if a quarter of what is available is
    enough, else none.

    Args:
        mode: ``data.cache``.
        bytes_needed: Size of the decoded pictures that are not there yet.
        free_disk: Free bytes where the cache would lie; 0 where it cannot be written.
        available_ram: Free bytes of memory, or None where that is not known.

    Returns:
        The choice.

    Raises:
        ConfigError: ``ram``, and the pictures do not fit into memory.

    Example:
        >>> choose_cache("auto", 300, free_disk=500, available_ram=2000)
        CachePlan(mode='ram', reason='a quarter of the free memory is enough, the disk is not', bytes_needed=300)
    """
    if mode == "ram" and available_ram is not None and bytes_needed > available_ram:
        raise ConfigError(
            f"data.cache=ram: the decoded pictures take about {mib(bytes_needed)}, {mib(available_ram)} of memory are "
            "free; use disk, none, or auto."
        )
    if mode != "auto":
        return CachePlan(mode, "", bytes_needed)
    if free_disk >= 2 * bytes_needed:
        return CachePlan("disk", "it has twice the room", bytes_needed)
    if available_ram is not None and bytes_needed <= _RAM_SHARE * available_ram:
        return CachePlan("ram", "a quarter of the free memory is enough, the disk is not", bytes_needed)
    return CachePlan("none", "neither twice the room on disk nor four times the memory", bytes_needed)


def default_cache_dir() -> Path:
    """Give ``$XDG_CACHE_HOME/gn_transfer``, or ``~/.cache/gn_transfer``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gn_transfer"


def cache_folder(cache_dir: Path, root: Path, view: View) -> Path:
    """Name the folder of a data set's views: by the place of the data set, the view, and who decodes.

    Args:
        cache_dir: Where all caches lie.
        root: The data set.
        view: The view.
    """
    place = root.resolve()
    who = f"{_VERSION} {cv2.__version__} {PIL.__version__} {simplejpeg.__version__}"
    return cache_dir / f"{place.name}-{_short_hash(str(place))}" / f"{view.name}-{_short_hash(who)}"


def estimate_bytes(view: View, root: Path, paths: Sequence[str], most: int = 48) -> int:
    """Estimate the size of views from the headers of some pictures.

    Args:
        view: The view.
        root: What the paths are relative to.
        paths: The pictures.
        most: How many headers to read.

    Returns:
        Bytes.
    """
    step = max(1, len(paths) // most)
    sizes = []
    for path in paths[::step]:
        try:
            height, width = view.stored_shape(*read_size(root / path))
        except BadImageError:
            continue
        sizes.append(3 * height * width + _HEADER.size)
    return round(sum(sizes) / len(sizes) * len(paths)) if sizes else 0


def free_disk_bytes(folder: Path) -> int:
    """Tell how many bytes can be written to a folder that may not exist yet; 0 where none can."""
    anchor = next((place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()), None)
    if anchor is None or not anchor.is_dir() or not os.access(anchor, os.W_OK):
        return 0
    return shutil.disk_usage(anchor).free


def available_ram_bytes() -> int | None:
    """Tell how much memory this process may still take, in a container too; None where the system does not say."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    except (OSError, StopIteration, ValueError):
        return None
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text()))
        except (OSError, ValueError):
            continue  # no such control group, or no limit
    return max(0, min(found))


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


def mib(count: int) -> str:
    """Write a number of bytes for people.

    Example:
        >>> mib(300 * 2**20), mib(5 * 2**30)
        ('300 MiB', '5.0 GiB')
    """
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _checksum(content: Pixels) -> int:
    """Add 64-bit words, modulo 2**64: finds lost pages at memory speed, where a CRC would take as long as a crop."""
    return int(content.view(np.uint64).sum(dtype=np.uint64))


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
