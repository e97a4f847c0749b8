"""What a run reached, up to date after every validation: metrics.json, epochs.csv, predictions of each image."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gn_transfer.config import shortened
from gn_transfer.files import going_on_without, read_json, write_csv, write_json
from gn_transfer.training.predictions import ImagePredictions
from gn_transfer.training.progress import find_throughput, peak_memory_mib

FORMAT_VERSION = 1
"""Of metrics.json and the files beside it; rises when a key changes its meaning."""

Status = Literal["running", "finished", "interrupted", "failed", "fast_dev_run"]


class RunRecord(Callback):
    """Write ``metrics.json``, flat and with stable keys, and beside it ``epochs.csv`` (one row per validation),
    ``predictions_val.csv`` and ``predictions_best_val.csv``.

    ``val/*`` are the last epoch's, those of ``last.ckpt``; ``best/*`` those of ``best.ckpt``.

    Args:
        path: The file ``metrics.json``.
        facts: What is known before the first step: norm, backbone, batch sizes, seed, versions, device, ...
        predictions: The callback that keeps the predictions.
        best: The best checkpoint; without it, a run that goes on has no best figures yet.
    """

    def __init__(self, path: Path, facts: dict[str, Any], predictions: ImagePredictions, best: Path) -> None:
        self.path = path
        self.best = best
        self.facts = facts
        self.predictions = predictions
        self.metrics: dict[str, float] = {}
        self.epochs: list[dict[str, float | None]] = []
        self.best_metrics: dict[str, float] = {}
        self.wall_time_s = 0.0
        self._started = time.monotonic()
        self._began = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a record of a run that does not reach its first validation."""
        self._began = True
        self._write(trainer, pl_module, "running", trainer.current_epoch)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Take over the figures of a validation."""
        if trainer.sanity_checking:
            return
        self.metrics = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        }
        name = pl_module.monitor
        improved = not self.best_metrics or self.metrics[name] > self.best_metrics[f"best/{name}"]
        if improved:
            self.best_metrics = {f"best/{name}": value for name, value in self.metrics.items()}
            self.best_metrics["best/epoch"] = trainer.current_epoch + 1
        throughput = find_throughput(trainer)
        place = {"epoch": trainer.current_epoch + 1, "samples_seen": throughput.samples_seen}
        if self.epochs and place.items() <= self.epochs[-1].items():
            self.epochs.pop()  # of the same weights: a run that goes on inside a step is validated there once more
        self.epochs.append({**place, "train/loss": _rounded(throughput.epoch_loss), **self.metrics})
        self._write(trainer, pl_module, "running", trainer.current_epoch + 1)
        self._write_tables(trainer, pl_module, improved)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the run as finished, or as a trial of a batch or two."""
        status: Status = "fast_dev_run" if trainer.fast_dev_run else "finished"  # type: ignore[attr-defined]
        self._write(trainer, pl_module, status, trainer.current_epoch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring a run to its end that was stopped behind its last step, before its record said so.

        Where nothing is left to train, Lightning calls no ``on_train_end``.
        """
        if self._began or trainer.global_step == 0 or read_json(self.path).get("status") == "finished":
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Mark the run as interrupted or failed."""
        status: Status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
        self._write(trainer, pl_module, status, trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Keep the time spent and the best figures for a resumed run."""
        spent = self.wall_time_s + time.monotonic() - self._started
        return {
            "wall_time_s": spent,
            "metrics": dict(self.metrics),
            "best_metrics": dict(self.best_metrics),
            "epochs": list(self.epochs),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.wall_time_s = float(state_dict["wall_time_s"])
        self.metrics, self.best_metrics = (
            {str(name): _number(value) for name, value in state_dict[key].items()}
            for key in ("metrics", "best_metrics")
        )
        if not self.best.is_file():
            self.best_metrics = {}
        self.epochs = [dict(epoch) for epoch in state_dict["epochs"]]

    def _write(self, trainer: Trainer, pl_module: LightningModule, status: Status, epochs: int) -> None:
        if not trainer.is_global_zero:
            return
        throughput = find_throughput(trainer)
        values = {
            "format_version": FORMAT_VERSION,
            "status": status,
            **self.facts,
            "epochs": epochs,
            "optimizer_steps": trainer.global_step,
            "samples_seen": throughput.samples_seen,
            "train/loss": _rounded(throughput.epoch_loss),
            **self.metrics,
            **self.best_metrics,
            **self._evaluated(),
            "weight_norm": round(weight_norm(pl_module), 4),
            "images_per_sec": round(throughput.images_per_sec, 2),
            "peak_memory_mib": round(peak_memory_mib(pl_module.device), 1),
            "wall_time_s": round(self.wall_time_s + time.monotonic() - self._started, 2),
        }
        with going_on_without("metrics.json"):
            write_json(self.path, values)

    def _evaluated(self) -> dict[str, int]:
        """Count the validation images, of which trainer.limit_val_batches may leave some out."""
        count = self.predictions.count
        return {"val_images": min(count, int(self.facts.get("val_images", count)))} if count else {}

    def _write_tables(self, trainer: Trainer, task: Any, improved: bool) -> None:
        if not trainer.is_global_zero:
            return
        folder, columns = self.path.parent, list(self.epochs[-1])
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with going_on_without("epochs.csv and predictions"):
            write_csv(folder / "epochs.csv", columns, ([row.get(name) for name in columns] for row in self.epochs))
            for name in ("predictions_val.csv", "predictions_best_val.csv")[: 2 if improved else 1]:
                self.predictions.write(folder / name, data.val_dataset.images, task)


def _rounded(loss: float) -> float | None:
    # A resumed run adds up its sum in other parts, which differ in the last digits.
    return round(loss, 5) if math.isfinite(loss) else None


def weight_norm(model: torch.nn.Module) -> float:
    """Compute the Euclidean norm of all weights together, biases and affines of norms left out.

    Behind a norm the size of a weight decides nothing but how fast it turns, so that weight decay there is a schedule
    of the learning rate, which a comparison of norms has to tell.
    """
    norms = [parameter.detach().float().norm() for parameter in model.parameters() if parameter.ndim > 1]
    return float(torch.stack(norms).norm())


def _number(value: Any) -> Any:
    if isinstance(value, int | float):
        return value
    raise TypeError(f"{shortened(value)} where a number belongs")
