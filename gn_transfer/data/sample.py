"""The embedded data set: synthetic images, written once, then read like Pets."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from gn_transfer.config import ConfigError
from gn_transfer.data.pets import FOLDER, Pets
from gn_transfer.data.synthetic_animals import BREEDS, render_animal

TRAINVAL_PER_BREED = 130
TEST_PER_BREED = 20
IMAGE_SIZE = 80
"""Side of an image in pixels."""

_BORDER = 2  # width of the border of a trimap, in pixels
_VERSION = 3  # raise it with every change of the images: folders of another version are written again
_STAMP = "sample.json"
_HEADER = """\
#Image CLASS-ID SPECIES BREED ID
#ID: 1:{count} Class ids
#SPECIES: 1:Cat 2:Dog
#BREED ID: 1-{cats}:Cat 1:{dogs}:Dog
#All images with 1st letter as captial are cat images
#images with small first letter are dog images
"""


class Sample(Pets):
    """Synthetic cats and dogs of invented breeds, written into ``root`` on first use and read by the same code as Pets.

    Args:
        root: Folder that the images are written to.
        **options: Those of :class:`gn_transfer.data.ImageDataModule`; the images (80 px) do not depend on the seed.
    """

    NOT_OPTIONS = frozenset({"download"})
    """Arguments of the base that are not for the user to set."""

    WRITTEN = (FOLDER,)

    def __init__(self, root: Path | str = "data_sample", **options: Any) -> None:
        super().__init__(root, download=False, **options)

    def prepare_data(self) -> None:
        """Write the images unless they are there; Lightning calls it once per machine."""
        write_sample(Path(self.root))


def write_sample(root: Path, seed: int = 0) -> Path:
    """Write the sample in the layout of Oxford-IIIT Pet, with trimaps: 5 breeds of 130 images in trainval, 20 in test.

    It is written to a temporary folder beside its place and then renamed, so what is found there is whole. A sample of
    the same version and seed is left as it is; of another, replaced.

    Args:
        root: Folder that will hold ``oxford-iiit-pet``; made if missing.
        seed: Seed of the drawings; the same seed gives the same bytes.

    Returns:
        The folder ``root / "oxford-iiit-pet"``.

    Raises:
        ConfigError: Something else stands there, or the folder cannot be written.
    """
    stamp = {
        "version": _VERSION,
        "seed": seed,
        "size": IMAGE_SIZE,
        "trainval_per_breed": TRAINVAL_PER_BREED,
        "test_per_breed": TEST_PER_BREED,
    }
    place = root / FOLDER
    if _read_stamp(place) == stamp:
        return place
    if place.exists() and _read_stamp(place) is None:
        raise ConfigError(f"{place} holds something else than the sample; give the sample another data.root.")
    if root.is_dir() and any(not path.name.startswith(".") and path.name != FOLDER for path in root.iterdir()):
        raise ConfigError(
            f"data.root={root} holds other files, and the embedded sample writes its images there. To train on your "
            "images add --data Folder, or --config folder.yaml; for the sample give an empty folder."
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".sample-", dir=root) as scratch:
            fresh = Path(scratch, FOLDER)
            _write(fresh, seed)
            (fresh / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
            if place.exists():
                place.rename(Path(scratch, "old"))
            try:
                fresh.rename(place)
            except OSError:  # another run has put its own there meanwhile
                if _read_stamp(place) != stamp:
                    raise
    except OSError as error:
        raise ConfigError(f"data.root={root}: the sample cannot be written there ({error}).") from error
    return place


def _write(folder: Path, seed: int) -> None:
    images, annotations, trimaps = folder / "images", folder / "annotations", folder / "annotations" / "trimaps"
    images.mkdir(parents=True)
    trimaps.mkdir(parents=True)
    lists: dict[str, list[str]] = {"trainval.txt": [], "test.txt": []}
    of_species = {True: 0, False: 0}
    for class_id, breed in enumerate(BREEDS, 1):
        of_species[breed.is_cat] += 1
        for number in range(1, TRAINVAL_PER_BREED + TEST_PER_BREED + 1):
            image_id = f"{breed.name}_{number}"
            pixels_RGB, cover = render_animal(breed, IMAGE_SIZE, np.random.default_rng([seed, class_id, number]))
            _, jpeg = cv2.imencode(".jpg", pixels_RGB[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
            (images / f"{image_id}.jpg").write_bytes(jpeg.tobytes())
            _, png = cv2.imencode(".png", _trimap(cover))
            (trimaps / f"{image_id}.png").write_bytes(png.tobytes())
            split = "trainval.txt" if number <= TRAINVAL_PER_BREED else "test.txt"
            line = f"{image_id} {class_id} {1 if breed.is_cat else 2} {of_species[breed.is_cat]}"
            lists[split].append(line)
    header = _HEADER.format(count=len(BREEDS), cats=of_species[True], dogs=of_species[False])
    lists["list.txt"] = [header + "\n".join(sorted(lists["trainval.txt"] + lists["test.txt"]))]
    for name, lines in lists.items():
        (annotations / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _trimap(cover: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """From how much of each pixel an animal covers to the values of Pets: 1 animal, 2 background, 3 border."""
    animal = (cover >= 128).astype(np.uint8)
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * _BORDER - 1, 2 * _BORDER - 1))
    border = cv2.dilate(animal, disk) != cv2.erode(animal, disk)
    return np.where(border, 3, 2 - animal).astype(np.uint8)


def _read_stamp(place: Path) -> object:
    try:
        return json.loads((place / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
