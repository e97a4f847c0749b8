"""Gradient accumulation by effective batch size: where a micro-batch stands in its accumulation step.

The callback computes the place of each micro-batch, announces it to the accumulation engine, and gives it to the
module, which scales its loss by it. Every image of an accumulation step has the same weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gn_transfer.backbones import ModelConfig
from gn_transfer.config import ConfigError
from gn_transfer.layers import AccumulationEngine, GraphedModel


@dataclass(frozen=True)
class MicroBatch:
    """Place of a micro-batch in its accumulation step.

    Attributes:
        first: It is the first of its step.
        last: The optimizer steps after it.
        loss_scale: Factor on its mean loss that gives every image of the step the same weight.
        step: Number of the accumulation step since the run began.
        offset: Images of the step before it, on this device.
    """

    first: bool = True
    last: bool = True
    loss_scale: float = 1.0
    step: int = 0
    offset: int = 0


def micro_batch(
    batch_idx: int, *, num_batches: int, micro_batches: int, batch_size: int, num_samples: int, step: int = 0
) -> MicroBatch:
    """Place a micro-batch in its accumulation step.

    Lightning divides each loss by ``micro_batches``, also in an epoch's last step, which may be shorter. The scale
    corrects that, so that each image of a step of ``N`` images has the weight ``1 / N``.

    Args:
        batch_idx: Index of the micro-batch in its epoch, from 0.
        num_batches: Micro-batches in the epoch.
        micro_batches: Micro-batches in a full accumulation step.
        batch_size: Images in a full micro-batch, on one device.
        num_samples: Images in the epoch, on one device; the last micro-batch holds the rest.
        step: Number of the accumulation step since the run began.

    Returns:
        The place.

    Example:
        Five images, one at a time, in steps of four: the fifth is a step of its own.

        >>> micro_batch(4, num_batches=5, micro_batches=4, batch_size=1, num_samples=5)
        MicroBatch(first=True, last=True, loss_scale=4.0, step=0, offset=0)
    """
    start = batch_idx - batch_idx % micro_batches
    end = min(start + micro_batches, num_batches)
    images = min(batch_size, num_samples - batch_idx * batch_size)
    images_in_step = min(end * batch_size, num_samples) - start * batch_size
    return MicroBatch(
        first=batch_idx == start,
        last=batch_idx + 1 == end,
        loss_scale=images * micro_batches / images_in_step,
        step=step,
        offset=(batch_idx - start) * batch_size,
    )


def micro_batches_per_step(effective_batch_size: int | None, batch_size: int, num_devices: int) -> int:
    """Count the micro-batches of an optimizer step.

    Args:
        effective_batch_size: Images per optimizer step over all devices; ``None`` accumulates nothing.
        batch_size: Images per forward pass on one device.
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
        effective_batch_size: Images per optimizer step over all devices. null means data.batch_size, so that nothing
            is accumulated. data.batch_size stays what is in memory and what BatchNorm sees.
        cache_weights: Standardize weights, cast them and fold frozen norms into them once per optimizer step instead
            of once per micro-batch.
        cuda_graphs: On a single GPU, replay forward and backward of a micro-batch as CUDA graphs instead. With few
            images a GPU waits for the launches of its kernels otherwise.
    """

    def __init__(
        self, effective_batch_size: int | None = None, cache_weights: bool = True, cuda_graphs: bool = True
    ) -> None:
        if effective_batch_size is not None and effective_batch_size < 1:
            raise ConfigError(f"accumulation.effective_batch_size={effective_batch_size}: use 1 or more, or null.")
        self.effective_batch_size = effective_batch_size
        self.cache_weights = cache_weights
        self.cuda_graphs = cuda_graphs
        self.engine: AccumulationEngine | None = None
        self._looked_for_norms = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell Lightning the number of micro-batches."""
        if stage == "fit" and trainer.datamodule is not None:  # type: ignore[attr-defined]
            batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
            trainer.accumulate_grad_batches = micro_batches_per_step(
                self.effective_batch_size, batch_size, trainer.world_size
            )

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Attach the accumulation engine, or have the model replayed as CUDA graphs."""
        config = pl_module.model_config
        if self.replays(config, trainer.strategy.root_device, trainer.world_size):
            pl_module.graphed_model = GraphedModel(pl_module.model)
        elif self.cache_weights:
            self.engine = AccumulationEngine(pl_module.model, compiled=config.compile)
            self._looked_for_norms = False

    def replays(self, config: ModelConfig, device: torch.device, num_devices: int = 1) -> bool:
        """Say whether a model is to be replayed as CUDA graphs.

        Args:
            config: Of the model.
            device: That it trains on.
            num_devices: Devices that train together.

        Returns:
            Whether it was asked for, the device is a GPU on its own, and the model can be captured.
        """
        # gradient checkpointing starts a backward within the backward, which cannot be captured
        plain = not config.compile and not config.gradient_checkpointing and num_devices == 1
        return self.cuda_graphs and device.type == "cuda" and plain

    def count_micro_batches(self, trainer: Trainer) -> None:
        """Count the micro-batches where loaders came without a data module; before the steps of a run are counted."""
        if trainer.datamodule is None:  # type: ignore[attr-defined]
            trainer.fit_loop.setup_data()
            batch_size, _ = _epoch_size(trainer)
            trainer.accumulate_grad_batches = micro_batches_per_step(
                self.effective_batch_size, batch_size, trainer.world_size
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count them also for a module with an optimizer of its own."""
        self.count_micro_batches(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Announce the micro-batch to the engine and to the module."""
        batch_size, num_samples = _epoch_size(trainer)
        place = micro_batch(
            batch_idx,
            num_batches=int(trainer.num_training_batches),
            micro_batches=trainer.accumulate_grad_batches,
            batch_size=batch_size,
            num_samples=num_samples,
            step=trainer.global_step,
        )
        pl_module.micro_batch = place
        if self.engine is not None:
            with trainer.precision_plugin.forward_context():  # a compiled engine casts the weights here
                if not self._looked_for_norms:
                    self.engine.fold_norms(pl_module.normalize(batch[0]))
                    self._looked_for_norms = True
                self.engine.micro_batch(first=place.first, last=place.last)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop an unfinished accumulation step."""
        self._detach(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach the engine: what is evaluated next runs as it is written."""
        self._detach(pl_module)

    def _detach(self, pl_module: Any) -> None:
        pl_module.graphed_model = None
        if self.engine is not None:
            self.engine.remove()
            self.engine = None


def _epoch_size(trainer: Trainer) -> tuple[int, int]:
    """Images per micro-batch and per epoch, on one device."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is not None and hasattr(data, "train_sampler"):
        return data.batch_size, len(data.train_sampler)
    loader: Any = trainer.train_dataloader
    return loader.batch_size, len(loader.sampler)
