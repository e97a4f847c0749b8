"""The cache of decoded images: which one a run uses, and filling it.

A full disk costs the images that did not fit; anything that is missing is decoded anew.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import PIL
import simplejpeg

from gn_transfer.config import ConfigError
from gn_transfer.data.cache_store import HEADER_BYTES, DiskStore, PixelStore, RamStore, fingerprint
from gn_transfer.data.dataset import CachedFiles, ImageDataset
from gn_transfer.data.decode import BadImageError, read_size
from gn_transfer.data.free_memory import available_ram_bytes
from gn_transfer.data.progress import progress_bar
from gn_transfer.data.resolution import Resolution

CacheMode = Literal["auto", "none", "ram", "disk"]

_VERSION = 2  # raise it with every change of how an image is decoded
_RAM_SHARE = 0.25


class Filled(NamedTuple):
    """What became of building a cache.

    Attributes:
        present: Images that are in it now.
        decoded: How many of them were decoded just now.
        bad: Images that could not be decoded; training will stop at them, or has left them out.
        problem: Why it could not be completed, or None.
    """

    present: int
    decoded: int
    bad: int
    problem: str | None


def fill(
    store: PixelStore,
    resolution: Resolution,
    root: Path,
    paths: Sequence[str],
    *,
    threads: int,
    advance: Callable[[], object],
) -> Filled:
    """Decode what a store lacks, until it has everything or no more room.

    Several processes may fill the same store: each begins elsewhere and leaves out what it finds done.

    Args:
        store: The store.
        resolution: How to decode.
        root: What the paths are relative to.
        paths: The images; positions in it are the store's keys.
        threads: How many at a time, >= 1.
        advance: Called after every image.

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
            before = fingerprint(root / paths[index])
            pixels_HWC = resolution.load(root / paths[index])
            if fingerprint(root / paths[index]) != before:
                return "left"  # changed meanwhile: it is decoded when it is needed
        except (BadImageError, OSError):
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
        bytes_needed: Size of all decoded images, estimated from some.
    """

    mode: Literal["none", "ram", "disk"]
    reason: str
    bytes_needed: int


def choose_cache(mode: CacheMode, bytes_needed: int, *, free_disk: int, available_ram: int | None) -> CachePlan:
    """Choose where decoded images are kept.

    ``auto`` takes the disk if it has twice the room that is needed, else memory if a quarter of what is available is
    enough, else none.

    Args:
        mode: ``data.cache``.
        bytes_needed: Size of the decoded images that are not there yet.
        free_disk: Free bytes where the cache would lie; 0 where it cannot be written.
        available_ram: Free bytes of memory, or None where that is not known.

    Returns:
        The choice.

    Raises:
        ConfigError: ``ram``, and the images do not fit into memory.

    Example:
        >>> choose_cache("auto", 300, free_disk=500, available_ram=2000)
        CachePlan(mode='ram', reason='a quarter of the free memory is enough, the disk is not', bytes_needed=300)
    """
    if mode == "ram" and available_ram is not None and bytes_needed > available_ram:
        raise ConfigError(
            f"data.cache=ram: the decoded images take about {mib(bytes_needed)}, {mib(available_ram)} of memory are "
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


def cache_folder(cache_dir: Path, root: Path, resolution: Resolution) -> Path:
    """Name the folder of a data set's images: by the place of the data set, the resolution and the decoders.

    Args:
        cache_dir: Where all caches lie.
        root: The data set.
        resolution: At which the images are kept.
    """
    place = root.resolve()
    who = f"{_VERSION} {cv2.__version__} {PIL.__version__} {simplejpeg.__version__}"
    return cache_dir / f"{place.name}-{_short_hash(str(place))}" / f"{resolution.name}-{_short_hash(who)}"


def estimate_bytes(resolution: Resolution, root: Path, paths: Sequence[str], most: int = 48) -> int:
    """Estimate the size of decoded images from the headers of some files.

    Args:
        resolution: At which the images are kept.
        root: What the paths are relative to.
        paths: The images.
        most: How many headers to read.

    Returns:
        Bytes.
    """
    step = max(1, len(paths) // most)
    sizes = []
    for path in paths[::step]:
        try:
            height, width = resolution.stored_shape(*read_size(root / path))
        except BadImageError:
            continue
        sizes.append(resolution.channels * height * width + HEADER_BYTES)
    return round(sum(sizes) / len(sizes) * len(paths)) if sizes else 0


def free_disk_bytes(folder: Path) -> int:
    """Tell how many bytes can be written to a folder that may not exist yet; 0 where none can."""
    anchor = next((place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()), None)
    if anchor is None or not anchor.is_dir() or not os.access(anchor, os.W_OK):
        return 0
    return shutil.disk_usage(anchor).free


def mib(count: int) -> str:
    """Write a number of bytes for people.

    Example:
        >>> mib(300 * 2**20), mib(5 * 2**30)
        ('300 MiB', '5.0 GiB')
    """
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def _short_hash(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=5).hexdigest()


class DatasetCache:
    """The cache of a data module's splits.

    Args:
        mode: ``data.cache``.
        folder: Folder of the disk cache.

    Attributes:
        plan: Which cache is used, and why; set by :meth:`plan_for`.
    """

    def __init__(self, mode: CacheMode, folder: Path) -> None:
        self.mode: CacheMode = mode
        self.folder = folder
        self.plan = CachePlan("none", "", 0)

    def plan_for(self, datasets: Sequence[ImageDataset]) -> None:
        """Choose the cache of data sets by what they still need and by the room that there is."""
        needed = 0
        for files in (files for dataset in datasets for files in dataset.cached_files):
            count = len(files.paths)
            missing = count - (self._disk_store(files).count() if self.mode in ("auto", "disk") else 0)
            needed += estimate_bytes(files.resolution, files.root, files.paths) * missing // max(1, count)
        self.plan = choose_cache(
            self.mode, needed, free_disk=free_disk_bytes(self.folder), available_ram=available_ram_bytes()
        )

    def fill(self, dataset: ImageDataset, threads: int) -> list[Filled]:
        """Give a data set its stores and decode what they lack; report what went wrong, and go on without.

        Args:
            dataset: The data set.
            threads: How many images to decode at a time.

        Returns:
            The result for the images and, where there are some, for the masks; nothing without a cache, or where the
            data set has its stores already.
        """
        if self.plan.mode == "none":
            return []
        return [self._fill(files, threads) for files in dataset.cached_files if files.store is None]

    def _fill(self, files: CachedFiles, threads: int) -> Filled:
        store = self._disk_store(files) if self.plan.mode == "disk" else RamStore()
        total = len(files.paths)
        with progress_bar("decoding into the cache", total) as advance:
            filled = fill(store, files.resolution, files.root, files.paths, threads=threads, advance=advance)
        files.store = store
        if filled.problem is not None:
            where = f"{self.folder}: {filled.problem}" if self.plan.mode == "disk" else filled.problem
            print(
                f"warning: the cache could not be completed ({where}). It holds {filled.present:,} of "
                f"{total:,} images; the others are decoded every time. Free some room, or set data.cache_dir "
                "or data.cache.",
                file=sys.stderr,
            )
        return filled

    def describe(self, dataset: ImageDataset) -> str:
        """Describe the cache in a line of the plan.

        Args:
            dataset: One of the data sets, for the resolution at which images are kept.
        """
        plan = self.plan
        if plan.mode == "none":
            return f"none{plan.reason and ': '}{plan.reason}"
        why = f" (auto: {plan.reason})" if plan.reason else ""
        size = f", about {mib(plan.bytes_needed)} to decode first" if plan.bytes_needed else ", complete"
        row = f"{plan.mode}{why}" + (f" in {self.folder}" if plan.mode == "disk" else "") + size
        if dataset.resolution.kind in ("short", "whole") and dataset.resolution.side:
            row += f"; large images are kept with a short side of {dataset.resolution.side} px"
        return row

    def _disk_store(self, files: CachedFiles) -> DiskStore:
        return DiskStore(cache_folder(self.folder, files.root, files.resolution), files.root, files.paths)
