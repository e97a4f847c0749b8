"""What a run is going to do, computed before its first step: the rows that ``fit`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch import nn

from gn_transfer.config import ConfigError, is_out_of_memory
from gn_transfer.data import ImageDataModule
from gn_transfer.data.describe import describe_data
from gn_transfer.training.accumulation import GradientAccumulation, micro_batches_per_step
from gn_transfer.training.batch_norm_statistics import BatchNormStatistics
from gn_transfer.training.batch_size import BatchSizeChoice
from gn_transfer.training.progress import duration
from gn_transfer.training.schedules import bit_samples
from gn_transfer.training.split_check import about_source, check_own_splits
from gn_transfer.training.step_cost import measure_step
from gn_transfer.training.task import TransferTask

_HINT = "--data.batch_size auto measures whether more images at a time train faster, to the same result"


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    Attributes:
        rows: Name and value of each line.
        warnings: What the user should know before waiting for the result.
        seconds: How long the training steps will take.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> Table:
        """Lay the rows out for the terminal."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.rows:
            table.add_row(name, value)
        return table


def make_plan(
    task: TransferTask,
    data: ImageDataModule,
    *,
    accumulation: GradientAccumulation,
    batch_norm: BatchNormStatistics,
    frozen_epochs: int = 0,
    precision: str,
    device: torch.device,
    num_devices: int,
    max_epochs: int,
    max_steps: int,
    limit_batches: float,
    batch_sizes: BatchSizeChoice | None = None,
) -> Plan:
    """Compute images, steps, precision, weights and the time that a run will take.

    Args:
        task: The module, built.
        data: The data, set up for fitting.
        accumulation: The callback that accumulates gradients.
        batch_norm: The callback that controls running statistics.
        frozen_epochs: First epochs in which the head alone learns.
        precision: Lightning's name of the precision.
        device: Where the model will train.
        num_devices: Devices that train together.
        max_epochs: Epochs, -1 for no limit.
        max_steps: Optimizer steps, -1 for no limit.
        limit_batches: ``trainer.limit_train_batches``: a count (int) or a fraction (float) of the micro-batches.
        batch_sizes: What was measured for ``data.batch_size=auto``.

    Returns:
        The plan.

    Raises:
        ConfigError: The effective batch cannot be made of micro-batches.
    """
    assert task.report is not None
    assert task.model is not None
    micro_batches = micro_batches_per_step(accumulation.effective_batch_size, data.batch_size, num_devices)
    task.check_accumulation(micro_batches * data.batch_size)
    batches = _batches(-(-len(data.train_dataset) // num_devices), data.batch_size, limit_batches)
    steps_per_epoch = -(-batches // micro_batches)
    epochs = max_epochs if max_epochs >= 0 else max(1, -(-max_steps // max(steps_per_epoch, 1)))
    steps = steps_per_epoch * epochs if max_steps < 0 else min(steps_per_epoch * epochs, max_steps)
    if epochs == 0:
        raise ConfigError("trainer.max_epochs=0: nothing would be trained; use 1 or more.")
    cost = batch_sizes.chosen.cost if batch_sizes is not None else None
    try:
        cost = cost or measure_step(
            task,
            accumulation,
            data.batch_size,
            data.img_size,
            data.evaluation_shape(data.batch_size),
            precision,
            device,
            num_devices,
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"data.batch_size={data.batch_size} images of data.img_size={data.img_size} do not fit into memory; choose "
            "a smaller data.img_size, a smaller data.batch_size, or set model.gradient_checkpointing=true."
        ) from error
    seconds = cost.seconds * batches * epochs * steps / max(1, steps_per_epoch * epochs)

    hint = micro_batches > 1 and num_devices == 1 and task.model_config.norm_over_batch is None
    config, optimizer, report = task.model_config, task.optimizer_config, task.report
    size = f"{config.group_size} channels a group" if config.group_size else f"{task.num_groups} groups"
    groups = f", {size}" if config.norm.startswith("gn") else ""
    narrow = narrow_layers(task.model) if groups and not config.group_size else ""
    parameters = sum(parameter.numel() for parameter in task.model.parameters()) / 1e6
    rows = [
        *describe_data(data),
        ("model", f"{report.architecture}, norm {config.norm}{groups}, {parameters:.1f} M parameters"),
        *([("", f"decoder {config.decoder}, norm {config.resolved_decoder_norm}")] if config.decoder else []),
        *([("", narrow)] if narrow else []),
        ("weights", report.summary()),
        *([("", f"pretrained on {report.pretrained_on}")] if report.pretrained_on else []),
        *(("", note) for note in report.notes),
        *(batch_sizes.rows() if batch_sizes is not None else []),
        ("batch", _batch_row(data.batch_size, num_devices, micro_batches, batches)),
        *([("", _HINT)] if batch_sizes is None and hint else []),
        ("steps", f"{epochs} epochs x {steps_per_epoch:,} optimizer steps = {steps:,}"),
        (
            "optimizer",
            f"{optimizer.name}, lr {optimizer.lr:g}, {optimizer.schedule}, weight decay {optimizer.weight_decay:g}",
        ),
        *(("", line) for line in task.describe_recipe()),
        *(("", line) for line in recipe(task, batch_norm, frozen_epochs, len(data.train_dataset), epochs)),
        ("precision", f"{precision} on {device}"),
        (
            "memory",
            f"about {cost.peak_mib:,.0f} MiB at the peak: {cost.activations_mib:,.0f} of activations, "
            f"{cost.state_mib:,.0f} of weights, gradients and optimizer, the rest of "
            + ("working copies" if device.type == "cuda" else "the program and working copies"),
        ),
        ("time", f"about {duration(seconds)} of training steps, measured now"),
    ]
    source = about_source(task.model_config.pretrained, data)
    warnings = [*check_own_splits(data), *source, *data.cautions(), *advice(task, data.batch_size, micro_batches)]
    if frozen_epochs >= epochs > 0:
        warnings.append(
            f"freezing.epochs={frozen_epochs}, and the run has {epochs}: only the last layer learns. It bears a far "
            "higher learning rate than the whole model. To train the backbone after it, choose fewer epochs."
        )
    if steps < steps_per_epoch:
        samples = steps * micro_batches * data.batch_size * num_devices
        warnings.append(
            f"the run ends after {steps:,} of the {steps_per_epoch:,} optimizer steps of its first epoch: without "
            "trainer.val_check_interval nothing is validated, and there is no best.ckpt. "
            f"--samples {samples} in place of --trainer.max_steps {max_steps} trains as long, and then validates."
        )
    return Plan(rows, warnings, seconds)


def narrow_layers(model: nn.Module) -> str:
    """Say which layers have fewer groups than the others.

    Args:
        model: A model with group norms.

    Returns:
        A line for the plan; empty where all layers have the same number.
    """
    groups = {layer.num_channels: layer.num_groups for layer in model.modules() if isinstance(layer, nn.GroupNorm)}
    most = max(groups.values(), default=0)
    fewer = [f"{count} of {channels}" for channels, count in sorted(groups.items()) if count < most]
    return f"fewer groups in narrow layers (groups of channels): {', '.join(fewer)}" if fewer else ""


def _batches(images: int, batch_size: int, limit: float) -> int:
    batches = -(-images // batch_size)
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _batch_row(batch_size: int, num_devices: int, micro_batches: int, batches: int) -> str:
    row = (
        f"batch {batch_size}"
        + (f" x {num_devices} devices" if num_devices > 1 else "")
        + (f" x {micro_batches} accumulated" if micro_batches > 1 else "")
        + f" = effective batch {batch_size * num_devices * micro_batches}"
    )
    rest = batches % micro_batches
    return row + (f"; the last step of an epoch has {rest} micro-batches" if rest else "")


def epochs_of(samples: int, images: int, at_once: int) -> tuple[int, int | None]:
    """Turn a budget of images into epochs.

    Args:
        samples: Images to train on, with repetitions.
        images: Images in the training split.
        at_once: Images per batch, over all devices.

    Returns:
        Whole epochs, the nearest number; and, of a budget below one epoch, its batches.

    Example:
        >>> epochs_of(1200, 400, 16), epochs_of(100, 400, 16)
        ((3, None), (1, 6))
    """
    if samples < 1:
        raise ConfigError(f"samples={samples} is out of range; use 1 or more.")
    if samples < images:
        return 1, max(1, samples // at_once)
    return round(samples / images), None


def recipe(
    task: TransferTask, batch_norm: BatchNormStatistics, frozen_epochs: int, num_images: int, epochs: int
) -> list[str]:
    """Describe what a recipe does beside the optimizer.

    Args:
        task: The module.
        batch_norm: The callback that controls running statistics.
        frozen_epochs: First epochs in which the head alone learns.
        num_images: Training images.
        epochs: Epochs of the run.

    Returns:
        Lines for the plan, none for a plain recipe.
    """
    lines = []
    if task.optimizer_config.schedule == "bit":
        wanted = bit_samples(num_images)
        lines.append(
            f"BiT-HyperRule: {wanted:,} samples for {num_images:,} images, trainer.max_epochs "
            f"{round(wanted / num_images)}; this run has {num_images * epochs:,}"
        )
    if frozen_epochs:
        lines.append(f"the head alone learns for {min(frozen_epochs, epochs)} of {epochs} epochs")
    if task.optimizer_config.clip_norm is not None:
        lines.append(f"gradients of an optimizer step are clipped to norm {task.optimizer_config.clip_norm:g}")
    if batch_norm.reestimate_images:
        when = "once before training" if task.norm == "bn_frozen" else "before each validation"
        lines.append(f"BN statistics are re-estimated on {batch_norm.reestimate_images:,} training images {when}")
    return lines


def advice(task: TransferTask, batch_size: int, micro_batches: int) -> list[str]:
    """Say what will disappoint about a norm at a batch size.

    Args:
        task: The module.
        batch_size: Images per forward pass.
        micro_batches: Micro-batches per optimizer step.

    Returns:
        Sentences, none where nothing is to be said.
    """
    found = []
    if (over_batch := task.model_config.norm_over_batch) and batch_size < 8:
        one = "a single image" if batch_size == 1 else f"{batch_size} images"
        found.append(
            f"norm {over_batch} takes its statistics from {one} at a time and evaluates with their running average. "
            + ("Accumulation does not help BN. " if micro_batches > 1 else "")
            + "Compare --model.norm gn_ws or bn_frozen."
        )
    if task.norm == "bn_frozen" and task.model_config.pretrained is None:
        found.append("norm bn_frozen from scratch has nothing to freeze: mean 0 and variance 1. Set model.pretrained.")
    return found
