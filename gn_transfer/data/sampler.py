"""The order of an epoch as a function of (seed, epoch), and where in it to go on."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from torch.utils.data import Sampler

Key: TypeAlias = tuple[int, int]
"""What a data set is asked for: ``(epoch, index)``; an image's random parameters come from (seed, epoch, index)."""


class EpochSampler(Sampler[Key]):
    """Yield keys ``(epoch, index)`` in an order that depends on (seed, epoch) alone.

    With several ranks the order is dealt out in turn (rank r gets positions r, r + world_size, ...); its beginning
    is repeated at the end until all ranks have equally many. A single process sees every image once.

    Args:
        num_samples: Size of the data set.
        batch_size: Images per batch and rank; the unit that :meth:`resume_at` skips.
        seed: Seed of the order, >= 0.
        shuffle: False gives 0, 1, 2, ... in every epoch.
        rank: This process, 0 <= rank < world_size.
        world_size: Number of processes that share the data set.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        assert num_samples > 0, "an empty split is refused before it gets here"
        assert batch_size > 0
        assert 0 <= rank < world_size
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._resume: tuple[int, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Lightning calls it before each."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batch: int) -> None:
        """Go on within an epoch: its next iteration leaves out the batches that are done.

        Call it before the loader is iterated, with ``batch=0`` too: on a restart Lightning creates the loader's
        iterator before it calls :meth:`set_epoch`, so workers would fetch the first images of epoch 0.

        An iterator that is created and dropped does not use the skip up; one that runs to its end does. The length
        stays that of the whole epoch.

        Args:
            epoch: The epoch to go on with.
            batch: How many of its batches are done.
        """
        assert epoch >= 0
        assert 0 <= batch * self.batch_size <= len(self) + self.batch_size
        self.epoch = epoch
        self._resume = (epoch, batch)

    def __len__(self) -> int:
        return -(-self.num_samples // self.world_size)

    def __iter__(self) -> Iterator[Key]:
        epoch = self.epoch
        resumed = self._resume if self._resume is not None and self._resume[0] == epoch else None
        first = resumed[1] * self.batch_size if resumed is not None else 0
        for index in epoch_order(self.num_samples, self.seed, epoch, self.shuffle, self.rank, self.world_size)[first:]:
            yield epoch, index
        if resumed is not None and self._resume is resumed:
            self._resume = None


def epoch_order(
    num_samples: int, seed: int, epoch: int, shuffle: bool, rank: int = 0, world_size: int = 1
) -> list[int]:
    """List the indices that one rank sees in one epoch.

    Args:
        num_samples: Size of the data set.
        seed: Seed of the order.
        epoch: Number of the epoch.
        shuffle: False gives ascending indices.
        rank: This process.
        world_size: Number of processes.

    Returns:
        ``ceil(num_samples / world_size)`` indices.

    Example:
        >>> epoch_order(5, seed=0, epoch=0, shuffle=False, rank=1, world_size=2)
        [1, 3, 0]
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_samples) if shuffle else np.arange(num_samples)
    padded = np.resize(order, -(-num_samples // world_size) * world_size)  # repeats from the beginning
    return [int(index) for index in padded[rank::world_size]]


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Derive the seed of one image's random parameters: a function of (seed, epoch, index).

    Args:
        seed: Seed of the run, >= 0.
        epoch: Number of the epoch.
        index: Number of the image.

    Returns:
        A number below 2**32, well spread over its range.

    Example:
        >>> sample_seed(0, 0, 1) != sample_seed(0, 1, 0)
        True
    """
    packed = struct.pack("<QQQ", seed, epoch, index)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little")
