"""Standardize and cast weights once per accumulation step instead of once per micro-batch.

Between two optimizer steps the weights do not change, so their standardization, its backward and their cast to the
forward's dtype need to be done once. At the first micro-batch a working copy of each weight is made; all micro-batches
of the step use it and sum up its gradient; the last one sends the whole gradient through the standardization to the
parameter, within its own backward, so that hooks on the parameter (DDP's too) see it whole.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from gn_transfer.layers.conv import HeldProducts, conv2d
from gn_transfer.layers.std_conv import StdConv2d, filter_rows, rows_to_filters


class AccumulationEngine:
    """Cache standardized and cast weights of a model per optimizer step.

    Every ``StdConv2d`` is standardized, and under autocast every ``nn.Conv2d`` and ``nn.Linear`` is cast, once per
    accumulation step: exactly these classes, as subclasses may compute something else. In channels-last on a CPU the
    convolutions also use :func:`gn_transfer.layers.conv.conv2d`. Gradients are those of the plain computation;
    low-precision gradients of a weight are summed over the step in float32.

    State dict, deep copies and pickles of the model are as without the engine. Forward passes without gradient
    (validation within an accumulation step) do not change the step. A weight that changes within a step is noticed by
    an optimizer's step, its ``_version`` or its storage (``load_state_dict``, ``copy_``, ``.to()``, a new
    ``weight.data``); what was summed until then goes to ``weight.grad``. Edits in place of ``weight.data`` are
    noticed at the next step, those of a frozen weight after :meth:`reset`.

    Without DDP a weight that the last micro-batch does not use still receives what earlier ones summed up; with DDP
    it does so on its own process only, so there every weight must take part in the last micro-batch.

    Args:
        module: The model, its norms already replaced; it is changed until :meth:`remove`.
        compiled: The model is or will be compiled: :meth:`micro_batch`, to be called under the autocast of the forward,
            gets all weights ready, and the compiled graph takes them as inputs.

    Raises:
        RuntimeError: The model has an engine already.

    Example:
        >>> model = nn.Sequential(StdConv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> engine = AccumulationEngine(model)
        >>> engine
        AccumulationEngine(1 StdConv2d, 1 Linear; idle)
        >>> for i in range(4):
        ...     engine.micro_batch(first=i == 0, last=i == 3)
        ...     model(torch.randn(1, 3, 3, 3)).sum().backward()
    """

    def __init__(self, module: nn.Module, *, compiled: bool = False) -> None:
        if any(type(layer) in _PLAIN for layer in module.modules()):
            raise RuntimeError("the model has an accumulation engine; call its remove() first")
        self.active = False
        self.last = False
        self.optimizer_steps = 0
        self.compiled = compiled
        self._weights: list[CachedWeight] = []
        self._finish_is_queued = False
        self._step_hook = register_optimizer_step_post_hook(_CountSteps(self))
        for layer in list(module.modules()):
            if (cached_kind := _CACHED.get(type(layer))) is not None:
                self._weights.append(CachedWeight(self, layer))
                layer.__class__ = cached_kind
                layer.__dict__["cached_weight"] = self._weights[-1]

    def micro_batch(self, *, first: bool, last: bool) -> None:
        """Announce the next micro-batch; call it before its forward pass.

        Args:
            first: It is the first of an accumulation step: what an unfinished step has summed up is dropped, weights
                are cached anew.
            last: An optimizer step follows: its backward fills ``grad`` of the parameters.
        """
        if first:
            for weight in self._weights:
                weight.start_step()
        self.active, self.last = True, last
        if self.compiled:
            for weight in self._weights:
                weight.ready = weight.for_forward(None)

    def finish(self) -> None:
        """Give parameters the gradients that were summed up for them and not yet delivered.

        The last micro-batch's backward calls it by itself; call it where that micro-batch had no backward (its loss was
        skipped) and the optimizer steps all the same.
        """
        self._finish_is_queued = False
        for weight in self._weights:
            weight.deliver()

    def reset(self) -> None:
        """Drop everything that is cached and summed up, and compute plainly until the next :meth:`micro_batch`."""
        self.active = self.last = self._finish_is_queued = False
        for weight in self._weights:
            weight.drop()

    def remove(self) -> None:
        """Make the model what it was before."""
        self.reset()
        self._step_hook.remove()
        for weight in self._weights:
            weight.layer.__class__ = _PLAIN[type(weight.layer)]
            del weight.layer.__dict__["cached_weight"]
        self._weights.clear()

    def finish_after_backward(self) -> None:
        """Have the running backward end with :meth:`finish`."""
        if not self._finish_is_queued:
            self._finish_is_queued = True
            Variable._execution_engine.queue_callback(self.finish)

    def __repr__(self) -> str:
        kinds = Counter(_PLAIN[type(weight.layer)].__name__ for weight in self._weights)
        state = "idle" if not self.active else "last micro-batch" if self.last else "accumulating"
        return f"AccumulationEngine({', '.join(f'{n} {kind}' for kind, n in kinds.items()) or 'nothing'}; {state})"


class _CountSteps:
    """Optimizer hook that does not keep the engine alive. Fused optimizers leave ``weight._version`` as it was."""

    def __init__(self, engine: AccumulationEngine) -> None:
        self._engine = weakref.ref(engine)

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        engine = self._engine()
        if engine is not None:
            engine.optimizer_steps += 1


class CachedWeight:
    """The working copy of one layer's weight, and the gradient summed up for it.

    Args:
        engine: Knows the place in the accumulation step.
        layer: Has the weight; a ``StdConv2d`` has it standardized.
    """

    def __init__(self, engine: AccumulationEngine, layer: nn.Module) -> None:
        self.engine = engine
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

    def drop(self) -> None:
        """Forget the copy and the gradient."""
        self._copy: Tensor | None = None
        self._key: tuple[object, ...] | None = None
        self._mean: Tensor | None = None  # of the filters, for the backward of the standardization
        self._rstd: Tensor | None = None
        self._gradient: Tensor | None = None  # of the copy, summed over the step
        self.ready: Tensor | None = None  # for a compiled forward
        self.held.clear()

    def start_step(self) -> None:
        """Forget the gradient, and the copy too: an optimizer that writes to ``weight.data`` leaves no sign."""
        if self.weight.requires_grad:
            self.drop()

    def for_forward(self, input: Tensor | None) -> Tensor | None:
        """Find what the layer is to compute with.

        Args:
            input: Of the layer; decides on the memory format, None is that of the weight.

        Returns:
            Working copy, attached to the graph where gradients are wanted; None where the plain computation is right.
        """
        if torch.compiler.is_compiling():
            return self.ready if torch.is_grad_enabled() else None
        weight = self.weight
        if not self.engine.active or torch.is_inference_mode_enabled():
            return None
        if not torch.is_grad_enabled() and not self.layer.training:
            return None
        dtype = _forward_dtype(weight)
        if self._eps is None and dtype == weight.dtype:
            return None
        copy = self._working_copy(weight, dtype, input)
        if weight.requires_grad and torch.is_grad_enabled():
            # Before the last micro-batch the parameter has no part in the graph: its hooks would fire without gradient.
            source = weight if self.engine.last else self._anchor
            self.held.hold = not self.engine.last
            attached: Tensor = _Attach.apply(source, self, copy)  # type: ignore[no-untyped-call]
            return attached
        return copy

    def _working_copy(self, weight: Tensor, dtype: torch.dtype, input: Tensor | None) -> Tensor:
        key = self._identity(weight)
        if self._key is not None and self._key != key:
            self.deliver()
            self.drop()
        memory_format = torch.preserve_format
        if weight.ndim == 4 and input is not None and not input.is_contiguous():
            memory_format = torch.channels_last
        old = self._copy
        if old is not None and old.dtype == dtype:
            fits = memory_format == torch.preserve_format or old.is_contiguous(memory_format=memory_format)
            if fits:
                return old
        with torch.no_grad():
            self._key = key
            new = weight.detach()
            if self._eps is not None:
                new, self._mean, self._rstd = _standardize(new, self._eps)
            self._copy = new.to(dtype, memory_format=memory_format)
        return self._copy

    def _identity(self, weight: Tensor) -> tuple[object, ...]:
        return self.engine.optimizer_steps, weight._version, weight.data_ptr(), weight.dtype, weight.device

    def add_gradient(self, gradient: Tensor | None, deliver: bool) -> Tensor | None:
        """Take a gradient of the copy.

        Args:
            gradient: From one use of the copy in one backward; None where it is held.
            deliver: The graph goes on to the parameter.

        Returns:
            Gradient of the weight with all that was summed up, if it is to be delivered; else None.
        """
        if self.engine.last or not self.engine.active:
            self.engine.finish_after_backward()
        if gradient is None:
            return None
        if not deliver:
            self._add(gradient)
            return None
        if self._gradient is not None:
            self._add(gradient)
            gradient, self._gradient = self._gradient, None
        self._copy = None  # its memory serves the gradients of the layers before; another forward makes it anew
        return self._to_weight(gradient)

    def _add(self, gradient: Tensor) -> None:
        if self._gradient is None:
            self._gradient = gradient.to(self.weight.dtype)
        else:  # in place: a convolution's or product's weight gradient is a new tensor that nobody else holds
            self._gradient.add_(gradient)

    def deliver(self) -> None:
        """Add what was summed up to ``weight.grad``."""
        self.held.hold = False
        if self._copy is not None and (gradient := self.held.product(self._copy)) is not None:
            self._add(gradient)
        if self._gradient is None:
            return
        weight, gradient = self.weight, self._gradient
        self._gradient = None
        with torch.no_grad():
            if self._key == self._identity(weight):
                gradient = self._to_weight(gradient)
            elif self._rstd is not None:
                assert self._copy is not None
                gradient = _standardize_backward_of_copy(gradient, self._copy, self._rstd)
            weight.grad = gradient if weight.grad is None else weight.grad + gradient

    def _to_weight(self, gradient: Tensor) -> Tensor:
        """From the gradient of the copy to that of the weight."""
        weight = self.weight
        gradient = gradient.to(weight.dtype)
        if self._eps is None:
            return gradient
        like = torch.channels_last if not weight.is_contiguous() else torch.contiguous_format
        rows, weight_rows = filter_rows(gradient.contiguous(memory_format=like)), filter_rows(weight.detach())
        raw = torch.ops.aten.native_layer_norm_backward(
            rows, weight_rows, rows.shape[1:], self._mean, self._rstd, None, None, [True, False, False]
        )[0]
        # into the memory that held the sum: new memory for every weight in turn leaves holes between the old
        return rows_to_filters(rows.copy_(raw), weight)


class _Attach(torch.autograd.Function):
    """Put a working copy into the graph; its gradient goes to the cached weight. Not twice differentiable.

    Nothing is saved for backward, so a checkpointed segment may be computed again at will.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, cached: CachedWeight, copy: Tensor) -> Tensor:
        ctx.cached, ctx.weight = cached, cached.weight
        ctx.deliver, ctx.version = source is ctx.weight, ctx.weight._version
        ctx.set_materialize_grads(False)
        return copy.detach()  # a new tensor on the same memory, as autograd writes its history on it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:
        if ctx.weight._version != ctx.version:
            raise RuntimeError(
                "a weight was modified in place between forward and backward: the gradient cannot be computed"
            )
        return ctx.cached.add_gradient(gradient, ctx.deliver), None, None


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


def _new(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


class _WithCachedWeight(nn.Module):
    """Class of a layer while an engine is attached; copies and pickles are of the plain class."""

    cached_weight: CachedWeight

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: dict[str, Any] = self.__getstate__()  # type: ignore[no-untyped-call]
        return _new, (_PLAIN[type(self)],), {key: value for key, value in state.items() if key != "cached_weight"}


class _CachedConv2d(_WithCachedWeight, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.cached_weight.for_forward(input)
        return (
            _conv(self, input, self.weight) if weight is None else _conv(self, input, weight, self.cached_weight.held)
        )


class _CachedStdConv2d(_WithCachedWeight, StdConv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.cached_weight.for_forward(input)
        if weight is None:
            return _conv(self, input, self.standardized_weight())
        return _conv(self, input, weight, self.cached_weight.held)


class _CachedLinear(_WithCachedWeight, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.cached_weight.for_forward(input)
        return F.linear(input, self.weight if weight is None else weight, self.bias)


def _conv(layer: nn.Conv2d, input: Tensor, weight: Tensor, held: HeldProducts | None = None) -> Tensor:
    if layer.padding_mode != "zeros":
        output: Tensor = layer._conv_forward(input, weight, layer.bias)
        return output
    return conv2d(
        input,
        weight,
        layer.bias,
        layer.stride,  # type: ignore[arg-type]  # torch types pairs as tuple[int, ...]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        layer.groups,
        held,
    )


_CACHED: dict[type[nn.Module], type[_WithCachedWeight]] = {
    nn.Conv2d: _CachedConv2d,
    nn.Linear: _CachedLinear,
    StdConv2d: _CachedStdConv2d,
}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {cached_kind: plain for plain, cached_kind in _CACHED.items()}
