"""The optimizer of a run: the keys ``optimizer.*``, parameter groups, and torch's fused optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gn_transfer.config import check_range
from gn_transfer.training.schedules import SCHEDULES, Schedule

OptimizerName = Literal["sgd", "adamw", "adam"]
_LARGEST = 1000.0  # a rate or a decay above it is a typing error


@dataclass
class OptimizerConfig:
    """Optimizer, learning rates and their schedule.

    Args:
        name: sgd with momentum, adamw or adam.
        lr: Learning rate per optimizer step, of the backbone, in (0, 1000].
        head_lr: Learning rate of the new head. null takes lr.
        momentum: Momentum of sgd, first beta of adam.
        weight_decay: Decay of weights. Norms and biases are not decayed.
        layer_decay: Factor on the learning rate per layer towards the stem, in (0, 1]. 1 disables it.
        schedule: cosine to zero or constant, after the warm-up. bit is BiT's HyperRule: a tenth after 40, 60 and 80 %
            of the run (with warmup_fraction 0.2).
        warmup_fraction: Fraction of all optimizer steps in which the learning rate rises, in [0, 1).
        clip_norm: Largest norm of the gradient of an optimizer step. Larger gradients are scaled down to it. null
            disables it.
    """

    name: OptimizerName = "sgd"
    lr: float = 0.01
    head_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    schedule: Schedule = "cosine"
    warmup_fraction: float = 0.1
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        check_range("optimizer.lr", self.lr, low=0.0, high=_LARGEST, open_low=True, open_high=False)
        if self.head_lr is not None:
            check_range("optimizer.head_lr", self.head_lr, low=0.0, high=_LARGEST, open_high=False)
        check_range("optimizer.momentum", self.momentum, low=0.0, high=1.0)
        check_range("optimizer.weight_decay", self.weight_decay, low=0.0, high=_LARGEST, open_high=False)
        check_range("optimizer.layer_decay", self.layer_decay, low=0.0, high=1.0, open_low=True, open_high=False)
        check_range("optimizer.warmup_fraction", self.warmup_fraction, low=0.0, high=1.0)
        if self.clip_norm is not None:
            check_range("optimizer.clip_norm", self.clip_norm, low=0.0, open_low=True)

    def create_optimizer(
        self, model: nn.Module, head: str, depths: Mapping[str, int] | None, *, fused: bool = True
    ) -> torch.optim.Optimizer:
        """Build the optimizer of a model whose classifier module is called ``head``."""
        groups = parameter_groups(
            model.named_parameters(),
            lr=self.lr,
            head=head,
            head_lr=self.head_lr,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            depths=depths,
        )
        return create_optimizer(self.name, groups, momentum=self.momentum, fused=fused)

    def create_scheduler(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
        """Build the schedule over ``total_steps`` optimizer steps."""
        warmup_steps, scale = math.ceil(self.warmup_fraction * total_steps), SCHEDULES[self.schedule]
        return LambdaLR(optimizer, lambda step: scale(step, total_steps, warmup_steps))


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
