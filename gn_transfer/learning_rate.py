"""A learning-rate range test that counts optimizer steps, for ``fit --lr_find``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor

from gn_transfer.classifier import TransferClassifier
from gn_transfer.data import PictureData
from gn_transfer.layers import OncePerWindow
from gn_transfer.optim import create_optimizer

LOWEST, HIGHEST, STEPS = 1e-5, 1.0, 80
SMOOTHING = 0.8


def range_test(
    model: TransferClassifier, data: PictureData, *, micro_batches: int, precision: str, device: torch.device
) -> list[tuple[float, float]]:
    """Train a copy of the net for some optimizer steps while the learning rate rises; the model stays as it is.

    Every step is a whole window of accumulated micro-batches, and its loss the mean over all pictures of the window:
    at batch size 1 the loss of a single micro-batch says nothing. Source: Smith 2015, arXiv:1506.01186.

    Args:
        model: The model, built.
        data: Set up for fitting.
        micro_batches: Micro-batches per optimizer step.
        precision: Lightning's name of the precision.
        device: Where to train.

    Returns:
        Learning rate (of the backbone; others keep their ratio to it) and loss per optimizer step, until the loss is
        four times its lowest or no longer finite.
    """
    assert model.net is not None
    memory_format = model.memory_format(device.type, data.batch_size)
    net = deepcopy(model.net).to(device).train().to(memory_format=memory_format)  # type: ignore[call-overload]
    groups = model.parameter_groups(net)
    bases = [group["lr"] / model.lr for group in groups]
    optimizer = create_optimizer(model.optimizer_name, groups, momentum=model.momentum)
    engine = OncePerWindow(net) if model.once_per_window else None
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.bfloat16}.get(precision)
    mean, std = model.mean.to(device), model.std.to(device)
    weight = None if model.class_weight is None else model.class_weight.to(device)
    batches, tested, lowest = _endless(data), [], math.inf
    for step in range(STEPS):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = rate * base
        optimizer.zero_grad()
        total = 0.0
        for index in range(micro_batches):
            images, targets = next(batches)
            if engine is not None:
                engine.micro_batch(first=index == 0, last=index == micro_batches - 1)
            pixels = ((images.to(device).float() - mean) / std).contiguous(memory_format=memory_format)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                logits = net(pixels)
            loss = torch.nn.functional.cross_entropy(
                logits.float(), targets.to(device), weight=weight, label_smoothing=model.label_smoothing
            )
            (loss / micro_batches).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach()) / micro_batches
        optimizer.step()
        if not math.isfinite(total):
            break
        tested.append((rate, total))
        lowest = min(lowest, smooth([loss for _, loss in tested])[-1])
        if smooth([loss for _, loss in tested])[-1] > 4 * lowest:
            break
    return tested


def smooth(losses: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Average losses exponentially, without the bias towards zero at the start.

    Args:
        losses: One per step.
        weight: Of what came before, in [0, 1).

    Returns:
        As many values.

    Example:
        >>> smooth([2.0, 2.0, 2.0])
        [2.0, 2.0, 2.0]
    """
    smoothed, mean = [], 0.0
    for count, loss in enumerate(losses, 1):
        mean = weight * mean + (1 - weight) * loss
        smoothed.append(round(mean / (1 - weight**count), 12))
    return smoothed


def suggest(tested: Sequence[tuple[float, float]]) -> float | None:
    """Choose the learning rate at which the smoothed loss falls fastest per factor of the rate.

    Args:
        tested: Learning rates, rising by equal factors, and losses.

    Returns:
        The rate, to two digits; None where the loss never fell.

    Example:
        >>> suggest([(10.0**power, loss) for power, loss in zip(range(-5, 0), (2.0, 1.9, 1.0, 0.9, 3.0))])
        0.001
    """
    losses = smooth([loss for _, loss in tested])
    slopes = [after - before for before, after in pairwise(losses)]
    if not slopes or min(slopes) >= 0:
        return None
    return float(f"{tested[slopes.index(min(slopes)) + 1][0]:.2g}")


def _endless(data: PictureData) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        data.train_sampler.set_epoch(epoch)
        yield from data.train_dataloader()
        epoch += 1
