"""Replay a model's forward and backward as CUDA graphs: with one image a GPU waits for launches, not for arithmetic.

A ResNet-50 launches some two thousand kernels for a forward and a backward. With a few images each of them takes less
time on the GPU than its launch takes on the CPU. A CUDA graph launches them all at once (NVIDIA, "CUDA graphs";
``torch.cuda.make_graphed_callables`` does so too, but its gradients are overwritten where several micro-batches are
accumulated from ``grad=None``).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

_WARM_UP = 3
"""Passes before a capture, in which libraries choose their kernels and take their memory."""


class GraphedModel:
    """A model whose training steps are replayed: call it in place of the model.

    The first call in training captures a forward and a backward for the shape of its input. Later ones copy their input
    into the graph's memory and replay; the backward adds to ``grad`` of the parameters, so micro-batches accumulate.
    Where a parameter moves, starts or stops to learn, a layer changes its mode, autocast its dtype, or two inputs in a
    row have another shape, the model is captured anew. It runs plainly without gradient, in evaluation, on a CPU, for
    a single input of another shape and while a module or a parameter has a hook, which a replay would not call. It
    runs plainly from then on where it cannot be captured: it asks the GPU for a value in its forward, say, or a second
    set of gradients finds no room.

    Each forward has to be followed by its backward, before the next one. What Python decides in a forward, by random
    numbers of its own too, stays as it was at the capture. DDP needs its hooks, so it cannot be combined with this.
    Graphs keep their memory until :meth:`reset`: that of the activations, and a second set of gradients.

    Args:
        model: Gives one tensor for one tensor. Its layers, parameters and buffers must stay the same objects.

    Attributes:
        failure: Why the model could not be captured; None so far.

    Example:
        >>> model = GraphedModel(nn.Linear(4, 2))
        >>> for i in range(4):
        ...     model(torch.randn(1, 4)).sum().backward()
        >>> model
        GraphedModel(plain)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.failure: str | None = None
        self._modules = list(model.modules())
        self._parameters = list(model.parameters())
        self._graph: _Graph | None = None
        self._state: tuple[object, ...] = ()
        self._misses = 0  # inputs of another shape in a row

    def __call__(self, input: Tensor) -> Tensor:
        """Run the model.

        Args:
            input: Of the model, in the memory format that it trains with.

        Returns:
            Its output, in memory of its own.
        """
        graph = self._graph_for(input) if self._applies(input) else None
        run = self.model if graph is None else graph
        output: Tensor = run(input)
        return output

    def reset(self) -> None:
        """Give up the graphs and their memory; the next call captures anew."""
        self._graph = None

    def _graph_for(self, input: Tensor) -> _Graph | None:
        state = self._current_state()
        fits = self._graph is not None and self._graph.takes(input)
        self._misses = 0 if fits else self._misses + 1
        if self._graph is None or self._state != state or self._misses > 1:
            self.reset()
            self._graph, self._state = self._capture(input), state
            return self._graph
        return self._graph if fits else None

    def _applies(self, input: Tensor) -> bool:
        return (
            self.failure is None
            and input.is_cuda
            and not input.requires_grad
            and torch.is_grad_enabled()
            and any(module.training for module in self._modules)  # the head alone, where the rest is frozen
            and not torch.cuda.is_current_stream_capturing()
            and any(parameter.requires_grad for parameter in self._parameters)
            and not any(
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
                for module in self._modules
            )
            and not any(
                parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
                for parameter in self._parameters
            )
        )

    def _current_state(self) -> tuple[object, ...]:
        return (
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            *(module.training for module in self._modules),
            *((parameter.data_ptr(), parameter.requires_grad) for parameter in self._parameters),
        )

    def _capture(self, input: Tensor) -> _Graph | None:
        device = input.device
        generator = torch.cuda.default_generators[device.index]
        random_state = generator.clone_state()
        try:
            # a capture that breaks off leaves its stream as the current one
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
                return _Graph(self.model, input)
        except (RuntimeError, TypeError) as error:
            generator.graphsafe_set_state(random_state)  # the other one is taken for a part of the capture still
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"the model runs without CUDA graphs: {self.failure}", stacklevel=3)
        torch.cuda.empty_cache()
        return None

    def __repr__(self) -> str:
        return f"GraphedModel({'plain' if self._graph is None else tuple(self._graph.input.shape)})"


class _Graph:
    """A captured forward and backward, and the memory that they read and write.

    The model is captured with leaves of its own in place of the parameters, on the same memory: where a graph of the
    user's still holds a parameter, its node belongs to another stream, on which the capture would have to wait.

    Args:
        model: In training.
        input: Gives shape, dtype and layout.
    """

    def __init__(self, model: nn.Module, input: Tensor) -> None:
        self.input = input.clone()
        self.anchor = torch.empty(0, device=input.device, requires_grad=True)  # a leaf that never gets a gradient
        self.waiting = 0  # number of the forward that waits for its backward; 0 where none does
        self.runs = 0
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), False):
            learning = {name: each for name, each in model.named_parameters() if each.requires_grad}
            leaves = {name: each.detach().requires_grad_() for name, each in learning.items()}
            unused = self._warm_up(model, leaves)
            self._parameters = [each for name, each in learning.items() if name not in unused]
            self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
            pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(input.device)  # type: ignore[no-untyped-call]
            self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            # threads that load data may pin memory meanwhile, which a global capture forbids
            with torch.cuda.graph(self.forward, pool, stream, capture_error_mode="thread_local"):
                output = functional_call(model, leaves, self.input)
            self.output_gradient = torch.zeros_like(output)
            used = [leaf for name, leaf in leaves.items() if name not in unused]
            with torch.cuda.graph(self.backward, pool, stream, capture_error_mode="thread_local"):
                with torch.autocast("cuda", enabled=False):  # where a loop calls backward
                    found = torch.autograd.grad(output, used, self.output_gradient)
                torch._foreach_add_(self._gradients, found)
        self.output = output.detach()

    def _warm_up(self, model: nn.Module, leaves: dict[str, Tensor]) -> set[str]:
        """Run on a stream of its own; random numbers and buffers stay. Names of leaves that have no part in it."""
        device = self.input.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.random.fork_rng([device]), _buffers_kept(model):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    unused = self._unused(model, leaves)
            stream.synchronize()
        return unused

    def _unused(self, model: nn.Module, leaves: dict[str, Tensor]) -> set[str]:
        """Run forward and backward once, and drop the gradients. Names of leaves that have none."""
        output = functional_call(model, leaves, self.input)
        if not isinstance(output, Tensor):
            raise TypeError(f"its output is no tensor, but {type(output).__name__}")
        originals = [each for each in model.parameters() if each.requires_grad]
        with torch.autocast("cuda", enabled=False):
            found = torch.autograd.grad(
                output, [*leaves.values(), *originals], torch.zeros_like(output), allow_unused=True
            )
        if any(gradient is not None for gradient in found[len(leaves) :]):
            raise RuntimeError("a layer reaches a parameter that is not registered as its own")
        return {name for name, gradient in zip(leaves, found, strict=False) if gradient is None}

    def __call__(self, input: Tensor) -> Tensor:
        """Replay the forward; the backward of what it returns replays the backward."""
        output: Tensor = _Replay.apply(self, input, self.anchor)  # type: ignore[no-untyped-call]
        return output

    def takes(self, input: Tensor) -> bool:
        """Say whether an input is of the captured kind."""
        mine = self.input
        return input.shape == mine.shape and input.dtype == mine.dtype and input.stride() == mine.stride()

    def attach_gradients(self) -> None:
        """Have ``grad`` of the parameters be what the backward adds to."""
        new = []
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            before = parameter.grad
            if before is gradient:
                continue
            if before is None:
                new.append(gradient)
            else:
                gradient.copy_(before)
            parameter.grad = gradient
        if new:
            torch._foreach_zero_(new)


class _Replay(torch.autograd.Function):
    """Replay a forward, and in the backward its backward. Not twice differentiable."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, input: Tensor, anchor: Tensor) -> Tensor:
        graph.input.copy_(input)
        graph.forward.replay()
        graph.runs += 1
        graph.waiting = graph.runs
        ctx.graph, ctx.run = graph, graph.runs
        output: Tensor = graph.output.clone()
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        graph: _Graph = ctx.graph
        if graph.waiting != ctx.run:
            raise RuntimeError(
                "a model that is replayed as a CUDA graph ran again before this backward, or this is its second one: "
                "what the backward needs is overwritten; do without CUDA graphs here (accumulation.cuda_graphs=false)"
            )
        graph.waiting = 0
        graph.output_gradient.copy_(gradient)
        graph.attach_gradients()
        graph.backward.replay()
        return None, None, None


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers, such as the running statistics of batch norms."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
