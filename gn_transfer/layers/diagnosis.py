"""What a diagnosis of batch norms says: the layers, what to know about them, and what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_BATCH_NOISE = 0.25
"""Standard deviations that the mean of a batch may be away from that of all images (root mean square)."""

MOST_MEAN_SHIFT = 0.5
"""Standard deviations that a running mean may be away from that of the images (root mean square of the channels)."""

MOST_VARIANCE_FACTOR = 2.0
"""Factor that a running variance may be away from the variance of the images (likewise, of its logarithm)."""

LEAST_GAIN = 0.05
"""Accuracy that statistics of the images must gain for the running ones to be called wrong."""

FEWEST_AVERAGED = 100
"""Images that a running statistic should average over at least."""


@dataclass(frozen=True)
class BatchNormLayer:
    """A batch norm of a model.

    Attributes:
        name: As ``model.named_modules()`` gives it.
        kind: Its class.
        channels: Number of channels.
        uses_batch: Whether it normalizes by the statistics of its batch once the model is in training mode.
        affine_frozen: Whether its scale and shift do not learn.
        values_per_channel: Values that a statistic of one batch is made of: images times positions.
        averaged_images: Images that the running statistics average over, by the momentum; None where all count alike.
        batch_noise: Distance of the mean of a batch and the mean of all images, in standard deviations of the images,
            root mean square over batches and channels; None where there are not two batches of images.
        mean_shift: Distance of running mean and mean of the images, in standard deviations of the images, root mean
            square over the channels; None without running statistics.
        variance_factor: Factor between running variance and variance of the images, at least 1, likewise.
    """

    name: str
    kind: str
    channels: int
    uses_batch: bool
    affine_frozen: bool
    values_per_channel: int
    averaged_images: float | None
    batch_noise: float | None = None
    mean_shift: float | None = None
    variance_factor: float | None = None

    @property
    def statistics_fit(self) -> bool:
        """Whether its running statistics are near those of the images."""
        return (self.mean_shift or 0.0) <= MOST_MEAN_SHIFT and (self.variance_factor or 1.0) <= MOST_VARIANCE_FACTOR


@dataclass(frozen=True)
class Remedy:
    """Something to do.

    Attributes:
        text: A sentence for the user.
        code: The line of Python.
        command: Options of ``gn-transfer fit``, or a command.
    """

    text: str
    code: str
    command: str


@dataclass(frozen=True)
class Finding:
    """Something to know about a model at a batch size.

    Attributes:
        key: ``crash``, ``batch``, ``statistics``, ``momentum``, ``moving`` or ``undone``.
        what: A sentence for the user.
        remedies: What to do, the first one first.
    """

    key: str
    what: str
    remedies: tuple[Remedy, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        batch_size: Images per forward pass that were asked about.
        images: Images that it was measured on.
        layers: The batch norms, in the order of the model.
        output_difference: How far the outputs of training mode are from those of evaluation mode, as a share of what
            outputs of different images differ by; None where training mode cannot run.
        gradient_angle: Angle between the gradient over batches of ``batch_size`` and that of the same images at once,
            in degrees; 90 where they have nothing in common. None where it cannot be computed.
        accuracy: Share of right answers with ``running`` statistics, with those of each ``batch``, and of all
            ``images`` together; empty without targets.
        findings: What to know, the most important first; empty where all is fine.
    """

    batch_size: int
    images: int
    layers: tuple[BatchNormLayer, ...]
    output_difference: float | None
    gradient_angle: float | None
    accuracy: dict[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Give plain values, for JSON."""
        return asdict(self)

    def as_text(self, *, commands: bool = False) -> str:
        """Write what was found, and what to do, in lines.

        Args:
            commands: Give commands of gn-transfer; else lines of Python.
        """
        using = sum(layer.uses_batch for layer in self.layers)
        lines = [
            f"{len(self.layers)} batch norms, {using} of them use the statistics of their batch in training; "
            f"measured on {self.images} images at batch size {self.batch_size}"
        ]
        if self.gradient_angle is not None:
            lines.append(f"gradient: turned by {self.gradient_angle:.0f} degrees from that of the images in one batch")
        if self.output_difference is not None:
            lines.append(f"outputs: training mode is {self.output_difference:.0%} away from evaluation mode")
        if self.accuracy:
            said = ", ".join(
                f"{share:.1%} with statistics of {_STATISTICS[key]}" for key, share in self.accuracy.items()
            )
            lines += textwrap.wrap(f"accuracy: {said}", 100, subsequent_indent="          ")
        for number, finding in enumerate(self.findings, 1):
            lines += ["", *textwrap.wrap(f"{number}. {finding.what}", 100, subsequent_indent="   ")]
            for remedy in finding.remedies:
                lines += textwrap.wrap(remedy.text, 100, initial_indent="   - ", subsequent_indent="     ")
                lines.append(f"       {remedy.command if commands else remedy.code}")
        if not self.findings:
            lines += ["", f"Nothing to mend: batch size {self.batch_size} suits this model's norms."]
        return "\n".join(lines)

    __str__ = as_text


_STATISTICS = {"running": "the checkpoint", "batch": "each batch", "images": "all images together"}


_FREEZE = Remedy(
    "Freeze the statistics: the same function at every batch size, and model.train() does not undo it.",
    "freeze_batch_norm(model)",
    "gn-transfer fit ... --model.norm bn_frozen",
)
_CALIBRATE = Remedy(
    "Convert to GroupNorm, calibrated on your images: it never looks at the batch.",
    'convert_norm(model, "gn", num_groups=4, calibration=batches, skip={"name of the last layer"})',
    "gn-transfer fit ... --model.norm gn --model.conversion calibrated",
)
_TRAINED_SO = Remedy(
    "Take a model with GroupNorm + Weight Standardization and weights that were trained so.",
    'convert_norm(model, "gn_ws", skip={"name of the last layer"})',
    "gn-transfer fit ... --model.norm gn_ws",
)
_REESTIMATE = Remedy(
    "Set the running statistics from a pass over your images.",
    "reestimate_statistics(model, batches)",
    "gn-transfer reestimate CKPT",
)
_MOMENTUM = Remedy(
    "Lower the momentum of the running statistics with the batch size.",
    "for layer in model.modules():\n"
    "           if isinstance(layer, torch.nn.BatchNorm2d): layer.momentum = corrected_momentum(batch_size)",
    "gn-transfer fit ... --batch_norm.momentum corrected",
)


def judge(found: Diagnosis, crashing: Sequence[BatchNormLayer], undone: Sequence[str]) -> Iterator[Finding]:
    """Judge what was measured, the most important first."""
    using = [layer for layer in found.layers if layer.uses_batch]
    misfits = sorted(
        (layer for layer in found.layers if not layer.statistics_fit),
        key=lambda layer: max(layer.mean_shift or 0, (layer.variance_factor or 1) - 1),
        reverse=True,
    )
    gain = found.accuracy["images"] - found.accuracy["running"] if "images" in found.accuracy else None
    # Statistics that are wrong are not worth freezing.
    ways = (_FREEZE, _CALIBRATE) if gain is None or gain <= LEAST_GAIN else (_REESTIMATE, _TRAINED_SO)
    if crashing:
        yield Finding(
            "crash",
            f"Training stops at batch size {found.batch_size}: {_named([layer.name for layer in crashing])} would take "
            "the mean of a single value per channel (Expected more than 1 value per channel when training).",
            ways,
        )
    elif noisy := [layer for layer in using if (layer.batch_noise or 0.0) > MOST_BATCH_NOISE]:
        worst = max(noisy, key=lambda layer: layer.batch_noise or 0.0)
        yield Finding(
            "batch",
            f"Batches of {found.batch_size} are too small for batch statistics: their means are up to "
            f"{worst.batch_noise:.2f} standard deviations away from those of all images ({worst.name}; "
            f"{MOST_BATCH_NOISE} is acceptable). Accumulating gradients does not help, because the statistics stay "
            "those of the small batch.",
            ways,
        )
    if misfits and (gain is None or gain > LEAST_GAIN):
        yield Finding(
            "statistics",
            f"The running statistics of {len(misfits)} of {len(found.layers)} layers are not those of these images: "
            f"{_named([layer.name for layer in misfits])}. A mean is up to "
            f"{max(layer.mean_shift or 0 for layer in misfits):.1f} standard deviations away, a variance up to a "
            f"factor of {max(layer.variance_factor or 1 for layer in misfits):.1f}. "
            + (
                "Other images than the weights were trained on do that, too: then leave the statistics as they are. "
                "Re-estimate those that a training at a small batch size has left."
                if gain is None
                else f"With them {found.accuracy['running']:.0%} of the images are right, with statistics of these "
                f"images {found.accuracy['images']:.0%}."
            ),
            (_REESTIMATE,),
        )
    moving = [layer.name for layer in using if layer.affine_frozen]
    if moving:
        yield Finding(
            "moving",
            f"The parameters of {_named(moving)} are frozen, but in training mode the layers still use and update the "
            "statistics of the batch.",
            (_FREEZE,),
        )
    if undone:
        yield Finding(
            "undone",
            f"{_named(undone)} are in evaluation mode now. The next model.train() undoes that.",
            (_FREEZE,),
        )
    short = [layer for layer in using if (layer.averaged_images or FEWEST_AVERAGED) < FEWEST_AVERAGED]
    if short:
        yield Finding(
            "momentum",
            f"The running statistics of {_named([layer.name for layer in short])} average only over the last "
            f"{short[0].averaged_images:.0f} images, so evaluation depends on which these were.",
            (_MOMENTUM, _REESTIMATE),
        )


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(name or "the model" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
