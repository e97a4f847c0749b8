"""A training that goes wrong: numbers that are not finite, and a model that is no better than guessing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from gn_transfer.config import ConfigError
from gn_transfer.data.sampler import epoch_order
from gn_transfer.training.predictions import ImagePredictions

_PATIENCE = 2
"""Validations in a row at the level of guessing before that is said."""

_MOST_NAMES = 4


class DivergenceCheck(Callback):
    """Stop a run whose loss is not finite, and say when it does no better than guessing.

    On a CPU every micro-batch is looked at; on a GPU all of them each ``trainer.log_every_n_steps`` optimizer steps, so
    that no step waits for the device. No checkpoint is written from weights that are not finite, so the last one stays
    good.

    Args:
        say: Prints a line.

    Attributes:
        last_good: Names the checkpoint that stays; empty before the first.
    """

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say = say
        self.last_good = ""
        self._losses: list[tuple[int, Tensor]] = []
        self._at_guess = 0
        self._said = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the epoch before."""
        self._losses = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the losses when that does not make the device wait.

        Raises:
            ConfigError: One is not finite.
        """
        self._losses.append((batch_idx, outputs["mean_loss"]))
        on_cpu = pl_module.device.type == "cpu"
        last = batch_idx + 1 >= trainer.num_training_batches
        every = trainer.log_every_n_steps * trainer.accumulate_grad_batches  # type: ignore[attr-defined]
        if not (on_cpu or last or len(self._losses) >= every):
            return
        losses, self._losses = self._losses, []
        finite = torch.isfinite(torch.stack([loss for _, loss in losses]))
        if not bool(finite.all()):
            batch, loss = losses[int((~finite).nonzero()[0])]
            images = _images_of(trainer, batch)
            where = f"at step {trainer.global_step}, batch {batch + 1} of epoch {trainer.current_epoch + 1}"
            self._stop(trainer, f"the training loss became {float(loss)} {where}{f' ({images})' if images else ''}")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Look at a validation.

        Raises:
            ConfigError: Its loss is not finite.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        loss = metrics.get("val/loss")
        if loss is not None and not math.isfinite(loss):
            self._stop(trainer, f"the validation loss became {float(loss)} in epoch {trainer.current_epoch + 1}")
        predictions = next((c for c in trainer.callbacks if isinstance(c, ImagePredictions)), None)  # type: ignore[attr-defined]
        data = trainer.datamodule  # type: ignore[attr-defined]
        if predictions is None or not hasattr(data, "val_dataset") or pl_module.monitor not in metrics:
            return
        score = float(metrics[pl_module.monitor])
        guess = pl_module.guess(predictions.scores, data.val_dataset.images)
        self._at_guess = self._at_guess + 1 if score <= guess + 1e-6 else 0
        if self._at_guess >= _PATIENCE and not self._said:
            self._said = True
            rate = _learning_rate(trainer)
            self.say(
                f"warning: {pl_module.monitor} {score:.3f} is what guessing reaches ({guess:.3f}), for "
                f"{self._at_guess} validations now. optimizer.lr {rate:g} is probably too high for this model: try "
                f"{rate / 10:g}. If it is already small, look whether the labels are right: gn-transfer data show."
            )

    def _stop(self, trainer: Trainer, what: str) -> None:
        kept = f"The last good checkpoint is {self.last_good}." if self.last_good else "No checkpoint was saved yet."
        raise ConfigError(
            f"{what}. {kept} Lower optimizer.lr ({_learning_rate(trainer):g}), raise optimizer.warmup_fraction, or set "
            "mixed_precision.mode=fp32."
        )


def is_finite(module: nn.Module) -> bool:
    """Tell whether all weights and statistics of a module are finite numbers; waits for the device."""
    tensors = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


def _learning_rate(trainer: Trainer) -> float:
    """Give the learning rate before warmup and decay, of the fastest group."""
    return max(float(group.get("initial_lr", group["lr"])) for group in trainer.optimizers[0].param_groups)


def _images_of(trainer: Trainer, batch_idx: int) -> str:
    """Name the images of a micro-batch of this process; empty where the loaders are the user's own."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "train_sampler"):
        return ""
    s = data.train_sampler
    order = epoch_order(s.num_samples, s.seed, trainer.current_epoch, s.shuffle, s.rank, s.world_size)
    indices = order[batch_idx * s.batch_size : (batch_idx + 1) * s.batch_size]
    paths = [data.train_dataset.images[index].path for index in indices]
    return ", ".join(paths[:_MOST_NAMES]) + (
        f" and {len(paths) - _MOST_NAMES} more" if len(paths) > _MOST_NAMES else ""
    )
