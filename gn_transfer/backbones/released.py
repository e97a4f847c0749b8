"""The small backbones that come with gn-transfer: weights in float16, each beside a model card that says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gn_transfer.config import ConfigError, Norm
from gn_transfer.files import parse_json, partial_of, read_text, sha256, write_json

FOLDER = "checkpoints"
"""Where released weights lie: inside the package of a wheel, beside it in a source checkout."""

MAX_BYTES = 25 * 2**20
"""The most that a released file may weigh."""
_MOST_BYTES_OF_CARD = 2**20


@dataclass(frozen=True)
class TrainedNorm:
    """The norm that weights were trained with.

    Attributes:
        name: The value of ``model.norm``.
        num_groups: Groups of its group norms, where stated; not used by batch norm.
        group_size: Channels per group, where that was set instead.
    """

    name: Norm
    num_groups: int | None = None
    group_size: int | None = None


@dataclass(frozen=True)
class Training:
    """How released weights were trained.

    Attributes:
        dataset: Name of the data module, in small letters.
        classes: What the head's outputs mean, in order.
        samples_seen: Images that training went through, with repetitions.
        config: The resolved configuration of the run.
        environment: Versions, device and git commit of the run.
        history: What the configuration does not say: how training went where it was continued in another way.
    """

    dataset: str
    classes: list[str]
    samples_seen: int
    config: dict[str, Any]
    environment: dict[str, Any]
    history: str = ""


@dataclass(frozen=True)
class Preprocessing:
    """How images were turned into the input of released weights.

    Attributes:
        mean: Pixel mean per channel, on pixels scaled to [0, 1].
        std: Pixel standard deviation per channel, likewise.
        img_size: Side of the training images, in pixels.
        description: How images were evaluated, in words.
    """

    mean: list[float]
    std: list[float]
    img_size: int
    description: str


@dataclass(frozen=True)
class Card:
    """What a released file is: the JSON beside it, field by field.

    Attributes:
        name: ``<backbone>.<norm>.<dataset>``, the stem of both files.
        backbone: timm's name of the model.
        norm: The norm it was trained with.
        val_acc1: Validation top-1 of the weights in this file, in [0, 1].
        preprocessing: From image to input.
        sha256: Of the weights file.
        license: On which terms the weights may be used, and what the images' terms are.
        training: Data, configuration and environment.
    """

    name: str
    backbone: str
    norm: TrainedNorm
    val_acc1: float
    preprocessing: Preprocessing
    sha256: str
    license: str
    training: Training


def find_card(name: str) -> tuple[Card, Path] | None:
    """Look for released weights.

    Args:
        name: Stem of the files, ``resnetv2_18.gn_ws.tinyimagenet``.

    Returns:
        The card and the path of the weights; None where there is no such card.

    Raises:
        ConfigError: The card cannot be read.
    """
    for folder in _folders():
        path = folder / f"{name}.json"
        if path.is_file():
            return _read_card(path), path.with_suffix(".safetensors")
    return None


def card_beside(weights: Path) -> Card | None:
    """Read the card beside a weights file, if there is one.

    Args:
        weights: A file that may be a copy of a released one.

    Raises:
        ConfigError: The JSON of that name is a card, but a corrupt one.
    """
    path = weights.with_suffix(".json")
    if weights.suffix != ".safetensors" or not path.is_file():
        return None
    with path.open("rb") as file:
        if b'"sha256"' not in file.read(_MOST_BYTES_OF_CARD):
            return None
    return _read_card(path)


def cards() -> list[Card]:
    """Read the cards of all released weights, sorted by name."""
    found = {path.stem: path for folder in reversed(_folders()) for path in sorted(folder.glob("*.json"))}
    return [_read_card(found[name]) for name in sorted(found)]


def read_released(card: Card, path: Path) -> dict[str, Tensor]:
    """Load released weights after comparing them with their card.

    Args:
        card: The card.
        path: The weights.

    Returns:
        State dict with timm's keys.

    Raises:
        ConfigError: The file is missing or is not the one that the card describes.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing beside its card; install gn-transfer again, or fetch the file.")
    found = sha256(path)
    if found != card.sha256:
        raise ConfigError(
            f"{path} is not what its card describes: sha256 {found[:12]}... instead of {card.sha256[:12]}...; it is "
            "corrupt or another file. Install gn-transfer again, or fetch the file."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} cannot be read as safetensors ({error}); install gn-transfer again.") from error


def write_released(weights: Mapping[str, Tensor], card: Card, folder: Path) -> Path:
    """Write weights and card, each whole or not at all; the card last, since it makes the weights known.

    Args:
        weights: State dict with timm's keys; floating tensors are stored in float16.
        card: Its ``sha256`` is filled in here.
        folder: An existing folder.

    Returns:
        Path of the weights.

    Raises:
        ConfigError: Weights beyond float16, or a file beyond :data:`MAX_BYTES`.
    """
    half = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    if beyond := [key for key, value in half.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ConfigError(f"{', '.join(beyond[:3])}: values beyond float16 or not finite; these weights stay float32.")
    path = folder / f"{card.name}.safetensors"
    partial = partial_of(path)
    try:
        content = save({key: value.contiguous() for key, value in half.items()}, metadata={"format": "pt"})
        partial.write_bytes(content)  # save_file would make it private
        if partial.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{path.name} would take {partial.stat().st_size:,} bytes, more than {MAX_BYTES:,}; release a smaller "
                "model."
            )
        digest = sha256(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    write_json(path.with_suffix(".json"), {**asdict(card), "sha256": digest})
    return path


def round_to_half(model: torch.nn.Module) -> None:
    """Round a model's weights and statistics to float16 in place, as a released file holds them."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half().to(value.dtype))


def _folders() -> list[Path]:
    package = Path(__file__).parent.parent
    return [package / FOLDER, package.parent / FOLDER]


def _read_card(path: Path) -> Card:
    try:
        return TypeAdapter(Card).validate_python(parse_json(read_text(path)))
    except (OSError, ValueError) as error:  # also of another kind than its fields are
        raise ConfigError(
            f"{path} is not a model card ({type(error).__name__}: {error}); install gn-transfer again."
        ) from error
