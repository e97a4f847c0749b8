r"""Frozen batch norms folded into the convolutions before them, once per accumulation step.

Between two optimizer steps a frozen batch norm is an affine map of constants, so a convolution can do its work:

.. math:: \gamma \frac{W x - \mu}{\sigma} + \beta = W' x + b', \qquad
    W' = s W, \quad b' = \beta - s \mu, \quad s = \gamma / \sigma, \quad \sigma = \sqrt{\sigma^2_{run} + \epsilon}

The norm's forward and backward pass over the activations fall away, and with them the copy of the activations that its
backward reads. What the parameters need follows from the gradients of the folded weights, summed over the step:

.. math:: dW = s\,dW', \qquad d\beta = db', \qquad d\gamma = (\textstyle\sum dW' W - \mu\,db') / \sigma

Inference folds norms in the same way (Jacob et al. 2018, arXiv:1712.05877, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gn_transfer.layers.batch_norm import FrozenBatchNorm2d, FrozenBatchNormAct2d
from gn_transfer.layers.cached_weight import AccumulationStep, CachedWeight


class FoldedNorm(CachedWeight):
    """A convolution's weight with the frozen batch norm behind it folded in.

    Args:
        step: Knows the place in the accumulation step.
        conv: The convolution.
        norm: Sees the convolution's output, and nothing else does; has an affine.
    """

    def __init__(self, step: AccumulationStep, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
        self.norm = norm
        self._folded: Tensor | None = None  # output of the convolution that the norm is to leave as it is
        super().__init__(step, conv)

    @property
    def sources(self) -> tuple[nn.Parameter, ...]:
        """Weight, gamma, beta, and the convolution's bias where it has one."""
        bias = self.layer.bias
        return self.weight, self.norm.weight, self.norm.bias, *([bias] if isinstance(bias, nn.Parameter) else [])

    def drop(self) -> None:
        """Forget the copies and their gradients."""
        super().drop()
        self._folded = None

    def for_forward(self, input: Tensor | None) -> tuple[Tensor, ...] | None:
        """Give weight and bias with the norm folded in; None where convolution and norm compute plainly.

        They do where somebody looks at what is between them (a hook, a replaced ``forward``), and where the affine
        learns but the convolution does not: then the gradient of its weight would be computed for the affine alone.
        """
        self._folded = None
        norm = self.norm
        if self.layer._forward_hooks or norm._forward_pre_hooks or norm._forward_hooks or "forward" in vars(norm):
            return None
        if not self.weight.requires_grad and any(source.requires_grad for source in self.sources):
            return None
        cached = super().for_forward(input)
        return None if cached is None else (cached[0], self._copies[1])

    def folded(self, output: Tensor, attached: bool) -> Tensor:
        """Note the output of the convolution with the folded weight, for :meth:`is_done`.

        Args:
            output: Shape ``(N, C, H, W)``.
            attached: The weight is attached to the graph. The gradient of the bias is then summed up here: oneDNN's
                backward of a depthwise convolution takes a quarter longer where it computes that too.
        """
        self._folded = output
        if attached and output.grad_fn is not None:
            output.grad_fn.register_prehook(self._add_bias_gradient)
        return output

    def _add_bias_gradient(self, gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is not None:
            with torch.no_grad():
                self._add({1: gradients[0].sum((0, 2, 3), dtype=self.weight.dtype)})

    def is_done(self, input: Tensor) -> bool:
        """Say whether the norm has been applied to its input by the convolution.

        Raises:
            RuntimeError: The convolution's output took another way than with the example.
        """
        expected, self._folded = self._folded, None
        if expected is None:
            return False
        if expected is not input:
            raise RuntimeError(
                "a frozen batch norm does not see the output of the convolution that it is folded into, as it did "
                "with the example; do without fold_norms for this model"
            )
        return True

    def _pays(self, dtype: torch.dtype) -> bool:
        return True

    def _compute(self, dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[Tensor, ...]:
        norm, weight = self.norm, self.weight
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self._rstd = (norm.running_var + norm.eps).rsqrt()
        self._scale = norm.weight * self._rstd
        bias = self.layer.bias
        self._shift = (bias if isinstance(bias, Tensor) else 0.0) - norm.running_mean
        folded = weight * self._scale.to(weight.dtype).view(-1, 1, 1, 1)
        return folded.to(dtype, memory_format=memory_format), (norm.bias + self._shift * self._scale).to(dtype)

    def _identity(self) -> tuple[object, ...]:
        tensors = (*self.sources[1:], self.norm.running_mean, self.norm.running_var)
        return *super()._identity(), *((each._version, each.data_ptr()) for each in tensors if each is not None)

    def _to_sources(self, gradients: Mapping[int, Tensor], *, changed: bool) -> tuple[Tensor | None, ...]:
        weight, rstd, scale = self.weight.detach(), self._rstd, self._scale
        assert rstd is not None
        per_filter = scale.to(weight.dtype).view(-1, 1, 1, 1)
        if changed:
            weight = torch.where(per_filter == 0, weight, self._copies[0].to(weight.dtype) / per_filter)
        bias_gradient = gradients[1].to(scale.dtype)
        if 0 in gradients:
            gradient = gradients[0].to(weight.dtype)
            gamma_gradient = rstd * ((gradient * weight).sum((1, 2, 3)) + self._shift * bias_gradient)
            gradient = gradient.mul_(per_filter)
        else:
            gradient, gamma_gradient = torch.zeros_like(weight), rstd * self._shift * bias_gradient
        of_bias = [scale * bias_gradient] if len(self.sources) == 4 else []
        return gradient, gamma_gradient, bias_gradient, *of_bias


def foldable_norms(model: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, FrozenBatchNorm2d]]:
    """Find the frozen batch norms that can be folded into a convolution, by one forward pass.

    Each sees the output of a convolution that nothing else sees, and both are used once. Left out are those that would
    need more memory than they save: convolutions with more weights than outputs. Buffers, modes and the random state
    of the device stay.

    Args:
        model: In the mode in which it trains.
        example: Input of the model, of the size that it trains with; shape ``(N, C, H, W)``.

    Returns:
        Convolution and norm of each pair, in the order of the forward pass.
    """
    uses = _Uses()
    hooks = []
    for layer in model.modules():
        kind = vars(layer).get("plain_kind", type(layer))  # an engine may be attached
        if kind is nn.Conv2d or kind.__name__ == "Conv2dSame":  # timm's, or ours
            hooks.append(layer.register_forward_hook(uses.convolved))
        elif kind in (FrozenBatchNorm2d, FrozenBatchNormAct2d) and layer.affine:
            hooks.append(layer.register_forward_pre_hook(uses.normalizing))
            hooks.append(layer.register_forward_hook(uses.normalized))
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [example.device] if example.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), uses:
            outputs = model(example)
        uses.count(tree_leaves(outputs))
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
    return uses.pairs()


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts who reads the outputs of convolutions, by their memory: a view of an output counts as the output."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # kept alive, so that no memory is used twice
        self._norms: dict[int, FrozenBatchNorm2d] = {}
        self._foreign: set[int] = set()
        self._seen: list[nn.Module] = []
        self._inside: int | None = None  # the output that is being normalized

    def convolved(self, conv: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        self._seen.append(conv)
        self._outputs[_memory(output)] = conv, output

    def normalizing(self, norm: nn.Module, args: Any) -> None:
        assert isinstance(norm, FrozenBatchNorm2d)
        self._seen.append(norm)
        key = _memory(args[0])
        if key in self._outputs and self._outputs[key][1] is args[0] and key not in self._norms:
            self._norms[key] = norm
            self._inside = key

    def normalized(self, norm: nn.Module, args: Any, output: Tensor) -> None:
        self._inside = None

    def count(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor) and (key := _memory(value)) in self._outputs and key != self._inside:
                self._foreign.add(key)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count(tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))

    def pairs(self) -> list[tuple[nn.Conv2d, FrozenBatchNorm2d]]:
        found = []
        for key, norm in self._norms.items():
            conv, output = self._outputs[key]
            once = self._seen.count(conv) == 1 and self._seen.count(norm) == 1
            plain = conv.padding_mode == "zeros" and conv.weight.dtype == norm.weight.dtype
            if once and plain and key not in self._foreign and output.numel() >= conv.weight.numel():
                found.append((conv, norm))
        return found


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
