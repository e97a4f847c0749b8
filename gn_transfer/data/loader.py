"""Batches from a data set, fetched by threads of this process.

Reading, decoding and resizing release Python's lock, so threads keep the cores busy, and nothing is pickled, copied or
queued between processes: with batches of one image that would cost more than the image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import SimpleNamespace

import cv2
import torch
from torch import Tensor

from gn_transfer.data.dataset import ImageDataset
from gn_transfer.data.sampler import EpochSampler, Key

Batch = tuple[Tensor, Tensor]

CHUNK = 16
"""Images that are fetched at once, at least: a batch of one does not pay for a call of its own."""

_AHEAD = 2
"""Chunks per thread that are fetched before they are asked for."""


class ImageLoader:
    """Batches ``(images uint8 (B, C, H, W), targets int64 (B,))`` in a sampler's order, whatever the threads.

    Args:
        dataset: The images.
        sampler: Their order, and the size of a batch.
        num_workers: Threads that fetch ahead; 0 fetches when a batch is asked for.
        pin_memory: Page-locked memory, for copies to a CUDA device beside computation.
    """

    def __init__(self, dataset: ImageDataset, sampler: EpochSampler, *, num_workers: int, pin_memory: bool) -> None:
        self.dataset = dataset
        # Lightning sets the epoch of a sampler that it finds here. One called `sampler` it would want to replace.
        self.batch_sampler = SimpleNamespace(sampler=sampler)
        self.batch_size = sampler.batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        cv2.setNumThreads(0)  # images go over threads; those of OpenCV, within an image, would be in the way

    def __len__(self) -> int:
        return -(-len(self.batch_sampler.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        size = self.batch_size
        for images, targets in self._chunks():
            yield from zip(torch.split(images, size), torch.split(targets, size), strict=True)

    def _chunks(self) -> Iterator[Batch]:
        keys = iter(self.batch_sampler.sampler)
        size = self.batch_size * (-(-CHUNK // self.batch_size) if self.dataset.one_size else 1)
        parts = iter(lambda: list(islice(keys, size)), [])
        if self.num_workers == 0:
            yield from map(self._fetch, parts)
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="images")
        try:
            waiting: deque[Future[Batch]] = deque()
            for part in parts:
                waiting.append(pool.submit(self._fetch, part))
                if len(waiting) >= _AHEAD * self.num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _fetch(self, keys: list[Key]) -> Batch:
        images, targets = self.dataset.batch(keys)
        return (images.pin_memory(), targets.pin_memory()) if self.pin_memory else (images, targets)
