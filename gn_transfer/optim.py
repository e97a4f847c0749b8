"""Parameter groups, schedules and optimizers: pure functions of names, shapes and the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

OptimizerName = Literal["sgd", "adamw", "adam"]
ScheduleName = Literal["cosine", "constant"]


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


SCHEDULES = {"cosine": warmup_cosine, "constant": warmup_constant}


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


def create_optimizer(name: OptimizerName, groups: list[dict[str, Any]], *, momentum: float) -> torch.optim.Optimizer:
    """Build an optimizer in torch's fused form, which at batch size 1 saves a good part of the step.

    Args:
        name: ``sgd`` (with momentum, not Nesterov's), ``adamw`` or ``adam``.
        groups: See :func:`parameter_groups`.
        momentum: Momentum of SGD, and the first beta of Adam; the second stays 0.999.

    Returns:
        The optimizer, fused where torch has a fused kernel for the parameters' device.
    """
    device = groups[0]["params"][0].device.type
    fused = device in ("cpu", "cuda", "xpu", "mps")
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, fused=fused)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(groups, betas=(momentum, 0.999), fused=fused)
