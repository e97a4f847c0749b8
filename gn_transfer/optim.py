"""Parameter groups, schedules and optimizers: pure functions of names, shapes and the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

OptimizerName = Literal["sgd", "adamw", "adam"]
ScheduleName = Literal["cosine", "constant", "bit"]


def warmup_cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    r"""Scale of the learning rate: linear from 1/warmup to 1, then half a cosine to 0.

    .. math:: (s + 1) / w \text{ for } s < w, \qquad \tfrac12 (1 + \cos(\pi (s - w) / (T - w))) \text{ after}

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983 (without restarts).

    Args:
        step: Optimizer steps taken so far, from 0.
        total_steps: Optimizer steps of the whole run, at least 1.
        warmup_steps: Steps of the linear rise; 0 disables it.

    Returns:
        Factor in [0, 1].

    Example:
        >>> [round(warmup_cosine(step, 6, 2), 3) for step in range(7)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def warmup_constant(step: int, total_steps: int, warmup_steps: int) -> float:
    """Scale of the learning rate: the same warm-up as :func:`warmup_cosine`, then 1.

    Args:
        step: Optimizer steps taken so far, from 0.
        total_steps: Not used; the same signature as the other schedules.
        warmup_steps: Steps of the linear rise; 0 disables it.

    Returns:
        Factor in (0, 1].
    """
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def warmup_staircase(step: int, total_steps: int, warmup_steps: int) -> float:
    """Scale of the learning rate in BiT's HyperRule: warm-up, then a tenth after 40, 60 and 80 % of the run.

    Source: Kolesnikov et al. 2019, arXiv:1912.11370, which states it for its smallest data sets in steps of 512
    pictures: 500, with a warm-up of 100 and drops at 200, 300, 400. As parts of the run it is the same in samples,
    whatever the batch; :func:`bit_samples` says how many samples the rule wants.

    Args:
        step: Optimizer steps taken so far, from 0.
        total_steps: Optimizer steps of the whole run, at least 1.
        warmup_steps: Steps of the linear rise; the rule's own are a fifth of the run.

    Returns:
        Factor in (0, 1].

    Example:
        >>> [warmup_staircase(step, 500, 100) for step in (0, 99, 199)]
        [0.01, 1.0, 1.0]
        >>> [round(warmup_staircase(step, 500, 100), 4) for step in (200, 300, 400)]
        [0.1, 0.01, 0.001]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    drops = sum(step * 5 >= part * total_steps for part in (2, 3, 4))
    return float(0.1**drops)


def bit_samples(num_images: int) -> int:
    """Number of samples that BiT's HyperRule trains with, by the size of the data set.

    Source: Kolesnikov et al. 2019, arXiv:1912.11370: 500 steps of 512 pictures below 20,000 pictures, 10,000 steps
    below 500,000, 20,000 steps from there.

    Args:
        num_images: Training pictures.

    Returns:
        Pictures seen in training, with repetitions.

    Example:
        >>> bit_samples(3_680), bit_samples(20_000), bit_samples(1_281_167)
        (256000, 5120000, 10240000)
    """
    steps = 500 if num_images < 20_000 else 10_000 if num_images < 500_000 else 20_000
    return steps * 512


SCHEDULES = {"cosine": warmup_cosine, "constant": warmup_constant, "bit": warmup_staircase}


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    head: str,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    depths: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Sort parameters into groups of equal learning rate and weight decay; frozen ones are left out.

    Norm weights and biases (every tensor of at most one dimension) are not decayed. A layer at depth ``d`` of ``D``
    learns at ``lr * layer_decay ** (D - d)`` (Clark et al. 2020, arXiv:2003.10555).

    Args:
        parameters: Names and parameters, as ``named_parameters()`` gives them.
        lr: Learning rate of the deepest layer of the backbone.
        head: Name of the classifier module.
        head_lr: Learning rate of the head; ``None`` takes ``lr``.
        weight_decay: Decay of weights of two dimensions and more.
        layer_decay: Factor per layer towards the stem, in (0, 1]; 1 disables it.
        depths: Parameter name to depth, 0 for the stem; needed where ``layer_decay`` is below 1.

    Returns:
        Groups in the order of first appearance, each with ``params``, ``lr``, ``weight_decay`` and ``name``.
    """
    depths = depths or {}
    deepest = max((depth for name, depth in depths.items() if not name.startswith(f"{head}.")), default=0)
    groups: dict[tuple[bool, float, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        in_head = name.startswith(f"{head}.")
        if in_head:
            rate = lr if head_lr is None else head_lr
        else:
            rate = lr * layer_decay ** (deepest - depths.get(name, deepest))
        decay = weight_decay if parameter.ndim > 1 else 0.0
        label = f"{'head' if in_head else 'backbone'}/{'decay' if decay else 'no_decay'}"
        group = groups.setdefault(
            (in_head, rate, decay), {"params": [], "lr": rate, "weight_decay": decay, "name": label}
        )
        group["params"].append(parameter)
    return list(groups.values())


def create_optimizer(
    name: OptimizerName, groups: list[dict[str, Any]], *, momentum: float, fused: bool = True
) -> torch.optim.Optimizer:
    """Build an optimizer in torch's fused form, which at batch size 1 saves a good part of the step.

    Args:
        name: ``sgd`` (with momentum, not Nesterov's), ``adamw`` or ``adam``.
        groups: See :func:`parameter_groups`.
        momentum: Momentum of SGD, and the first beta of Adam; the second stays 0.999.
        fused: False: unscaled fp16 gradients must be seen before the step, which fused optimizers unscale inside it.

    Returns:
        The optimizer, fused where torch has a fused kernel for the parameters' device.
    """
    device = groups[0]["params"][0].device.type
    fused = fused and device in ("cpu", "cuda", "xpu", "mps")
    optimizer: torch.optim.Optimizer
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=momentum, fused=fused)
    else:
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        optimizer = kind(groups, betas=(momentum, 0.999), fused=fused)
    optimizer.register_load_state_dict_post_hook(_lay_out_like_parameters)
    return optimizer


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded state the memory layout of its parameters: fused kernels pair them by place in memory, unchecked."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
