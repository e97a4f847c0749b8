"""Gradient accumulation by effective batch size, with every picture of a window weighted alike."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gn_transfer.classifier import MicroBatch, TransferClassifier
from gn_transfer.config import ConfigError


def micro_batch(
    batch_idx: int, *, num_batches: int, micro_batches: int, batch_size: int, num_samples: int, window: int = 0
) -> MicroBatch:
    """Place a micro-batch in its window.

    Lightning divides each loss by ``micro_batches``, also in an epoch's last window, which may be shorter; the scale
    undoes that, so that each picture of a window of ``N`` pictures weighs ``1 / N``.

    Args:
        batch_idx: Index of the micro-batch in its epoch, from 0.
        num_batches: Micro-batches in the epoch.
        micro_batches: Micro-batches in a full window.
        batch_size: Pictures in a full micro-batch, on one device.
        num_samples: Pictures in the epoch, on one device; the last micro-batch holds what remains.
        window: Number of the window since the run began.

    Returns:
        Whether it opens and closes its window, and the factor on its mean loss.

    Example:
        Five pictures, one at a time, in windows of four: the fifth is a window of its own.

        >>> micro_batch(4, num_batches=5, micro_batches=4, batch_size=1, num_samples=5)
        MicroBatch(first=True, last=True, loss_scale=4.0, window=0, offset=0)
    """
    start = batch_idx - batch_idx % micro_batches
    end = min(start + micro_batches, num_batches)
    pictures = min(batch_size, num_samples - batch_idx * batch_size)
    in_window = min(end * batch_size, num_samples) - start * batch_size
    return MicroBatch(
        first=batch_idx == start,
        last=batch_idx + 1 == end,
        loss_scale=pictures * micro_batches / in_window,
        window=window,
        offset=(batch_idx - start) * batch_size,
    )


def micro_batches_per_window(effective_batch_size: int | None, batch_size: int, num_devices: int) -> int:
    """Count the micro-batches between two optimizer steps.

    Args:
        effective_batch_size: Pictures per optimizer step over all devices; ``None`` accumulates nothing.
        batch_size: Pictures per forward pass on one device.
        num_devices: Devices that train together.

    Returns:
        Micro-batches per device and optimizer step, at least 1.

    Raises:
        ConfigError: The effective batch is not a multiple of what the devices hold at once.
    """
    at_once = batch_size * num_devices
    if effective_batch_size is None:
        return 1
    if effective_batch_size < at_once or effective_batch_size % at_once:
        near = max(at_once, round(effective_batch_size / at_once) * at_once)
        devices = f" on {num_devices} devices" if num_devices > 1 else ""
        raise ConfigError(
            f"accumulation.effective_batch_size={effective_batch_size} is not a multiple of "
            f"data.batch_size={batch_size}{devices}; use {near}, or change data.batch_size."
        )
    return effective_batch_size // at_once


class GradientAccumulation(Callback):
    """Accumulate gradients up to an effective batch size.

    Args:
        effective_batch_size: Pictures per optimizer step over all devices; null takes data.batch_size, so that
            nothing is accumulated. data.batch_size stays what is in memory and what BatchNorm sees.
    """

    def __init__(self, effective_batch_size: int | None = None) -> None:
        if effective_batch_size is not None and effective_batch_size < 1:
            raise ConfigError(f"accumulation.effective_batch_size={effective_batch_size}: use 1 or more, or null.")
        self.effective_batch_size = effective_batch_size

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell Lightning the number of micro-batches."""
        if stage == "fit":
            trainer.accumulate_grad_batches = micro_batches_per_window(
                self.effective_batch_size, _data(trainer).batch_size, trainer.world_size
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the module where the micro-batch stands."""
        data = _data(trainer)
        assert isinstance(pl_module, TransferClassifier)
        pl_module.micro_batch = micro_batch(
            batch_idx,
            num_batches=int(trainer.num_training_batches),
            micro_batches=trainer.accumulate_grad_batches,
            batch_size=data.batch_size,
            num_samples=len(data.train_sampler),
            window=trainer.global_step,
        )


def _data(trainer: Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]
