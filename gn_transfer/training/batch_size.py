"""The micro-batch, chosen by measurement.

A norm that does not look at the batch gives the same gradient for 1 x 16, 4 x 4 and 16 x 1 images up to rounding, so
that ``data.batch_size`` is a matter of speed and memory alone. Under batch norm each of them trains another model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gn_transfer.config import ConfigError, Norm, is_out_of_memory
from gn_transfer.data import ImageDataModule
from gn_transfer.data.free_memory import available_ram_bytes, resident_bytes
from gn_transfer.training.accumulation import GradientAccumulation
from gn_transfer.training.progress import reset_peak_memory
from gn_transfer.training.step_cost import StepCost, measure_step
from gn_transfer.training.task import TransferTask

_RESERVE = 0.1
"""Share of the memory that is left free, for what is not foreseen."""

_WORTH = 1.03
"""A larger micro-batch has to be so many times as fast as a smaller one."""

_SLOWER = 2
"""After so many candidates in a row that are no faster, larger ones are not measured."""


@dataclass(frozen=True)
class Candidate:
    """A micro-batch that was looked at.

    Attributes:
        batch_size: Images per forward pass.
        cost: What it costs; None where it does not fit into memory.
        needed_mib: The peak memory that was measured, or that was foreseen for what does not fit.
    """

    batch_size: int
    cost: StepCost | None
    needed_mib: float

    @property
    def images_per_sec(self) -> float:
        """Images trained per second, without the optimizer's update, which costs each of them the same."""
        return 0.0 if self.cost is None else self.batch_size / self.cost.seconds


@dataclass(frozen=True)
class BatchSizeChoice:
    """What was measured, and the choice.

    Attributes:
        candidates: In ascending order.
        limit_mib: Memory that the training may take; infinite where the system does not say.
        over_batch: The norm that takes statistics from the batch; None without one.
    """

    candidates: list[Candidate]
    limit_mib: float
    over_batch: Norm | None

    @property
    def chosen(self) -> Candidate:
        """The smallest that is as good as the fastest; the smallest of all where none fits."""
        fastest = max(candidate.images_per_sec for candidate in self.candidates)
        return next(c for c in self.candidates if c.images_per_sec * _WORTH >= fastest)

    def rows(self) -> list[tuple[str, str]]:
        """Lines for the plan."""
        return [("" if number else "batches", self._row(candidate)) for number, candidate in enumerate(self.candidates)]

    def _row(self, candidate: Candidate) -> str:
        size, needed = f"{candidate.batch_size:>4,}", f"about {candidate.needed_mib:,.0f} MiB"
        if candidate.cost is None:
            return f"{size}  {needed}, of {self.limit_mib:,.0f} that may be taken"
        row = f"{size}  {candidate.images_per_sec:,.1f} images/s, {needed}"
        if self.over_batch:
            images = "a single image" if candidate.batch_size == 1 else f"{candidate.batch_size:,} images"
            return f"{row}; {self.over_batch} sees {images}"
        return f"{row}; chosen" if candidate is self.chosen else row


def choose_batch_size(
    task: TransferTask,
    data: ImageDataModule,
    *,
    accumulation: GradientAccumulation,
    precision: str,
    device: torch.device,
    num_devices: int = 1,
    memory_limit_gib: float | None = None,
) -> BatchSizeChoice:
    """Measure the micro-batches that divide the effective batch, on a copy of the model.

    Candidates are measured in ascending order, some seconds each, until two in a row are no faster or the next would
    not fit into memory, as foreseen from the activations of the one before. Weights, optimizer and random numbers stay
    as they are.

    Args:
        task: The module, built.
        data: The data, set up for fitting.
        accumulation: The callback that accumulates gradients.
        precision: Lightning's name of the precision.
        device: Where the model will train.
        num_devices: Devices that train together.
        memory_limit_gib: Memory that the training may take, of the whole process on a CPU; None takes what is free now,
            less a tenth.

    Returns:
        What was measured.

    Raises:
        ConfigError: There is no effective batch to divide, several devices train together, or a single image takes more
            than the memory that was given.

    Example:
        With a module and data that are prepared::

            choice = choose_batch_size(task, data, accumulation=GradientAccumulation(16), precision="32-true",
                                       device=torch.device("cpu"))
            data.use_batch_size(choice.chosen.batch_size)
    """
    effective = accumulation.effective_batch_size
    if effective is None:
        raise ConfigError(
            "data.batch_size=auto divides accumulation.effective_batch_size, which is not given; give it, such as "
            "--accumulation.effective_batch_size 16, or a number of images as data.batch_size."
        )
    if num_devices > 1:
        raise ConfigError(
            "data.batch_size=auto is measured on one device, and here are "
            f"{num_devices}; run it once with --trainer.devices 1 --dry_run, and give the number that it chooses."
        )
    limit = memory_limit_mib(device) if memory_limit_gib is None else memory_limit_gib * 1024.0
    most = min(effective, len(data.train_dataset))
    sizes = [size for size in range(1, most + 1) if effective % size == 0]
    candidates: list[Candidate] = []
    for size in sizes:
        needed = _foreseen(candidates[-1], size) if candidates else 0.0
        cost = None
        if needed <= limit:
            cost = _measured(task, accumulation, size, data, precision, device)
            needed = needed if cost is None else max(needed, cost.peak_mib)
        if size == 1 and memory_limit_gib is not None and needed > limit:
            raise ConfigError(
                f"memory_limit={memory_limit_gib:g}: a single image at a time takes about {needed:,.0f} MiB, "
                f"{limit:,.0f} may be taken; raise memory_limit, lower data.img_size, or set "
                "model.gradient_checkpointing=true."
            )
        fits = cost is not None and (needed <= limit or size == 1)
        candidates.append(Candidate(size, cost if fits else None, needed))
        if not fits or _no_faster(candidates):
            break
    reset_peak_memory(device)
    return BatchSizeChoice(candidates, limit, task.model_config.norm_over_batch)


def memory_limit_mib(device: torch.device) -> float:
    """Tell how much memory a training may take, in MiB: what is free now and what we have, less a tenth of that.

    Args:
        device: Where the model will train.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        available, resident = available_ram_bytes(), resident_bytes()
        if available is None or resident is None:
            return math.inf
        free = available + resident
    return (1.0 - _RESERVE) * free / 2**20


def _measured(
    task: TransferTask,
    accumulation: GradientAccumulation,
    size: int,
    data: ImageDataModule,
    precision: str,
    device: torch.device,
) -> StepCost | None:
    """Measure a micro-batch; None where the device has no room for it."""
    try:
        shape = data.evaluation_shape(size)
        return measure_step(task, accumulation, size, data.img_size, shape, precision, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or size == 1:
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _foreseen(before: Candidate, size: int) -> float:
    """Foresee the peak of a micro-batch: the activations grow with it, the rest stays."""
    assert before.cost is not None
    return before.needed_mib + before.cost.activations_mib * (size / before.batch_size - 1.0)


def _no_faster(candidates: list[Candidate]) -> bool:
    speeds = [candidate.images_per_sec for candidate in candidates]
    return len(speeds) > _SLOWER and max(speeds[-_SLOWER:]) < _WORTH * max(speeds[:-_SLOWER])
