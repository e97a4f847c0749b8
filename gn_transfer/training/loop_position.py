"""Where in an epoch a training stands, and how Lightning's loops say it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def is_validated(trainer: Trainer, batch_idx: int) -> bool:
    """Say whether a validation follows this step inside the epoch, which a run that goes on from here would lack.

    False where one follows every step: there would be no place to save at.
    """
    every: Any = trainer.val_check_batch
    if not isinstance(every, int) or every <= trainer.accumulate_grad_batches:
        return False
    done = trainer.fit_loop.epoch_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return (done + 1) % every == 0


def place_loops(loops: dict[str, Any], batches: int) -> None:
    """Have Lightning's loops stand where they stand after the last micro-batch of an optimizer step.

    Args:
        loops: Their state in a checkpoint, changed in place.
        batches: Micro-batches of the epoch that are done; 0 is the beginning of the epoch.
    """
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False
    before = progress["total"]["processed"] - progress["current"]["processed"]  # of the epochs before
    for part, number in (("current", batches), ("total", before + batches)):
        progress[part].update(ready=number, started=number, processed=number, completed=number - bool(batches))


def whole_steps(trainer: Trainer) -> int:
    """Micro-batches of the running epoch that belong to optimizer steps that are done."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    done: int = batches.processed
    last = done >= trainer.num_training_batches  # the last step of an epoch may have fewer
    return done if last else done - done % trainer.accumulate_grad_batches


def is_position(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"epoch", "batch"}
        and all(isinstance(number, int) and 0 <= number < 2**31 for number in value.values())
    )
