"""When checkpoints are saved, and how: atomically, between two accumulation steps."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from gn_transfer.config import ConfigError, check_range, is_out_of_memory
from gn_transfer.files import partial_of, remove_leftovers
from gn_transfer.training.checkpoint import read_checkpoint
from gn_transfer.training.divergence import DivergenceCheck, is_finite
from gn_transfer.training.loop_position import is_position, is_validated, place_loops, whole_steps
from gn_transfer.training.run_folder import BEST, LAST, PREVIOUS


def write_checkpoint(content: dict[str, Any], path: Path, *, keep_previous: bool = False) -> None:
    """Write a checkpoint beside its place and rename it, so that a kill leaves the old or the new one, never a half.

    Args:
        content: Plain values and tensors.
        path: Local file to write; its folder is made if missing.
        keep_previous: The file that it replaces stays, as ``previous.ckpt``.

    Raises:
        OSError: The disk is full, or the folder cannot be written. What was there is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, aside = partial_of(path), partial_of(path.with_name(PREVIOUS))
    try:
        try:
            with partial.open("xb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:  # what torch's writer makes of a full disk
            if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if keep_previous and path.is_file():
            with suppress(OSError):  # a file system without links keeps one checkpoint
                aside.hardlink_to(path)
                aside.replace(path.with_name(PREVIOUS))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints with :func:`write_checkpoint`. A disk that is full does not end the training.

    Attributes:
        problems: Why a file could not be written, by its path; those written meanwhile are taken out.
    """

    def __init__(self) -> None:
        self.problems: dict[Path, str] = {}
        self._last_is_corrupt = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint, or note why that failed.

        Args:
            checkpoint: Plain values and tensors.
            path: Local file to write.
            storage_options: Not used; the signature is Lightning's.
        """
        try:
            is_last = Path(path).name == LAST
            write_checkpoint(checkpoint, Path(path), keep_previous=is_last and not self._last_is_corrupt)
            self._last_is_corrupt = self._last_is_corrupt and not is_last
            self.problems.pop(Path(path), None)
        except OSError as error:  # on one process of several: an exception here would leave the others waiting
            self.problems[Path(path)] = error.strerror or str(error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a local checkpoint; see :func:`read_checkpoint`."""
        self._last_is_corrupt = Path(path).name == PREVIOUS  # so it must not take the place of this one
        return read_checkpoint(path)


class BestCheckpoint(ModelCheckpoint):
    """Keep ``best.ckpt``: the earliest of the epochs with the highest value of the task's metric."""

    def __init__(self) -> None:
        super().__init__(
            filename="best",
            monitor="val/acc1",
            mode="max",
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best so far, also where the run's folder was moved or is named another way.

        Where the folder has no ``best.ckpt``, the next validation is the best.
        """
        assert self.dirpath is not None, "the run's folder is set before a checkpoint is restored"
        best = str(Path(self.dirpath) / BEST)
        if not _of_first_process(Path(best).is_file()):
            return
        kept = dict.fromkeys([best] if state_dict["best_k_models"] else [], state_dict["best_model_score"])
        super().load_state_dict(
            {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": best,
                "kth_best_model_path": best,
                "best_k_models": kept,
            }
        )


SAME_REQUEST_SECONDS = 5.0
"""Within that time, signals of two kinds ask for one and the same thing."""


class LastCheckpoint(Checkpoint):
    """Keep ``last.ckpt``: at every epoch's end, every few minutes inside an epoch, and when the run is asked to stop.

    A checkpoint stands between two accumulation steps. It holds the number of micro-batches of the epoch that are
    done, so that a resumed run sees the images that it would have seen. SIGINT (Ctrl-C), SIGTERM, and SIGUSR1, which
    SLURM sends ahead of a time limit, finish the accumulation step or the validation, save, and stop the run; where a
    validation follows the step, the run saves before it and stops one step after it. A second one stops at once.
    Signals of two kinds at the same time are one request: who stops a service tells all processes.

    Args:
        every_minutes: Time between two checkpoints inside an epoch. 0 saves after every accumulation step.

    Attributes:
        directory: Where ``last.ckpt`` goes; set when the run has a folder. Nothing is saved before, and nothing by a
            ``fast_dev_run``, which learns nothing.
        say: Prints a line.
        training_began: Everything was restored from the checkpoint, if there was one.
        saved: The newest checkpoint that this training wrote.
        out_of_memory: A training step ran out of memory, and the optimizer steps before it are saved or were none.
    """

    def __init__(self, every_minutes: float = 5.0) -> None:
        check_range("checkpoint.every_minutes", every_minutes, low=0.0)
        self.directory: Path | None = None
        self.every_minutes = every_minutes
        self.stop_requested = False
        self._request: tuple[int, float] = (0, 0.0)
        self._retried = False
        self._resumed_at = 0  # batches of the epoch
        self.say: Callable[[str], None] = print
        self.training_began = False
        self.saved: Path | None = None
        self.out_of_memory = False
        self._saved_at = time.monotonic()
        self._previous_handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have a run resumed after a whole epoch go on with the next one, with ``trainer.max_steps`` as without.

        Lightning 2.6 takes the epoch for unfinished where that is set: the run would have an epoch of no batches, and
        end too early.
        """
        self.training_began = self.out_of_memory = self._retried = False  # a training may begin again with this
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # its signal is ours, and a checkpoint of its own would start other runs
        trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and remove what a killed process left."""
        self._saved_at = time.monotonic()
        if self.directory is not None and trainer.is_global_zero:
            remove_leftovers(self.directory)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle the signals: the first finishes what is at hand, saves and stops; the second stops at once.

        Raises:
            ConfigError: The checkpoint stands behind the end of the epochs of this call.
        """
        self.training_began = True
        if self._resumed_at and self._resumed_at > trainer.num_training_batches:
            raise ConfigError(
                f"the checkpoint stands behind batch {self._resumed_at:,} of its epoch, and here an epoch has "
                f"{trainer.num_training_batches:,}. trainer.limit_train_batches counts batches of "
                f"{_batch_size(trainer)}: give a higher one, or the data.batch_size of the run."
            )

        def request_stop(number: int, frame: FrameType | None) -> None:
            first, when = self._request
            again = self.stop_requested and (number == first or time.monotonic() - when > SAME_REQUEST_SECONDS)
            if again or trainer.state.fn != "fit":
                raise KeyboardInterrupt
            if not self.stop_requested:
                self.stop_requested, self._request = True, (number, time.monotonic())

        names = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows lacks the last
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            with suppress(ValueError):  # not the main thread: whoever runs us there handles signals
                self._previous_handlers[number] = signal.signal(number, request_stop)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the end of an accumulation step, when it is time or a stop was requested."""
        step_ended = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not step_ended or batch_idx + 1 >= trainer.num_training_batches:
            return
        is_time = time.monotonic() - self._saved_at >= 60.0 * self.every_minutes
        validated = is_validated(trainer, batch_idx)  # a stop waits for that, and for the step after it
        due = self.stop_requested or (is_time and not validated)
        if _any_process(trainer, due):  # each has a clock of its own, and saving is done by all
            self._save(trainer, pl_module)
            if _any_process(trainer, self.stop_requested) and not validated:
                raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of every epoch, after its validation."""
        self._save(trainer, pl_module)
        if _any_process(trainer, self.stop_requested):
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the handlers of the signals, and try once more to write what could not be written.

        Raises:
            ConfigError: The last weights of the run are not on the disk.
        """
        self._restore_handlers()
        self.retry(trainer, pl_module)
        if trainer.is_global_zero and (found := _problems(trainer)):
            path, reason = next(iter(found.items()))
            raise ConfigError(
                f"the training ended, but {path} could not be written ({reason}). Free some room; the same run with "
                "--ckpt_path last goes on from the newest checkpoint that was written."
            )

    def retry(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try once more to write what could not be written; before an average takes the place of the weights."""
        if not self._retried and _any_process(trainer, bool(_problems(trainer))):  # only the first knows of them
            self._retried = True
            self._save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the handlers of the signals, and save the optimizer steps before one that found no memory."""
        self._restore_handlers()
        if not is_out_of_memory(exception) or not self.training_began:
            return
        if not trainer.training or trainer.world_size > 1:  # fewer images at a time would not help, or not here
            return
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()
        with suppress(RuntimeError, MemoryError):  # there may be no room for this either
            began = whole_steps(trainer) > 0
            self.out_of_memory = not began or self._save(trainer, pl_module)

    def _restore_handlers(self) -> None:
        """Restore the handlers before Lightning restores its own, which know the trainer and would keep it alive."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the position in the epoch and the states of torch's generators."""
        loop = trainer.fit_loop
        # Of the trackers mypy knows only the base class; these two count `processed` and `started` as well.
        batches: Any = loop.epoch_loop.batch_progress.current
        epochs: Any = loop.epoch_progress.current
        done, epoch = whole_steps(trainer), epochs.processed
        if done < trainer.num_training_batches and epochs.processed == epochs.ready:  # max_steps ended it inside
            for part in ("current", "total"):
                checkpoint["loops"]["fit_loop"]["epoch_progress"][part]["processed"] -= 1
            epoch -= 1
        if not done == batches.processed == batches.ready:  # saved inside an accumulation step, which is forgotten
            place_loops(checkpoint["loops"], done)
            if done:  # added on a restart
                checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        if done >= trainer.num_training_batches:  # `processed` counts the epoch only after its validation
            done, epoch = 0, epochs.started
        ours = checkpoint.setdefault("gn_transfer", {})
        ours["position"] = {"epoch": epoch, "batch": done}
        ours["batch_size"] = _batch_size(trainer)
        ours["devices"] = trainer.world_size
        ours["images_per_step"] = trainer.world_size * trainer.accumulate_grad_batches * _batch_size(trainer)
        ours["torch_rng_state"] = torch.get_rng_state()
        if (device := trainer.strategy.root_device).type == "cuda":  # dropout there has a generator of its own
            ours["cuda_rng_state"] = torch.cuda.get_rng_state(device)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the sampler to the stored position.

        Raises:
            ConfigError: The run cannot go on from it on this number of devices.
        """
        if trainer.state.fn != "fit":
            return
        stored = checkpoint["gn_transfer"]
        position, state = stored.get("position"), stored.get("torch_rng_state")
        if not (is_position(position) and isinstance(state, torch.Tensor) and state.dtype == torch.uint8):
            raise ConfigError("the checkpoint does not say where in the training it was, so no run can go on from it.")
        devices = stored.get("devices", trainer.world_size)
        here = trainer.world_size * trainer.accumulate_grad_batches * _batch_size(trainer)
        if devices != trainer.world_size and (position["batch"] or here != stored["images_per_step"]):
            where = "inside an epoch" if position["batch"] else f"with {stored['images_per_step']} images per step"
            raise ConfigError(
                f"the checkpoint was saved {where} on {devices} device{'s' * (devices != 1)}, and here are "
                f"{trainer.world_size}; continue with --trainer.devices {devices}. With an "
                "accumulation.effective_batch_size, a checkpoint of the end of an epoch fits any number of devices."
            )
        size, stored_size = _batch_size(trainer), stored.get("batch_size", _batch_size(trainer))
        if position["batch"] and size != stored_size:
            position["batch"] = position["batch"] * stored_size // size  # whole steps, so nothing is left over
            place_loops(checkpoint["loops"], position["batch"])
        self._resumed_at = position["batch"]
        trainer.datamodule.train_sampler.resume_at(**position)  # type: ignore[attr-defined]
        torch.set_rng_state(state)
        device, cuda_state = trainer.strategy.root_device, stored.get("cuda_rng_state")
        if device.type == "cuda" and isinstance(cuda_state, torch.Tensor):
            torch.cuda.set_rng_state(cuda_state, device)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Save; False where that was not possible or not wanted."""
        self._saved_at = time.monotonic()
        if self.directory is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        if _any_process(trainer, not is_finite(pl_module)):  # the statistics of a batch norm differ between processes
            return False
        path = self.directory / LAST
        trainer.save_checkpoint(path)
        for failed, reason in _problems(trainer).items():
            self.say(
                f"warning: {failed} could not be written ({reason}); the training goes on, and what was there stays"
            )
        written = path not in _problems(trainer)
        if written:
            self.saved = path
            for check in (c for c in trainer.callbacks if isinstance(c, DivergenceCheck)):  # type: ignore[attr-defined]
                check.last_good = str(path)
        return written


def _of_first_process(value: bool) -> bool:
    """Take what the first of several processes says: it alone writes files, and all have to decide alike."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    said = [value]
    torch.distributed.broadcast_object_list(said)
    return said[0]


def _any_process(trainer: Trainer, decision: bool) -> bool:
    """Tell whether any of the processes of a training says yes."""
    return trainer.strategy.reduce_boolean_decision(decision, all=False) if trainer.world_size > 1 else decision


def _problems(trainer: Trainer) -> dict[Path, str]:
    """Files that could not be written, with the reason."""
    io = trainer.strategy.checkpoint_io
    return dict(io.problems) if isinstance(io, AtomicCheckpointIO) else {}


def _batch_size(trainer: Trainer) -> int:
    return int(getattr(trainer.datamodule, "batch_size", 1))  # type: ignore[attr-defined]
