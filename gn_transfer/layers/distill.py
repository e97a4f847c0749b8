"""Distillation without labels: train a converted model until it gives the features of the model that it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gn_transfer.config import ConfigError

_PIXELS = 8 * 64 * 64  # at a time
_WARMUP_STEPS = 5

IMAGES_PER_STEP = 8
"""Images per optimizer step of a distillation."""


@dataclass(frozen=True)
class Distillation:
    """What a distillation did.

    Attributes:
        samples: Images that were trained on, with repetitions.
        before: Squared error of the features, as a share of their variance, over the first eighth of the steps.
        after: The same over the last eighth.
    """

    samples: int
    before: float
    after: float


def distill(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    *,
    samples: int,
    features: Callable[[nn.Module, Tensor], Tensor],
    stages: Sequence[str] = (),
    lr: float = 3e-4,
    images_per_step: int = IMAGES_PER_STEP,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> Distillation:
    r"""Train a model to give the features of another one; no labels are used.

    .. math:: \sum_l \mathrm{mean}\,(s_l - t_l)^2 / \mathrm{Var}(t_l)

    is minimized by Adam over the final features and the outputs of ``stages``, where ``t`` are the teacher's (Romero
    et al. 2015, arXiv:1412.6550). The learning rate falls as a cosine. Half of the images are flipped. Both models
    run in evaluation mode: their norms must not depend on the batch.

    Args:
        student: The model to train, in place. Parameters that do not reach the features stay as they are.
        teacher: The model to follow; it stays as it is.
        images: Inputs of the models, float32 ``(N, C, H, W)``, or uint8 where ``features`` takes them.
        samples: Images to train on, >= 1; with more than N, they are repeated.
        features: Computes the final features of a model.
        stages: Names of modules, which both models have, whose outputs are to agree as well.
        lr: Greatest learning rate.
        images_per_step: Images per optimizer step.
        seed: Seed of order and flips.
        advance: Called after every optimizer step.

    Returns:
        The error before and after.

    Raises:
        ConfigError: No images, or features that are not finite.
    """
    if samples < 1 or len(images) < 1:
        raise ConfigError(f"distillation needs images; got {len(images)} images and samples={samples}.")
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-samples // len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(rounds)])[:samples]
    modes = {layer: layer.training for model in (student, teacher) for layer in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in student.parameters()}
    taps = [_Taps(model, stages) for model in (student, teacher)]
    optimizer = torch.optim.Adam(student.requires_grad_(True).parameters(), lr=lr)
    steps = torch.split(order, images_per_step)
    errors = []
    student.eval(), teacher.eval()
    try:
        with torch.enable_grad():
            for number, chosen in enumerate(steps):
                optimizer.param_groups[0]["lr"] = lr * _schedule(number, len(steps))
                error = 0.0
                for part in torch.split(chosen, max(1, _PIXELS // images[0, 0].numel())):
                    batch = images[part]
                    flip = torch.rand(len(part), generator=generator) < 0.5
                    batch = torch.where(flip.view(-1, 1, 1, 1), batch.flip(3), batch)
                    with torch.no_grad():
                        targets = [features(teacher, batch), *taps[1].outputs()]
                    found = [features(student, batch), *taps[0].outputs()]
                    losses = [_relative_error(s, t) for s, t in zip(found, targets, strict=True)]
                    weight = len(part) / len(chosen)
                    (torch.stack(losses).sum() * weight).backward()  # type: ignore[no-untyped-call]
                    error += losses[0].item() * weight
                if not math.isfinite(error):
                    raise ConfigError("the distillation met features that are not finite; use other images.")
                optimizer.step()
                optimizer.zero_grad()
                errors.append(error)
                advance()
    finally:
        for tap in taps:
            tap.remove()
        for layer, training in modes.items():
            layer.training = training
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
    some = max(1, len(errors) // 8)
    return Distillation(samples, sum(errors[:some]) / some, sum(errors[-some:]) / some)


class _Taps:
    """Keeps the outputs of named modules of the latest forward pass."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._outputs: dict[str, Tensor] = {}
        self._handles = [model.get_submodule(name).register_forward_hook(self._keep(name)) for name in names]

    def _keep(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(_: nn.Module, inputs: object, output: Tensor) -> None:
            self._outputs[name] = output

        return keep

    def outputs(self) -> list[Tensor]:
        """Give the outputs in the order in which they were computed, and let go of them."""
        found = list(self._outputs.values())
        self._outputs.clear()
        return found

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()


def _relative_error(found: Tensor, target: Tensor) -> Tensor:
    return (found.float() - target.float()).square().mean() / target.float().var().clamp_min(1e-12)


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
