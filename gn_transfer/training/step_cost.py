"""What a training step costs in time and memory, measured on a copy of the model."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gn_transfer.layers import AccumulationEngine, GraphedModel
from gn_transfer.training.accumulation import GradientAccumulation
from gn_transfer.training.precision import autocast_dtype
from gn_transfer.training.progress import peak_memory_mib
from gn_transfer.training.task import TransferTask

LOADED_LATER_MIB = 100.0
"""Memory of the libraries that a run loads after its plan, for figures and TensorBoard (measured on Linux)."""


@dataclass(frozen=True)
class StepCost:
    """What a training step costs.

    Attributes:
        seconds: Forward and backward of a micro-batch.
        activations_mib: What autograd keeps for the backward of a micro-batch.
        state_mib: Weights, gradients and the optimizer's state.
        peak_mib: The most that the training will hold: measured in these micro-batches and a batch of validation, with
            the optimizer's state added. On a CPU the program and its libraries are in it.
    """

    seconds: float
    activations_mib: float
    state_mib: float
    peak_mib: float


def measure_step(
    task: TransferTask,
    accumulation: GradientAccumulation,
    batch_size: int,
    img_size: int,
    evaluation_shape: tuple[int, int, int],
    precision: str,
    device: torch.device,
    num_devices: int = 1,
) -> StepCost:
    """Run a few micro-batches on a copy of the model; uses no random numbers.

    The time is the fastest of up to three after one to warm up, in about two seconds at most. The memory is counted,
    not measured: tensors saved for backward in the first, by storage, beside the parameters' own. Buffers that a
    library takes for the time of an operation come on top.

    Args:
        task: The module, built.
        accumulation: Says whether weights are cached, or the model replayed.
        batch_size: Images per forward pass.
        img_size: Their side, in pixels.
        evaluation_shape: Number, height and width of the images of a batch of validation.
        precision: Lightning's name of the precision.
        device: Where to measure.
        num_devices: Devices that train together; one of them is measured, without their exchange of gradients.

    Returns:
        What a step costs.
    """
    assert task.model is not None
    memory_format = task.memory_format(device.type, precision)
    model = deepcopy(task.model).to(device).train().to(memory_format=memory_format)  # type: ignore[call-overload]
    replays = accumulation.replays(task.model_config, device, num_devices)
    engine = AccumulationEngine(model) if accumulation.cache_weights and not replays else None
    parameters = list(model.parameters())
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    dtype = autocast_dtype(precision)
    pixels = torch.zeros(batch_size, task.mean.shape[1], img_size, img_size, device=device)
    pixels += torch.linspace(-1, 1, img_size, device=device)
    pixels = pixels.contiguous(memory_format=memory_format)
    fastest, began = float("inf"), time.perf_counter()
    generators = torch.random.fork_rng([device] if device.type == "cuda" else [])  # dropout draws from them
    with generators, torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        if engine is not None:
            engine.fold_norms(pixels)
            engine.micro_batch(first=True, last=False)
        with saved_tensors_hooks(count, lambda tensor: tensor):
            model(pixels).float().square().mean().backward()
        trained = GraphedModel(model) if replays else model
        if replays:
            trained(pixels).float().square().mean().backward()
        for _ in range(3):
            start = time.perf_counter()
            trained(pixels).float().square().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            fastest = min(fastest, time.perf_counter() - start)
            if time.perf_counter() - began > 2.0:
                break
        if engine is not None:
            engine.remove()
        with torch.no_grad():  # a batch of validation may need more
            number, *sides = evaluation_shape
            many = pixels[:1, :, :1, :1].expand(number, -1, *sides)
            model.eval()(many.contiguous(memory_format=memory_format))
    moments = {"sgd": 1 if task.optimizer_config.momentum else 0, "adam": 2, "adamw": 2}[task.optimizer_config.name]
    weights = sum(parameter.nbytes for parameter in parameters) / 2**20
    peak = peak_memory_mib(device) + weights * moments
    if device.type != "cuda":  # the copy that was measured stood beside the model itself
        peak += LOADED_LATER_MIB - weights
    return StepCost(fastest, sum(saved.values()) / 2**20, weights * (2 + moments), peak)
