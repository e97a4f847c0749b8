"""What a training says while it runs: speed, learning rate and memory for the loggers, a bar, a line an epoch."""

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
from lightning.pytorch.callbacks import ProgressBar
from rich import get_console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def peak_memory_mib(device: torch.device) -> float:
    """Read the peak memory so far, in MiB: taken by torch on a CUDA device, else resident of this process.

    What torch has taken there counts what a CUDA graph holds between its replays, which no tensor does.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device) / 2**20)
    with contextlib.suppress(OSError, StopIteration):  # Linux; getrusage there starts from the parent's peak
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def reset_peak_memory(device: torch.device) -> None:
    """Have :func:`peak_memory_mib` begin anew, where the system can do that: after measurements that were trials."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Linux
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Throughput(Callback):
    """Measure images per second of the training alone, and log loss, learning rate, speed and memory by the way.

    The loss that is logged is the mean over the images since the last entry.
    """

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self.samples_seen = 0
        self.recent_loss = float("nan")
        self._epoch_loss_sum = 0.0
        self._epoch_images = 0
        self.recent_images_per_sec = 0.0
        self._loss_sum: torch.Tensor | None = None
        self._loss_images = 0
        self._step_losses: list[tuple[torch.Tensor, int]] = []  # of an accumulation step that has not ended
        self._mark = self._paused = 0.0
        self._mark_images = 0
        self._warm = False
        self._every = 1

    @property
    def epoch_loss(self) -> float:
        """Mean loss over the images of the running epoch, those before a resumption included."""
        loss_sum, images = self._epoch_sums()
        return loss_sum / images if images else float("nan")

    @property
    def images_per_sec(self) -> float:
        """Images trained per second over the whole run, without validation; without the first optimizer step where more
        followed.
        """
        return self.images / self.seconds if self.seconds else self.recent_images_per_sec

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the timer."""
        self._mark, self._mark_images, self._warm = time.perf_counter(), 0, False
        self._every = trainer.log_every_n_steps  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log every ``trainer.log_every_n_steps`` optimizer steps."""
        if batch_idx == 0:
            self._epoch_loss_sum, self._epoch_images = 0.0, 0
        loss = outputs["mean_loss"] * len(batch[1])
        # A resumed run adds up in other parts: in float64, that cannot be seen in the figures. MPS has none.
        self._step_losses.append((loss if loss.device.type == "mps" else loss.double(), len(batch[1])))
        last = batch_idx + 1 >= trainer.num_training_batches
        if not last and (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._count_step(trainer.world_size)
        if not (last or not self._warm or trainer.global_step % self._every == 0):
            return
        self._flush(trainer, pl_module)

    def _count_step(self, devices: int) -> None:
        for loss, images in self._step_losses:
            self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
            self._loss_images += images
            self._mark_images += images * devices
            self.samples_seen += images * devices
        self._step_losses = []

    def _flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._loss_sum is not None
        self._epoch_loss_sum, self._epoch_images = self._epoch_sums()
        self.recent_loss = float(self._loss_sum) / self._loss_images  # waits for the device, so the clock is right
        now = time.perf_counter()
        seconds, images = now - self._mark, self._mark_images
        self.recent_images_per_sec = images / seconds
        if self._warm:
            self.images, self.seconds = self.images + images, self.seconds + seconds
        self._warm = True
        self._mark, self._mark_images, self._loss_sum, self._loss_images = now, 0, None, 0
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

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when the validation begins, with nothing of the training left to compute."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exclude the validation from the measurement."""
        self._mark += time.perf_counter() - self._paused

    def state_dict(self) -> dict[str, Any]:
        """Keep the counts, so that a resumed run reports those of the whole run."""
        loss_sum, images = self._epoch_sums()
        return {
            "images": self.images,
            "seconds": self.seconds,
            "samples_seen": self.samples_seen,
            "epoch_loss_sum": loss_sum,
            "epoch_images": images,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue to count."""
        self.images, self.seconds = int(state_dict["images"]), float(state_dict["seconds"])
        self.samples_seen = int(state_dict["samples_seen"])
        self._epoch_loss_sum = float(state_dict.get("epoch_loss_sum", 0.0))
        self._epoch_images = int(state_dict.get("epoch_images", 0))

    def _epoch_sums(self) -> tuple[float, int]:
        if self._loss_sum is None:
            return self._epoch_loss_sum, self._epoch_images
        return self._epoch_loss_sum + float(self._loss_sum), self._epoch_images + self._loss_images


class RunProgressBar(ProgressBar):
    """One bar for the whole run, with the time that is left; validation has a bar of its own below it."""

    def __init__(self) -> None:
        super().__init__()
        self._bars: Progress | None = None
        self._run = TaskID(0)
        self._validation: TaskID | None = None

    def disable(self) -> None:
        """Close the bar; Lightning asks for it on every process but the first, which opens none."""
        self._stop()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar; a resumed run begins where it stood."""
        if not trainer.is_global_zero:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
        )
        self._bars = Progress(*columns, console=get_console(), transient=True, expand=True)
        self._bars.start()
        total, done = batches_of_run(trainer), trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self._run = self._bars.add_task("run", total=total, completed=max(0, done), figures="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self._bars is None:
            return
        self._bars.update(self._run, description=_epoch_of(trainer), advance=1, figures=_figures(trainer))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar of the validation."""
        if self._bars is None:
            return
        if self._validation is None:
            total = sum(number for number in trainer.num_val_batches if number != float("inf"))
            self._validation = self._bars.add_task("validation", total=total, figures="")
        self._bars.advance(self._validation)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar of the validation."""
        if self._bars is not None and self._validation is not None:
            self._bars.remove_task(self._validation)
        self._validation = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the message has the terminal to itself."""
        self._stop()

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None


class EpochLines(Callback):
    """Print one line per epoch, and in long epochs one every half minute where there is no progress bar.

    Args:
        say: Prints a line.
        every_seconds: Longest silence inside an epoch; None prints nothing there.
    """

    def __init__(self, say: Callable[[str], None] = print, every_seconds: float | None = 30.0) -> None:
        self.say = say
        self.every_seconds = every_seconds
        self._started = self._spoken = 0.0
        self._validated = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._started = self._spoken = time.perf_counter()
        self._validated = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Break a long silence."""
        if self.every_seconds is None or not trainer.is_global_zero:
            return
        now = time.perf_counter()
        if now - self._spoken < self.every_seconds:
            return
        self._spoken = now
        speed = find_throughput(trainer).recent_images_per_sec
        batches = batches_of_run(trainer) - trainer.fit_loop.epoch_loop.total_batch_idx - 1
        left = batches * len(batch[1]) * trainer.world_size / speed if speed else 0.0
        self.say(
            f"{_epoch_of(trainer)}  batch {batch_idx + 1:,}/{trainer.num_training_batches:,}  {_figures(trainer)}"
            + (f"  about {duration(left)} of training left" if left else "")
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the figures are this epoch's."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the epoch."""
        if not trainer.is_global_zero:
            return
        throughput = find_throughput(trainer)
        metrics = trainer.callback_metrics
        parts = [_epoch_of(trainer), f"loss {throughput.epoch_loss:.3f}"]
        if self._validated:
            names = (pl_module.monitor, "val/loss")
            parts += [f"{name} {float(metrics[name]):.3f}" for name in names if name in metrics]
        parts += [f"{throughput.recent_images_per_sec:.1f} images/s"]
        if self._started:
            parts += [f"{time.perf_counter() - self._started:.1f} s"]
        self.say("  ".join(parts))


def find_throughput(trainer: Trainer) -> Throughput:
    """Find the callback that counts images; every run has it."""
    found: Throughput = next(c for c in trainer.callbacks if isinstance(c, Throughput))  # type: ignore[attr-defined]
    return found


def batches_of_run(trainer: Trainer) -> int:
    """Count the micro-batches of a whole run, from its first to its last epoch."""
    batches = int(trainer.num_training_batches)
    of_epochs = batches * trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None
    if trainer.max_steps < 0:
        return of_epochs or batches
    of_steps = trainer.max_steps * trainer.accumulate_grad_batches
    return of_steps if of_epochs is None else min(of_steps, of_epochs)


def duration(seconds: float) -> str:
    """Write a time for people.

    Args:
        seconds: Seconds.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _epoch_of(trainer: Trainer) -> str:
    of_all = f"/{trainer.max_epochs}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{of_all}"


def _figures(trainer: Trainer) -> str:
    throughput = find_throughput(trainer)
    scores = [getattr(callback, "best_model_score", None) for callback in trainer.checkpoint_callbacks]
    best = [score for score in scores if score is not None]
    if throughput.recent_loss != throughput.recent_loss:  # no optimizer step yet
        return "first optimizer step"
    return f"loss {throughput.epoch_loss:.3f}  {throughput.recent_images_per_sec:.1f} images/s" + (
        f"  best {float(best[0]):.3f}" if best else ""
    )
