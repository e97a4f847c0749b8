"""Batches from a data set, several of them at a time, so that a batch of one costs no trip to a worker of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import cv2
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from gn_transfer.data.dataset import PictureDataset
from gn_transfer.data.sampler import EpochSampler, Key

Batch = tuple[Tensor, Tensor]

CHUNK = 16
"""Pictures that a worker hands over at once, at least: 2.4 MB at 224 px, so that 8 workers with two chunks each fit
into the 64 MiB of shared memory that a container has."""


class PictureLoader(DataLoader[Batch]):
    """Batches ``(images uint8 (B, C, H, W), targets int64 (B,))`` in a sampler's order.

    A chunk of at least :data:`CHUNK` pictures is fetched and handed over at once, and cut into batches here.

    Args:
        dataset: The pictures.
        sampler: Their order, and the size of a batch.
        num_workers: Data worker processes; 0 fetches here.
        pin_memory: Page-locked memory, for copies to a CUDA device beside computation.
    """

    def __init__(self, dataset: PictureDataset, sampler: EpochSampler, *, num_workers: int, pin_memory: bool) -> None:
        self.sampler_batch_size = sampler.batch_size
        cv2.setNumThreads(0)  # pictures go in parallel over workers, not each over threads that compete with torch's
        batches = -(-CHUNK // sampler.batch_size)
        super().__init__(
            _Chunks(dataset),
            batch_sampler=BatchSampler(cast(Any, sampler), sampler.batch_size * batches, drop_last=False),
            num_workers=num_workers,
            collate_fn=_as_is,
            worker_init_fn=init_worker,
            persistent_workers=num_workers > 0,
            prefetch_factor=2 if num_workers > 0 else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # of its own: torch's global one belongs to the net
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        size = self.sampler_batch_size
        for images, targets in super().__iter__():
            yield from zip(images.split(size), targets.split(size), strict=True)

    def __len__(self) -> int:
        sampler: EpochSampler = self.batch_sampler.sampler  # type: ignore[union-attr]
        return -(-len(sampler) // self.sampler_batch_size)


class _Chunks(Dataset[Batch]):
    """A data set that answers to many keys with one batch."""

    def __init__(self, dataset: PictureDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> Batch:
        return self.dataset.batch(keys)


def init_worker(worker_id: int) -> None:
    """Keep OpenCV to one thread in a data worker: its pool does not survive a fork, and the cores are spoken for."""
    cv2.setNumThreads(0)


def _as_is(batch: Any) -> Any:
    return batch
