"""Mixup and CutMix along the accumulation step, so that they mean something at batch size 1.

The images of an accumulation step form one sequence, whatever the micro-batch: each is mixed with the previous image,
the first one is not mixed. So (1 x 32) and (32 x 1) train on the same mixtures, and nothing is carried from one
accumulation step to the next. A checkpoint stands between two steps, so it has nothing to store.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_PURPOSE = 77  # keeps this random stream apart from others of the same seed


class Mixed(NamedTuple):
    """A mixed micro-batch.

    Attributes:
        pixels: Shape ``(B, C, H, W)``.
        partners: Targets of the images mixed in, int64 ``(B,)``.
        weights: Weight of the images' own targets, ``(B,)``; 1 where nothing was mixed in.
    """

    pixels: Tensor
    partners: Tensor
    weights: Tensor


class Mixture(NamedTuple):
    """How one image is mixed with the previous one.

    Attributes:
        weight: Weight of the image itself.
        box: Top, left, bottom, right of what is pasted from the previous image (CutMix); None blends (Mixup).
    """

    weight: float
    box: tuple[int, int, int, int] | None = None


class MixupCutmix:
    """Mix each image with the previous one of its accumulation step.

    Mixup: Zhang et al. 2017, arXiv:1710.09412; CutMix: Yun et al. 2019, arXiv:1905.04899. With both, each image gets
    one of them with probability 1/2.

    Args:
        mixup: alpha of Mixup's Beta(alpha, alpha), >= 0; 0 disables it.
        cutmix: alpha of CutMix's, >= 0; 0 disables it.
        seed: Seed and rank of this process.
    """

    def __init__(self, mixup: float, cutmix: float, seed: tuple[int, int]) -> None:
        assert mixup > 0 or cutmix > 0
        self.mixup = mixup
        self.cutmix = cutmix
        self.seed = seed
        self._before: tuple[Tensor, Tensor] | None = None

    def __call__(self, pixels: Tensor, targets: Tensor, *, step: int, offset: int) -> Mixed:
        """Mix a micro-batch.

        Args:
            pixels: Normalized images, ``(B, C, H, W)``, floating point.
            targets: Class indices, ``(B,)``.
            step: Number of the accumulation step since the run began.
            offset: Images of the accumulation step before this micro-batch.

        Returns:
            The mixture; the input is not changed.
        """
        if offset == 0:
            self._before = pixels[:1], targets[:1]
        assert self._before is not None, "an accumulation step begins with offset 0"
        others = torch.cat([self._before[0], pixels[:-1]])
        partners = torch.cat([self._before[1], targets[:-1]])
        self._before = pixels[-1:].clone(), targets[-1:]
        mixed, weights = pixels.clone(), []
        for place in range(len(pixels)):
            mixture = self._random_mixture(step, offset + place, pixels.shape[2], pixels.shape[3])
            weights.append(mixture.weight)
            if mixture.box is None:
                mixed[place].lerp_(others[place], 1.0 - mixture.weight)
            else:
                top, left, bottom, right = mixture.box
                mixed[place, :, top:bottom, left:right] = others[place, :, top:bottom, left:right]
        return Mixed(mixed, partners, torch.tensor(weights, dtype=pixels.dtype, device=pixels.device))

    def _random_mixture(self, step: int, position: int, height: int, width: int) -> Mixture:
        if position == 0:
            return Mixture(1.0)
        generator = np.random.default_rng([*self.seed, step, position, _PURPOSE])
        cut = self.cutmix > 0 and (self.mixup == 0 or generator.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        weight = float(generator.beta(alpha, alpha))
        return cut_box(weight, generator.random(), generator.random(), height, width) if cut else Mixture(weight)


def cut_box(weight: float, u_top: float, u_left: float, height: int, width: int) -> Mixture:
    """Place CutMix's box: its centre is uniform, what lies outside is cut off, the weight is corrected for that.

    Args:
        weight: Weight that the image itself keeps, before the correction.
        u_top: Random number in [0, 1) for the centre's row.
        u_left: Number in [0, 1) for its column.
        height: Of the image, in pixels.
        width: Likewise.

    Example:
        >>> cut_box(0.75, 0.5, 0.0, 100, 100)
        Mixture(weight=0.875, box=(25, 0, 75, 25))
    """
    share = (1.0 - weight) ** 0.5
    half_height, half_width = round(height * share) // 2, round(width * share) // 2
    row, column = int(u_top * height), int(u_left * width)
    top, bottom = max(0, row - half_height), min(height, row + half_height)
    left, right = max(0, column - half_width), min(width, column + half_width)
    return Mixture(1.0 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))
