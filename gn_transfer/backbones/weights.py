"""Sets of pretrained weights: what they are, what they have seen, and how they are read without running code."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gn_transfer.backbones import hub
from gn_transfer.backbones.packages import PACKAGES, read_package
from gn_transfer.backbones.released import Card, TrainedNorm, card_beside, find_card, read_released
from gn_transfer.config import ConfigError, is_out_of_memory, shortened
from gn_transfer.files import parse_json, read_text

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".ckpt")
"""Files that ``model.pretrained`` may name."""

UNKNOWN = "not stated"
"""What weights have seen that do not say so."""

# Words of timm's tags for what the weights were trained on.
_DATASETS = {
    "in1k": "ImageNet-1k (1.3 M images)",
    "in12k": "ImageNet-12k (12 M images of ImageNet-21k)",
    "in21k": "ImageNet-21k (14 M images)",
    "ig1b": "Instagram (940 M images with hashtags)",
    "yfcc100m": "YFCC100M (without labels)",
    "yfcc15m": "YFCC15M (captions)",
    "cc12m": "CC12M (captions)",
    "openai": "OpenAI's 400 M captioned images",
    "bamboo": "Bamboo (69 M images)",
}


@dataclass(frozen=True)
class Weights:
    """A set of weights that was found, and what is known about it before a model is built.

    Attributes:
        name: ``timm:architecture.tag``, ``gn-transfer:backbone.norm.dataset``, ``package:architecture.tag``, or a path.
        architecture: timm's name of the model that they fit.
        pretrained_on: The images that they were trained on, in words.
        norm: The norm that they were trained with; None where it is not stated.
        mean: Pixel mean per channel, on pixels scaled to [0, 1]; None: that of the architecture.
        std: Pixel standard deviation per channel, likewise.
        hints: What they were trained at (``img_size``, ``interpolation``), for the user to read.
        repository: Repository of the Hugging Face hub that holds them.
        file: Local file that holds them.
        card: Their model card.
        packaged: They are in a Python package; see :mod:`gn_transfer.backbones.packages`.
        state: The weights, where they had to be read to know all this.
    """

    name: str
    architecture: str
    pretrained_on: str = UNKNOWN
    norm: TrainedNorm | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    hints: Mapping[str, Any] | None = None
    repository: str | None = None
    file: Path | None = None
    card: Card | None = None
    packaged: bool = False
    state: Mapping[str, Tensor] | None = None


def pretraining_datasets(tag: str) -> str:
    """Say what images the weights of a timm tag were trained on.

    Args:
        tag: What stands behind the dot in timm's name.

    Returns:
        The data sets in order, or :data:`UNKNOWN`.

    Example:
        >>> pretraining_datasets("goog_in21k_ft_in1k")
        'ImageNet-21k (14 M images), then ImageNet-1k (1.3 M images)'
    """
    words = tag.split("_")
    sets = [_DATASETS[word] for word in words if word in _DATASETS]
    taught = "; distilled from a model pretrained on ImageNet-21k" if words[:2] == ["goog", "distilled"] else ""
    return ", then ".join(sets) + taught if sets else UNKNOWN


def released_weights(name: str) -> Weights:
    """Find weights that come with gn-transfer.

    Args:
        name: ``resnetv2_18.gn_ws.tinyimagenet``.

    Raises:
        ConfigError: They are not installed.
    """
    found = find_card(name)
    if found is None:
        raise ConfigError(
            f"model.pretrained: the weights {name}, which come with gn-transfer, are not in this installation; install "
            "it again or fetch the files of checkpoints/, name other weights, or set model.pretrained=null to train "
            "from scratch."
        )
    return _of_card(*found)


def packaged_weights(architecture: str) -> Weights:
    """Describe weights that come as a Python package.

    Args:
        architecture: timm's name, one of :data:`gn_transfer.backbones.packages.PACKAGES`.
    """
    return Weights(
        f"package:{architecture}.in1k",
        architecture,
        pretrained_on=_DATASETS["in1k"],
        norm=TrainedNorm("bn"),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        hints={"img_size": PACKAGES[architecture].img_size, "interpolation": "bicubic"},
        packaged=True,
    )


def file_weights(path: Path, backbone: str) -> Weights:
    """Look at a local file, and at the card or ``config.json`` beside it.

    Args:
        path: A weights file, or a folder in the layout of a timm repository (``config.json``, ``model.safetensors``).
        backbone: The architecture to assume where nothing states it.

    Raises:
        ConfigError: It cannot be read.
    """
    name = str(path)
    if path.is_dir():
        found = [path / file for file in hub.FILES if (path / file).is_file()]
        if not found:
            raise ConfigError(f"model.pretrained={path}: the folder holds neither {' nor '.join(hub.FILES)}.")
        path = found[0]
    card = card_beside(path)
    if card is not None:
        return replace(_of_card(card, path), name=name)
    weights = Weights(name, backbone, file=path)
    config = path.with_name("config.json")
    if config.is_file():
        weights = _with_timm_config(weights, config)
    return weights if path.suffix == ".npz" else _with_state(weights, path)


def read_weights(weights: Weights) -> Mapping[str, Tensor]:
    """Read weights, downloading them first where that is needed.

    Args:
        weights: Any but a BiT ``.npz`` file.

    Returns:
        State dict with timm's keys.

    Raises:
        ConfigError: They cannot be had or read.
    """
    if weights.state is not None:
        return weights.state
    if weights.card is not None:
        assert weights.file is not None
        return read_released(weights.card, weights.file)
    if weights.packaged:
        return read_package(weights.architecture)
    assert weights.repository is not None
    path = hub.fetch(weights.repository, weights.name)
    try:
        return _tensors(_load(path), path)
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) or (cause is not None and is_out_of_memory(cause)):  # it says nothing of the file
            raise
        hub.forget(path)
        raise ConfigError(f"{error} The corrupt download was removed from the cache.") from error


def _of_card(card: Card, path: Path) -> Weights:
    training, preprocessing = card.training, card.preprocessing
    return Weights(
        f"gn-transfer:{card.name}",
        card.backbone,
        pretrained_on=f"{training.dataset} ({training.samples_seen:,} samples of {len(training.classes)} classes)",
        norm=card.norm,
        mean=tuple(preprocessing.mean),
        std=tuple(preprocessing.std),
        hints={"img_size": preprocessing.img_size},
        file=path,
        card=card,
    )


def _with_timm_config(weights: Weights, path: Path) -> Weights:
    try:
        content = parse_json(read_text(path))
        stated = content.get("pretrained_cfg", content)
        tag = str(stated.get("tag", ""))
        return replace(
            weights,
            architecture=str(content["architecture"]),
            pretrained_on=pretraining_datasets(tag),
            mean=_of_channels(stated["mean"]),
            std=_of_channels(stated["std"], least=1e-6),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"{path} beside the weights is not timm's config.json ({type(error).__name__}: {error}); correct it, or "
            "move it away to take architecture and pixel statistics from model.backbone."
        ) from error


def _with_state(weights: Weights, path: Path) -> Weights:
    content = _load(path)
    if isinstance(content, dict) and isinstance(content.get("gn_transfer"), dict):  # a checkpoint of our own
        try:
            weights = _with_description(weights, content["gn_transfer"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ConfigError(
                f"model.pretrained={path} does not describe its model as a checkpoint of gn-transfer does "
                f"({type(error).__name__}: {error}); use another checkpoint of the run."
            ) from error
    return replace(weights, state=_tensors(content, path))


def _with_description(weights: Weights, ours: Mapping[str, Any]) -> Weights:
    model, report = ours["architecture"], ours["transfer_report"]
    data = str(ours.get("config", {}).get("data", {}).get("class_path", UNKNOWN)).rpartition(".")[2]
    first = report.get("pretrained_on") or (report["source"] if report["source"] != "from scratch" else "")
    return replace(
        weights,
        architecture=str(model["architecture"]),
        pretrained_on=f"{first}, then {data}" if first else data,
        norm=TrainedNorm(model["norm"], model["num_groups"], model["group_size"]),
        mean=_of_channels(model["mean"]),
        std=_of_channels(model["std"], least=1e-6),
    )


def _of_channels(values: Any, least: float = -math.inf) -> tuple[float, ...]:
    """Take a mean or a deviation of the pixels of each channel."""
    if not isinstance(values, list | tuple) or len(values) not in (1, 3):
        raise ValueError(f"{shortened(values)} is no value for each channel")
    found = tuple(float(value) for value in values)
    if not all(math.isfinite(value) and value >= least for value in found):
        raise ValueError(f"{shortened(values)} is nothing to normalize pixels with")
    return found


def _load(path: Path) -> Any:
    refuse_bomb(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = "it holds more than plain tensors, which could run code, and was refused"
        if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
            why = "it is corrupt"
        raise ConfigError(f"model.pretrained={path} cannot be read as weights: {why}. {_ALLOWED}") from error
    except Exception as error:  # each format's reader has its own errors for a corrupt file
        if isinstance(error, OSError) or is_out_of_memory(error):
            reason = getattr(error, "strerror", None) or "there is not enough memory"
            raise ConfigError(f"model.pretrained={path} cannot be read now: {reason}.") from error
        raise ConfigError(
            f"model.pretrained={path} cannot be read as weights ({type(error).__name__}): it is corrupt or of another "
            f"kind. {_ALLOWED}"
        ) from error


def refuse_bomb(path: Path) -> None:
    """Refuse a small archive of weights that would fill the memory.

    Args:
        path: The file, of any kind.

    Raises:
        ConfigError: It is an archive whose content is far larger than itself; weights hardly shrink.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except Exception:  # of another kind, or corrupt, for its reader to refuse
        return
    if size > _MOST_COMPRESSED * path.stat().st_size:
        raise ConfigError(f"model.pretrained={path} is compressed to less than a tenth, as no weights are; refused.")


_MOST_COMPRESSED = 10
_ALLOWED = "Allowed are .safetensors, .pth/.bin/.ckpt holding plain tensors, and BiT .npz files; fetch the file again."


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = isinstance(content, dict) and bool(content) and all(isinstance(key, str) for key in content)
    if not named or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"model.pretrained={path} holds no state dict; give a file of named tensors.")
    return {key.removeprefix("model."): value for key, value in content.items()}
