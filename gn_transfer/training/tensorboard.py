"""TensorBoard: the HPARAMS tab, and images of training and validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard.summary import hparams as hparams_summary

from gn_transfer.backbones import ModelConfig
from gn_transfer.data import ImageDataModule
from gn_transfer.files import going_on_without
from gn_transfer.training.run_folder import RunFolder
from gn_transfer.training.task import WORST, EvaluationFigures

EVENTS = "TensorBoard's events and images"
"""What is given up where the disk is full, in words."""

HPARAMS_FIRST = ("norm", "batch_size", "num_groups", "lr", "seed")
"""The hyper-parameters that the HPARAMS tab shows first; the others are a click away."""

HPARAM_METRICS = ("val/acc1", "val/acc_per_class", "val/loss", "train/loss", "train/images_per_sec")
"""The metrics of the HPARAMS tab, the same in every run of a task: runs with other keys vanish from it."""

SEGMENTATION_METRICS = ("val/miou", "val/pixel_acc", *HPARAM_METRICS[2:])
"""Those of a segmentation."""


def flat_hparams(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Flatten a configuration for the HPARAMS tab: the same keys in every run, no value missing.

    Args:
        config: The resolved configuration, nested.

    Returns:
        Dotted keys without their section where that is plain (``norm``, ``lr``), in a fixed order; ``None`` is
        written ``"none"``, since TensorBoard drops runs with missing values.
    """
    model, data = config["model"], config["data"]["init_args"]
    optimizer, batch_norm = config["optimizer"], config["batch_norm"]
    trainer = config.get("trainer", {})
    values: dict[str, Any] = {
        "norm": model["norm"],
        "backbone": model["backbone"],
        **_groups(ModelConfig(**model)),
        "pretrained": str(model["pretrained"]),
        "batch_size": data["batch_size"],
        "effective_batch_size": config["accumulation"]["effective_batch_size"] or data["batch_size"],
        "img_size": data["img_size"],
        "recipe": data.get("recipe"),
        "shots_per_class": str(data.get("shots_per_class")),
        "optimizer": optimizer["name"],
        "lr": float(optimizer["lr"]),
        "head_lr": float(optimizer["lr"] if optimizer["head_lr"] is None else optimizer["head_lr"]),
        "weight_decay": float(optimizer["weight_decay"]),
        **{name: float(value) for name, value in config.get("regularization", {}).items()},
        **_of_segmentation(config),
        "batch_norm_momentum": str(batch_norm["momentum"]),
        "reestimate_images": batch_norm["reestimate_images"],
        "batch_norm_evaluation": batch_norm["evaluation"],
        "max_epochs": trainer.get("max_epochs"),
        "precision": config["mixed_precision"]["mode"],
        "seed": config["seed_everything"],
    }
    return {key: "none" if value in (None, "None") else value for key, value in values.items()}


def _of_segmentation(config: Mapping[str, Any]) -> dict[str, str]:
    if "segmentation" not in config:
        return {}
    model = ModelConfig(**config["model"])
    return {
        "decoder": str(model.decoder),
        "decoder_norm": model.resolved_decoder_norm,
        "loss": config["segmentation"]["loss"],
    }


def _groups(model: ModelConfig) -> dict[str, str]:
    """The groups of a model in words; "none" where its norm has none."""
    has_groups = model.norm.startswith("gn")
    by_size = has_groups and model.group_size is not None
    return {
        "num_groups": str(model.resolved_num_groups if has_groups and not by_size else None),
        "group_size": str(model.group_size if by_size else None),
    }


class RunLogger(TensorBoardLogger):
    """TensorBoard in a run's folder, with hyper-parameters that fill the HPARAMS tab.

    The tab's rows are announced at the start, so that a killed run shows too; its metrics are the run's own scalars.

    Args:
        run: The run.
        hparams: See :func:`flat_hparams`.
    """

    def __init__(self, run: RunFolder, hparams: Mapping[str, bool | int | float | str]) -> None:
        super().__init__(save_dir=run.logs, name="", version="", default_hp_metric=False)
        self._flat = dict(hparams)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars, unless the disk is full."""
        with going_on_without(EVENTS):
            for name, value in metrics.items():
                self.experiment.add_scalar(name, value, step)

    def save(self) -> None:
        """Write nothing but events: the configuration is in ``config.yaml`` already."""
        with going_on_without(EVENTS):
            self.experiment.flush()

    def announce(self) -> None:
        """Write the run's row of the HPARAMS tab, without values of its metrics."""
        experiment, session_start, _ = _summaries(self._flat)
        with going_on_without(EVENTS):
            writer = self.experiment._get_file_writer()
            writer.add_summary(experiment)
            writer.add_summary(session_start)
            self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Mark the row as finished and close the file."""
        _, _, session_end = _summaries(self._flat)
        with going_on_without(EVENTS):
            self.experiment._get_file_writer().add_summary(session_end)
            super().finalize(status)


def _summaries(flat: dict[str, Any]) -> tuple[Any, Any, Any]:
    names = SEGMENTATION_METRICS if "decoder" in flat else HPARAM_METRICS
    experiment, start, end = hparams_summary(flat, dict.fromkeys(names, 0.0))  # type: ignore[no-untyped-call]
    # TensorBoard shows only the first few axes, and takes those first of which it is told that they differ.
    stored = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(stored.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in HPARAMS_FIRST
    stored.content = content.SerializeToString()
    return experiment, start, end


class TrainingImages(Callback):
    """Show training images as the model sees them, at the start of ``fit``: in TensorBoard, and in a file of the run.

    Args:
        count: How many images to show.

    Attributes:
        path: The file, a JPEG; None writes none.
    """

    def __init__(self, count: int = 24) -> None:
        self.count = count
        self.path: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Log to each TensorBoard logger, and write the file."""
        loggers = _tensorboard_loggers(trainer)
        if trainer.is_global_zero and (loggers or self.path is not None):
            data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
            sheet = pl_module.training_sheet(data, self.count)
            with going_on_without(EVENTS):
                for logger in loggers:
                    logger.experiment.add_image("train/images", sheet, trainer.global_step, dataformats="HWC")
                if self.path is not None:
                    Image.fromarray(sheet).save(self.path, "JPEG", quality=90)


class ValidationFigures(Callback):
    """Log the task's figures of each validation to TensorBoard, and keep the worst images of the best one in a file.

    Attributes:
        path: The file, a JPEG; None writes none.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._figures: EvaluationFigures | None = None
        self._best = -math.inf

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget the previous validation."""
        self._figures = pl_module.create_figures()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hand the batch on, without images that only fill up the batches of several processes."""
        assert self._figures is not None
        if own := pl_module.own_images_of_batch:
            self._figures.update(outputs[:own], *(part[:own] for part in batch))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log to each TensorBoard logger, and write the file."""
        if trainer.sanity_checking or self._figures is None:
            return
        value = float(trainer.callback_metrics[pl_module.monitor])
        path, self._best = self.path if value > self._best else None, max(value, self._best)
        if path is None and not any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            return
        figures, images = self._figures.draw()  # in every process: a confusion matrix gathers from all
        with going_on_without(EVENTS):
            if path is not None and WORST in images and trainer.is_global_zero:
                Image.fromarray(images[WORST]).save(path, "JPEG", quality=90)
            for logger in _tensorboard_loggers(trainer):
                for name, figure in figures.items():
                    logger.experiment.add_figure(name, figure, global_step=trainer.global_step)
                for name, image in images.items():
                    logger.experiment.add_image(name, image, trainer.global_step, dataformats="HWC")

    def state_dict(self) -> dict[str, float]:
        """Keep the best value for a resumed run."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on from there."""
        self._best = float(state_dict["best"])


def _tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
