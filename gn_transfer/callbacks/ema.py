"""An exponential moving average of the weights, evaluated and saved in their place."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gn_transfer.classifier import TransferClassifier
from gn_transfer.config import ConfigError

PREFIX = "net."


def average_decay(decay: float, step: int) -> float:
    """Decay of the average at an optimizer step: lower at the start, so that the first weights are soon forgotten.

    Args:
        decay: Decay in the long run, in (0, 1).
        step: Optimizer steps taken, from 1.

    Returns:
        ``min(decay, (1 + step) / (10 + step))``.

    Example:
        >>> average_decay(0.999, 1), average_decay(0.999, 100_000)
        (0.18181818181818182, 0.999)
    """
    return min(decay, (1 + step) / (10 + step))


def average_into(average: dict[str, Tensor], current: dict[str, Tensor], decay: float) -> None:
    """Move an average towards current values in place; what is not floating (counters) is copied.

    Args:
        average: State dict of the average.
        current: State dict of the net, with the same keys.
        decay: Weight of the average, in [0, 1].
    """
    with torch.no_grad():
        for key, value in current.items():
            if value.is_floating_point():
                average[key].lerp_(value, 1.0 - decay)
            else:
                average[key].copy_(value)


class WeightAverage(Callback):
    """Evaluate and save an exponential moving average (EMA) of weights and running statistics; off by default.

    With it, validation figures are the average's, ``state_dict`` of every checkpoint is the average (so that validate,
    test, export and predict use it), and the weights as trained lie beside it under ``gn_transfer/trained_weights``,
    from which a resumed run goes on.

    Args:
        decay: Weight of the average at each optimizer step, in (0, 1), such as 0.999; lower in the first steps, so
            that the start is forgotten. null disables it.
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0.0 < decay < 1.0:
            raise ConfigError(f"ema.decay={decay} is out of range; use a number in (0, 1), or null to disable it.")
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] | None = None  # while the net holds the average
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights that training begins with, if no checkpoint has brought an average.

        Not earlier: on a restart the number of steps is not known before.
        """
        if self.decay is not None and not self._average:
            self._average = _copy(_state(pl_module))
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after every optimizer step."""
        if self.decay is not None and trainer.global_step > self._step:
            self._step = trainer.global_step
            average_into(self._average, _state(pl_module), average_decay(self.decay, self._step))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the net."""
        if self._average and trainer.state.fn == "fit":
            self._trained = _copy(_state(pl_module))
            _load(pl_module, self._average)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights as trained back, keeping what validation has re-estimated for the average."""
        self._give_back(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the net with the weights as trained."""
        self._give_back(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the net with the average."""
        if self._average:
            _load(pl_module, self._average)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the net, the weights as trained beside it."""
        ours = checkpoint.setdefault("gn_transfer", {})
        ours["weights"] = self.describe()
        if self._average:
            trained = self._trained if self._trained is not None else _state(pl_module)
            ours["trained_weights"] = _copy(trained)
            checkpoint["state_dict"] |= {f"{PREFIX}{key}": value for key, value in _copy(self._average).items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from the weights as trained; Lightning has loaded the average into the net by now."""
        trained = checkpoint["gn_transfer"].get("trained_weights")
        if self.decay is not None and trained is not None and trainer.state.fn == "fit":
            self._average = _copy(_state(pl_module))
            _load(pl_module, trained)

    def describe(self) -> str:
        """Say which weights are evaluated, saved and exported."""
        return "as trained" if self.decay is None else f"exponential moving average, decay {self.decay:g} per step"

    def _give_back(self, pl_module: LightningModule) -> None:
        if self._trained is not None:
            self._average = _copy(_state(pl_module))
            _load(pl_module, self._trained)
            self._trained = None


def _state(pl_module: LightningModule) -> dict[str, Tensor]:
    assert isinstance(pl_module, TransferClassifier)
    assert pl_module.net is not None
    state: dict[str, Tensor] = pl_module.net.state_dict()
    return state


def _load(pl_module: LightningModule, state: dict[str, Tensor]) -> None:
    assert isinstance(pl_module, TransferClassifier)
    assert pl_module.net is not None
    pl_module.net.load_state_dict(state)  # in place by copy_, which the once-per-window engine notices


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in state.items()}
