"""When checkpoints are saved, and how: atomically, between two accumulation steps."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from gn_transfer.config import check_range
from gn_transfer.training.checkpoint import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target and rename, so that a kill leaves the old or the new checkpoint, never half of one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: Plain values and tensors.
            path: Local file to write.
            storage_options: Not used; the signature is Lightning's.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a local checkpoint; see :func:`read_checkpoint`."""
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
        """Go on from the best so far, also where the run's folder was moved or is named another way."""
        assert self.dirpath is not None, "the run's folder is set before a checkpoint is restored"
        best = str(Path(self.dirpath) / "best.ckpt")
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


class LastCheckpoint(Checkpoint):
    """Keep ``last.ckpt``: at every epoch's end, every few minutes inside an epoch, and at an interruption.

    A checkpoint stands between two accumulation steps. It holds the number of micro-batches of the epoch that are
    done, so that a resumed run sees the images that it would have seen.

    Args:
        every_minutes: Time between two checkpoints inside an epoch. 0 saves after every accumulation step.

    Attributes:
        directory: Where ``last.ckpt`` goes; set when the run has a folder. Nothing is saved before, and nothing by a
            ``fast_dev_run``, which learns nothing.
    """

    def __init__(self, every_minutes: float = 5.0) -> None:
        check_range("checkpoint.every_minutes", every_minutes, low=0.0)
        self.directory: Path | None = None
        self.every_minutes = every_minutes
        self.stop_requested = False
        self._saved_at = time.monotonic()
        self._previous_handler: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have a run resumed after a whole epoch go on with the next one, with ``trainer.max_steps`` as without.

        Lightning 2.6 takes the epoch for unfinished where that is set: the run would have an epoch of no batches, and
        end too early.
        """
        trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle Ctrl-C: the first finishes the accumulation step, saves and stops; the second stops at once."""

        def request_stop(number: int, frame: FrameType | None) -> None:
            if self.stop_requested or not trainer.training:
                raise KeyboardInterrupt
            self.stop_requested = True

        try:
            self._previous_handler = signal.signal(signal.SIGINT, request_stop)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            self._previous_handler = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the end of an accumulation step, when it is time or a stop was requested."""
        step_ended = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        epoch_ended = batch_idx + 1 >= trainer.num_training_batches
        due = self.stop_requested or time.monotonic() - self._saved_at >= 60.0 * self.every_minutes
        if step_ended and not epoch_ended and due:
            self._save(trainer)
            if self.stop_requested:
                raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of every epoch, after its validation."""
        self._save(trainer)
        if self.stop_requested:
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the handler of Ctrl-C."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the position in the epoch and the state of torch's generator."""
        loop = trainer.fit_loop
        # Of the trackers mypy knows only the base class; these two count `processed` and `started` as well.
        batches: Any = loop.epoch_loop.batch_progress.current
        epochs: Any = loop.epoch_progress.current
        done, epoch = batches.processed, epochs.processed
        if done >= trainer.num_training_batches:  # `processed` counts the epoch only after its validation
            done, epoch = 0, epochs.started
        ours = checkpoint.setdefault("gn_transfer", {})
        ours["position"] = {"epoch": epoch, "batch": done}
        ours["torch_rng_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the sampler to the stored position."""
        stored = checkpoint["gn_transfer"]
        if trainer.training or trainer.state.fn == "fit":
            trainer.datamodule.train_sampler.resume_at(**stored["position"])  # type: ignore[attr-defined]
            torch.set_rng_state(stored["torch_rng_state"])

    def _save(self, trainer: Trainer) -> None:
        if self.directory is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.directory / "last.ckpt")
        self._saved_at = time.monotonic()
