"""Convolutions by matrix products: equal to F.conv2d in every combination, and chosen where they should be."""

import pytest
import torch
import torch.nn.functional as F

from gn_transfer.layers import conv
from gn_transfer.layers.conv import ByMatmul, by_matmul, conv2d

ALL, NONE, WEIGHT_ONLY = ByMatmul(True, True, True), ByMatmul(False, False, False), ByMatmul(False, False, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, 49, 512, 2048, torch.bfloat16), ALL),  # layer 4 of ResNet-50 at batch 1
        ((1, 3136, 64, 256, torch.bfloat16), NONE),
        ((1, 784, 128, 512, torch.bfloat16), ALL),
        ((1, 49, 512, 2048, torch.float32), ALL),
        ((1, 784, 128, 512, torch.float32), NONE),
        ((1, 196, 256, 1024, torch.float32), WEIGHT_ONLY),
        ((3, 49, 512, 512, torch.bfloat16), ByMatmul(True, False, True)),
        ((3, 49, 512, 512, torch.float32), WEIGHT_ONLY),
        ((3, 3136, 64, 64, torch.bfloat16), NONE),
    ],
)
def test_rule(arguments, expected):
    assert by_matmul(*arguments) == expected


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 6), (5, 7)])
@pytest.mark.parametrize("plan", [ALL, WEIGHT_ONLY, ByMatmul(True, False, False)])
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_torch(monkeypatch, kernel, stride, size, plan, weight_format, with_bias):
    plan = plan._replace(grad_input=plan.grad_input and kernel == 1)
    monkeypatch.setattr(conv, "by_matmul", lambda *_: plan)
    # 8 channels: with fewer, oneDNN's backward of a strided 1x1 convolution (torch 2.11, channels-last, a CPU with AVX2
    # and without AVX-512) writes beyond its memory.
    images = torch.randn(2, 8, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(12, 8, kernel, kernel).contiguous(memory_format=weight_format).requires_grad_()
    bias = torch.randn(12, requires_grad=True) if with_bias else None
    arguments = bias, (stride, stride), (kernel // 2, kernel // 2), (1, 1), 1
    ours, theirs = conv2d(images, weight, *arguments), F.conv2d(images, weight, *arguments)
    assert ours.grad_fn.name() == "_MatmulConvBackward"
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(ours)
    inputs = (images, weight, bias) if with_bias else (images, weight)
    for got, right in zip(
        torch.autograd.grad(
            F.relu(ours, inplace=True), inputs, direction
        ),  # as an activation does behind a folded norm
        torch.autograd.grad(F.relu(theirs), inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    monkeypatch.setattr(conv, "by_matmul", lambda *_: ALL)
    images = torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(6, 4, 1, 1)
    arguments = None, (1, 1), (0, 0), (1, 1), 1
    conv2d(images, weight.requires_grad_(), *arguments).sum().backward()
    assert images.grad is None
    conv2d(images.requires_grad_(), weight.detach(), *arguments).sum().backward()
    assert images.grad is not None


def test_bfloat16_is_as_exact_as_torch():
    torch.manual_seed(0)
    images = torch.randn(1, 256, 7, 7).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    for kernel in (1, 3):
        weight = torch.randn(256, 256, kernel, kernel).bfloat16().requires_grad_()
        arguments = None, (1, 1), (kernel // 2, kernel // 2), (1, 1), 1
        outputs = [f(images, weight, *arguments) for f in (conv2d, F.conv2d)]
        exact_in = images.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        exact = F.conv2d(*exact_in, *arguments)
        direction = torch.randn_like(exact).bfloat16()
        expected = exact, *torch.autograd.grad(exact, exact_in, direction.double())
        got, torchs = ((o, *torch.autograd.grad(o, (images, weight), direction)) for o in outputs)
        for ours, theirs, right in zip(got, torchs, expected, strict=True):
            assert (ours.double() - right).norm() <= 1.2 * (theirs.double() - right).norm()


@pytest.mark.parametrize(
    "change",
    [
        {"padding": "same"},
        {"padding": (0, 0)},
        {"padding": (1, 0)},
        {"dilation": (2, 2)},
        {"stride": (1, 2)},
    ],
)
def test_what_the_fast_path_does_not_know_goes_to_torch(monkeypatch, change):
    monkeypatch.setattr(conv, "by_matmul", lambda *_: ALL)
    images = torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    arguments = {"bias": None, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, **change}
    weight = torch.randn(6, 4, 3, 3)
    output = conv2d(images, weight, **arguments)
    assert output.grad_fn.name() == "ConvolutionBackward0"
    torch.testing.assert_close(output, F.conv2d(images, weight, **arguments))


@pytest.mark.parametrize("kernel", [1, 3])
def test_autocast_casts_as_it_does_for_torch(monkeypatch, kernel):
    monkeypatch.setattr(conv, "by_matmul", lambda *_: ALL._replace(grad_input=kernel == 1))
    images = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(12, 8, kernel, kernel, requires_grad=True), torch.randn(12, requires_grad=True)
    arguments = bias, (1, 1), (kernel // 2, kernel // 2), (1, 1), 1
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = conv2d(images, weight, *arguments), F.conv2d(images, weight, *arguments)
    assert ours.grad_fn.name() == "_MatmulConvBackward"
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-2)
    ours.sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
