"""What a run is going to do, worked out before its first step: the rows that ``fit`` prints."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gn_transfer.callbacks import micro_batches_per_window
from gn_transfer.classifier import TransferClassifier
from gn_transfer.config import ConfigError
from gn_transfer.data import PictureData
from gn_transfer.layers import OncePerWindow
from gn_transfer.optim import bit_samples


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
    model: TransferClassifier,
    data: PictureData,
    *,
    effective_batch_size: int | None,
    precision: str,
    device: torch.device,
    num_devices: int,
    max_epochs: int,
    max_steps: int,
    limit_batches: float,
) -> Plan:
    """Work out pictures, steps, windows, precision, weights and the time that it will take.

    Args:
        model: The model, built.
        data: The data, set up for fitting.
        effective_batch_size: See :class:`gn_transfer.callbacks.GradientAccumulation`.
        precision: Lightning's name of the precision.
        device: Where the net will train.
        num_devices: Devices that train together.
        max_epochs: Epochs, -1 for no limit.
        max_steps: Optimizer steps, -1 for no limit.
        limit_batches: ``trainer.limit_train_batches``: a count (int) or a fraction (float) of the micro-batches.

    Returns:
        The plan.

    Raises:
        ConfigError: The effective batch cannot be made of micro-batches.
    """
    micro_batches = micro_batches_per_window(effective_batch_size, data.batch_size, num_devices)
    model.check_window(micro_batches * data.batch_size)
    effective = micro_batches * data.batch_size * num_devices
    per_device = -(-len(data.train_dataset) // num_devices)
    batches = -(-per_device // data.batch_size)
    batches = min(batches, limit_batches) if isinstance(limit_batches, int) else int(batches * limit_batches)
    windows = -(-batches // micro_batches)
    epochs = max_epochs if max_epochs >= 0 else max(1, -(-max_steps // max(windows, 1)))
    steps = windows * epochs if max_steps < 0 else min(windows * epochs, max_steps)
    last = batches - (windows - 1) * micro_batches
    cost = measure_step(model, data.batch_size, data.img_size, precision, device)
    seconds = cost.seconds * batches * epochs * steps / max(1, windows * epochs)

    report = model.report
    assert report is not None
    groups = f", {model.group_size} channels a group" if model.group_size else f", {model.num_groups} groups"
    net = f"{report.architecture}, norm {model.norm}" + (groups if model.norm.startswith("gn") else "")
    assert model.net is not None
    parameters = sum(parameter.numel() for parameter in model.net.parameters()) / 1e6
    window = (
        f"batch {data.batch_size}"
        + (f" x {num_devices} devices" if num_devices > 1 else "")
        + (f" x {micro_batches} accumulated" if micro_batches > 1 else "")
        + f" = effective batch {effective}"
    )
    if micro_batches > 1 and last != micro_batches:
        window += f"; the last window of an epoch has {last} micro-batches"
    mixes = model.mixup > 0 or model.cutmix > 0
    rows = [
        *data.describe(),
        ("net", f"{net}, {parameters:.1f} M parameters"),
        ("weights", report.summary()),
        *([("", f"they saw {report.saw}")] if report.saw else []),
        *(("", note) for note in report.notes),
        ("window", window),
        ("steps", f"{epochs} epochs x {windows:,} optimizer steps = {steps:,}"),
        ("optimizer", f"{model.optimizer_name}, lr {model.lr:g}, {model.schedule}, decay {model.weight_decay:g}"),
        *([("mixing", f"mixup {model.mixup:g}, cutmix {model.cutmix:g}, with the picture before")] if mixes else []),
        *(("", line) for line in recipe(model, len(data.train_dataset), epochs)),
        ("precision", f"{precision} on {device}"),
        (
            "memory",
            f"about {cost.activations_mib + cost.state_mib:,.0f} MiB: {cost.activations_mib:,.0f} of activations, "
            f"{cost.state_mib:,.0f} of weights, gradients and optimizer; the program itself and buffers come on top",
        ),
        ("time", f"about {duration(seconds)} of training steps"),
    ]
    return Plan(rows, advice(model, data.batch_size, micro_batches), seconds)


def epochs_of(samples: int, pictures: int, at_once: int) -> tuple[int, int | None]:
    """Turn a budget of pictures into epochs.

    Args:
        samples: Pictures to train on, with repetitions.
        pictures: Pictures in the training split.
        at_once: Pictures per batch, over all devices.

    Returns:
        Whole epochs, the nearest number; and, of a budget below one epoch, its batches.

    Example:
        >>> epochs_of(1200, 400, 16), epochs_of(100, 400, 16)
        ((3, None), (1, 6))
    """
    if samples < 1:
        raise ConfigError(f"samples={samples} is out of range; use 1 or more.")
    if samples < pictures:
        return 1, max(1, samples // at_once)
    return round(samples / pictures), None


def recipe(model: TransferClassifier, num_images: int, epochs: int) -> list[str]:
    """Say in words what a recipe does beside the optimizer.

    Args:
        model: The model.
        num_images: Training pictures.
        epochs: Epochs of the run.

    Returns:
        Lines for the plan, none for a plain recipe.
    """
    lines = []
    if model.schedule == "bit":
        wanted = bit_samples(num_images)
        lines.append(
            f"BiT-HyperRule: {wanted:,} samples for {num_images:,} pictures, trainer.max_epochs "
            f"{round(wanted / num_images)}; this run has {num_images * epochs:,}"
        )
    if model.freeze_epochs:
        lines.append(f"the head alone learns for {model.freeze_epochs} of {epochs} epochs")
    if model.clip_norm is not None:
        lines.append(f"gradients of a window are shortened to norm {model.clip_norm:g}")
    if model.reestimate_bn:
        when = "once before training" if model.norm == "bn_frozen" else "before each validation"
        lines.append(f"BN statistics are re-estimated on {model.reestimate_bn:,} training pictures {when}")
    return lines


def advice(model: TransferClassifier, batch_size: int, micro_batches: int) -> list[str]:
    """Say what will disappoint about a norm at a batch size.

    Args:
        model: The model.
        batch_size: Pictures per forward pass.
        micro_batches: Micro-batches per optimizer step.

    Returns:
        Sentences, none where nothing is to be said.
    """
    found = []
    if model.normalizes_over_batch and batch_size < 8:
        one = "a single picture" if batch_size == 1 else f"{batch_size} pictures"
        found.append(
            f"norm {model.norm} takes its statistics from {one} at a time and evaluates with their running average; "
            + ("accumulation does not help BN. " if micro_batches > 1 else "")
            + "Compare --model.norm gn_ws or bn_frozen."
        )
    if model.norm == "bn_frozen" and model.pretrained is None:
        found.append("norm bn_frozen from scratch has nothing to freeze: mean 0 and variance 1. Set model.pretrained.")
    return found


@dataclass(frozen=True)
class StepCost:
    """What a training step costs.

    Attributes:
        seconds: Forward and backward of a micro-batch.
        activations_mib: What autograd keeps for the backward of a micro-batch.
        state_mib: Weights, gradients and the optimizer's state.
    """

    seconds: float
    activations_mib: float
    state_mib: float


def measure_step(
    model: TransferClassifier, batch_size: int, img_size: int, precision: str, device: torch.device
) -> StepCost:
    """Run a few micro-batches on a copy of the net; draws nothing from torch's generators.

    The time is the fastest of up to three after one to warm up, in about two seconds at most. The memory is counted,
    not measured: tensors saved for backward in the first, by storage, beside the parameters' own. Buffers that a
    library takes for the time of an operation come on top.

    Args:
        model: The model, built.
        batch_size: Pictures per forward pass.
        img_size: Their side, in pixels.
        precision: Lightning's name of the precision.
        device: Where to measure.

    Returns:
        What a step costs.
    """
    assert model.net is not None
    memory_format = model.memory_format(device.type, batch_size)
    net = deepcopy(model.net).to(device).train().to(memory_format=memory_format)  # type: ignore[call-overload]
    engine = OncePerWindow(net) if model.once_per_window else None
    if engine is not None:
        engine.micro_batch(first=True, last=False)
    parameters = list(net.parameters())
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    pixels = torch.zeros(batch_size, model.mean.shape[1], img_size, img_size, device=device)
    pixels += torch.linspace(-1, 1, img_size, device=device)
    pixels = pixels.contiguous(memory_format=memory_format)
    fastest, began = float("inf"), time.perf_counter()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        with saved_tensors_hooks(count, lambda tensor: tensor):
            net(pixels).float().square().mean().backward()
        for _ in range(3):
            start = time.perf_counter()
            net(pixels).float().square().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            fastest = min(fastest, time.perf_counter() - start)
            if time.perf_counter() - began > 2.0:
                break
    moments = {"sgd": 1 if model.momentum else 0, "adam": 2, "adamw": 2}[model.optimizer_name]
    state = sum(parameter.nbytes for parameter in parameters) * (2 + moments)
    return StepCost(fastest, sum(saved.values()) / 2**20, state / 2**20)


def duration(seconds: float) -> str:
    """Write a time for people.

    Args:
        seconds: Seconds.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
