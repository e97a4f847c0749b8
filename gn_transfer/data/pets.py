"""The Oxford-IIIT Pet data set, or any number of its breeds, in its own layout with its official splits."""

from __future__ import annotations

import re
import shutil
import socket
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from gn_transfer.config import ConfigError
from gn_transfer.data.datamodule import ImageDataModule, ListedImages
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.files import read_text

FOLDER = "oxford-iiit-pet"
_NUMBER = re.compile(r"[0-9]{1,9}")
"""Name of the data set's folder, as torchvision gives it."""

_PROBE_SECONDS = 6.0
_STALL_SECONDS = 30.0


class Annotation(NamedTuple):
    """One line of ``trainval.txt`` or ``test.txt``.

    Attributes:
        image_id: File name without ``.jpg``, such as ``american_bulldog_100``.
        class_id: Class number from 1, not necessarily without gaps.
    """

    image_id: str
    class_id: int

    @property
    def breed(self) -> str:
        """The image id without its number."""
        return self.image_id.rpartition("_")[0]


class Pets(ImageDataModule):
    """Oxford-IIIT Pet (Parkhi et al. 2012): official trainval and test lists, validation cut from trainval.

    Args:
        root: Folder that holds ``oxford-iiit-pet``, or that folder itself.
        download: Fetch the data set (800 MB) if it is not there.
        **options: Those of :class:`gn_transfer.data.ImageDataModule`.
    """

    def __init__(self, root: Path | str = "data", download: bool = False, **options: Any) -> None:
        super().__init__(root, **options)
        self.download = download

    def prepare_data(self) -> None:
        """Download what is missing, if asked to; Lightning calls it once per machine."""
        if self.download and _find(Path(self.root)) is None:
            download_pets(Path(self.root))

    def list_fit(self) -> ListedImages:
        """List trainval; validation is cut from it."""
        base = self._base()
        path = base / "annotations" / "trainval.txt"
        annotations = read_annotations(path)
        breeds = class_names(annotations, path)
        return ListedImages(list(breeds.values()), self._images(base, annotations, breeds), None)

    def list_test(self) -> list[LabeledImage]:
        """List the official test split."""
        base = self._base()
        fit_path, path = base / "annotations" / "trainval.txt", base / "annotations" / "test.txt"
        breeds = class_names(read_annotations(fit_path), fit_path)
        annotations = read_annotations(path)
        unknown = sorted({annotation.breed for annotation in annotations if annotation.class_id not in breeds})
        if unknown:
            raise ConfigError(f"{path}: {', '.join(unknown)} does not occur in trainval.txt beside it.")
        return self._images(base, annotations, breeds)

    def _base(self) -> Path:
        base = _find(Path(self.root))
        if base is None:
            raise ConfigError(
                f"data.root={self.root}: no Oxford-IIIT Pet data there. Download it with --data.download true, or put "
                f"its two folders at {Path(self.root) / FOLDER / 'images'} (*.jpg) and "
                f"{Path(self.root) / FOLDER / 'annotations'} (trainval.txt, test.txt)."
            )
        return base

    def _images(self, base: Path, annotations: list[Annotation], breeds: dict[int, str]) -> list[LabeledImage]:
        targets = {class_id: target for target, class_id in enumerate(breeds)}
        folder = (base / "images").relative_to(Path(self.root)).as_posix()
        return [
            LabeledImage(f"{folder}/{annotation.image_id}.jpg", targets[annotation.class_id])
            for annotation in annotations
        ]


def read_annotations(path: Path) -> list[Annotation]:
    """Read ``trainval.txt`` or ``test.txt``: lines ``image_id class_id species breed_id``, comments behind ``#``.

    Args:
        path: The file.

    Returns:
        One entry per line, in the file's order.

    Raises:
        ConfigError: The file is missing or empty, or a line is not of that form.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from error
    annotations = []
    for number, line in enumerate(lines, 1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        if len(fields) < 2 or not _NUMBER.fullmatch(fields[1]) or "_" not in fields[0] or "/" in fields[0]:
            raise ConfigError(f"{path}:{number}: {line!r} is not a line 'image_id class_id species breed_id'.")
        annotations.append(Annotation(fields[0], int(fields[1])))
    if not annotations:
        raise ConfigError(f"{path}: lists no images.")
    return annotations


def class_names(annotations: list[Annotation], path: Path) -> dict[int, str]:
    """Name the classes after the image ids.

    Args:
        annotations: Entries of one list.
        path: Where they were read, for the message.

    Returns:
        Class id to breed, in ascending order of the ids.

    Raises:
        ConfigError: One class id with two breeds, or only one class.

    Example:
        >>> class_names([Annotation("american_bulldog_1", 2), Annotation("Abyssinian_7", 1)], Path("trainval.txt"))
        {1: 'Abyssinian', 2: 'american_bulldog'}
    """
    breeds: dict[int, str] = {}
    for annotation in annotations:
        known = breeds.setdefault(annotation.class_id, annotation.breed)
        if known != annotation.breed:
            raise ConfigError(
                f"{path}: {annotation.image_id} has class id {annotation.class_id}, which is {known}; "
                "a class is one breed."
            )
    if len(breeds) < 2:
        raise ConfigError(f"{path}: only one class ({next(iter(breeds.values()))}); a classifier needs at least 2.")
    return dict(sorted(breeds.items()))


def download_pets(root: Path) -> None:
    """Download Oxford-IIIT Pet by torchvision, checksums verified, into ``root / "oxford-iiit-pet"``.

    It is unpacked in a temporary folder beside its place and then renamed: nothing half-written is ever found there.

    Args:
        root: Folder that will hold ``oxford-iiit-pet``; made if missing.

    Raises:
        ConfigError: No network, a transfer that fails, or something incomplete in the way.
    """
    from torchvision.datasets import OxfordIIITPet

    if (root / FOLDER).exists():
        raise ConfigError(
            f"data.download: {root / FOLDER} is there, but without images or annotations/trainval.txt. Complete it, or "
            "remove it to download anew."
        )
    url = OxfordIIITPet._RESOURCES[0][0]
    _check_reachable(url, root)
    anchor = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.is_dir())
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)  # torchvision's transfers have none
    try:
        with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=anchor) as scratch:
            OxfordIIITPet(scratch, download=True)
            for archive in Path(scratch, FOLDER).glob("*.tar.gz"):
                archive.unlink()
            root.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(scratch, FOLDER), root / FOLDER)
    except (OSError, RuntimeError) as error:  # RuntimeError: torchvision's checksum mismatch
        raise _download_failed(root, url, error) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _find(root: Path) -> Path | None:
    for base in (root / FOLDER, root):
        if (base / "images").is_dir() and (base / "annotations" / "trainval.txt").is_file():
            return base
    return None


def _check_reachable(url: str, root: Path) -> None:
    """Ask the server for the headers. In a thread: looking up a name has no time limit of its own."""
    outcome: list[Exception | None] = []

    def probe() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PROBE_SECONDS):
                outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS + 1.0)
    error = outcome[0] if outcome else TimeoutError(f"no answer within {_PROBE_SECONDS:.0f} s")
    if error is not None:
        raise _download_failed(root, url, error) from error


def _download_failed(root: Path, url: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"data.download: {url} failed ({error}). Try again with a network, or unpack images.tar.gz and "
        f"annotations.tar.gz of the Oxford-IIIT Pet data set into {root / FOLDER}."
    )
