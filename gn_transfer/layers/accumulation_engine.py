"""Standardize and cast weights, and fold frozen norms into them, once per accumulation step.

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
from torch.optim.optimizer import register_optimizer_step_post_hook

from gn_transfer.layers.batch_norm import FrozenBatchNorm2d, FrozenBatchNormAct2d
from gn_transfer.layers.cached_weight import CachedWeight
from gn_transfer.layers.conv import HeldProducts, conv2d
from gn_transfer.layers.folded_norm import FoldedNorm, foldable_norms
from gn_transfer.layers.same_padding import pad_same
from gn_transfer.layers.std_conv import StdConv2d


class AccumulationEngine:
    """Cache the weights that a model computes with per optimizer step.

    Every ``StdConv2d`` is standardized, and under autocast every ``nn.Conv2d`` and ``nn.Linear`` is cast, once per
    accumulation step: exactly these classes, as subclasses may compute something else. :meth:`fold_norms` makes frozen
    batch norms a part of the convolutions before them. In channels-last on a CPU the convolutions also use
    :func:`gn_transfer.layers.conv.conv2d`. Gradients are those of the plain computation; low-precision gradients of a
    weight are summed over the step in float32.

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
        if any(isinstance(layer, _WithCachedWeight) for layer in module.modules()):
            raise RuntimeError("the model has an accumulation engine; call its remove() first")
        self.active = False
        self.last = False
        self.optimizer_steps = 0
        self.compiled = compiled
        self._module = module
        self._weights: list[CachedWeight] = []
        self._layers: list[nn.Module] = []
        self._finish_is_queued = False
        self._step_hook = register_optimizer_step_post_hook(_CountSteps(self))
        for layer in list(module.modules()):
            if (cached_kind := _CACHED.get(type(layer))) is not None:
                self._attach(layer, cached_kind, CachedWeight(self, layer))

    def fold_norms(self, example: Tensor) -> int:
        """Fold frozen batch norms into the convolutions before them, where that saves memory.

        The model runs once on the example, without gradient, to find norms that alone see the output of a convolution.
        In training its layers must follow one another as they do here. A compiled model is left as it is.

        Args:
            example: Input of the model as in training, shape ``(N, C, H, W)``.

        Returns:
            How many are folded.
        """
        self.reset()
        pairs = [] if self.compiled else foldable_norms(self._module, example)
        for conv, norm in pairs:
            folded = FoldedNorm(self, conv, norm)
            self._detach(conv)
            self._attach(conv, _ConvWithFoldedNorm, folded)
            self._attach(norm, _FOLDED[type(norm)], folded)
        return len(pairs)

    def _attach(self, layer: nn.Module, kind: type[_WithCachedWeight], weight: CachedWeight) -> None:
        if weight.layer is layer:
            self._weights.append(weight)
        self._layers.append(layer)
        vars(layer).update(cached_weight=weight, plain_kind=type(layer))
        layer.__class__ = kind

    def _detach(self, layer: nn.Module) -> None:
        if isinstance(layer, _WithCachedWeight):
            self._weights = [weight for weight in self._weights if weight.layer is not layer]
            self._layers = [each for each in self._layers if each is not layer]
            state = vars(layer)
            layer.__class__ = state.pop("plain_kind")
            del state["cached_weight"]

    def micro_batch(self, *, first: bool, last: bool) -> None:
        """Announce the next micro-batch; call it before its forward pass.

        Args:
            first: It is the first of an accumulation step: what an unfinished step has summed up is dropped, weights
                are cached anew.
            last: An optimizer step follows: its backward fills ``grad`` of the parameters.
        """
        if first:
            self._finish_is_queued = False  # still True where the last backward was interrupted
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
        for layer in self._layers:
            self._detach(layer)

    def finish_after_backward(self) -> None:
        """Have the running backward end with :meth:`finish`."""
        if not self._finish_is_queued:
            self._finish_is_queued = True
            Variable._execution_engine.queue_callback(self.finish)

    def __repr__(self) -> str:
        kinds = Counter(vars(layer)["plain_kind"].__name__ for layer in self._layers)
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


def _new(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


class _WithCachedWeight(nn.Module):
    """Class of a layer while an engine is attached; copies and pickles are of the plain class."""

    cached_weight: CachedWeight
    plain_kind: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: dict[str, Any] = self.__getstate__()  # type: ignore[no-untyped-call]
        ours = ("cached_weight", "plain_kind")
        return _new, (self.plain_kind,), {key: value for key, value in state.items() if key not in ours}


class _CachedConv2d(_WithCachedWeight, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        cached = self.cached_weight.for_forward(input)
        if cached is None:
            return _conv(self, input, self.weight, self.bias)
        return _conv(self, input, cached[0], self.bias, self.cached_weight.held)


class _CachedStdConv2d(_WithCachedWeight, StdConv2d):
    def forward(self, input: Tensor) -> Tensor:
        cached = self.cached_weight.for_forward(input)
        if cached is None:
            return _conv(self, input, self.standardized_weight(), self.bias)
        return _conv(self, input, cached[0], self.bias, self.cached_weight.held)


class _CachedLinear(_WithCachedWeight, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        cached = self.cached_weight.for_forward(input)
        return F.linear(input, self.weight if cached is None else cached[0], self.bias)


class _ConvWithFoldedNorm(_WithCachedWeight, nn.Conv2d):
    cached_weight: FoldedNorm

    def forward(self, input: Tensor) -> Tensor:
        cached = self.cached_weight.for_forward(input)
        weight, bias = (self.weight, self.bias) if cached is None else cached
        held = None if cached is None else self.cached_weight.held
        if self.plain_kind.__name__ == "Conv2dSame":
            input = pad_same(input, self.kernel_size, self.stride, self.dilation)
            output = conv2d(input, weight, bias, self.stride, (0, 0), self.dilation, self.groups, held)  # type: ignore[arg-type]
        else:
            output = _conv(self, input, weight, bias, held)
        return output if cached is None else self.cached_weight.folded(output, attached=weight.requires_grad)


class _FoldedBatchNorm2d(_WithCachedWeight, FrozenBatchNorm2d):
    cached_weight: FoldedNorm

    def forward(self, input: Tensor) -> Tensor:
        return input if self.cached_weight.is_done(input) else super().forward(input)


class _FoldedBatchNormAct2d(_WithCachedWeight, FrozenBatchNormAct2d):
    cached_weight: FoldedNorm

    def forward(self, input: Tensor) -> Tensor:
        if self.cached_weight.is_done(input):
            output: Tensor = self.act(self.drop(input))
            return output
        return super().forward(input)


def _conv(
    layer: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None, held: HeldProducts | None = None
) -> Tensor:
    if layer.padding_mode != "zeros":
        output: Tensor = layer._conv_forward(input, weight, bias)
        return output
    return conv2d(
        input,
        weight,
        bias,
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
_FOLDED: dict[type[nn.Module], type[_WithCachedWeight]] = {
    FrozenBatchNorm2d: _FoldedBatchNorm2d,
    FrozenBatchNormAct2d: _FoldedBatchNormAct2d,
}
