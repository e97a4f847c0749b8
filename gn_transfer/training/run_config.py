"""The configuration of a run that was put together in Python, with the keys of the command line."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer

from gn_transfer.data import ImageDataModule
from gn_transfer.training.accumulation import GradientAccumulation
from gn_transfer.training.batch_norm_statistics import BatchNormStatistics
from gn_transfer.training.checkpoint_callbacks import LastCheckpoint
from gn_transfer.training.ema import ExponentialMovingAverage
from gn_transfer.training.freezing import BackboneFreezing
from gn_transfer.training.task import TransferTask

Found = TypeVar("Found", bound=Callback)

_OPTIONAL: dict[str, type[Callback]] = {
    "freezing": BackboneFreezing,
    "ema": ExponentialMovingAverage,
    "checkpoint": LastCheckpoint,
}
_OF_TRAINER = (
    *("max_epochs", "max_steps", "limit_train_batches", "limit_val_batches", "val_check_interval"),
    "check_val_every_n_epoch",
)


def config_of(task: TransferTask, data: ImageDataModule, trainer: Trainer) -> dict[str, Any]:
    """Derive the configuration of a run from its objects, with the keys of the command line."""
    accumulation, batch_norm = find(trainer, GradientAccumulation), find(trainer, BatchNormStatistics)
    parameters = [
        name
        for kind in type(data).__mro__
        if issubclass(kind, ImageDataModule)
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in {"seed", *getattr(data, "NOT_OPTIONS", ())} and parameter.kind is not parameter.VAR_KEYWORD
    ]
    given = {name: getattr(data, name) for name in dict.fromkeys(parameters) if hasattr(data, name)}
    return {
        "seed_everything": data.seed,
        "data": {
            "class_path": f"gn_transfer.data.{type(data).__name__}",
            "init_args": {name: str(value) if isinstance(value, Path) else value for name, value in given.items()},
        },
        "model": asdict(task.model_config),
        "optimizer": asdict(task.optimizer_config),
        **task.own_config(),
        "accumulation": {
            "effective_batch_size": accumulation.effective_batch_size,
            "cache_weights": accumulation.cache_weights,
            "cuda_graphs": accumulation.cuda_graphs,
        },
        "batch_norm": {
            "momentum": batch_norm.momentum,
            "reestimate_images": batch_norm.reestimate_images,
            "evaluation": batch_norm.evaluation,
        },
        **_of_optional_callbacks(trainer),
        "mixed_precision": {"mode": {"bf16-mixed": "bf16", "16-mixed": "fp16"}.get(str(trainer.precision), "fp32")},
        "trainer": {name: _as_given(getattr(trainer, name, None)) for name in _OF_TRAINER},
    }


def _as_given(value: Any) -> Any:
    """Undo what Lightning makes of an argument that was not given: the share 1.0, all batches."""
    return None if isinstance(value, float) and value == 1.0 else value


def _of_optional_callbacks(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Give the keys of the callbacks that a run may have; those of a callback that it lacks have their defaults."""
    found = {}
    for group, kind in _OPTIONAL.items():
        callback = next((one for one in trainer.callbacks if isinstance(one, kind)), None) or kind()  # type: ignore[attr-defined]
        found[group] = {name: getattr(callback, name) for name in inspect.signature(kind).parameters}
    return found


def find(trainer: Trainer, kind: type[Found]) -> Found:
    """Find the callback of a kind; every run has it."""
    found: Found = next(callback for callback in trainer.callbacks if isinstance(callback, kind))  # type: ignore[attr-defined]
    return found
