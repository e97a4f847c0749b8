"""Weights into a model: what goes together, what is copied, and the report of it that every run keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from gn_transfer.backbones.released import TrainedNorm
from gn_transfer.backbones.weights import Weights
from gn_transfer.config import ConfigError, Norm

Conversion = Literal["error", "copy", "calibrated", "distilled"]

FITTED: tuple[Conversion, ...] = ("calibrated", "distilled")
"""Conversions that look at training images."""

BN_FAMILY: frozenset[Norm] = frozenset({"bn", "bn_frozen", "bn_sync", "bn_ws"})
"""Norms that keep running statistics, so that weights trained with BN fit them."""


@dataclass(frozen=True)
class TransferReport:
    """What happened to the pretrained weights; printed by ``fit`` and stored in every checkpoint.

    Attributes:
        source: Where the weights came from (``timm:architecture.tag``, a path) or ``"from scratch"``.
        architecture: timm's name of the model that was built.
        norm: The norm.
        loaded: Keys copied unchanged.
        dropped: Keys of the source without a place in the model, with the reason in :attr:`notes`.
        reinitialized: Keys of the model that the source did not fill.
        converted: Keys that were trained under another norm, copied as they are or fitted
            (``model.conversion``).
        notes: What a reader must know beside the comparison.
        pretrained_on: The images that the weights were trained on.
        r2: Share of the BN layer's output variance that each calibrated norm reproduces.
    """

    source: str
    architecture: str
    norm: Norm
    loaded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    reinitialized: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pretrained_on: str = ""
    r2: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Give the report as plain values for JSON and checkpoints."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransferReport:
        """Read a report from the plain values of a checkpoint."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)

    def summary(self) -> str:
        """Say in one line what was transferred.

        Example:
            >>> TransferReport("from scratch", "resnet18", "gn").summary()
            'from scratch'
        """
        if self.source == "from scratch":
            return self.source
        counts = [f"{len(self.loaded)} tensors loaded"]
        if self.reinitialized and set(self.dropped) <= set(self.reinitialized):  # the last layer, and nothing else
            counts.append(f"a new last layer for your classes ({', '.join(self.reinitialized)})")
            return f"{self.source}: " + "; ".join(
                [*counts, *([f"{len(self.converted)} converted"] if self.converted else [])]
            )
        for label in ("dropped", "reinitialized", "converted"):
            keys = getattr(self, label)
            if keys:
                shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
                counts.append(f"{len(keys)} {label} ({shown})")
        return f"{self.source}: " + "; ".join(counts)


def check_norm(
    weights: Weights,
    state: Mapping[str, Tensor],
    norm: Norm,
    conversion: Conversion,
    *,
    num_groups: int,
    group_size: int | None,
) -> None:
    """Refuse weights of another norm that nobody asked to convert, and conversions that cannot be.

    Args:
        weights: What is known about them.
        state: The weights.
        norm: The normalization.
        conversion: See :func:`create_backbone`.
        num_groups: See :func:`create_backbone`.
        group_size: See :func:`create_backbone`.

    Raises:
        ConfigError: They do not go together.
    """
    has_statistics = has_batch_norm(state)
    if norm in BN_FAMILY and not has_statistics:
        raise ConfigError(
            f"model.pretrained={weights.name} was trained without BatchNorm (it has no running statistics), but "
            f"model.norm={norm} needs them; choose model.norm=gn or gn_ws, or weights trained with BN."
        )
    if conversion in FITTED and has_statistics and norm not in (*BN_FAMILY, "gn", "ln", "in"):
        raise ConfigError(
            f"model.conversion={conversion} leads from BN to gn, ln or in, not to model.norm={norm}; choose one of "
            "these, weights trained with that norm, or model.conversion=copy."
        )
    if conversion != "error":
        return
    if has_statistics and norm not in BN_FAMILY:
        raise ConfigError(
            f"model.pretrained={weights.name} was trained with BatchNorm and model.norm={norm} computes something "
            "else, so these weights would start far below their accuracy; choose model.norm=bn or bn_frozen, weights "
            "trained with this norm, or ask for a conversion by name: model.conversion=calibrated or "
            "distilled (to gn, ln, in), or model.conversion=copy."
        )
    theirs = weights.norm
    if theirs is None:
        return
    if trained_as(theirs.name) != trained_as(norm):
        raise ConfigError(
            f"model.pretrained={weights.name} was trained with norm {theirs.name}, not with model.norm={norm}; choose "
            f"model.norm={theirs.name}, or ask for the copy by name with model.conversion=copy."
        )
    if theirs.num_groups is not None and theirs != TrainedNorm(norm, num_groups, group_size) and "gn" in theirs.name:
        raise ConfigError(
            f"model.pretrained={weights.name} was trained with model.num_groups={theirs.num_groups} and "
            f"model.group_size={_null(theirs.group_size)}, not {num_groups} and {_null(group_size)}; set them so, or "
            "ask for the copy by name with model.conversion=copy."
        )


def transfer(
    source: Mapping[str, Tensor], model: nn.Module, *, weights: Weights, norm: Norm, head: str
) -> TransferReport:
    """Copy pretrained weights into a model in place; the head always starts anew, since the classes differ.

    Args:
        source: State dict with timm's keys.
        model: The model to fill.
        weights: What is known about them.
        norm: The normalization.
        head: Name of the classifier module.

    Returns:
        What was loaded, dropped, re-initialized and converted.

    Raises:
        ConfigError: The source has another architecture.
    """
    target = model.state_dict()
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
            f"model.pretrained={weights.name} does not fit {weights.architecture}: {len(misfits)} of {len(target)} "
            f"tensors are missing or have another shape, among them {', '.join(misfits[:3])}; give weights of "
            f"{weights.architecture}, or set model.backbone to the architecture of the file."
        )
    model.load_state_dict(loaded, strict=False)
    running = tuple(key for key in source if key.endswith(("running_mean", "running_var", "num_batches_tracked")))
    layers = {key.rsplit(".", 1)[0] for key in running}
    converted = () if norm in BN_FAMILY else tuple(k for k in loaded if k.rsplit(".", 1)[0] in layers)
    if converted:  # a calibration has the statistics loaded to read them; they go with its batch norms
        converted = tuple(key for key in converted if key not in running)
        loaded = {key: value for key, value in loaded.items() if key not in running}
    return TransferReport(
        source=weights.name,
        architecture=weights.architecture,
        norm=norm,
        loaded=tuple(key for key in loaded if key not in converted),
        dropped=tuple(key for key in source if key not in loaded),
        reinitialized=tuple(reinitialized),
        converted=converted,
        notes=notes_on(weights.architecture, norm),
        pretrained_on=weights.pretrained_on,
    )


def trained_as(norm: Norm) -> Norm:
    """Name the norm whose weights a norm shares: BN with frozen or synchronized statistics takes those of BN."""
    return "bn" if norm in ("bn_frozen", "bn_sync") else norm


def has_batch_norm(state: Mapping[str, Tensor]) -> bool:
    """Say whether weights hold running statistics."""
    return any(key.endswith("running_mean") for key in state)


def notes_on(architecture: str, norm: Norm) -> tuple[str, ...]:
    """Say what a reader of a comparison must know about an architecture."""
    notes = []
    if architecture.endswith("_bit"):
        notes.append(
            "BiT's stem pads its max-pool with zeros where resnetv2's pads with -inf: not only the norm differs"
        )
    if architecture.endswith("_bit") and norm == "gn_ws":
        notes.append("BiT weights were pretrained on ImageNet-21k, the BN counterparts on ImageNet-1k only")
    return tuple(notes)


def _null(value: int | None) -> str:
    return "null" if value is None else str(value)
