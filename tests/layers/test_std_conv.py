"""standardize_weight and StdConv2d: hand values, the formula, timm's layer, odd weights, what evaluation keeps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import StdConv2d as TimmStdConv2d
from torch import nn

from gn_transfer.config import ConfigError
from gn_transfer.layers import StdConv2d, standardize_weight
from gn_transfer.layers.std_conv import conv_geometry, filter_rows, rows_to_filters


def test_hand_value():
    weight = torch.tensor([[1.0, 3.0], [2.0, 8.0]]).reshape(2, 2, 1, 1)
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]).reshape(2, 2, 1, 1)
    torch.testing.assert_close(standardize_weight(weight, 0.0), expected)
    # variance 1, so eps = 3 halves the result: it stands inside the root
    torch.testing.assert_close(standardize_weight(weight, 3.0)[0], expected[0] / 2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_formula_in_float64(memory_format):
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64).to(memory_format=memory_format)
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    variance = ((weight - mean) ** 2).mean(dim=(1, 2, 3), keepdim=True)
    standardized = standardize_weight(weight, 1e-3)
    torch.testing.assert_close(standardized, (weight - mean) / (variance + 1e-3).sqrt(), rtol=1e-12, atol=1e-12)
    assert standardized.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 1, "groups": 2, "bias": True},
        {"kernel_size": 3, "dilation": 2, "padding": 2, "groups": 4},
    ],
)
def test_equals_timm_with_its_weights(geometry):
    theirs = TimmStdConv2d(8, 12, **geometry, eps=1e-8)
    ours = StdConv2d(8, 12, **{"bias": False, **geometry})
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes_and_state_dict_of_conv2d(padding_mode):
    plain = nn.Conv2d(4, 6, 3, padding=1, padding_mode=padding_mode)
    ours = StdConv2d(4, 6, 3, padding=1, padding_mode=padding_mode)
    ours.load_state_dict(plain.state_dict())
    plain.weight.data = standardize_weight(plain.weight.data, 1e-8)
    images = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(ours(images), plain(images))
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_gradient_of_the_raw_weight_has_zero_mean_and_is_orthogonal_to_it():
    conv = StdConv2d(8, 6, 3)
    conv(torch.randn(2, 8, 9, 9)).square().sum().backward()
    gradient, weight = conv.weight.grad.flatten(1), conv.weight.detach().flatten(1)
    scale = gradient.norm(dim=1)
    assert (gradient.mean(1).abs() / scale).max() < 1e-6
    centred = weight - weight.mean(1, keepdim=True)
    assert ((gradient * centred).sum(1).abs() / (scale * centred.norm(dim=1))).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", [lambda w: w.fill_(0.0), lambda w: w.fill_(7.0), lambda w: w.mul_(1e4)])
def test_odd_filters_stay_finite_under_autocast(dtype, fill):
    conv = StdConv2d(8, 6, 3, padding=1)
    fill(conv.weight.data)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = conv(torch.randn(2, 8, 9, 9))
    output.float().mean().backward()
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert conv.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_for_half_weights_and_under_autocast(dtype):
    # mean 100, spread 0.5: in bf16 the filter's own mean would be off by up to 0.25
    weight = (100 + 0.5 * torch.randn(4, 64, 3, 3)).to(dtype)
    expected = standardize_weight(weight.double(), 1e-8)
    with torch.autocast("cpu", dtype):
        standardized = standardize_weight(weight, 1e-8)
    assert standardized.dtype == dtype
    assert (standardized.double() - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_filters_of_one_weight_are_refused():
    with pytest.raises(ConfigError, match="filters of one weight"):
        StdConv2d(4, 4, 1, groups=4)


def test_evaluation_standardizes_once_until_the_weight_changes(monkeypatch):
    conv, images = StdConv2d(4, 6, 3).eval(), torch.randn(1, 4, 5, 5)
    calls = []
    norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda *args, **kwargs: calls.append(1) or norm(*args, **kwargs))

    def outputs_right():
        plain = F.conv2d(images, standardize_weight(conv.weight, conv.eps), conv.bias)
        calls.clear()
        with torch.inference_mode():
            first = conv(images)
        with torch.no_grad():
            torch.testing.assert_close(conv(images), plain)
        torch.testing.assert_close(first, plain)
        return len(calls)

    assert outputs_right() == 1
    assert outputs_right() == 0
    with torch.no_grad():
        conv.weight.mul_(2).add_(torch.randn_like(conv.weight))
    assert outputs_right() == 1
    conv.weight.data = torch.randn_like(conv.weight)
    assert outputs_right() == 1
    conv.load_state_dict({key: value + torch.randn_like(value) for key, value in conv.state_dict().items()})
    assert outputs_right() == 1
    conv.train().eval()
    assert outputs_right() == 1
    twin = copy.deepcopy(conv)
    assert twin._eval_weight is None
    assert conv(images).requires_grad  # with gradients wanted, evaluation uses the graph


def test_weights_made_in_inference_mode_work():
    with torch.inference_mode():
        conv = StdConv2d(4, 6, 3).eval()
        assert conv(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 3)


def test_filters_kept_for_evaluation_are_dropped_where_a_step_may_follow():
    """Fused optimizers change a weight and leave its version as it was; so does ``.data``."""
    conv, images = StdConv2d(4, 6, 3).eval(), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        conv(images)
    conv(images)
    conv.weight.data.add_(torch.randn_like(conv.weight))
    with torch.no_grad():
        plain = F.conv2d(images, standardize_weight(conv.weight, conv.eps), conv.bias)
        torch.testing.assert_close(conv(images), plain)


def test_eps_is_that_of_bit_and_is_shown():
    assert StdConv2d(4, 6, 3).eps == StdConv2d.from_conv(nn.Conv2d(4, 6, 3)).eps == 1e-8
    assert repr(StdConv2d(4, 6, 3)) == "StdConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), eps=1e-08)"


@pytest.mark.parametrize(("dtype", "mean"), [(torch.bfloat16, 100.25), (torch.float16, 100.03)])
def test_gradients_of_half_weights_use_float32_statistics(dtype, mean):
    torch.manual_seed(0)
    weight, direction = (mean + 0.5 * torch.randn(4, 64, 3, 3)).to(dtype), (1 + torch.randn(4, 64, 3, 3)).to(dtype)
    half, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    standardize_weight(half, 1e-8).backward(direction)
    standardize_weight(exact, 1e-8).backward(direction.double())
    assert (half.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_filters_as_rows_and_back(memory_format):
    weight = torch.randn(6, 5, 3, 3).to(memory_format=memory_format)
    rows = filter_rows(weight)
    assert rows.shape == (6, 45)
    assert rows.data_ptr() == weight.data_ptr()
    assert torch.equal(rows_to_filters(rows, weight), weight)


def test_a_single_filter_and_training_by_default():
    conv = StdConv2d(3, 1, 3)
    assert conv(torch.randn(1, 3, 5, 5)).shape == (1, 1, 3, 3)
    assert conv.eval().train().training


@pytest.mark.parametrize("bias", [True, False])
def test_the_geometry_of_a_convolution(bias):
    conv = nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=2, groups=2, bias=bias)
    assert conv_geometry(conv) == (4, 6, (3, 1), (2, 2), (1, 0), (2, 2), 2, bias, "zeros")
