"""The cache changes speed and not a pixel, whatever happens to it or to the images."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gn_transfer.config import ConfigError
from gn_transfer.data import Folder
from gn_transfer.data import cache_store as cache_module
from gn_transfer.data.cache import (
    cache_folder,
    choose_cache,
    estimate_bytes,
    fill,
    free_disk_bytes,
)
from gn_transfer.data.cache_store import DiskStore, RamStore, fingerprint
from gn_transfer.data.describe import describe_data
from gn_transfer.data.resolution import Resolution

RESOLUTION = Resolution("short", 30)
GIB = 2**30


@pytest.fixture
def root(tmp_path: Path, write_image: Any) -> Path:
    for number in range(12):
        write_image(tmp_path / "images" / f"{number}.jpg", seed=number, size=(40 + number, 60))
    return tmp_path / "images"


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def epoch_batches(data: Folder, epoch: int = 0) -> list[Any]:
    data.train_sampler.set_epoch(epoch)
    return list(data.train_dataloader())


def paths(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*.jpg"))


def store(root: Path, resolution: Resolution = RESOLUTION) -> DiskStore:
    return DiskStore(cache_folder(root.parent / "cache", root, resolution), root, paths(root))


def build(root: Path, into: Any = None, threads: int = 2) -> Any:
    target = store(root) if into is None else into
    return fill(target, RESOLUTION, root, paths(root), threads=threads, advance=lambda: None)


def assert_right(root: Path, kept: Any, *, complete: bool = True) -> None:
    """What is kept equals direct decoding."""
    for index, path in enumerate(paths(root)):
        pixels = kept.get(index)
        assert pixels is not None or not complete
        if pixels is not None:
            np.testing.assert_array_equal(pixels, RESOLUTION.load(root / path))


@pytest.mark.parametrize("kind", ["disk", "ram"])
def test_what_goes_in_comes_out(root: Path, kind: str) -> None:
    kept: Any = store(root) if kind == "disk" else RamStore()
    assert kept.get(0) is None
    assert build(root, kept) == (12, 12, 0, None)
    assert_right(root, kept)
    assert build(root, kept) == (12, 0, 0, None)  # nothing is decoded twice


def test_later_runs_find_it(root: Path) -> None:
    build(root)
    later = store(root)
    assert later.count() == 12
    assert_right(root, later)
    assert not later.get(0).flags.writeable  # type: ignore[union-attr]
    assert store(root, Resolution("short", 29)).get(0) is None  # another setting


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts this process's open files by /proc")
def test_data_sets_of_the_same_name_share_nothing(root: Path, tmp_path: Path, write_image: Any) -> None:
    other = tmp_path / "other" / root.name
    for path in paths(root):
        write_image(other / path, seed=77, size=(50, 60))
    cache = tmp_path / "cache"
    mine, theirs = (DiskStore(cache_folder(cache, place, RESOLUTION), place, paths(root)) for place in (root, other))
    build(root, mine)
    assert theirs.get(0) is None
    build(other, theirs)
    assert_right(root, mine)
    assert_right(other, theirs)


def test_kept_resolutions_hold_no_open_files(root: Path) -> None:
    fill(store(root), RESOLUTION, root, paths(root), threads=1, advance=lambda: None)
    kept, before = store(root), open_files()
    resolutions = [kept.get(index) for index in range(12)]
    assert all(resolution is not None and not resolution.flags.writeable for resolution in resolutions)
    assert open_files() == before


def test_a_changed_image_is_decoded_anew(root: Path, write_image: Any) -> None:
    build(root)
    size, times = (root / "3.jpg").stat().st_size, (root / "3.jpg").stat()
    write_image(root / "3.jpg", seed=99, size=(43, 60))
    content = (root / "3.jpg").read_bytes()
    if len(content) < size:  # the same size and modification time, as a careless tool leaves them
        (root / "3.jpg").write_bytes(content + bytes(size - len(content)))
    os.utime(root / "3.jpg", ns=(times.st_atime_ns, times.st_mtime_ns))
    later = store(root)
    assert later.get(paths(root).index("3.jpg")) is None
    assert_right(root, later, complete=False)
    assert build(root, later)[:2] == (12, 1)
    assert_right(root, later)


def test_an_image_that_changes_while_it_is_decoded_is_not_kept(
    root: Path, write_image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Resolution.load

    def slow(resolution: Resolution, path: Path) -> Any:
        pixels = decode(resolution, path)
        if path.name == "3.jpg":
            write_image(path, seed=99, size=(43, 60))
        return pixels

    with monkeypatch.context() as patch:
        patch.setattr(Resolution, "load", slow)
        build(root)
    assert store(root).get(paths(root).index("3.jpg")) is None
    build(root)
    assert_right(root, store(root))


def test_a_change_within_a_clock_tick_is_noticed(root: Path) -> None:
    image = root / "0.jpg"
    first = image.read_bytes()
    seen = set()
    for number in range(8):
        image.write_bytes(first + bytes([number]))  # the same length each time
        seen.add(fingerprint(image))
    assert len(seen) == 8


def test_a_image_put_in_its_place_is_noticed(root: Path) -> None:
    build(root)
    (root / "4.jpg").replace(root / "5.jpg")
    assert store(root).get(store(root).paths.index("5.jpg")) is None


@pytest.mark.parametrize("corruption", ["cut", "empty", "flip", "header", "other", "swap"])
def test_a_corrupt_file_is_never_used(root: Path, corruption: str) -> None:
    build(root)
    place = store(root).place(2)
    data = bytearray(place.read_bytes())
    if corruption == "cut":
        data = data[:-9]
    elif corruption == "empty":
        data = bytearray()
    elif corruption == "flip":
        data[-100] ^= 1
    elif corruption == "header":
        data[0] ^= 1
    elif corruption == "swap":  # two parts of the content have changed places
        data[-600:-300], data[-300:] = data[-300:], data[-600:-300]
    else:
        data = bytearray(store(root).place(1).read_bytes())
    place.write_bytes(bytes(data))
    later = store(root)
    assert later.get(2) is None
    assert build(root, later)[:2] == (12, 1)
    assert_right(root, later)


def test_a_full_disk_leaves_the_rest_to_decoding(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, written = DiskStore.put, []

    def put(self: DiskStore, index: int, pixels: Any) -> None:
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(index)
        own(self, index, pixels)

    monkeypatch.setattr(DiskStore, "put", put)
    kept = store(root)
    filled = build(root, kept, threads=1)
    assert filled == (5, 5, 0, "No space left on device")
    assert_right(root, kept, complete=False)
    assert list(kept.folder.glob("*/.*")) == []
    assert build(root, store(root), threads=1)[:2] == (5, 0)  # full still: what is there is found


def test_what_a_killed_builder_left_is_swept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(root)
    partial = store(root).place(0).with_name(".half.px.1-1.part")
    partial.write_bytes(b"half")
    build(root)
    assert partial.exists()  # it may be another builder's
    monkeypatch.setattr(cache_module, "_STALE_SECONDS", -1.0)
    build(root)
    assert not partial.exists()


def test_a_bad_image_is_counted(root: Path) -> None:
    (root / "1.jpg").write_bytes(b"no image")
    assert build(root) == (11, 11, 1, None)


BUILDER = """
import sys
from pathlib import Path
from gn_transfer.data.cache import cache_folder, fill
from gn_transfer.data.cache_store import DiskStore
from gn_transfer.data.resolution import Resolution
root = Path(sys.argv[1])
paths = sorted(path.name for path in root.glob("*.jpg"))
resolution = Resolution("short", 30)
store = DiskStore(cache_folder(root.parent / "cache", root, resolution), root, paths)
print("ready", flush=True)
sys.stdin.readline()
print(fill(store, resolution, root, paths, threads=2, advance=lambda: None))
"""


def builder(root: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_builders_at_once(root: Path) -> None:
    builders = [builder(root), builder(root)]
    for process in builders:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in builders]
    assert all("present=12" in line and "problem=None" in line for line in said)
    assert store(root).count() == len(list(store(root).folder.glob("*/*"))) == 12
    assert_right(root, store(root))


@pytest.mark.slow
def test_killed_at_random_moments(root: Path, write_image: Any) -> None:
    for number in range(12, 300):
        write_image(root / f"{number}.jpg", seed=number, size=(200, 300))
    interrupted = 0
    for _ in range(60):
        before = store(root).count()
        process = builder(root)
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None and store(root).count() <= before:
            time.sleep(0.001)  # a kill before it builds would show nothing
        time.sleep(random.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        interrupted += before < store(root).count() < 300
        assert_right(root, store(root), complete=False)
        if interrupted == 20:
            break
        if store(root).count() > 200:
            shutil.rmtree(store(root).folder)
    build(root)
    assert_right(root, store(root))
    assert interrupted == 20


@pytest.mark.parametrize(
    ("needed", "disk", "ram", "mode"),
    [
        (GIB, 2 * GIB, None, "disk"),
        (GIB, 2 * GIB - 1, 4 * GIB, "ram"),
        (GIB, 0, 4 * GIB - 1, "none"),
        (GIB, 0, None, "none"),
        (0, 0, 0, "disk"),
    ],
)
def test_the_rule(needed: int, disk: int, ram: int | None, mode: str) -> None:
    plan = choose_cache("auto", needed, free_disk=disk, available_ram=ram)
    assert plan.mode == mode
    assert plan.reason


def test_memory_is_not_taken_blindly() -> None:
    with pytest.raises(ConfigError, match=r"data\.cache=ram: the decoded images take about 5\.0 GiB, 3\.0 GiB"):
        choose_cache("ram", 5 * GIB, free_disk=0, available_ram=3 * GIB)
    assert choose_cache("ram", 5 * GIB, free_disk=0, available_ram=6 * GIB).mode == "ram"


def test_what_the_machine_has(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "not" / "there") > 0
    (tmp_path / "file").touch()
    assert free_disk_bytes(tmp_path / "file" / "below") == 0


def test_the_estimate(root: Path) -> None:
    exact = sum(RESOLUTION.load(root / path).size for path in paths(root))
    assert estimate_bytes(RESOLUTION, root, paths(root)) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("recipe", ["none", "light", "crop_flip", "bit", "strong"])
def test_a_run_sees_the_same_images_with_and_without(tmp_path: Path, recipe: str) -> None:
    for name in ("a", "b"):
        for number in range(4):
            folder = tmp_path / "two" / name
            folder.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(
                0, 256, (150, 210, 3), dtype=np.uint8
            )  # larger than the resolution
            Image.fromarray(noise).save(folder / f"{number}.jpg")
    batches = []
    for cache in ("none", "ram", "disk", "disk"):
        data = Folder(
            tmp_path / "two", img_size=32, recipe=recipe, cache=cache, cache_dir=tmp_path / "c", num_workers=1
        )
        data.setup("fit")
        batches.append([*epoch_batches(data, 0), *epoch_batches(data, 3), *data.val_dataloader()])
        assert (data.train_dataset.store is None) == (cache == "none")
    for other in batches[1:]:
        for (images, targets), (expected, labels) in zip(other, batches[0], strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(targets, labels)
    assert "complete" in dict(describe_data(data))["cache"]


def test_a_cache_that_cannot_be_written_is_reported_and_done_without(
    folder_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    data = Folder(folder_root, img_size=32, cache="disk", cache_dir=tmp_path / "file" / "cache")
    data.setup("fit")
    assert len(epoch_batches(data)) == 9
    said = capsys.readouterr().err
    assert said.startswith("warning: the cache could not be completed")
    assert "It holds 0 of 9 images" in said
