"""Measure what batch norms do to a model at a batch size, on images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gn_transfer.config import ConfigError
from gn_transfer.layers.batch_norm import FrozenBatchNorm2d, batch_statistics, inputs_of, normalize_by_batch
from gn_transfer.layers.diagnosis import BatchNormLayer, Diagnosis, judge

Loss: TypeAlias = Callable[[Any, Tensor | None], Tensor]
"""From the model's output and the targets to a scalar, a mean over the images."""

_IMAGES, _GRADIENT_IMAGES = 64, 16  # at least so many, where there are so many, and twice the batch


def diagnose(model: nn.Module, batches: Iterable[Any], *, batch_size: int = 1, loss: Loss | None = None) -> Diagnosis:
    """Tell what the batch norms of a model do at a batch size. The model is as it was afterwards.

    Measured are the layers that use statistics of their batch and how many values these come from; the running
    statistics against those of the images; outputs and accuracy in training mode against evaluation mode; and how far
    the gradient depends on the size of the batch. Everything but the batch norms (dropout) is in evaluation mode.

    Args:
        model: Any model that takes images ``(B, C, H, W)``. Of its output the first tensor counts.
        batches: Inputs as the model takes them, all of one size, or ``(inputs, targets)`` as data loaders give them;
            as many are taken as are needed: 64 images, or two batches.
        batch_size: Images per forward pass to ask about, at least 1.
        loss: What is trained; None is the cross entropy where targets are class numbers; without targets, images
            are of all classes by turns.

    Returns:
        What was found, and what to do.

    Raises:
        ConfigError: Fewer than two images, images of different sizes, or a batch size that cannot be.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> found = diagnose(model, [torch.randn(16, 3, 8, 8)], batch_size=1)
        >>> found.layers[0].uses_batch, found.layers[0].values_per_channel
        (True, 36)
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is out of range; use a number of 1 or more.")
    images, targets = _gather(batches, max(_IMAGES, 2 * batch_size))
    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    with _evaluating(model):
        layers = _describe(norms, model, images, batch_size)
        crashing = [layer for layer in layers if layer.uses_batch and layer.values_per_channel == 1]
        running = _outputs(model, images, batch_size)
        accuracy = _accuracies({"running": running}, targets)
        output_difference = gradient_angle = None
        if any(layer.uses_batch for layer in layers) and not crashing:
            with batch_statistics(model):
                batch, whole = _outputs(model, images, batch_size), _outputs(model, images, len(images))
                gradient_angle = _gradient_angle(model, images, targets, batch_size, loss)
            output_difference = _distance(batch, running)
            accuracy = _accuracies({"running": running, "batch": batch, "images": whole}, targets)
    found = Diagnosis(batch_size, len(images), layers, output_difference, gradient_angle, accuracy)
    undone = [name for name, layer in norms.items() if model.training and not layer.training and _uses_batch(layer)]
    return replace(found, findings=tuple(judge(found, crashing, undone)))


def _gather(batches: Iterable[Any], number: int) -> tuple[Tensor, Tensor | None]:
    """Take the first images, and their targets where there are some for all."""
    images: list[Tensor] = []
    targets: list[Tensor] = []
    count = 0
    for batch in batches:
        inputs = inputs_of(batch)
        if not isinstance(inputs, Tensor) or inputs.ndim != 4:
            raise ConfigError(
                "diagnose takes images of one size as tensors (B, C, H, W); of a detector, diagnose the backbone."
            )
        if images and inputs.shape[1:] != images[0].shape[1:]:
            raise ConfigError("diagnose takes images of one size; resize or crop them.")
        images.append(inputs)
        if inputs is not batch and len(batch) > 1 and isinstance(batch[1], Tensor) and len(batch[1]) == len(inputs):
            targets.append(batch[1])
        count += len(inputs)
        if count >= number:
            break
    if count < 2:
        raise ConfigError(f"diagnose needs two images at least, and got {count}.")
    order = torch.randperm(min(count, number), generator=torch.Generator().manual_seed(0))  # not sorted by class
    together = torch.cat(targets)[:number][order] if len(targets) == len(images) else None
    return torch.cat(images)[:number][order], together


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _uses_batch(layer: _BatchNorm) -> bool:
    return not isinstance(layer, FrozenBatchNorm2d)


def _describe(
    norms: dict[str, _BatchNorm], model: nn.Module, images: Tensor, batch_size: int
) -> tuple[BatchNormLayer, ...]:
    """Run all images as one batch, every norm by the statistics of that batch, and compare with the running ones.

    So the input of a layer does not depend on what is wrong in the layers before it.
    """
    values: dict[str, int] = {}
    noise: dict[str, float | None] = {}
    shifts: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, _BatchNorm)
            flat = inputs[0].detach().transpose(0, 1).flatten(1).double()
            values[name] = flat.shape[1] // len(images) * batch_size
            mean, variance = flat.mean(1), flat.var(1) + layer.eps
            of_images = inputs[0].detach().double().flatten(2).mean(2) if inputs[0].ndim > 2 else inputs[0].double()
            noise[name] = _batch_noise(of_images, mean, variance, batch_size)
            if layer.running_mean is not None and layer.running_var is not None:
                shift = ((layer.running_mean - mean) / variance.sqrt()).square().mean().sqrt()
                factor = ((layer.running_var + layer.eps) / variance).log().square().mean().sqrt().exp()
                shifts[name] = float(shift), float(factor)

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in norms.items()]
    frozen = [layer for layer in norms.values() if not _uses_batch(layer)]
    try:
        for layer in frozen:
            layer.forward = partial(normalize_by_batch, layer)  # type: ignore[method-assign]
        with batch_statistics(model) if len(frozen) < len(norms) else _evaluating(model), torch.no_grad():
            model(images)
    finally:
        for layer in frozen:
            del layer.forward
        for each in hooks:
            each.remove()
    return tuple(
        BatchNormLayer(
            name,
            type(layer).__name__,
            layer.num_features,
            uses_batch=_uses_batch(layer),
            affine_frozen=layer.weight is not None and not layer.weight.requires_grad,
            values_per_channel=values[name],
            averaged_images=None if not layer.momentum else batch_size * (2 - layer.momentum) / layer.momentum,
            batch_noise=noise[name],
            mean_shift=shifts[name][0] if name in shifts else None,
            variance_factor=shifts[name][1] if name in shifts else None,
        )
        for name, layer in norms.items()
        if name in values
    )


def _batch_noise(of_images: Tensor, mean: Tensor, variance: Tensor, batch_size: int) -> float | None:
    """Tell how far the mean of a batch is from that of all images, in standard deviations.

    Args:
        of_images: Mean of every image, shape ``(N, C)``.
        mean: Of all images, shape ``(C,)``.
        variance: Likewise.
        batch_size: Images of a batch.
    """
    number = len(of_images) // batch_size
    if number < 2:
        return None
    of_batches = of_images[: number * batch_size].reshape(number, batch_size, -1).mean(1)
    # The images of a batch are among all images, which brings the means nearer.
    share = 1 - batch_size / len(of_images)
    return float(((of_batches - mean).square() / variance).mean().div(share).sqrt())


def _outputs(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([_tensor_of(model(part)).float() for part in torch.split(images, batch_size)])


def _tensor_of(output: Any) -> Tensor:
    """Take the first tensor of an output: a tensor, or a mapping or sequence that holds some."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if hasattr(output, "values") else output
    return _tensor_of(next(iter(parts)))


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """How far outputs are apart, as a share of what those of different images differ by."""
    spread = (theirs - theirs.mean(0, keepdim=True)).norm()
    return float((ours - theirs).norm() / spread.clamp_min(1e-12))


def _accuracies(outputs: dict[str, Tensor], targets: Tensor | None) -> dict[str, float]:
    if targets is None or any(not _are_classes(targets, output) for output in outputs.values()):
        return {}
    return {key: float((output.argmax(1) == targets).float().mean()) for key, output in outputs.items()}


def _are_classes(targets: Tensor, output: Tensor) -> bool:
    return not targets.is_floating_point() and output.ndim == targets.ndim + 1 and output.shape[2:] == targets.shape[1:]


def _gradient_angle(
    model: nn.Module, images: Tensor, targets: Tensor | None, batch_size: int, loss: Loss | None
) -> float | None:
    """Tell the angle between the gradient of some images in batches and that of the same images at once."""
    number = min(max(_GRADIENT_IMAGES, 2 * batch_size), len(images)) // batch_size * batch_size
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if number < 2 * batch_size or not parameters:
        return None

    def gradient(size: int) -> Tensor:
        total = torch.zeros(sum(parameter.numel() for parameter in parameters), device=images.device)
        for part in torch.split(torch.arange(number, device=images.device), size):
            own = None if targets is None else targets[part]
            with torch.enable_grad():
                output = model(images[part])
                value = _default_loss(output, own, part) if loss is None else loss(output, own)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            pairs = zip(found, parameters, strict=True)
            total += torch.cat([(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in pairs]) * size
        return total / number

    cosine = F.cosine_similarity(gradient(batch_size), gradient(number), dim=0).clamp(-1, 1)
    return math.degrees(math.acos(float(cosine)))


def _default_loss(output: Any, targets: Tensor | None, numbers: Tensor) -> Tensor:
    """Compute the cross entropy; without targets that are classes of the output, images are of all classes by turns."""
    found = _tensor_of(output).float()
    if targets is not None and _are_classes(targets, found):
        return F.cross_entropy(found, targets)
    if found.ndim < 2 or found.shape[1] < 2:
        return (found.flatten(1).mean(1) * (1 - 2 * (numbers % 2))).mean()
    classes = (numbers % found.shape[1]).view(-1, *[1] * (found.ndim - 2)).expand(-1, *found.shape[2:])
    return F.cross_entropy(found, classes)
