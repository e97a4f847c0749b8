"""TensorBoard: the HPARAMS tab, and images of training and validation."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard.summary import hparams as hparams_summary
from torchmetrics.classification import MulticlassConfusionMatrix

from gn_transfer.backbones import ModelConfig
from gn_transfer.data import ImageDataModule
from gn_transfer.data.contact_sheet import contact_sheet
from gn_transfer.data.sampler import epoch_order
from gn_transfer.training.mixing import MixupCutmix
from gn_transfer.training.run_folder import RunFolder

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

    def save(self) -> None:
        """Write nothing but events: the configuration is in ``config.yaml`` already."""
        self.experiment.flush()

    def announce(self) -> None:
        """Write the run's row of the HPARAMS tab, without values of its metrics."""
        experiment, session_start, _ = _summaries(self._flat)
        writer = self.experiment._get_file_writer()
        writer.add_summary(experiment)
        writer.add_summary(session_start)
        self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Mark the row as finished and close the file."""
        _, _, session_end = _summaries(self._flat)
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


def training_contact_sheet(data: ImageDataModule, mixer: MixupCutmix | None, count: int) -> np.ndarray:
    """Show the first training images of epoch 0 as the model sees them, with their labels.

    Args:
        data: Set up for fit.
        mixer: What mixes training images, or None.
        count: How many to show, as one accumulation step where they are mixed.

    Returns:
        Pixels uint8, shape ``(H, W, 3)``.
    """
    dataset, sampler = data.train_dataset, data.train_sampler
    order = epoch_order(len(dataset), sampler.seed, 0, sampler.shuffle)[:count]
    images, targets = dataset.batch([(0, index) for index in order])
    captions = [[data.classes[target]] for target in targets.tolist()]
    if mixer is not None:
        mixed = mixer(images.float(), targets, step=0, offset=0)
        images = mixed.pixels.round().byte()
        for caption, partner, weight in zip(captions, mixed.partners.tolist(), mixed.weights.tolist(), strict=True):
            caption.append(f"{weight:.0%}, {data.classes[partner]} {1 - weight:.0%}" if weight < 1 else "100%")
    pixels = images.permute(0, 2, 3, 1).numpy()
    return contact_sheet(list(zip(pixels, captions, strict=True)))


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
            sheet = training_contact_sheet(data, pl_module.create_mixer(data.seed, 0), self.count)
            for logger in loggers:
                logger.experiment.add_image("train/images", sheet, trainer.global_step, dataformats="HWC")
            if self.path is not None:
                Image.fromarray(sheet).save(self.path, "JPEG", quality=90)


class ValidationFigures(Callback):
    """Log a confusion matrix and the worst predictions of each validation to TensorBoard.

    Args:
        worst: How many images to show, those with the highest loss.
    """

    def __init__(self, worst: int = 12) -> None:
        self.worst = worst
        self._confusion: MulticlassConfusionMatrix | None = None
        self._heap: list[tuple[float, int, np.ndarray, int, int, float]] = []
        self._serial = 0

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget the previous validation."""
        self._confusion = MulticlassConfusionMatrix(len(pl_module.classes)).to(pl_module.device)
        self._heap, self._serial = [], 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count, and keep the worst images so far; only those are copied."""
        assert self._confusion is not None
        images, targets = batch
        self._confusion.update(outputs, targets)
        probs = F.softmax(outputs.float(), dim=1)
        preds = probs.argmax(dim=1)
        losses = F.cross_entropy(outputs.float(), targets, reduction="none")
        for index, loss in enumerate(losses.tolist()):
            if len(self._heap) == self.worst and loss <= self._heap[0][0]:
                continue
            self._serial += 1
            pixels = images[index].expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy().copy()  # grey, too
            pred = int(preds[index])
            entry = (loss, self._serial, pixels, int(targets[index]), pred, float(probs[index, pred]))
            (heapq.heappush if len(self._heap) < self.worst else heapq.heapreplace)(self._heap, entry)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log to each TensorBoard logger."""
        loggers = _tensorboard_loggers(trainer)
        if trainer.sanity_checking or not loggers or not self._heap:
            return
        assert self._confusion is not None
        classes = pl_module.classes
        figure, _ = self._confusion.plot(labels=classes, add_text=len(classes) <= 20, cmap="Blues")
        size = min(14.0, 3.0 + 0.35 * len(classes))
        figure.set_size_inches(size, size)
        worst = contact_sheet(
            [
                (pixels, [classes[target], f"predicted {classes[pred]}", f"probability {prob:.0%}"])
                for _, _, pixels, target, pred, prob in sorted(self._heap, key=lambda entry: -entry[0])
            ],
            columns=4,
        )
        for logger in loggers:
            logger.experiment.add_figure("val/confusion", figure, global_step=trainer.global_step)
            logger.experiment.add_image("val/worst_predictions", worst, trainer.global_step, dataformats="HWC")


def _tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
