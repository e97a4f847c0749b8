"""The working copy of a weight within an accumulation step, and the gradient summed up for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gn_transfer.layers.conv import HeldProducts
from gn_transfer.layers.std_conv import StdConv2d, filter_rows, rows_to_filters


class AccumulationStep(Protocol):
    """What a cached weight asks the engine.

    Attributes:
        active: A micro-batch was announced.
        last: It is the last of its step.
        optimizer_steps: Steps of any optimizer so far.
    """

    active: bool
    last: bool
    optimizer_steps: int

    def finish_after_backward(self) -> None:
        """Have the running backward end with the delivery of all gradients."""
        ...


class CachedWeight:
    """The working copy of one layer's weight, and the gradient summed up for it.

    Args:
        step: Knows the place in the accumulation step.
        layer: Has the weight; a ``StdConv2d`` has it standardized.
    """

    def __init__(self, step: AccumulationStep, layer: nn.Module) -> None:
        self.step = step
        self.layer = layer
        self._eps: float | None = layer.eps if isinstance(layer, StdConv2d) else None
        self.held = HeldProducts()
        self._anchor = torch.empty(0, requires_grad=True)  # a leaf that never gets a gradient
        self.drop()

    @property
    def weight(self) -> nn.Parameter:
        """The layer's parameter, which may be replaced at any time."""
        weight = self.layer.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def sources(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the copies are computed from."""
        return (self.weight,)

    def drop(self) -> None:
        """Forget the copies and their gradients."""
        self._copies: tuple[Tensor, ...] = ()
        self._key: tuple[object, ...] | None = None
        self._mean: Tensor | None = None  # of the filters, for the backward of the standardization
        self._rstd: Tensor | None = None
        self._gradients: dict[int, Tensor] = {}  # of the copies, by their index, summed over the step
        self.ready: tuple[Tensor, ...] | None = None  # for a compiled forward
        self.held.clear()

    def start_step(self) -> None:
        """Forget the gradients, and the copies too: an optimizer that writes to ``weight.data`` leaves no sign."""
        if any(source.requires_grad for source in self.sources):
            self.drop()

    def for_forward(self, input: Tensor | None) -> tuple[Tensor, ...] | None:
        """Find what the layer is to compute with.

        Args:
            input: Of the layer; decides on the memory format, None is that of the weight.

        Returns:
            Working copies, attached to the graph where gradients are wanted; None where the plain computation is right.
        """
        if torch.compiler.is_compiling():
            return self.ready if torch.is_grad_enabled() else None
        if not self.step.active or torch.is_inference_mode_enabled():
            return None
        if not torch.is_grad_enabled() and not self.layer.training:
            return None
        dtype = _forward_dtype(self.weight)
        if not self._pays(dtype):
            return None
        copies = self._working_copies(dtype, input)
        if torch.is_grad_enabled() and any(source.requires_grad for source in self.sources):
            # Before the last micro-batch the parameter has no part in the graph: its hooks would fire without gradient.
            sources = self.sources if self.step.last else (self._anchor,)
            self.held.hold = not self.step.last
            attached: tuple[Tensor, ...] = _Attach.apply(self, self.step.last, len(sources), *sources, *copies)  # type: ignore[no-untyped-call]
            return attached
        return copies

    def _pays(self, dtype: torch.dtype) -> bool:
        return self._eps is not None or dtype != self.weight.dtype

    def _working_copies(self, dtype: torch.dtype, input: Tensor | None) -> tuple[Tensor, ...]:
        key = self._identity()
        if self._key is not None and self._key != key:
            self.deliver()
            self.drop()
        weight = self.weight
        memory_format = torch.preserve_format
        if weight.ndim == 4 and input is not None and not input.is_contiguous():
            memory_format = torch.channels_last
        if self._copies and self._copies[0].dtype == dtype:
            old = self._copies[0]
            if memory_format == torch.preserve_format or old.is_contiguous(memory_format=memory_format):
                return self._copies
        with torch.no_grad():
            self._key = key
            self._copies = self._compute(dtype, memory_format)
        return self._copies

    def _compute(self, dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[Tensor, ...]:
        new = self.weight.detach()
        if self._eps is not None:
            new, self._mean, self._rstd = _standardize(new, self._eps)
        return (new.to(dtype, memory_format=memory_format),)

    def _identity(self) -> tuple[object, ...]:
        weight = self.weight
        return self.step.optimizer_steps, weight._version, weight.data_ptr(), weight.dtype, weight.device

    def add_gradients(self, gradients: tuple[Tensor | None, ...], deliver: bool) -> tuple[Tensor | None, ...]:
        """Take the gradients of the copies.

        Args:
            gradients: From one use of the copies in one backward; None where one is held.
            deliver: The graph goes on to the parameters.

        Returns:
            Gradients of the sources with all that was summed up, if they are to be delivered; else None each.
        """
        if self.step.last or not self.step.active:
            self.step.finish_after_backward()
        given = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}
        if not deliver or 0 not in given:
            self._add(given)
            return (None,) * (len(self.sources) if deliver else 1)
        if self._gradients:
            self._add(given)
            given, self._gradients = self._gradients, {}
        delivered = self._to_sources(given, changed=False)
        self._copies = ()  # their memory serves the gradients of the layers before; another forward makes them anew
        return delivered

    def _add(self, gradients: Mapping[int, Tensor]) -> None:
        for index, gradient in gradients.items():
            if index in self._gradients:
                # in place: a convolution's or product's weight gradient is a new tensor that nobody else holds
                self._gradients[index].add_(gradient)
            else:
                self._gradients[index] = gradient.to(self.weight.dtype)

    def deliver(self) -> None:
        """Add what was summed up to ``grad`` of the sources."""
        self.held.hold = False
        if self._copies and (product := self.held.product(self._copies[0])) is not None:
            self._add({0: product})
        if not self._gradients:
            return
        gradients, self._gradients = self._gradients, {}
        with torch.no_grad():
            delivered = self._to_sources(gradients, changed=self._key != self._identity())
            for source, gradient in zip(self.sources, delivered, strict=True):
                if gradient is not None and source.requires_grad:
                    source.grad = gradient if source.grad is None else source.grad + gradient

    def _to_sources(self, gradients: Mapping[int, Tensor], *, changed: bool) -> tuple[Tensor | None, ...]:
        """From the gradients of the copies to those of the sources, which may have changed since."""
        gradient = gradients[0].to(self.weight.dtype)
        if self._eps is None:
            return (_strided_as(self.weight, gradient),)
        if changed:
            assert self._rstd is not None
            return (_standardize_backward_of_copy(gradient, self._copies[0], self._rstd),)
        weight = self.weight
        like = torch.channels_last if not weight.is_contiguous() else torch.contiguous_format
        rows, weight_rows = filter_rows(gradient.contiguous(memory_format=like)), filter_rows(weight.detach())
        raw = torch.ops.aten.native_layer_norm_backward(
            rows, weight_rows, rows.shape[1:], self._mean, self._rstd, None, None, [True, False, False]
        )[0]
        # into the memory that held the sum: new memory for every weight in turn leaves holes between the old
        return (_strided_as(weight, rows_to_filters(rows.copy_(raw), weight)),)


class _Attach(torch.autograd.Function):
    """Put working copies into the graph; their gradients go to the cached weight. Not twice differentiable.

    Nothing is saved for backward, so a checkpointed segment may be computed again at will.
    """

    @staticmethod
    def forward(ctx: Any, cached: CachedWeight, deliver: bool, num_sources: int, *tensors: Tensor) -> Any:
        copies = tensors[num_sources:]
        ctx.cached, ctx.deliver, ctx.num_copies = cached, deliver, len(copies)
        ctx.weight, ctx.version = cached.weight, cached.weight._version
        ctx.set_materialize_grads(False)
        return tuple(copy.detach() for copy in copies)  # new tensors on the same memory, with a history of their own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.weight._version != ctx.version:
            raise RuntimeError(
                "a weight was modified in place between forward and backward: the gradient cannot be computed"
            )
        delivered = ctx.cached.add_gradients(gradients, ctx.deliver)
        return None, None, None, *delivered, *[None] * ctx.num_copies


def _strided_as(weight: Tensor, gradient: Tensor) -> Tensor:
    """Give a gradient the strides of its weight, where both describe the same memory: DDP warns where they differ."""
    if weight.ndim == 4 and weight.shape[2:] == (1, 1) and weight.is_contiguous() and gradient.is_contiguous():
        return gradient.as_strided(weight.shape, weight.stride())
    return gradient


def _forward_dtype(weight: Tensor) -> torch.dtype:
    """What autocast would cast the weight to; it leaves float64 alone."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _standardize(weight_OIHW: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As ``standardize_weight``, with mean and 1 / std of the filters for the backward."""
    rows = filter_rows(weight_OIHW)
    standardized, mean, rstd = torch.native_layer_norm(rows, rows.shape[1:], None, None, eps)
    return rows_to_filters(standardized, weight_OIHW), mean, rstd


def _standardize_backward_of_copy(gradient: Tensor, copy: Tensor, rstd: Tensor) -> Tensor:
    """Backward of the standardization where only its output is left: the weight has changed since."""
    g, x_hat = gradient.flatten(1), copy.flatten(1).to(gradient.dtype)
    return (rstd * (g - g.mean(1, keepdim=True) - x_hat * (g * x_hat).mean(1, keepdim=True))).view_as(gradient)
