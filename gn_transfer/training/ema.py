"""An exponential moving average of the weights, evaluated and saved in their place."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from gn_transfer.config import ConfigError
from gn_transfer.layers import StdConv2d
from gn_transfer.training.checkpoint_callbacks import LastCheckpoint

AS_TRAINED = "as trained"
"""Description of weights that are no average."""


def average_decay(decay: float, num_averaged: int) -> float:
    """Decay of the average at an update: lower at the start, so that the first weights are soon forgotten.

    Args:
        decay: Decay in the long run, in (0, 1).
        num_averaged: Updates so far, from 1.

    Returns:
        ``min(decay, (1 + n) / (10 + n))``.

    Example:
        >>> average_decay(0.999, 1), average_decay(0.999, 100_000)
        (0.18181818181818182, 0.999)
    """
    return min(decay, (1 + num_averaged) / (10 + num_averaged))


class ExponentialMovingAverage(WeightAveraging):
    """Evaluate and save an exponential moving average (EMA) of weights and running statistics. Off by default.

    Validation figures are those of the average, and ``state_dict`` of every checkpoint is the average, so validate,
    test, export and predict use it. A resumed run goes on from the weights as trained, which lie beside it.

    Args:
        decay: Weight of the average at each optimizer step, in (0, 1), such as 0.999. It is lower in the first steps,
            so that the start is forgotten. null disables the average.
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0.0 < decay < 1.0:
            raise ConfigError(f"ema.decay={decay} is out of range; use a number in (0, 1), or null to disable it.")
        self.decay = decay

        def average(averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
            assert decay is not None
            if not averaged.is_floating_point():  # a counter
                return current
            return averaged.lerp(current, 1.0 - average_decay(decay, int(num_averaged)))

        super().__init__(avg_fn=average)

    @property
    def enabled(self) -> bool:
        """Whether there is anything to do."""
        return self.decay is not None

    def describe(self) -> str:
        """Say which weights are evaluated, saved and exported."""
        return AS_TRAINED if self.decay is None else f"exponential moving average, decay {self.decay:g} per step"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the module; Lightning's warning about sharded models does not apply to ours."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*overrides the configure_model")
            super().setup(trainer, pl_module, stage)
        # First of all, so that batch norms are re-estimated after the average has taken the place of the weights.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def _swap_models(self, pl_module: LightningModule) -> None:
        """Exchange weights and average, and drop the standardized filters that evaluation keeps of the others."""
        super()._swap_models(pl_module)
        for layer in pl_module.modules():
            if isinstance(layer, StdConv2d):
                layer.train(layer.training)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the module have the average, once the weights as trained are on the disk."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LastCheckpoint):
                callback.retry(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the weights, the weights as trained beside it."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint.setdefault("gn_transfer", {})["weights"] = self.describe()
