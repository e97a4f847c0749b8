"""The LightningModule around a timm model: building it, running it, storing what rebuilds it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from gn_transfer.backbones import (
    ModelConfig,
    TransferReport,
    build_backbone,
    check_input,
    rebuild_backbone,
)
from gn_transfer.backbones.fitting import CALIBRATION_IMAGES, DISTILLATION_SAMPLES
from gn_transfer.config import ConfigError
from gn_transfer.data.progress import progress_bar
from gn_transfer.layers import GraphedModel, group_counts, preferred_memory_format
from gn_transfer.layers.conv import is_depthwise
from gn_transfer.training import checkpoint
from gn_transfer.training.precision import autocast_dtype


class BackboneModule(LightningModule, ABC):
    """Hold a timm model under a normalization.

    The model is built when the classes are known: by Lightning, from the data module, or by :meth:`build`. Pixels come
    as uint8 and are normalized here, with the statistics of the pretrained weights, so that wrong statistics cannot
    spoil a comparison of norms.

    Args:
        model: Backbone, norm and weights; None takes the defaults.

    Attributes:
        model: The timm model; None until it is built.
        classes: Class names; a target is a position in it.
        head: Name of the classifier module inside :attr:`model`.
        report: What was transferred from the pretrained weights.
        graphed_model: Stands in for :attr:`model` while it trains on a GPU; the accumulation callback sets it.
        run_config: Configuration that every checkpoint stores, set by :func:`gn_transfer.training.train.train`.
    """

    mean: Tensor
    std: Tensor
    class_weight: Tensor | None

    def __init__(self, model: ModelConfig | None = None) -> None:
        super().__init__()
        self.model_config = model or ModelConfig()
        self.model: nn.Module | None = None
        self.classes: list[str] = []
        self.head = ""
        self.report: TransferReport | None = None
        self.run_config: dict[str, Any] = {}
        self._restored: dict[str, Any] | None = None
        self.graphed_model: GraphedModel | None = None
        self._memory_format = torch.contiguous_format

    @abstractmethod
    def configure_metrics(self, num_classes: int) -> MetricCollection:
        """Create the metrics of an evaluation, without a prefix."""

    # -- building -----------------------------------------------------------------------------------------------

    @property
    def norm(self) -> str:
        """The normalization, ``model.norm``."""
        return self.model_config.norm

    @property
    def num_groups(self) -> int:
        """Groups of the model's group norms, in narrow layers it may be less; what the configuration says before."""
        config = self.model_config
        has_groups = self.model is not None and config.norm.startswith("gn") and config.group_size is None
        counts = group_counts(self.model) if has_groups else {}  # type: ignore[arg-type]
        return max(counts.values(), default=config.resolved_num_groups)

    def configure_model(self) -> None:
        """Build the model if that has not been done, and give it the memory format of training.

        Lightning calls this after the data is set up and before it wraps the module for several processes. DDP's
        buckets take over the layout of the weights, so it must not change later.
        """
        if self.model is None:
            self.build_for(self.trainer.datamodule)  # type: ignore[attr-defined]
        assert self.model is not None
        if self.trainer.state.fn == "fit":
            precision = str(self.trainer.precision)
            self._memory_format = self.memory_format(self.trainer.strategy.root_device.type, precision)
            self.model.to(memory_format=self._memory_format)  # type: ignore[call-overload]

    def build_for(self, data: Any) -> None:
        """Build the model for a data module that is set up.

        Raises:
            ConfigError: There is no data module of ours that would name the classes.
        """
        if not hasattr(data, "classes"):
            raise ConfigError(
                "the module does not know its classes: train with a data module of gn_transfer, or call "
                "module.build(class_names) before trainer.fit(module, loaders)."
            )
        fits = hasattr(data, "train_dataset")
        self.build(
            data.classes,
            class_weight=data.class_weight_tensor if fits else None,
            calibration_images=data.training_images if fits else None,
            conversion_cache=_conversion_cache(data),
        )

    def build(
        self,
        classes: list[str],
        *,
        class_weight: Tensor | None = None,
        calibration_images: Callable[[int], Tensor] | None = None,
        conversion_cache: Path | None = None,
    ) -> None:
        """Build the model for these classes. Does nothing if it is built already.

        Args:
            classes: Names of the classes, in the order of the targets.
            class_weight: Weight of each class in the training loss, shape ``(num_classes,)``, float32.
            calibration_images: Returns that many training images, uint8 ``(N, in_chans, H, W)``, preprocessed as in
                evaluation. Needed for ``conversion: calibrated`` and ``distilled``.
            conversion_cache: Folder where what came of these is kept; None converts anew.

        Raises:
            ConfigError: See :func:`gn_transfer.backbones.create_backbone`.
        """
        if self.model is not None:
            return
        config = self.model_config
        if self._restored is not None:
            try:
                built = rebuild_backbone(config, self._restored["architecture"], self._restored["transfer_report"])
            except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
                raise ConfigError(
                    f"no model can be built from the checkpoint's description ({type(error).__name__}: {error}); use "
                    "another checkpoint of the run, or the version of gn-transfer that wrote it."
                ) from error
        else:
            number = {"calibrated": CALIBRATION_IMAGES, "distilled": DISTILLATION_SAMPLES}.get(config.conversion)
            images = calibration_images(number) if number and calibration_images is not None else None
            built = build_backbone(
                config,
                len(classes),
                calibration=images,
                progress=progress_bar,
                conversion_cache=conversion_cache,
            )
        self.model, self.head, self.report = built.model, built.head, built.report
        if config.gradient_checkpointing:
            if not hasattr(self.model, "set_grad_checkpointing"):
                raise ConfigError(
                    f"model.gradient_checkpointing=true: {config.backbone} does not support it; set it to false."
                )
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        self.classes = list(classes)
        self.register_buffer("mean", torch.tensor(built.mean).view(1, -1, 1, 1) * 255.0, persistent=False)
        self.register_buffer("std", torch.tensor(built.std).view(1, -1, 1, 1) * 255.0, persistent=False)
        self.register_buffer("class_weight", class_weight, persistent=False)
        metrics = self.configure_metrics(len(classes))
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val/"), metrics.clone(prefix="test/")
        # A loss that is NaN must show: torchmetrics leaves it out of the mean, and with "disable" drops all weights.
        self.val_loss, self.test_loss = MeanMetric(nan_strategy=math.inf), MeanMetric(nan_strategy=math.inf)

    def restore(self, stored: dict[str, Any]) -> None:
        """Build from a checkpoint's description later, instead of loading pretrained weights again.

        Args:
            stored: What :meth:`on_save_checkpoint` wrote under ``gn_transfer``.
        """
        self._restored = stored
        self.run_config = {key: stored[key] for key in ("config", "config_name", "split") if key in stored}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **_: Any) -> Self:  # type: ignore[override]
        """Load a trained module from a checkpoint of ours, on the CPU and in evaluation mode.

        Args:
            checkpoint_path: Local path of a ``.ckpt`` file. No code in it is run.

        Raises:
            ConfigError: The file is missing, corrupt or not a checkpoint of gn_transfer.
        """
        content = checkpoint.read_checkpoint(checkpoint_path, argument="checkpoint")
        return checkpoint.rebuild_task(cls, content, Path(checkpoint_path)).eval()

    def check_batch(self, *, batch_size: int, img_size: int) -> None:
        """Refuse a batch that the model cannot train on; see :func:`gn_transfer.backbones.check_input`."""
        assert self.model is not None
        config = self.model_config
        check_input(
            self.model,
            config.norm,
            batch_size=batch_size,
            img_size=img_size,
            in_chans=config.resolved_in_chans,
            decoder=config.decoder,
        )

    # -- running ------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits.

        Args:
            images: Pixels, uint8, shape ``(B, in_chans, H, W)``.

        Returns:
            Logits, float32 unless autocast says otherwise; their shape is the task's.
        """
        return self.compute_logits(self.normalize(images))

    def normalize(self, images: Tensor) -> Tensor:
        """Bring uint8 pixels to the mean and standard deviation that the weights expect; float32.

        Raises:
            ConfigError: In evaluation, pixels that are not uint8.
        """
        if not self.training and images.dtype != torch.uint8:
            raise ConfigError(
                f"the module takes pixels as uint8, 0 to 255, and normalizes them itself; these are {images.dtype}."
            )
        return (images.float() - self.mean) / self.std

    def compute_logits(self, pixels: Tensor) -> Tensor:
        """Run the model on normalized pixels, shape ``(B, in_chans, H, W)``."""
        assert self.model is not None
        model = self.graphed_model or self.model
        logits: Tensor = model(pixels.contiguous(memory_format=self._memory_format))
        return logits

    def memory_format(self, device_type: str, precision: str) -> torch.memory_format:
        """Choose the memory format of training: ``model.channels_last``, or the format that measured faster.

        Args:
            device_type: ``cpu``, ``cuda``, ...
            precision: Lightning's name of the precision.
        """
        config = self.model_config
        if config.channels_last == "auto":
            assert self.model is not None
            return preferred_memory_format(
                config.norm,
                device_type,
                segments=config.decoder is not None,
                depthwise=any(is_depthwise(layer) for layer in self.model.modules()),
                half=autocast_dtype(precision) is not None,
            )
        return torch.channels_last if config.channels_last else torch.contiguous_format

    def on_fit_start(self) -> None:
        """Compile the model if asked to."""
        if self.model_config.compile:
            assert self.model is not None
            self.model.compile()

    def on_fit_end(self) -> None:
        """Run uncompiled from now on."""
        if self.model is not None:
            self.model._compiled_call_impl = None

    # -- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, content: dict[str, Any]) -> None:
        """Add what is needed to rebuild the model."""
        checkpoint.describe_task(self, content)

    def on_load_checkpoint(self, content: dict[str, Any]) -> None:
        """Refuse a checkpoint of other classes."""
        if self.classes:
            checkpoint.check_classes(content["gn_transfer"]["classes"], self.classes)


def _conversion_cache(data: Any) -> Path | None:
    """Where conversions are kept: beside the decoded images, if those may be kept on the disk."""
    cache = getattr(data, "decoded_cache", None)
    return cache.folder / "conversions" if cache is not None and cache.mode in ("auto", "disk") else None
