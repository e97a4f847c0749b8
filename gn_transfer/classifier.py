"""The model: pixels in, logits out, one step shared by training, validation and test."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from gn_transfer.backbones import (
    Backbone,
    check_input,
    create_backbone,
    default_channels,
    parameter_depths,
    rebuild,
)
from gn_transfer.config import ConfigError, Norm
from gn_transfer.layers import (
    OncePerWindow,
    batch_statistics,
    corrected_momentum,
    default_groups,
    preferred_memory_format,
    reestimate_statistics,
)
from gn_transfer.mixing import WindowMixer
from gn_transfer.optim import SCHEDULES, OptimizerName, ScheduleName, create_optimizer, parameter_groups
from gn_transfer.transfer import BN_FAMILY, Conversion, TransferReport

CHECKPOINT_VERSION = 1

CALIBRATION_PICTURES = 256
"""Training pictures that ``model.conversion: calibrated`` looks at."""

FROZEN_STATISTICS_BATCH = 32
"""Batch at which the statistics of frozen batch norms are re-estimated; they never see the training batch."""


@dataclass(frozen=True)
class MicroBatch:
    """Where a forward pass stands in its window of accumulated gradients.

    Attributes:
        first: It opens the window.
        last: The optimizer steps after it.
        loss_scale: Factor on its mean loss that makes every picture of the window weigh alike.
        window: Number of the window since the run began.
        offset: Pictures of the window before it, on this device.
    """

    first: bool = True
    last: bool = True
    loss_scale: float = 1.0
    window: int = 0
    offset: int = 0


class TransferClassifier(LightningModule):
    """Fine-tune a timm net under the normalization of the switch.

    The net is built when the data knows its classes. Pixels come as uint8 and are normalized here, with the statistics
    of the pretrained weights, so that a comparison of norms cannot be spoilt by wrong ones.

    Args:
        backbone: timm's name of the net, without a weights tag: resnet18, resnetv2_50, ...
        norm: The switch: bn, bn_frozen, bn_sync, gn, gn_ws (GroupNorm + Weight Standardization), bn_ws, ln, in, none.
        num_groups: Groups of GroupNorm; null takes 32, or 4 with conversion calibrated.
        group_size: Channels per group, instead of num_groups.
        pretrained: null from scratch, auto for the weights that fit backbone and norm, a timm tag, or a file.
        conversion: What to do with weights trained under BN when the net has none: refuse, copy the affine part, or
            calibrated: set the affine of each norm (gn, ln, in) in closed form on a few hundred training pictures so
            that the net starts near the BN net; the fewer groups, the nearer.
        in_chans: Channels of the pictures, 3 or 1 (grey); null: 1 for cnn_mnist, else 3.
        once_per_window: Standardize and cast weights once per accumulation window instead of once per micro-batch.
        channels_last: Memory layout of the pictures; auto takes what measured faster for the norm and device.
        compile: Compile the net with torch.compile.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        optimizer: sgd with momentum, adamw or adam.
        lr: Learning rate per optimizer step, of the backbone.
        head_lr: Learning rate of the new head; null takes lr.
        momentum: Momentum of sgd; first beta of adam.
        weight_decay: Decay of weights, not of norms and biases.
        layer_decay: Factor on the learning rate per layer towards the stem, in (0, 1]; 1 disables it.
        schedule: cosine to zero or constant, after the warm-up; bit: BiT's HyperRule, a tenth after 40, 60 and 80 % of
            the run (with warmup_fraction 0.2).
        warmup_fraction: Part of all optimizer steps in which the learning rate rises, in [0, 1).
        label_smoothing: Weight of the uniform distribution in the training target, in [0, 1).
        mixup: alpha of Mixup with the picture before in the window of accumulated gradients; 0 disables it.
        cutmix: alpha of CutMix with that picture; 0 disables it, with both a coin decides.
        clip_norm: Largest norm of the gradient of a whole window; longer ones are shortened to it; null disables it.
        freeze_epochs: First epochs in which the head alone learns and BN statistics stay as they are; 0 disables it.
        bn_momentum: Weight of a micro-batch in BN's running statistics, in (0, 1]; corrected takes
            1 - 0.9^(batch_size / 16), so that small micro-batches forget no faster per picture; null keeps 0.1.
        reestimate_bn: Training pictures on which BN statistics are re-estimated, by pooling E[x] and E[x^2]: before
            each validation, or with norm bn_frozen once before training; 0 disables it.
        bn_evaluation: Statistics that BN evaluates with: running, or batch: those of the batch at hand, which then has
            data.batch_size pictures, as in training. It separates bad running statistics from a bad net.
    """

    mean: Tensor
    std: Tensor
    class_weight: Tensor | None

    def __init__(
        self,
        backbone: str = "resnetv2_18",
        norm: Norm = "gn_ws",
        num_groups: int | None = None,
        group_size: int | None = None,
        pretrained: str | None = None,
        conversion: Conversion = "refuse",
        in_chans: Literal[1, 3] | None = None,
        once_per_window: bool = True,
        channels_last: bool | Literal["auto"] = "auto",
        compile: bool = False,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerName = "sgd",
        lr: float = 0.01,
        head_lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        layer_decay: float = 1.0,
        schedule: ScheduleName = "cosine",
        warmup_fraction: float = 0.1,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        clip_norm: float | None = None,
        freeze_epochs: int = 0,
        bn_momentum: float | Literal["corrected"] | None = None,
        reestimate_bn: int = 0,
        bn_evaluation: Literal["running", "batch"] = "running",
    ) -> None:
        super().__init__()
        _check_range("model.lr", lr, low=0.0, open_low=True)
        if head_lr is not None:
            _check_range("model.head_lr", head_lr, low=0.0)
        _check_range("model.momentum", momentum, low=0.0, high=1.0)
        _check_range("model.weight_decay", weight_decay, low=0.0)
        _check_range("model.layer_decay", layer_decay, low=0.0, high=1.0, open_low=True, open_high=False)
        _check_range("model.warmup_fraction", warmup_fraction, low=0.0, high=1.0)
        _check_range("model.label_smoothing", label_smoothing, low=0.0, high=1.0)
        if clip_norm is not None:
            _check_range("model.clip_norm", clip_norm, low=0.0, open_low=True)
        _check_range("model.freeze_epochs", freeze_epochs, low=0)
        if isinstance(bn_momentum, float):
            _check_range("model.bn_momentum", bn_momentum, low=0.0, high=1.0, open_low=True, open_high=False)
        _check_range("model.reestimate_bn", reestimate_bn, low=0)
        if norm not in BN_FAMILY and (bn_momentum is not None or reestimate_bn):
            key = "bn_momentum" if bn_momentum is not None else "reestimate_bn"
            raise ConfigError(f"model.{key} is for batch norms, and model.norm={norm} has none; leave it out.")
        if bn_evaluation == "batch" and norm not in BN_FAMILY - {"bn_frozen"}:
            raise ConfigError(
                f"model.bn_evaluation=batch: model.norm={norm} takes no statistics from a batch; use running, or a "
                f"norm of {', '.join(sorted(BN_FAMILY - {'bn_frozen'}))}."
            )
        _check_range("model.mixup", mixup, low=0.0)
        _check_range("model.cutmix", cutmix, low=0.0)
        self.backbone = backbone
        self.norm: Norm = norm
        calibrated = conversion == "calibrated"
        self.num_groups = default_groups(calibrated=calibrated) if num_groups is None else num_groups
        self.group_size = group_size
        self.pretrained = pretrained
        self.conversion: Conversion = conversion
        self.in_chans = default_channels(backbone) if in_chans is None else in_chans
        self.once_per_window = once_per_window
        self.channels_last = channels_last
        self.compile_net = compile
        self.gradient_checkpointing = gradient_checkpointing
        self.optimizer_name: OptimizerName = optimizer
        self.lr = lr
        self.head_lr = head_lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.layer_decay = layer_decay
        self.schedule: ScheduleName = schedule
        self.warmup_fraction = warmup_fraction
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.cutmix = cutmix
        self.clip_norm = clip_norm
        self.freeze_epochs = freeze_epochs
        self.bn_momentum = bn_momentum
        self.reestimate_bn = reestimate_bn
        self.bn_evaluation: Literal["running", "batch"] = bn_evaluation

        self.micro_batch = MicroBatch()
        self.evaluation_precision: torch.dtype | None = None
        self.classes: list[str] = []
        self.head = ""
        self.report: TransferReport | None = None
        self.net: nn.Module | None = None
        self._engine: OncePerWindow | None = None
        self._mixer: WindowMixer | None = None
        self._body_frozen = False
        self._memory_format = torch.contiguous_format
        self._restored: dict[str, Any] | None = None
        self.run_config: dict[str, Any] = {}

    # -- building -----------------------------------------------------------------------------------------------

    def build(
        self,
        classes: list[str],
        *,
        class_weight: Tensor | None = None,
        batch_size: int = 1,
        pictures: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Build the net for these classes; does nothing when it stands already.

        Args:
            classes: Names of the classes, in the order of the targets.
            class_weight: Weight of each class in the training loss, shape ``(num_classes,)``, float32.
            batch_size: Pictures per forward pass in training, for ``bn_momentum``.
            pictures: Gives that many training pictures, uint8 ``(N, 3, H, W)``, preprocessed as in evaluation; needed
                for ``conversion: calibrated`` and for ``reestimate_bn`` with ``bn_frozen``.

        Raises:
            ConfigError: See :func:`gn_transfer.backbones.create_backbone`.
        """
        if self.net is not None:
            return
        if self._restored is not None:
            stored = self._restored
            architecture = stored["architecture"]
            self.net = rebuild(
                architecture["architecture"],
                norm=self.norm,
                num_classes=len(stored["classes"]),
                head=architecture["head"],
                num_groups=self.num_groups,
                group_size=self.group_size,
                in_chans=self.in_chans,
            )
            self.head = architecture["head"]
            self.report = TransferReport(**{k: _frozen(v) for k, v in stored["transfer_report"].items()})
            mean, std = architecture["mean"], architecture["std"]
        else:
            built: Backbone = create_backbone(
                self.backbone,
                norm=self.norm,
                num_classes=len(classes),
                pretrained=self.pretrained,
                num_groups=self.num_groups,
                group_size=self.group_size,
                conversion=self.conversion,
                in_chans=self.in_chans,
                calibration=pictures(CALIBRATION_PICTURES) if pictures and self.conversion == "calibrated" else None,
            )
            self.net, self.head, self.report = built.net, built.head, built.report
            mean, std = list(built.mean), list(built.std)
        self.classes = list(classes)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255.0, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255.0, persistent=False)
        self.register_buffer("class_weight", class_weight, persistent=False)
        if self.bn_momentum is not None:
            value = corrected_momentum(batch_size) if self.bn_momentum == "corrected" else self.bn_momentum
            for layer in self.net.modules():
                if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
                    layer.momentum = value
        if self.reestimate_bn and self.norm == "bn_frozen" and self._restored is None and pictures is not None:
            self._reestimate(pictures(self.reestimate_bn), FROZEN_STATISTICS_BATCH)
        if self.gradient_checkpointing:
            if not hasattr(self.net, "set_grad_checkpointing"):
                raise ConfigError(f"model.gradient_checkpointing: {self.backbone} does not offer it; set it to false.")
            self.net.set_grad_checkpointing(True)  # type: ignore[operator]
        self._metrics(len(classes))

    def _metrics(self, num_classes: int) -> None:
        def accuracies(prefix: str) -> MetricCollection:
            return MetricCollection(
                {
                    "acc1": MulticlassAccuracy(num_classes, average="micro"),
                    "acc_per_class": MulticlassAccuracy(num_classes, average="macro"),
                },
                prefix=f"{prefix}/",
            )

        self.val_metrics, self.test_metrics = accuracies("val"), accuracies("test")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def configure_model(self) -> None:
        """Build the net if the command line has not done so, and lay it out for training.

        Lightning calls this once the data is set up and before it wraps the net for several processes: DDP's buckets
        take over the weights' layout, which must not change under them.
        """
        data = self._data()
        if self.net is None:
            self.build_for(data)
        assert self.net is not None
        if self.trainer.state.fn == "fit":
            if self.freeze_epochs and self.trainer.world_size > 1:
                raise ConfigError(
                    f"model.freeze_epochs={self.freeze_epochs}: DDP cannot unfreeze parameters while it runs; train "
                    "the head on one device first, or set it to 0."
                )
            self._memory_format = self.memory_format(self.trainer.strategy.root_device.type, data.batch_size)
            self.net.to(memory_format=self._memory_format)  # type: ignore[call-overload]

    def build_for(self, data: Any) -> None:
        """Build the net for a data module that is set up."""
        fits = hasattr(data, "train_dataset")
        self.build(
            data.classes,
            class_weight=data.class_weight_tensor if fits else None,
            batch_size=data.batch_size,
            pictures=data.training_pictures if fits else None,
        )

    def check_batch(self, *, batch_size: int, img_size: int) -> None:
        """Refuse a batch that the net cannot train on; see :func:`gn_transfer.backbones.check_input`."""
        assert self.net is not None
        check_input(self.net, self.norm, batch_size=batch_size, img_size=img_size, in_chans=self.in_chans)

    def check_window(self, pictures: int) -> None:
        """Refuse Mixup and CutMix where a window has nothing to mix.

        Args:
            pictures: In a window of accumulated gradients, on one device.

        Raises:
            ConfigError: There is only one.
        """
        if pictures < 2 and (self.mixup > 0 or self.cutmix > 0):
            raise ConfigError(
                f"model.mixup={self.mixup:g}, model.cutmix={self.cutmix:g}: pictures are mixed within the window of "
                "accumulated gradients, and this one has a single picture; set accumulation.effective_batch_size to 2 "
                "or more, or both to 0."
            )

    def create_mixer(self, seed: int, rank: int) -> WindowMixer | None:
        """Build what mixes training pictures; None with ``model.mixup`` and ``model.cutmix`` at 0."""
        return WindowMixer(self.mixup, self.cutmix, (seed, rank)) if self.mixup > 0 or self.cutmix > 0 else None

    @property
    def normalizes_over_batch(self) -> bool:
        """Whether training statistics are those of the micro-batch, so that accumulation does not help them."""
        return self.norm in BN_FAMILY - {"bn_frozen"}

    # -- the step -----------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits.

        Args:
            images: Pixels, uint8, shape ``(B, in_chans, H, W)``.

        Returns:
            Logits, shape ``(B, num_classes)``, float32 unless autocast says otherwise.
        """
        return self._logits(self.normalize(images))

    def normalize(self, images: Tensor) -> Tensor:
        """Bring uint8 pixels to the mean and standard deviation that the weights expect, float32."""
        return (images.float() - self.mean) / self.std

    def _logits(self, pixels: Tensor) -> Tensor:
        assert self.net is not None
        logits: Tensor = self.net(pixels.contiguous(memory_format=self._memory_format))
        return logits

    def shared_step(self, batch: tuple[Tensor, Tensor], *, training: bool) -> tuple[Tensor, Tensor]:
        """Compute loss and logits of a batch, for every stage.

        Args:
            batch: Pixels uint8 ``(B, 3, H, W)`` and targets int64 ``(B,)``.
            training: Mix, and apply label smoothing and class weights.

        Returns:
            Mean loss (scalar, float32) and detached logits ``(B, num_classes)``, float32.
        """
        images, targets = batch
        pixels = self.normalize(images)
        mixed = None
        if training and self._mixer is not None:
            mixed = self._mixer(pixels, targets, window=self.micro_batch.window, offset=self.micro_batch.offset)
            pixels = mixed.pixels
        logits = self._logits(pixels).float()

        def losses(labels: Tensor) -> Tensor:
            return F.cross_entropy(
                logits,
                labels,
                weight=self.class_weight if training else None,
                label_smoothing=self.label_smoothing if training else 0.0,
                reduction="none",
            )

        if mixed is None:
            return losses(targets).mean(), logits.detach()
        loss = torch.lerp(losses(mixed.partners), losses(targets), mixed.weights).mean()
        return loss, logits.detach()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Train on a micro-batch; the accumulation callback has set :attr:`micro_batch`."""
        if self._engine is not None:
            self._engine.micro_batch(first=self.micro_batch.first, last=self.micro_batch.last)
        loss, logits = self.shared_step(batch, training=True)
        return {"loss": loss * self.micro_batch.loss_scale, "mean_loss": loss.detach(), "logits": logits}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Evaluate a batch of validation pictures."""
        return self._evaluate(batch, self.val_metrics, self.val_loss)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Evaluate a batch of test pictures."""
        return self._evaluate(batch, self.test_metrics, self.test_loss)

    def _evaluate(self, batch: tuple[Tensor, Tensor], accuracies: MetricCollection, mean_loss: MeanMetric) -> Tensor:
        device, dtype = self.device.type, self.evaluation_precision
        assert self.net is not None
        statistics = batch_statistics(self.net) if self.bn_evaluation == "batch" else nullcontext()
        with statistics, torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss, logits = self.shared_step(batch, training=False)
        accuracies.update(logits, batch[1])
        mean_loss.update(loss, len(logits))
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log ``val/acc1``, ``val/acc_per_class`` and ``val/loss``."""
        self._log_epoch(self.val_metrics, self.val_loss, "val/loss")

    def on_test_epoch_end(self) -> None:
        """Log ``test/acc1``, ``test/acc_per_class`` and ``test/loss``."""
        self._log_epoch(self.test_metrics, self.test_loss, "test/loss")

    def _log_epoch(self, accuracies: MetricCollection, mean_loss: MeanMetric, loss_name: str) -> None:
        self.log_dict({**accuracies.compute(), loss_name: mean_loss.compute()}, prog_bar=False)
        accuracies.reset()
        mean_loss.reset()

    # -- batch norm and freezing --------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Re-estimate BN statistics at the size of the training batch, where that was asked for."""
        if self.reestimate_bn and self.norm != "bn_frozen" and self.trainer.state.fn == "fit":
            data = self._data()
            self._reestimate(data.training_pictures(self.reestimate_bn), data.batch_size)

    def _reestimate(self, pictures: Tensor, batch_size: int) -> None:
        assert self.net is not None
        reestimate_statistics(
            self.net,
            ((part.to(self.device).float() - self.mean) / self.std for part in torch.split(pictures, batch_size)),
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Freeze or unfreeze by the epoch alone, so that a resumed run does as it would have done."""
        self._freeze(self.current_epoch < self.freeze_epochs)

    def _freeze(self, frozen: bool) -> None:
        if frozen == self._body_frozen:
            return
        assert self.net is not None
        self._body_frozen = frozen
        for name, parameter in self.net.named_parameters():
            if not name.startswith(f"{self.head}."):
                parameter.requires_grad_(not frozen)
        if self._engine is not None:
            self._engine.reset()
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; a frozen body stays in evaluation, so that its statistics stay."""
        super().train(mode)
        if self._body_frozen and self.net is not None:
            self.net.eval()
            self.net.get_submodule(self.head).train(mode)
        return self

    # -- optimization -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the fused optimizer and the schedule over optimizer steps."""
        assert self.net is not None
        groups = self.parameter_groups(self.net)
        # fp16 gradients are scaled until the step where the optimizer is fused, so their norm would be another one.
        fused = self.clip_norm is None or self.trainer.precision != "16-mixed"
        optimizer = create_optimizer(self.optimizer_name, groups, momentum=self.momentum, fused=fused)
        total = int(self.trainer.estimated_stepping_batches)
        warmup, scale = math.ceil(self.warmup_fraction * total), SCHEDULES[self.schedule]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale(step, total, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """Sort the parameters of the net, or of a copy of it, by learning rate and weight decay."""
        return parameter_groups(
            net.named_parameters(),
            lr=self.lr,
            head=self.head,
            head_lr=self.head_lr,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            depths=parameter_depths(net) if self.layer_decay < 1 else None,
        )

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Shorten the gradient of a window that is longer than ``clip_norm``."""
        if self.clip_norm is not None:
            assert self.net is not None
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip_norm)

    def memory_format(self, device_type: str, batch_size: int) -> torch.memory_format:
        """Choose the layout of activations in training: ``model.channels_last``, or what measured faster."""
        if self.channels_last == "auto":
            return preferred_memory_format(self.norm, device_type, batch_size=batch_size)
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def on_fit_start(self) -> None:
        """Attach the once-per-window engine, and compile."""
        assert self.net is not None
        if self.once_per_window:
            self._engine = OncePerWindow(self.net, compiled=self.compile_net)
        self._mixer = self.create_mixer(self._data().seed, self.global_rank)
        if self.compile_net:
            self.net.compile()

    def on_exception(self, exception: BaseException) -> None:
        """Drop an unfinished window."""
        if self._engine is not None:
            self._engine.reset()

    def on_fit_end(self) -> None:
        """Detach the once-per-window engine; what is evaluated next runs as it is written."""
        if self._engine is not None:
            self._engine.remove()
            self._engine = None
        if self.net is not None:
            self.net._compiled_call_impl = None

    # -- checkpoints --------------------------------------------------------------------------------------------

    def architecture(self) -> dict[str, Any]:
        """Describe the net with plain values, enough to build it again without timm's weights."""
        assert self.report is not None
        return {
            "backbone": self.backbone,
            "architecture": self.report.architecture,
            "norm": self.norm,
            "num_groups": self.num_groups,
            "group_size": self.group_size,
            "head": self.head,
            "in_chans": self.in_chans,
            "mean": (self.mean.flatten() / 255.0).tolist(),
            "std": (self.std.flatten() / 255.0).tolist(),
        }

    def restore(self, stored: dict[str, Any]) -> None:
        """Build the net from a checkpoint's description instead of fetching pretrained weights again.

        Args:
            stored: What :meth:`on_save_checkpoint` wrote under ``gn_transfer``.
        """
        self._restored = stored

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to rebuild the net: plain values only, so that it loads with ``weights_only=True``."""
        assert self.report is not None
        checkpoint.setdefault("gn_transfer", {}).update(
            version=CHECKPOINT_VERSION,
            classes=list(self.classes),
            architecture=self.architecture(),
            transfer_report=self.report.as_dict(),
            **self.run_config,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other classes."""
        stored = checkpoint["gn_transfer"]["classes"]
        if self.classes and stored != self.classes:
            raise ConfigError(
                f"the checkpoint knows the classes {', '.join(stored[:5])} ({len(stored)}), the data has "
                f"{', '.join(self.classes[:5])} ({len(self.classes)}); point data.root at the data it was trained on."
            )

    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_range(
    key: str, value: float, *, low: float, high: float = math.inf, open_low: bool = False, open_high: bool = True
) -> None:
    below = value <= low if open_low else value < low
    above = value >= high if open_high else value > high
    if below or above or math.isnan(value):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ConfigError(f"{key}={value} is out of range; use a number in {interval}.")
