"""What a training says while it runs: speed, learning rate and memory for the loggers, a bar and a line an epoch."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from gn_transfer.config import ConfigError


def peak_memory_mib(device: torch.device) -> float:
    """Read the peak memory so far, in MiB: allocated on a CUDA device, else resident of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**20)
    with contextlib.suppress(OSError, StopIteration):  # Linux; getrusage there starts from the parent's peak
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class Throughput(Callback):
    """Measure images per second of the training alone, and log loss, learning rate, speed and memory by the way.

    The loss that is logged is the mean over the images since the last entry. A loss that is not finite stops the
    run, since no later step can repair the weights.
    """

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self.samples_seen = 0
        self.recent_loss = float("nan")
        self.recent_images_per_sec = 0.0
        self._loss_sum: torch.Tensor | None = None
        self._loss_images = 0
        self._mark = 0.0
        self._mark_images = 0
        self._warm = False
        self._every = 1

    @property
    def images_per_sec(self) -> float:
        """Images trained per second over the whole run, without validation and without the first optimizer step."""
        return self.images / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the timer."""
        self._mark, self._mark_images, self._warm = time.perf_counter(), 0, False
        self._every = trainer.log_every_n_steps  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log every ``trainer.log_every_n_steps`` optimizer steps."""
        images = len(batch[1]) * trainer.world_size
        loss = outputs["mean_loss"] * len(batch[1])
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        self._loss_images += len(batch[1])
        self._mark_images += images
        self.samples_seen += images
        last = batch_idx + 1 >= trainer.num_training_batches
        if not last and (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not (last or not self._warm or trainer.global_step % self._every == 0):
            return
        self._flush(trainer, pl_module)

    def _flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._loss_sum is not None
        self.recent_loss = float(self._loss_sum) / self._loss_images  # waits for the device, so the clock is right
        now = time.perf_counter()
        seconds, images = now - self._mark, self._mark_images
        self.recent_images_per_sec = images / seconds
        if self._warm:
            self.images, self.seconds = self.images + images, self.seconds + seconds
        self._warm = True
        self._mark, self._mark_images, self._loss_sum, self._loss_images = now, 0, None, 0
        if self.recent_loss != self.recent_loss or abs(self.recent_loss) == float("inf"):
            raise ConfigError(
                f"the training loss became {self.recent_loss} at step {trainer.global_step}; lower optimizer.lr "
                f"({max(group['lr'] for group in trainer.optimizers[0].param_groups):g}), raise "
                "optimizer.warmup_fraction, or set "
                "mixed_precision.mode=fp32. The last good checkpoint is kept."
            )
        rates: dict[str, float] = {}
        for group in trainer.optimizers[0].param_groups:  # of a part's layers, the fastest
            part = group["name"].split("/")[0]
            rates[f"lr/{part}"] = max(group["lr"], rates.get(f"lr/{part}", 0.0))
        values = {
            "train/loss": self.recent_loss,
            "train/images_per_sec": self.recent_images_per_sec,
            "train/peak_memory_mib": peak_memory_mib(pl_module.device),
            "train/epoch": trainer.current_epoch,
            **rates,
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exclude the time between two epochs from the measurement."""
        self._mark, self._mark_images = time.perf_counter(), 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exclude the validation from the measurement."""
        self._mark = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Keep the counts, so that a resumed run reports those of the whole run."""
        return {"images": self.images, "seconds": self.seconds, "samples_seen": self.samples_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue to count."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]
        self.samples_seen = state_dict["samples_seen"]


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, showing the loss and images per second of :class:`Throughput`."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Choose the figures beside the bar."""
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        if throughput is None or not trainer.training:
            return {}
        return {"loss": f"{throughput.recent_loss:.3f}", "images/s": f"{throughput.recent_images_per_sec:.1f}"}


class EpochLines(Callback):
    """Print one line per epoch, for log files and terminals without a progress bar.

    Args:
        say: Prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._started = 0.0
        self._validated = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._started = time.perf_counter()
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the figures are this epoch's."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch."""
        if not trainer.is_global_zero:
            return
        throughput = next(c for c in trainer.callbacks if isinstance(c, Throughput))  # type: ignore[attr-defined]
        metrics = trainer.callback_metrics
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", f"loss {throughput.recent_loss:.3f}"]
        if self._validated:
            parts += [f"{name} {float(metrics[name]):.3f}" for name in ("val/acc1", "val/loss") if name in metrics]
        parts += [f"{throughput.recent_images_per_sec:.1f} images/s"]
        if self._started:
            parts += [f"{time.perf_counter() - self._started:.1f} s"]
        self.say("  ".join(parts))
