"""Bundles that classify images. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from gn_transfer.config import ConfigError
from gn_transfer.data.decode import BadImageError
from gn_transfer.data.preprocess import CROP_FRACTION, preprocess_image
from gn_transfer.inference.bundle import Bundle
from gn_transfer.inference.image_source import (
    ImageSource,
    Pixels,
    check_positive,
    prepared_batches,
    read_image,
    without_errors,
)


@dataclass(frozen=True)
class Prediction:
    """What a bundle says about one image.

    Attributes:
        path: The image's file; None for pixels and contents of files.
        top: The likeliest classes with their probabilities, the likeliest first.
        known: False where the probability is below the bundle's threshold: the model should not answer. True where
            the bundle has none.
        logits: Of every class, shape ``(classes,)``, float32.
    """

    path: str | None
    top: tuple[tuple[str, float], ...]
    known: bool
    logits: npt.NDArray[np.float32] = field(repr=False, compare=False)

    def __repr__(self) -> str:
        unknown = "" if self.known else ", known=False"
        return f"Prediction(label={self.label!r}, prob={self.prob:.4f}{unknown}, path={self.path!r}, top={self.top})"

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.top[0][0]

    @property
    def prob(self) -> float:
        """Its probability."""
        return self.top[0][1]


_MOST_PIXELS = 16 * 1024**2  # of a batch


class ClassificationBundle(Bundle):
    """A bundle that names the class of an image.

    Its graph takes ``images``, uint8 ``(batch, img_size, img_size, 3)``, and gives ``logits`` and ``probs``, float32
    ``(batch, classes)``.

    Args:
        folder: See :class:`Bundle`.
        metadata: See there.
        session: See there.

    Attributes:
        img_size: Side of the square that the graph takes, in pixels.
        threshold: Probability below which a prediction is unknown; None where the bundle has none.

    Raises:
        ConfigError: The bundle wants another crop than this version cuts.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any], session: onnxruntime.InferenceSession) -> None:
        super().__init__(folder, metadata, session)
        self.img_size = int(metadata["img_size"])
        threshold = metadata.get("confidence", {}).get("threshold")
        self.threshold: float | None = None if threshold is None else float(threshold["probability"])
        if metadata["crop_fraction"] != CROP_FRACTION:
            raise ConfigError(
                f"{folder} wants a crop of {metadata['crop_fraction']} of the short side, this gn-transfer cuts "
                f"{CROP_FRACTION}; use the version that wrote it, {metadata.get('versions', {}).get('gn-transfer')}."
            )

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
        return without_errors(self.iter_predict(images, top_k=top_k, batch_size=batch_size))

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
        check_positive("top_k", top_k)
        batch_size = min(batch_size, max(1, _MOST_PIXELS // self.img_size**2))
        for batch in prepared_batches(images, self.graph_input, batch_size):
            yield from self._classify(batch, top_k)

    def graph_input(self, image: ImageSource) -> Pixels:
        """Cut the square of shape ``(img_size, img_size, 3)``; see the base class."""
        return preprocess_image(read_image(image), self.img_size)

    def logits_and_probs(
        self, squares_BHWC: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Run the graph.

        Args:
            squares_BHWC: Pixels, uint8, shape ``(B, img_size, img_size, 3)``, RGB.

        Returns:
            Logits and probabilities, each of shape ``(B, classes)``, float32.
        """
        logits, probs = self._run(squares_BHWC, "logits", "probs")
        return logits, probs

    def _classify(
        self, batch: Sequence[tuple[str | None, Pixels | BadImageError]], top_k: int
    ) -> Iterator[Prediction | BadImageError]:
        good = [square for _, square in batch if not isinstance(square, BadImageError)]
        scores = iter(zip(*self.logits_and_probs(np.stack(good)), strict=True)) if good else iter(())
        for path, square in batch:
            if isinstance(square, BadImageError):
                yield square
                continue
            logits, probs = next(scores)
            order = np.argsort(-logits, kind="stable")[:top_k]
            top = tuple((self.classes[i], float(probs[i])) for i in order)
            yield Prediction(path, top, self.threshold is None or top[0][1] >= self.threshold, logits)
