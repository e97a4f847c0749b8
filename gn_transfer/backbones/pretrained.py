"""Which pretrained weights a backbone and a norm mean: a table of what is known, timm's tags, local files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from gn_transfer.backbones import hub
from gn_transfer.backbones.packages import PACKAGES, find_file
from gn_transfer.backbones.released import TrainedNorm, cards
from gn_transfer.backbones.small_cnn import SmallCnn
from gn_transfer.backbones.transfer import BN_FAMILY, Conversion, trained_as
from gn_transfer.backbones.weights import (
    SUFFIXES,
    Weights,
    file_weights,
    packaged_weights,
    pretraining_datasets,
    released_weights,
)
from gn_transfer.config import ConfigError, Norm, did_you_mean

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {"resnetv2_26": ("resnetv2_50", {"layers": [2, 2, 2, 2]})}
"""Our names for models that timm builds only with arguments: name -> (timm architecture, its arguments)."""

OWN: dict[str, type[SmallCnn]] = {"cnn_mnist": SmallCnn}
"""Models that timm does not have, without pretrained weights. They take grey images by default."""

# (backbone, norm) -> the weights of `pretrained: auto`: a released file, or timm's "architecture.tag". Only pairs whose
# weights were trained with that very norm stand here; bn_frozen and bn_sync compute what bn computed and share its.
_AUTO: dict[tuple[str, Norm], str] = {
    ("resnetv2_18", "gn_ws"): "gn-transfer:resnetv2_18.gn_ws.tinyimagenet",
    ("resnetv2_50", "gn_ws"): "timm:resnetv2_50x1_bit.goog_in21k_ft_in1k",
    ("resnetv2_101", "gn_ws"): "timm:resnetv2_101x1_bit.goog_in21k_ft_in1k",
    ("resnet50", "gn"): "timm:resnet50_gn.a1h_in1k",
    ("resnetv2_18", "bn"): "gn-transfer:resnetv2_18.bn.tinyimagenet",
    ("resnetv2_34", "bn"): "timm:resnetv2_34.ra4_e3600_r224_in1k",
    ("resnetv2_50", "bn"): "timm:resnetv2_50.a1h_in1k",
    ("resnetv2_101", "bn"): "timm:resnetv2_101.a1h_in1k",
    ("resnet18", "bn"): "timm:resnet18.a1_in1k",
    ("resnet26", "bn"): "timm:resnet26.bt_in1k",
    ("resnet34", "bn"): "timm:resnet34.a1_in1k",
    ("resnet50", "bn"): "timm:resnet50.a1_in1k",
    ("resnet101", "bn"): "timm:resnet101.a1_in1k",
    **{(architecture, "bn"): f"package:{architecture}.in1k" for architecture in PACKAGES},
}

# timm's own models that stand for (backbone, norm): their weights fit, their architecture differs in more than the
# norm.
_STANDS_FOR = {"resnetv2_50": "resnetv2_50x1_bit", "resnetv2_101": "resnetv2_101x1_bit", "resnet50": "resnet50_gn"}


def resolve_pretrained(
    name: str, norm: Norm, pretrained: str | None, conversion: Conversion = "error"
) -> Weights | None:
    """Find the weights that ``model.pretrained`` means.

    Args:
        name: Backbone as the user named it.
        norm: The normalization.
        pretrained: See :func:`create_backbone`.
        conversion: With anything but ``error``, ``auto`` falls back to the BN weights of the backbone.

    Returns:
        The weights; None from scratch.

    Raises:
        ConfigError: Unknown architecture or tag, no such file, of another architecture, or no weights known for this
            pair.

    Example:
        >>> resolve_pretrained("resnetv2_50", "gn_ws", "auto").name
        'timm:resnetv2_50x1_bit.goog_in21k_ft_in1k'
    """
    if "." in name:
        base, tag = name.split(".", 1)
        raise ConfigError(f"model.backbone={name}: write model.backbone={base} and model.pretrained={tag}.")
    if name not in (*ALIASES, *OWN) and not timm.is_model(name):
        near = did_you_mean(name, [*ALIASES, *OWN, *timm.list_models("resnet*")]).split("Allowed")[0]
        raise ConfigError(
            f"model.backbone={name} is not a model that timm knows; {near}use resnet18, resnet26, resnet34, resnet50, "
            "resnet101, resnetv2_18, resnetv2_34, resnetv2_50, resnetv2_101, cnn_mnist, or another "
            "convolutional model of timm."
        )
    if pretrained is None:
        return None
    if Path(pretrained).exists():
        return _local(Path(pretrained), name)
    if pretrained == "auto":
        return named_weights(_auto(name, norm, conversion))
    if "/" in pretrained or Path(pretrained).suffix in SUFFIXES:
        raise ConfigError(f"model.pretrained={pretrained}: no such file; give an existing weights file, a tag or auto.")
    if name in OWN:
        raise ConfigError(f"model.pretrained={pretrained}: there are no weights for {name}; give null or a file.")
    names = [f"gn-transfer:{card.name}" for card in cards() if card.backbone == name]
    architectures = [name, _STANDS_FOR.get(name, name), pretrained.rpartition(".")[0]]
    names += [f"package:{name}.in1k"] if name in PACKAGES and find_file(name) else []
    names += [f"timm:{full}" for each in dict.fromkeys(architectures) for full in timm.list_pretrained(f"{each}.*")]
    for full in names:
        if pretrained in (full, full.partition(":")[2], full.partition(".")[2]):
            return named_weights(full)
    raise ConfigError(
        f"model.pretrained={pretrained} is neither a file nor a weights tag of {name}; "
        f"{did_you_mean(pretrained, ['auto', *(full.partition('.')[2] for full in names)])}."
    )


def named_weights(full: str) -> Weights:
    """Describe weights by their full name, without fetching them.

    Args:
        full: ``timm:architecture.tag``, ``package:architecture.tag`` or ``gn-transfer:backbone.norm.dataset``.

    Raises:
        ConfigError: Released weights that are not installed, or a tag that timm does not know.
    """
    kind, _, rest = full.partition(":")
    if kind == "gn-transfer":
        return released_weights(rest)
    if kind == "package":
        return packaged_weights(rest.partition(".")[0])
    try:
        config = timm.get_pretrained_cfg(rest, allow_unregistered=False) if "." in rest else None
    except RuntimeError:
        config = None
    if config is None or not config.hf_hub_id:
        raise ConfigError(f"{full} is not a set of weights that timm knows; write timm:resnetv2_50.a1h_in1k.")
    stated: Mapping[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    architecture, tag = rest.split(".", 1)
    grouped = architecture.endswith(("_gn", "_bit"))
    norm: Norm = "gn_ws" if architecture.endswith("_bit") else "gn" if grouped else "bn"
    return Weights(
        name=full,
        architecture=architecture,
        pretrained_on=pretraining_datasets(tag),
        norm=TrainedNorm(norm, 32 if grouped else None),
        mean=tuple(stated["mean"]),
        std=tuple(stated["std"]),
        hints={"img_size": int(stated["input_size"][-1]), "interpolation": str(stated["interpolation"])},
        repository=str(stated["hf_hub_id"]),
    )


def auto_table() -> list[tuple[str, Norm, str]]:
    """List what ``pretrained: auto`` resolves to: backbone, norm, full name of the weights."""
    return [(backbone, norm, full) for (backbone, norm), full in _AUTO.items()]


def _local(path: Path, name: str) -> Weights:
    bit = _STANDS_FOR.get(name, "").endswith("_bit") and path.suffix == ".npz"  # Google published these for BiT alone
    weights = file_weights(path, _STANDS_FOR[name] if bit else name)
    if bit:
        weights = replace(weights, norm=TrainedNorm("gn_ws", 32))
    if weights.architecture not in (name, _STANDS_FOR.get(name)):
        raise ConfigError(
            f"model.pretrained={path} holds weights of {weights.architecture}, model.backbone is {name}; set "
            f"model.backbone={weights.architecture}, or give weights of {name}."
        )
    return weights


def _auto(name: str, norm: Norm, conversion: Conversion) -> str:
    # bn_frozen and bn_sync are BN with other statistics: its weights are theirs.
    full = _AUTO.get((name, trained_as(norm)))
    if full is None and conversion != "error":
        full = _AUTO.get((name, "bn"))
    if full is None and name not in (*ALIASES, *OWN) and (norm in BN_FAMILY or conversion != "error"):
        config = timm.get_pretrained_cfg(name)  # timm's own choice among the weights that it has
        full = f"timm:{config.architecture}.{config.tag}" if config is not None and config.hf_hub_id else None
    if full is not None and full.startswith("package:") and find_file(name) is None and hub.answers():
        full = full.replace("package:", "timm:")  # the same weights from the hub
    if full is None:
        pairs = [f"{backbone} with {known}" for backbone, known in _AUTO if backbone == name or known == norm]
        raise ConfigError(
            f"model.pretrained=auto: no weights are known for model.backbone={name} with model.norm={norm}. "
            f"There are weights for: {', '.join(pairs) or 'other norms only'}. Choose one of these, name a local file, "
            "set model.pretrained=null to train from scratch, or convert BN weights with model.conversion=calibrated."
        )
    return full
