"""A bundle: what leaves the trainer. Reading and running one needs no torch.

A bundle is one flat folder:

- ``model.onnx``: uint8 images ``(batch, img_size, img_size, 3)`` in, ``logits`` and ``probs`` ``(batch, classes)``
  out, in float32; the statistics of the pixels, and standardized weights, are inside.
- ``model.safetensors``: the weights under timm's names, to train on.
- ``bundle.json``: classes, preprocessing, metrics, provenance, and the SHA-256 of every other file.
- ``README.md``: the model card.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from gn_transfer.config import ConfigError
from gn_transfer.data.decode import BadImageError, decode_image, pillow_to_rgb
from gn_transfer.data.preprocess import CROP_FRACTION, preprocess_image
from gn_transfer.files import sha256

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it writes an identifier of the machine into the user's cache
import onnxruntime

FORMAT = "gn_transfer bundle"
FORMAT_VERSION = 1
"""Version of the folder's layout and of bundle.json; a reader refuses what is newer."""

METADATA = "bundle.json"
GRAPH = "model.onnx"
WEIGHTS = "model.safetensors"
CARD = "README.md"

ImageSource = str | os.PathLike[str] | bytes | bytearray | npt.NDArray[np.uint8] | Image.Image

_REQUIRED = ("classes", "img_size", "crop_fraction", "norm", "backbone", "weights", "files")


@dataclass(frozen=True)
class Prediction:
    """What a bundle says about one image.

    Attributes:
        path: The image's file; None for pixels and contents of files.
        top: The likeliest classes with their probabilities, the likeliest first.
        logits: Of every class, shape ``(classes,)``, float32.
    """

    path: str | None
    top: tuple[tuple[str, float], ...]
    logits: npt.NDArray[np.float32] = field(repr=False, compare=False)

    def __repr__(self) -> str:
        return f"Prediction(label={self.label!r}, prob={self.prob:.4f}, path={self.path!r}, top={self.top})"

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.top[0][0]

    @property
    def prob(self) -> float:
        """Its probability."""
        return self.top[0][1]


class Bundle:
    """A verified bundle, ready to run; :func:`load_bundle` makes one.

    Args:
        folder: The bundle's folder.
        metadata: Content of its bundle.json.
        session: onnxruntime's session of its graph.

    Attributes:
        folder: The bundle's folder.
        metadata: Content of its bundle.json.
        classes: Names of the classes, in the order of the logits.
        img_size: Side of the square that the graph takes, in pixels.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any], session: onnxruntime.InferenceSession) -> None:
        self.folder = folder
        self.metadata = metadata
        self.classes: list[str] = list(metadata["classes"])
        self.img_size = int(metadata["img_size"])
        self._session = session

    def predict(self, images: Iterable[ImageSource], *, top_k: int = 1, batch_size: int = 16) -> list[Prediction]:
        """Classify images.

        Args:
            images: A list of paths, contents of image files (bytes), uint8 RGB arrays ``(H, W, 3)`` of any size, or
                Pillow images, mixed as you like.
            top_k: How many classes to name per image, at least 1.
            batch_size: Images per run of the graph; no result depends on it but by rounding.

        Returns:
            One prediction per image, in their order.

        Raises:
            BadImageError: An image that cannot be decoded; :meth:`iter_predict` goes on after one.
            ConfigError: A number out of range, or an array that holds no image.
        """
        found = []
        for result in self.iter_predict(images, top_k=top_k, batch_size=batch_size):
            if isinstance(result, BadImageError):
                raise result
            found.append(result)
        return found

    def iter_predict(
        self, images: Iterable[ImageSource], *, top_k: int = 1, batch_size: int = 16
    ) -> Iterator[Prediction | BadImageError]:
        """Classify any number of images in bounded memory: two batches of squares are held, no more.

        Args:
            images: See :meth:`predict`; taken one by one as they are needed.
            top_k: See :meth:`predict`.
            batch_size: See :meth:`predict`.

        Yields:
            In the order of the images: a prediction, or the error of an image that cannot be decoded.

        Raises:
            ConfigError: See :meth:`predict`.
        """
        if isinstance(images, str | os.PathLike | Image.Image | bytes | bytearray):
            raise ConfigError("predict takes a list of images; for a single image give a list of one: [image].")
        for name, value in (("top_k", top_k), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name}={value} is out of range; give an integer of at least 1.")
        # Decoding releases the GIL: the next batch is decoded while this one is in the graph.
        with ThreadPoolExecutor(2) as pool:
            waiting: deque[list[tuple[ImageSource, Future[npt.NDArray[np.uint8] | BadImageError]]]] = deque()
            source = iter(images)
            while batch := list(islice(source, batch_size)):
                waiting.append([(image, pool.submit(self._try_square, image)) for image in batch])
                if len(waiting) > 1:
                    yield from self._run(waiting.popleft(), top_k)
            for last in waiting:
                yield from self._run(last, top_k)

    def square(self, image: ImageSource) -> npt.NDArray[np.uint8]:
        """Decode an image and cut the square that the graph takes, as training's evaluation does.

        Args:
            image: A path, the content of an image file, a uint8 RGB array ``(H, W, 3)``, or a Pillow image.

        Returns:
            Pixels, shape ``(img_size, img_size, 3)``, RGB.

        Raises:
            BadImageError: It cannot be decoded.
            ConfigError: An array of another shape or type, or something else.
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise ConfigError(
                    f"an array of shape {image.shape} and type {image.dtype} is not an image; give uint8 RGB "
                    "pixels of shape (height, width, 3)."
                )
            pixels = image
        elif isinstance(image, Image.Image):
            pixels = pillow_to_rgb(image, getattr(image, "filename", "") or "the image")
        elif isinstance(image, str | os.PathLike | bytes | bytearray):
            pixels = decode_image(bytes(image) if isinstance(image, bytearray) else image)
        else:
            raise ConfigError(
                f"{type(image).__name__} is not an image; give a path, the content of an image file as bytes, a uint8 "
                "RGB array or a Pillow image."
            )
        return preprocess_image(pixels, self.img_size)

    def logits_and_probs(
        self, squares_BHWC: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Run the graph.

        Args:
            squares_BHWC: Pixels, uint8, shape ``(B, img_size, img_size, 3)``, RGB.

        Returns:
            Logits and probabilities, each of shape ``(B, classes)``, float32.
        """
        logits, probs = self._session.run(["logits", "probs"], {"images": squares_BHWC})
        return np.asarray(logits), np.asarray(probs)

    def _try_square(self, image: ImageSource) -> npt.NDArray[np.uint8] | BadImageError:
        try:
            return self.square(image)
        except BadImageError as error:
            return error

    def _run(
        self, batch: Sequence[tuple[ImageSource, Future[npt.NDArray[np.uint8] | BadImageError]]], top_k: int
    ) -> Iterator[Prediction | BadImageError]:
        squares = [future.result() for _, future in batch]
        good = [square for square in squares if not isinstance(square, BadImageError)]
        scores = iter(zip(*self.logits_and_probs(np.stack(good)), strict=True)) if good else iter(())
        for (image, _), square in zip(batch, squares, strict=True):
            if isinstance(square, BadImageError):
                yield square
                continue
            logits, probs = next(scores)
            order = np.argsort(-logits, kind="stable")[:top_k]
            path = os.fspath(image) if isinstance(image, str | os.PathLike) else None
            yield Prediction(path, tuple((self.classes[i], float(probs[i])) for i in order), logits)


def load_bundle(folder: str | os.PathLike[str], *, threads: int | None = None) -> Bundle:
    """Verify a bundle and make it ready to run. No code of the bundle is run, only its graph.

    ``model.safetensors``, which training needs and this does not, may have been left out of a copy.

    Args:
        folder: The bundle's folder.
        threads: Compute threads; None takes ``OMP_NUM_THREADS`` where it is set, else every core given to us.

    Returns:
        The bundle.

    Raises:
        ConfigError: Not a bundle, written by a newer version, a file missing or changed, or a graph that the installed
            onnxruntime cannot run.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    needed = {name: digest for name, digest in metadata["files"].items() if name != WEIGHTS or (folder / name).exists()}
    verify_files(folder, needed)
    if metadata["crop_fraction"] != CROP_FRACTION:
        raise ConfigError(
            f"{folder} wants a crop of {metadata['crop_fraction']} of the short side, this gn-transfer cuts "
            f"{CROP_FRACTION}; use the version that wrote it, {metadata.get('versions', {}).get('gn-transfer')}."
        )
    try:
        session = open_graph(folder / GRAPH, threads)
    except Exception as error:  # onnxruntime's errors share no base class but this
        raise ConfigError(
            f"{folder / GRAPH}: onnxruntime {onnxruntime.__version__} cannot run it ({error}); it needs a version that "
            f"knows opset {metadata.get('opset')}. Update onnxruntime, or export the checkpoint again."
        ) from error
    return Bundle(folder, metadata, session)


def open_graph(path: Path, threads: int | None = None) -> onnxruntime.InferenceSession:
    """Open a graph for the CPU.

    Args:
        path: An ONNX file.
        threads: See :func:`load_bundle`.

    Returns:
        onnxruntime's session.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or thread_count()
    options.log_severity_level = 3  # errors come as exceptions
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read and check bundle.json.

    Args:
        folder: The bundle's folder.

    Returns:
        Its content; every file that it names is directly in the folder.

    Raises:
        ConfigError: Not a bundle, corrupt, newer than this reader, or naming a file outside the folder.
    """
    path = folder / METADATA
    if not path.is_file():
        what = "no such folder" if not folder.exists() else f"not a bundle, it has no {METADATA}"
        raise ConfigError(
            f"{folder}: {what}; make one with gn-transfer export "
            f"{shlex.quote(str(folder)) if folder.exists() else 'CHECKPOINT'} --output DIR."
        )
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise ConfigError(f"{path} is corrupt ({error}); export the checkpoint again.") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ConfigError(f"{path} does not describe a gn_transfer bundle; make one with gn-transfer export.")
    version = metadata.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ConfigError(
            f"{folder} was written by a newer gn-transfer (bundle format {version}, this one reads up to "
            f"{FORMAT_VERSION}); update gn-transfer."
        )
    missing = [key for key in _REQUIRED if key not in metadata]
    files = metadata.get("files")
    if missing or not isinstance(files, dict) or GRAPH not in files:
        said = f"lacks {', '.join(missing)}" if missing else f"names no {GRAPH}"
        raise ConfigError(f"{path} {said}; export the checkpoint again.")
    for name in files:
        if name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name:
            raise ConfigError(f"{path} names the file {name!r}, which is not a plain name inside the bundle; refused.")
        if (folder / name).resolve().parent != folder.resolve():
            raise ConfigError(f"{folder / name} is a link that leads out of the bundle; refused.")
    if metadata.get("sha256") != metadata_sha256(metadata):
        raise ConfigError(
            f"{path} was changed after the export; copy the bundle again, or export the checkpoint again."
        )
    return metadata


def verify_files(folder: Path, files: Mapping[str, str]) -> None:
    """Compare every file with its SHA-256.

    Args:
        folder: The bundle's folder.
        files: Name to hexadecimal SHA-256.

    Raises:
        ConfigError: A file is missing or has changed.
    """
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing; copy the bundle again, whole, or export the checkpoint again.")
        if sha256(path) != expected:
            raise ConfigError(
                f"{path} is not the file that was exported (its SHA-256 differs from the one in {METADATA}); copy the "
                "bundle again, or export the checkpoint again."
            )


def metadata_sha256(metadata: Mapping[str, Any]) -> str:
    """Hash what bundle.json says, its own field ``sha256`` left out and whatever the order and the white space."""
    said = {key: value for key, value in metadata.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def thread_count() -> int:
    """Count the compute threads to use: ``OMP_NUM_THREADS`` where it is set, else every core given to us."""
    wished = os.environ.get("OMP_NUM_THREADS", "")
    if wished.isdecimal() and int(wished) > 0:
        return int(wished)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
