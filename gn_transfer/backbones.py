"""Backbones from timm under any normalization of the switch, and where their weights come from.

The only file that imports timm. A backbone is built as timm builds it, its norms (and, under Weight Standardization,
its convolutions) are exchanged by :func:`gn_transfer.layers.convert_norm`, and weights are copied over with a report
of what was loaded, dropped, re-initialized and converted.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from gn_transfer.config import ConfigError, Norm, did_you_mean
from gn_transfer.layers import Exchange, convert_norm
from gn_transfer.released import cards
from gn_transfer.small_cnn import SmallCnn
from gn_transfer.transfer import (
    BN_FAMILY,
    Conversion,
    TransferReport,
    check_norm,
    has_batch_norm,
    notes_on,
    trained_as,
    transfer,
)
from gn_transfer.weights import SUFFIXES, Weights, file_weights, read_weights, released_weights, seen

CALIBRATION_BATCH = 64
"""Pictures that a calibration holds at a time; the memory is that of twice as many."""

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {"resnetv2_26": ("resnetv2_50", {"layers": [2, 2, 2, 2]})}
"""Our names for nets that timm builds only with arguments: name -> (timm architecture, its arguments)."""

OWN: dict[str, type[SmallCnn]] = {"cnn_mnist": SmallCnn}
"""Nets that timm does not have; without pretrained weights, and grey unless asked otherwise."""

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
}

# timm's own nets that stand for (backbone, norm): their weights fit, their architecture differs in more than the norm.
_STANDS_FOR = {"resnetv2_50": "resnetv2_50x1_bit", "resnetv2_101": "resnetv2_101x1_bit", "resnet50": "resnet50_gn"}


@dataclass(frozen=True)
class Backbone:
    """A net ready to train.

    Attributes:
        net: Maps normalized pictures ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``.
        mean: Pixel mean per channel, on pixels scaled to [0, 1].
        std: Pixel standard deviation per channel, likewise.
        head: Name of the classifier module inside :attr:`net`.
        report: What was transferred.
        hints: What the weights were trained at (``img_size``, ``interpolation``), for the user to read; not applied.
    """

    net: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: str
    report: TransferReport
    hints: dict[str, Any] = field(default_factory=dict)


def create_backbone(
    name: str,
    *,
    norm: Norm,
    num_classes: int,
    pretrained: str | None = None,
    num_groups: int = 32,
    group_size: int | None = None,
    conversion: Conversion = "refuse",
    calibration: Tensor | None = None,
    in_chans: int = 3,
) -> Backbone:
    """Build a timm net under a norm of the switch, with or without pretrained weights.

    Initialization from scratch is timm's, and per norm: ResNet v1 with an affine norm starts each block's last norm
    at zero weight (Goyal et al. 2017, arXiv:1706.02677), which is safe under Weight Standardization since no
    *convolution* is zero; ResNetV2 starts all convolutions at He's normal, none at zero, because a zero filter under
    Weight Standardization with eps 1e-8 has its gradient amplified 1e4 times; ``norm: none`` starts each block's last
    convolution at zero, so that an unnormalized net begins as the identity (after Zhang et al. 2019, arXiv:1901.09321).

    Args:
        name: timm architecture without a tag (``resnet18``, ``resnetv2_50``), ``resnetv2_26`` or ``cnn_mnist``.
        norm: The switch.
        num_classes: Width of the new head, at least 2.
        pretrained: ``None`` for none, ``"auto"`` for the weights that fit (name, norm), a timm tag (``a1h_in1k`` or
            ``resnetv2_50.a1h_in1k``), released weights (``resnetv2_18.bn.tinyimagenet``), or a local file
            (.safetensors, .pth, .bin, .ckpt, BiT .npz) or folder.
        num_groups: GroupNorm's number of groups; ignored where ``group_size`` is given.
        group_size: Channels per group instead of a number of groups.
        conversion: ``refuse`` weights of another norm, ``copy`` their parameters unchanged, or set the affine of
            each group norm in closed form to reproduce a BN net (``calibrated``).
        calibration: Training pictures for ``calibrated``, uint8 ``(N, in_chans, H, W)``, preprocessed as in evaluation.
        in_chans: Channels of the pictures.

    Returns:
        The net with its pixel statistics, head name and transfer report.

    Raises:
        ConfigError: Unknown architecture, groups that do not divide, weights that are missing, unreadable or of
            another norm or architecture, or a conversion that cannot be.
    """
    weights = resolve_pretrained(name, norm, pretrained, conversion)
    architecture = name if weights is None else weights.architecture
    net = _build(architecture, num_classes=num_classes, in_chans=in_chans)
    config: Mapping[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    head = str(config["classifier"])
    mean, std = (_per_channel(config[key], in_chans) for key in ("mean", "std"))
    hints = {"img_size": int(config["input_size"][-1]), "interpolation": str(config["interpolation"])}
    if weights is not None:
        mean, std = (
            _per_channel(stated or default, in_chans) for stated, default in ((weights.mean, mean), (weights.std, std))
        )
        hints = dict(weights.hints or hints)
    groups: dict[str, Any] = {"num_groups": num_groups, "group_size": group_size}

    if weights is None:
        exchange(net, norm, head=head, **groups)
        if norm == "none":
            _zero_last_convolutions(net)
        report = TransferReport("from scratch", architecture, norm, notes=notes_on(architecture, norm))
        return Backbone(net, mean, std, head, report, hints)

    state = _read_npz(weights) if weights.file is not None and weights.file.suffix == ".npz" else read_weights(weights)
    check_norm(weights, state, norm, conversion, **groups)
    calibrated = conversion == "calibrated" and norm not in BN_FAMILY and has_batch_norm(state)
    exchange(net, "bn" if calibrated else norm, head=head, **groups)
    if norm == "none":
        _zero_last_convolutions(net)
    report = transfer(state, net, weights=weights, norm=norm, head=head)
    if calibrated:
        pixels = _calibration_batches(calibration, mean, std)
        exchanges: list[Exchange] = []
        convert_norm(net, norm, **groups, skip={head}, calibration=pixels, report=exchanges)
        explained = {found.name: round(found.explained, 4) for found in exchanges if found.explained is not None}
        report = replace(report, explained=explained, notes=(*report.notes, _quality(explained)))
    return Backbone(net, mean, std, head, report, hints)


def rebuild(
    architecture: str,
    *,
    norm: Norm,
    num_classes: int,
    head: str,
    num_groups: int,
    group_size: int | None,
    in_chans: int = 3,
) -> nn.Module:
    """Build the net that a checkpoint describes, without looking for any pretrained weights.

    Args:
        architecture: timm's name, as :attr:`TransferReport.architecture` stored it.
        norm: The switch.
        num_classes: Width of the head.
        head: Name of the classifier module.
        num_groups: See :func:`create_backbone`.
        group_size: See :func:`create_backbone`.
        in_chans: Channels of the pictures.

    Returns:
        Freshly initialized net, ready for ``load_state_dict``.
    """
    net = _build(architecture, num_classes=num_classes, in_chans=in_chans)
    exchange(net, norm, head=head, num_groups=num_groups, group_size=group_size)
    return net


def exchange(net: nn.Module, norm: Norm, *, head: str, num_groups: int, group_size: int | None) -> None:
    """Exchange the norms of a net in place, leaving a net that already has them as it is.

    Args:
        net: The net, mapping ``(B, C, H, W)`` to logits.
        norm: The switch.
        head: Name of the classifier module, which is neither normalized nor standardized.
        num_groups: See :func:`create_backbone`.
        group_size: See :func:`create_backbone`.
    """
    convert_norm(net, norm, num_groups=num_groups, group_size=group_size, skip={head})


def resolve_pretrained(
    name: str, norm: Norm, pretrained: str | None, conversion: Conversion = "refuse"
) -> Weights | None:
    """Find the weights that the switch means.

    Args:
        name: Backbone as the user named it.
        norm: The switch.
        pretrained: See :func:`create_backbone`.
        conversion: With anything but ``refuse``, ``auto`` falls back to the BN weights of the backbone.

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
            f"model.backbone={name} is not a net that timm knows; {near}use resnet18, resnet26, resnet34, resnet50, "
            "resnet101, resnetv2_18, resnetv2_34, resnetv2_50, resnetv2_101, cnn_mnist, or another "
            "convolutional net of timm."
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
        full: ``timm:architecture.tag`` or ``gn-transfer:backbone.norm.dataset``.

    Raises:
        ConfigError: Released weights that are not installed, or a tag that timm does not know.
    """
    kind, _, rest = full.partition(":")
    if kind == "gn-transfer":
        return released_weights(rest)
    config = timm.get_pretrained_cfg(rest, allow_unregistered=False) if "." in rest else None
    if config is None or not config.hf_hub_id:
        raise ConfigError(f"{full} is not a set of weights that timm knows; write timm:resnetv2_50.a1h_in1k.")
    stated: Mapping[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    architecture, tag = rest.split(".", 1)
    grouped = architecture.endswith(("_gn", "_bit"))
    return Weights(
        name=full,
        architecture=architecture,
        saw=seen(tag),
        norm="gn_ws" if architecture.endswith("_bit") else "gn" if grouped else "bn",
        num_groups=32 if grouped else None,
        mean=tuple(stated["mean"]),
        std=tuple(stated["std"]),
        hints={"img_size": int(stated["input_size"][-1]), "interpolation": str(stated["interpolation"])},
        repository=str(stated["hf_hub_id"]),
    )


def auto_table() -> list[tuple[str, Norm, str]]:
    """List what ``pretrained: auto`` resolves to: backbone, norm, full name of the weights."""
    return [(backbone, norm, full) for (backbone, norm), full in _AUTO.items()]


def parameter_depths(net: nn.Module) -> dict[str, int]:
    """Number the parameters by depth for layer-wise learning rates.

    Args:
        net: A timm net.

    Returns:
        Parameter name to depth: 0 for the stem, rising towards the head, which is the deepest.
    """
    depths: dict[str, int] = group_with_matcher(net.named_parameters(), net.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    order = {depth: rank for rank, depth in enumerate(sorted(set(depths.values())))}
    return {name: order[depth] for name, depth in depths.items()}


def check_input(net: nn.Module, norm: Norm, *, batch_size: int, img_size: int, in_chans: int = 3) -> None:
    """Refuse a batch that the net cannot normalize, before anything is trained; computes shapes only.

    Args:
        net: The net; left untouched.
        norm: The switch, for the message.
        batch_size: Pictures per forward pass.
        img_size: Their side, in pixels.
        in_chans: Their channels.

    Raises:
        ConfigError: A norm would see a single value per channel (or per group), as BN does at batch size 1 where a
            stride-32 net leaves a 1x1 map.
    """
    shadow = deepcopy(net).to("meta").train()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shadow(torch.empty(batch_size, in_chans, img_size, img_size, device="meta"))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"data.img_size={img_size} with data.batch_size={batch_size} cannot be trained with model.norm={norm}: "
            f"{error}. Set data.img_size to 64 or more, raise data.batch_size, or choose model.norm=gn_ws."
        ) from error


def _zero_last_convolutions(net: nn.Module) -> None:
    for module in net.modules():
        if hasattr(module, "zero_init_last") or hasattr(module, "conv2"):
            last = getattr(module, "conv3", None) or getattr(module, "conv2", None)
            if isinstance(last, nn.Conv2d):
                nn.init.zeros_(last.weight)


def _local(path: Path, name: str) -> Weights:
    bit = _STANDS_FOR.get(name, "").endswith("_bit") and path.suffix == ".npz"  # Google published these for BiT alone
    weights = file_weights(path, _STANDS_FOR[name] if bit else name)
    if bit:
        weights = replace(weights, norm="gn_ws", num_groups=32)
    if weights.architecture not in (name, _STANDS_FOR.get(name)):
        raise ConfigError(
            f"model.pretrained={path} holds weights of {weights.architecture}, model.backbone is {name}; set "
            f"model.backbone={weights.architecture}, or give weights of {name}."
        )
    return weights


def _auto(name: str, norm: Norm, conversion: Conversion) -> str:
    # bn_frozen and bn_sync are BN with other statistics: its weights are theirs.
    full = _AUTO.get((name, trained_as(norm)))
    if full is None and conversion != "refuse":
        full = _AUTO.get((name, "bn"))
    if full is None:
        pairs = [f"{backbone} with {known}" for backbone, known in _AUTO if backbone == name or known == norm]
        raise ConfigError(
            f"model.pretrained=auto: no weights are known for model.backbone={name} with model.norm={norm}. "
            f"There are weights for: {', '.join(pairs) or 'other norms only'}. Choose one of these, name a local file, "
            "set model.pretrained=null to train from scratch, or convert BN weights with model.conversion=calibrated."
        )
    return full


def _per_channel(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == in_chans else tuple(values[:1]) * in_chans


def _calibration_batches(pictures: Tensor | None, mean: Sequence[float], std: Sequence[float]) -> Iterator[Tensor]:
    if pictures is None:
        raise ConfigError("model.conversion=calibrated needs training pictures; none were given.")
    shape = (1, -1, 1, 1)
    for part in torch.split(pictures, CALIBRATION_BATCH):
        yield (part.float() / 255.0 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def _quality(explained: Mapping[str, float]) -> str:
    worst = min(explained, key=explained.__getitem__)
    middle = statistics.median(explained.values())
    return (
        f"calibrated: {len(explained)} norms reproduce {middle:.0%} of their BN layer's variance in the median, "
        f"{explained[worst]:.0%} in the worst ({worst})"
    )


def _read_npz(weights: Weights) -> Mapping[str, Tensor]:
    base, arguments = ALIASES.get(weights.architecture, (weights.architecture, {}))
    overlay = {"file": str(weights.file), "custom_load": True}
    try:
        net = timm.create_model(base, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except Exception as error:  # numpy, zipfile and timm have their own errors for a damaged file
        raise ConfigError(
            f"model.pretrained={weights.file} cannot be read as weights of {weights.architecture} "
            f"({type(error).__name__}); give a BiT .npz of that net, or fetch the file again."
        ) from error
    state: Mapping[str, Tensor] = net.state_dict()
    return state


def default_channels(name: str) -> int:
    """Tell how many channels of a picture a net takes unless it is told otherwise: 1 for ``cnn_mnist``, else 3."""
    return 1 if name in OWN else 3


def _build(architecture: str, *, num_classes: int, in_chans: int) -> nn.Module:
    if architecture in OWN:
        return OWN[architecture](num_classes, in_chans)
    base, arguments = ALIASES.get(architecture, (architecture, {}))
    net: nn.Module = timm.create_model(base, num_classes=num_classes, in_chans=in_chans, **arguments)
    return net
