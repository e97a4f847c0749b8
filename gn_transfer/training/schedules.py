"""Learning rate schedules: pure functions of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["cosine", "constant", "bit"]


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
    images: 500, with a warm-up of 100 and drops at 200, 300, 400. As parts of the run it is the same in samples,
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

    Source: Kolesnikov et al. 2019, arXiv:1912.11370: 500 steps of 512 images below 20,000 images, 10,000 steps
    below 500,000, 20,000 steps from there.

    Args:
        num_images: Training images.

    Returns:
        Images seen in training, with repetitions.

    Example:
        >>> bit_samples(3_680), bit_samples(20_000), bit_samples(1_281_167)
        (256000, 5120000, 10240000)
    """
    steps = 500 if num_images < 20_000 else 10_000 if num_images < 500_000 else 20_000
    return steps * 512


SCHEDULES: dict[Schedule, Callable[[int, int, int], float]] = {
    "cosine": warmup_cosine,
    "constant": warmup_constant,
    "bit": warmup_staircase,
}
