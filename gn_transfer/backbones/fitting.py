"""Turn a batch-norm model into one with group norms on training images: calibrate it, and distill it."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gn_transfer.backbones.transfer import Conversion, TransferReport
from gn_transfer.config import Norm
from gn_transfer.files import partial_of
from gn_transfer.layers import Replacement, convert_norm, group_counts
from gn_transfer.layers.distill import IMAGES_PER_STEP, distill

CALIBRATION_IMAGES = 256
"""Training images that a calibration takes."""

DISTILLATION_SAMPLES = 1024
"""Training images, with repetitions, that a distillation takes."""

_VERSION = 1  # raise it with every change of what a conversion computes
_PIXELS_AT_ONCE = 32 * 64 * 64  # few large blocks of memory cost more than what is computed on them

ProgressBar: TypeAlias = Callable[[str, int], AbstractContextManager[Callable[[], object]]]
"""From what is being done and the number of steps to a context that gives the function to call after each step."""


@contextmanager
def no_progress(what: str, total: int) -> Iterator[Callable[[], object]]:
    """Show nothing; the default :data:`ProgressBar`."""
    yield lambda: None


@dataclass(frozen=True)
class TrainingImages:
    """Training images and how their pixels are normalized.

    Attributes:
        pixels: uint8, shape ``(N, in_chans, H, W)``.
        mean: Per channel, on pixels scaled to [0, 1].
        std: Likewise.
    """

    pixels: Tensor
    mean: Sequence[float]
    std: Sequence[float]

    def normalized(self, pixels: Tensor) -> Tensor:
        """Give the model's input for some pixels."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255.0 - mean) / std

    def parts(self) -> Sequence[Tensor]:
        """Cut those that calibrate into parts that are held at a time."""
        at_once = max(1, _PIXELS_AT_ONCE // self.pixels[0, 0].numel())
        return torch.split(self.pixels[:CALIBRATION_IMAGES], at_once)


def fit_norms(
    model: nn.Module,
    norm: Norm,
    images: TrainingImages,
    report: TransferReport,
    *,
    head: str,
    groups: Mapping[str, Any],
    conversion: Conversion,
    show: ProgressBar,
    cache: Path | None = None,
) -> TransferReport:
    """Replace batch norms by group norms that reproduce them, in place, or take what came of it before.

    Args:
        model: timm's model with batch norms and their trained statistics.
        norm: gn, ln or in.
        images: Training images.
        report: What was transferred so far.
        head: Name of the classifier module.
        groups: ``num_groups`` and ``group_size`` of :func:`gn_transfer.layers.convert_norm`.
        conversion: ``calibrated``, or ``distilled``, which calibrates first.
        show: Shows how far it is.
        cache: Folder of conversions; None computes anew.

    Returns:
        The report, with what came of it.
    """
    if cache is not None:
        digest = _digest(model, images, head, [norm, dict(groups), conversion])
        place = cache / f"{digest}.safetensors"
        kept = _kept(place)
        if kept is None:
            found = fit_norms(model, norm, images, report, head=head, groups=groups, conversion=conversion, show=show)
            notes = list(found.notes[len(report.notes) :])
            _keep(place, model, head, {"groups": group_counts(model), "r2": found.r2, "notes": notes})
            return found
        state, what = kept
        convert_norm(model, norm, num_groups=what["groups"], skip={head})
        model.load_state_dict(state, strict=False)
        return replace(report, r2=what["r2"], notes=(*report.notes, *what["notes"]))
    teacher = deepcopy(model) if conversion == "distilled" else None
    replacements: list[Replacement] = []
    parts = images.parts()
    with show("calibrating the norms", len(parts)) as advance:
        batches = (_counted(images.normalized(part), advance) for part in parts)
        convert_norm(model, norm, **groups, skip={head}, calibration=batches, report=replacements)
    r2 = {found.name: round(found.r2, 4) for found in replacements if found.r2 is not None}
    notes = [*report.notes, _quality(r2)]
    if teacher is not None:
        with show("distilling", -(-DISTILLATION_SAMPLES // IMAGES_PER_STEP)) as advance:
            notes.append(_distill(model, teacher, images, advance))
    return replace(report, r2=r2, notes=tuple(notes))


def _digest(model: nn.Module, images: TrainingImages, head: str, settings: Sequence[object]) -> str:
    """Fingerprint all that a conversion depends on, the rounding of this machine's threads included."""
    said = [settings, list(images.mean), list(images.std), torch.__version__, torch.get_num_threads(), _VERSION]
    said.append(repr(model))  # strides and dilation, which no tensor shows
    digest = hashlib.sha256(json.dumps(said).encode())
    digest.update(images.pixels.numpy().tobytes())
    for name, tensor in _without_head(model, head).items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _without_head(model: nn.Module, head: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{head}.")}


def _kept(place: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a conversion; None where there is none, or it cannot be read."""
    try:
        with safe_open(place, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["conversion"])  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


def _keep(place: Path, model: nn.Module, head: str, what: Mapping[str, Any]) -> None:
    """Write a conversion, whole or not at all; a full disk costs the next run the computation."""
    state = {name: tensor.contiguous() for name, tensor in _without_head(model, head).items()}
    with suppress(OSError, SafetensorError):
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(place)
        try:
            save_file(state, partial, metadata={"conversion": json.dumps(what)})
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)


def _counted(batch: Tensor, advance: Callable[[], object]) -> Tensor:
    advance()
    return batch


def _quality(r2: Mapping[str, float]) -> str:
    worst = min(r2, key=r2.__getitem__)
    middle = statistics.median(r2.values())
    return (
        f"calibrated: {len(r2)} norms reproduce {middle:.0%} of their BN layer's variance in the median, "
        f"{r2[worst]:.0%} in the worst ({worst})"
    )


def _distill(model: nn.Module, teacher: nn.Module, images: TrainingImages, advance: Callable[[], object]) -> str:
    """Distill a calibrated model from the BN model that it came from; say what came of it."""

    def features(one: nn.Module, pixels: Tensor) -> Tensor:
        input = images.normalized(pixels).contiguous(memory_format=torch.channels_last)
        found: Tensor = one.forward_features(input)  # type: ignore[operator]
        return found

    for one in (model, teacher):
        one.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    known = dict(model.named_modules())
    stages = [str(stage["module"]) for stage in getattr(model, "feature_info", ()) if stage["module"] in known]
    began = time.monotonic()
    done = distill(
        model,
        teacher,
        images.pixels,
        samples=DISTILLATION_SAMPLES,
        features=features,
        stages=stages,
        advance=advance,
    )
    return (
        f"distilled on {done.samples:,} images in {time.monotonic() - began:.0f} s: the features' error fell from "
        f"{done.before:.0%} to {done.after:.0%} of their variance"
    )
