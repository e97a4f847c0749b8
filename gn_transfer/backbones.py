"""Backbones from timm under any normalization of the switch, and where their weights come from.

The only file that imports timm. A backbone is built as timm builds it, its norms (and, under Weight Standardization,
its convolutions) are exchanged by :func:`gn_transfer.layers.convert_norm`, and weights are copied over with a report
of what was loaded, dropped, re-initialized and converted.
"""

from __future__ import annotations

import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from gn_transfer.config import ConfigError, Norm, did_you_mean
from gn_transfer.layers import convert_norm
from gn_transfer.small_cnn import SmallCnn

Conversion = Literal["refuse", "copy"]

BN_FAMILY: frozenset[Norm] = frozenset({"bn", "bn_frozen", "bn_sync", "bn_ws"})
"""Norms that keep running statistics, so that weights trained with BN fit them."""

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {"resnetv2_26": ("resnetv2_50", {"layers": [2, 2, 2, 2]})}
"""Our names for nets that timm builds only with arguments: name -> (timm architecture, its arguments)."""

OWN: dict[str, type[SmallCnn]] = {"cnn_mnist": SmallCnn}
"""Nets that timm does not have; without pretrained weights, and grey unless asked otherwise."""

# (backbone, norm) -> timm's "architecture.tag" for `pretrained: auto`. Only pairs whose weights were trained with that
# very norm stand here; bn_frozen and bn_sync compute what bn computed, so they share its weights.
_AUTO: dict[tuple[str, Norm], str] = {
    ("resnetv2_50", "gn_ws"): "resnetv2_50x1_bit.goog_in21k_ft_in1k",
    ("resnetv2_101", "gn_ws"): "resnetv2_101x1_bit.goog_in21k_ft_in1k",
    ("resnet50", "gn"): "resnet50_gn.a1h_in1k",
    ("resnetv2_18", "bn"): "resnetv2_18.ra4_e3600_r224_in1k",
    ("resnetv2_34", "bn"): "resnetv2_34.ra4_e3600_r224_in1k",
    ("resnetv2_50", "bn"): "resnetv2_50.a1h_in1k",
    ("resnetv2_101", "bn"): "resnetv2_101.a1h_in1k",
    ("resnet18", "bn"): "resnet18.a1_in1k",
    ("resnet26", "bn"): "resnet26.bt_in1k",
    ("resnet34", "bn"): "resnet34.a1_in1k",
    ("resnet50", "bn"): "resnet50.a1_in1k",
    ("resnet101", "bn"): "resnet101.a1_in1k",
}


@dataclass(frozen=True)
class TransferReport:
    """What happened to the pretrained weights; printed by ``fit`` and stored in every checkpoint.

    Attributes:
        source: Where the weights came from (``timm:architecture.tag``, a path) or ``"from scratch"``.
        architecture: timm's name of the net that was built.
        norm: The norm of the switch.
        loaded: Keys copied unchanged.
        dropped: Keys of the source without a place in the net, with the reason in :attr:`notes`.
        reinitialized: Keys of the net that the source did not fill.
        converted: Keys copied although they were trained under another norm (``model.conversion: copy``).
        notes: What a reader must know beside the comparison.
    """

    source: str
    architecture: str
    norm: Norm
    loaded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    reinitialized: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Give the report as plain values for JSON and checkpoints."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def summary(self) -> str:
        """Say in one line what was transferred.

        Example:
            >>> TransferReport("from scratch", "resnet18", "gn").summary()
            'from scratch'
        """
        if self.source == "from scratch":
            return self.source
        counts = [f"{len(self.loaded)} tensors loaded"]
        for label in ("dropped", "reinitialized", "converted"):
            keys = getattr(self, label)
            if keys:
                shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
                counts.append(f"{len(keys)} {label} ({shown})")
        return f"{self.source}: " + "; ".join(counts)


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
        pretrained: ``None`` for none, ``"auto"`` for the tag that fits (name, norm), a timm tag
            (``a1h_in1k`` or ``resnetv2_50.a1h_in1k``), or a local file (.safetensors, .pth, .bin, .ckpt, BiT .npz).
        num_groups: GroupNorm's number of groups; ignored where ``group_size`` is given.
        group_size: Channels per group instead of a number of groups.
        conversion: ``refuse`` weights of another norm, or ``copy`` their affine parameters unchanged.
        in_chans: Channels of the pictures.

    Returns:
        The net with its pixel statistics, head name and transfer report.

    Raises:
        ConfigError: Unknown architecture, groups that do not divide, weights that are missing, unreadable or of
            another norm or architecture.
    """
    architecture, tag = resolve_pretrained(name, norm, pretrained)
    net = _build(architecture, num_classes=num_classes, in_chans=in_chans)
    config: Mapping[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    if tag is not None:
        tagged = timm.get_pretrained_cfg(f"{architecture}.{tag}")
        assert tagged is not None, "resolve_pretrained gave a tag that timm does not know"
        config = tagged.to_dict()  # type: ignore[no-untyped-call]
    head = str(config["classifier"])
    exchange(net, norm, head=head, num_groups=num_groups, group_size=group_size)
    if norm == "none":
        _zero_last_convolutions(net)

    if pretrained is None:
        report = TransferReport("from scratch", architecture, norm, notes=_notes(architecture, norm))
    else:
        if tag is not None:
            source_name = f"timm:{architecture}.{tag}"
            source = _download(f"{architecture}.{tag}", source_name)
        else:
            source_name = pretrained
            source = _read_file(Path(pretrained), architecture)
        report = transfer(
            source, net, source_name=source_name, architecture=architecture, norm=norm, head=head, conversion=conversion
        )
    channels = slice(0, in_chans) if in_chans in (1, 3) else slice(0, 1)
    mean, std = tuple(config["mean"][channels]), tuple(config["std"][channels])
    if in_chans not in (1, 3):
        mean, std = mean * in_chans, std * in_chans
    hints = {"img_size": int(config["input_size"][-1]), "interpolation": str(config["interpolation"])}
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


def resolve_pretrained(name: str, norm: Norm, pretrained: str | None) -> tuple[str, str | None]:
    """Find the architecture and the weights tag that the switch means.

    Args:
        name: Backbone as the user named it.
        norm: The switch.
        pretrained: See :func:`create_backbone`.

    Returns:
        timm's architecture and its tag; the tag is ``None`` from scratch and for local files.

    Raises:
        ConfigError: Unknown architecture or tag, no such file, or no weights known for this pair.

    Example:
        >>> resolve_pretrained("resnetv2_50", "gn_ws", "auto")
        ('resnetv2_50x1_bit', 'goog_in21k_ft_in1k')
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
    if pretrained is None or Path(pretrained).is_file():
        return name, None
    if pretrained == "auto":
        # bn_frozen and bn_sync are BN with other statistics: its weights are theirs.
        full = _AUTO.get((name, "bn" if norm in ("bn_frozen", "bn_sync") else norm))
        if full is None:
            pairs = [f"{backbone} with {known}" for backbone, known in _AUTO if backbone == name or known == norm]
            raise ConfigError(
                f"model.pretrained=auto: no weights are known for model.backbone={name} with model.norm={norm}. "
                f"There are weights for: {', '.join(pairs) or 'other norms only'}. Choose one of these, set "
                "model.pretrained=null to train from scratch, or name a local file."
            )
        architecture, tag = full.split(".", 1)
        return architecture, tag
    if "/" in pretrained or Path(pretrained).suffix in (".safetensors", ".pth", ".pt", ".bin", ".npz", ".ckpt"):
        raise ConfigError(f"model.pretrained={pretrained}: no such file; give an existing weights file, a tag or auto.")
    if name in OWN:
        raise ConfigError(f"model.pretrained={pretrained}: there are no weights for {name}; give null or a file.")
    architecture, _, tag = pretrained.rpartition(".")
    architecture = architecture or name
    tags = [full.split(".", 1)[1] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag not in tags:
        raise ConfigError(
            f"model.pretrained={pretrained} is neither a file nor a weights tag of {architecture}; "
            f"{did_you_mean(tag, ['auto', *tags])}."
        )
    return architecture, tag


def transfer(
    source: Mapping[str, Tensor],
    net: nn.Module,
    *,
    source_name: str,
    architecture: str,
    norm: Norm,
    head: str,
    conversion: Conversion = "refuse",
) -> TransferReport:
    """Copy pretrained weights into a net in place; the head always starts anew, since the classes differ.

    Args:
        source: State dict with timm's keys.
        net: The net to fill.
        source_name: How to call the source in messages.
        architecture: timm's name of the net.
        norm: The switch.
        head: Name of the classifier module.
        conversion: ``refuse`` weights of another norm or ``copy`` their affine parameters unchanged.

    Returns:
        What was loaded, dropped, re-initialized and converted.

    Raises:
        ConfigError: The source has another norm (and conversion is ``refuse``) or another architecture.
    """
    source_is_bn = any(key.endswith("running_mean") for key in source)
    target_is_bn = norm in BN_FAMILY
    if target_is_bn and not source_is_bn:
        raise ConfigError(
            f"model.pretrained={source_name} was trained without BatchNorm (it has no running statistics), but "
            f"model.norm={norm} needs them; choose model.norm=gn or gn_ws, or weights trained with BN."
        )
    if source_is_bn and not target_is_bn and conversion == "refuse":
        raise ConfigError(
            f"model.pretrained={source_name} was trained with BatchNorm and model.norm={norm} computes something "
            "else, so these weights would start far below their accuracy; choose model.norm=bn or bn_frozen, weights "
            "trained with this norm, or ask for the copy by name with model.conversion=copy."
        )
    target = net.state_dict()
    loaded, reinitialized, misfits = {}, [], []
    for key, tensor in target.items():
        if key.startswith(f"{head}."):
            reinitialized.append(key)
        elif key in source and source[key].shape == tensor.shape:
            loaded[key] = source[key].to(tensor.dtype)
        elif not key.endswith("num_batches_tracked"):
            misfits.append(f"{key} {tuple(tensor.shape)}")
    if misfits:
        raise ConfigError(
            f"model.pretrained={source_name} does not fit {architecture}: {len(misfits)} of {len(target)} tensors are "
            f"missing or have another shape, among them {', '.join(misfits[:3])}; give weights of {architecture}, or "
            "set model.backbone to the architecture of the file."
        )
    net.load_state_dict(loaded, strict=False)
    affine = {key.rsplit(".", 1)[0] for key in source if key.endswith("running_mean")}
    converted = () if target_is_bn or not source_is_bn else tuple(k for k in loaded if k.rsplit(".", 1)[0] in affine)
    return TransferReport(
        source=source_name,
        architecture=architecture,
        norm=norm,
        loaded=tuple(key for key in loaded if key not in converted),
        dropped=tuple(key for key in source if key not in loaded),
        reinitialized=tuple(reinitialized),
        converted=converted,
        notes=_notes(architecture, norm),
    )


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


def _notes(architecture: str, norm: Norm) -> tuple[str, ...]:
    notes = []
    if architecture.endswith("_bit"):
        notes.append(
            "BiT's stem pads its max-pool with zeros where resnetv2's pads with -inf: not only the norm differs"
        )
    if architecture.endswith("_bit") and norm == "gn_ws":
        notes.append("BiT weights saw ImageNet-21k; the BN counterparts saw ImageNet-1k only")
    return tuple(notes)


def _zero_last_convolutions(net: nn.Module) -> None:
    for module in net.modules():
        if hasattr(module, "zero_init_last") or hasattr(module, "conv2"):
            last = getattr(module, "conv3", None) or getattr(module, "conv2", None)
            if isinstance(last, nn.Conv2d):
                nn.init.zeros_(last.weight)


def _download(full_name: str, source_name: str) -> Mapping[str, Tensor]:
    # Without a network the hub's client tries for a minute; told that it is offline, it looks into its cache at once.
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or not _answers(hub.ENDPOINT)
    try:
        state: Mapping[str, Tensor] = timm.create_model(full_name, pretrained=True).state_dict()
    except Exception as error:  # the hub client raises a family of unrelated types
        raise ConfigError(
            f"model.pretrained: the weights {source_name} are not on this machine and could not be downloaded "
            f"({type(error).__name__}). With a network, run the command again; without one, copy the model's file "
            "(model.safetensors of that name on the Hugging Face hub) here and set model.pretrained to its path, or "
            "train from scratch with model.pretrained=null."
        ) from error
    finally:
        hub.HF_HUB_OFFLINE = before
    return state


def _answers(url: str, timeout: float = 4.0) -> bool:
    """Say whether a server answers at all, within ``timeout`` seconds."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True  # an answer, if not the one hoped for
    except OSError:
        return False


def _read_file(path: Path, architecture: str) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".npz":
            base, arguments = ALIASES.get(architecture, (architecture, {}))
            overlay = {"file": str(path), "custom_load": True}
            net = timm.create_model(base, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
            npz: Mapping[str, Tensor] = net.state_dict()
            return npz
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format's reader has its own errors for a damaged file
        raise ConfigError(
            f"model.pretrained={path} cannot be read as weights ({type(error).__name__}); allowed are "
            ".safetensors, .pth/.bin/.ckpt holding plain tensors, and BiT .npz files. Fetch the file again."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"model.pretrained={path} holds no state dict; give a file of named tensors.")
    return {key.removeprefix("net."): value for key, value in content.items()}


def default_channels(name: str) -> int:
    """Tell how many channels of a picture a net takes unless it is told otherwise: 1 for ``cnn_mnist``, else 3."""
    return 1 if name in OWN else 3


def _build(architecture: str, *, num_classes: int, in_chans: int) -> nn.Module:
    if architecture in OWN:
        return OWN[architecture](num_classes, in_chans)
    base, arguments = ALIASES.get(architecture, (architecture, {}))
    net: nn.Module = timm.create_model(base, num_classes=num_classes, in_chans=in_chans, **arguments)
    return net
