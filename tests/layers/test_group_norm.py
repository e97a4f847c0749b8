"""Group norm: the written formula, its limits LN and IN, timm's layer, and the channels-last kernel of our own."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import GroupNormAct as TimmGroupNormAct
from torch import nn

from gn_transfer.config import ConfigError
from gn_transfer.layers import GroupNorm, GroupNormAct, fitting_group_count, group_count
from gn_transfer.layers.group_norm import group_norm

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# 1,024 positions and 400,000 values an image are borders between ways; 2, 2, 16 and 8 channels a group
SHAPES = [(2, 64, 33, 32), (3, 64, 5, 7), (1, 512, 8, 8), (2, 256, 40, 40)]


def written_out(x, groups, weight, bias, eps):
    grouped = x.unflatten(1, (groups, -1))
    mean = grouped.mean(dim=(2, 3, 4), keepdim=True)
    variance = ((grouped - mean) ** 2).mean(dim=(2, 3, 4), keepdim=True)
    normed = ((grouped - mean) / (variance + eps).sqrt()).flatten(1, 2)
    return normed * weight[:, None, None] + bias[:, None, None]


def inputs(shape, dtype=torch.float32, layout=torch.contiguous_format, offset=0.5):
    torch.manual_seed(0)
    x = (torch.randn(shape) + offset).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(shape[1]) + 1, torch.randn(shape[1])
    return [t.requires_grad_() for t in (x, weight, bias)]


def gradients(output, tensors):
    torch.manual_seed(1)
    direction = torch.randn(output.shape).to(output.dtype)
    return torch.autograd.grad(output, tensors, direction)


def test_hand_value():
    x = torch.tensor([1.0, 3.0, 10.0, 30.0]).reshape(1, 4, 1, 1)
    expected = torch.tensor([-1.0, 1.0, -1.0, 1.0]).reshape(1, 4, 1, 1)
    torch.testing.assert_close(group_norm(x, 2, eps=0.0), expected)
    torch.testing.assert_close(group_norm(x, 2, eps=3.0)[:, :2], expected[:, :2] / 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 32, 64])
def test_formula_and_gradients_in_float64(shape, groups, layout):
    x, weight, bias = inputs(shape, layout=layout)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    output, expected = group_norm(x, groups, weight, bias, 1e-3), written_out(exact[0], groups, *exact[1:], 1e-3)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    assert output.is_contiguous(memory_format=layout)
    for ours, theirs in zip(gradients(output, (x, weight, bias)), gradients(expected, exact), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.5, 20.0])
def test_half_precision_in_channels_last_is_as_exact_as_torch(shape, dtype, offset):
    x, weight, bias = inputs(shape, dtype, torch.channels_last, offset)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    theirs_in = [x.detach().contiguous().requires_grad_(), weight, bias]
    expected = written_out(exact[0], 32, *exact[1:], 1e-5)
    ours, theirs = group_norm(x, 32, weight, bias), F.group_norm(theirs_in[0], 32, weight, bias)
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    triples = zip(
        (ours, *gradients(ours, (x, weight, bias))),
        (theirs, *gradients(theirs, theirs_in)),
        (expected, *gradients(expected, exact)),
        strict=True,
    )
    for got, other, right in triples:
        assert (got.double() - right).norm() <= 2 * (other.double() - right).norm() + 1e-6 * right.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_limits_are_layer_norm_and_instance_norm(layout):
    x, weight, bias = inputs((2, 12, 6, 5), layout=layout)
    layer = F.layer_norm(x, x.shape[1:]) * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(group_norm(x, 1, weight, bias), layer)
    torch.testing.assert_close(group_norm(x, 12, weight, bias), F.instance_norm(x, weight=weight, bias=bias))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_image_does_not_depend_on_its_batch_mates(layout):
    x, weight, bias = inputs((4, 64, 6, 5), layout=layout)
    together = group_norm(x, 32, weight, bias)
    alone = torch.cat([group_norm(image, 32, weight, bias) for image in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_equals_timm_with_its_weights(groups):
    theirs, ours = TimmGroupNormAct(16, num_groups=groups), GroupNormAct(16, groups)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 6, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    assert {name for name, _ in ours.named_children()} == {name for name, _ in theirs.named_children()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_constant_images_and_large_values_stay_finite(dtype, layout, value):
    for x in (torch.full((2, 32, 6, 6), value), value * torch.randn(2, 32, 6, 6)):
        x = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
        norm = GroupNormAct(32, 8)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = norm(x)
        output.float().square().mean().backward()
        assert all(t.isfinite().all() for t in (output, x.grad, norm.weight.grad, norm.bias.grad))


def test_frozen_affine_and_no_affine_in_channels_last():
    x, weight, bias = inputs((2, 16, 6, 5), layout=torch.channels_last)
    expected = gradients(F.group_norm(x.contiguous(), 8, weight, bias), (x,))[0]
    got = gradients(group_norm(x, 8, weight.detach(), bias.detach()), (x,))[0]
    torch.testing.assert_close(got, expected)
    bare = gradients(group_norm(x, 8), (x,))[0]
    torch.testing.assert_close(bare, gradients(F.group_norm(x.contiguous(), 8), (x,))[0])
    only_affine = group_norm(x.detach(), 8, weight, bias)
    assert all(g is not None for g in gradients(only_affine, (weight, bias)))


def test_group_size_counts_channels_per_group():
    assert GroupNorm(48, group_size=16).num_groups == 3
    assert group_count(64) == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_groups": 32},
            "model.num_groups=32 does not divide 48 channels of stem.norm; "
            "use one of 1, 2, 3, 4, 6, 8, 12, 16, 24, 48, or set model.group_size.",
        ),
        ({"group_size": 20}, "model.group_size=20 does not divide 48 channels of stem.norm; use one of 1, 2, 3, 4, "),
        ({"num_groups": 0}, "model.num_groups=0 does not divide"),
    ],
)
def test_a_count_that_does_not_divide_names_what_does(arguments, message):
    with pytest.raises(ConfigError) as raised:
        group_count(48, **arguments, layer="stem.norm")
    assert str(raised.value).startswith(message)


def test_groups_of_one_value_are_refused():
    with pytest.raises(ConfigError, match=r"8 groups over \(8, 1, 1\) hold one value each"):
        GroupNorm(8, 8)(torch.randn(2, 8, 1, 1))
    assert GroupNorm(8, 4)(torch.randn(2, 8, 1, 1)).isfinite().all()


NARROW = [(2, 8, 6, 7), (1, 256, 40, 40)]  # below and above 400,000 values an image


@pytest.mark.parametrize("shape", NARROW)
def test_float64_in_channels_last(shape):
    x, weight, bias = (t.detach().double().requires_grad_() for t in inputs(shape))
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    groups = shape[1] // 2
    output, expected = group_norm(last, groups, weight, bias), F.group_norm(x, groups, weight, bias)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        gradients(output, (last, weight, bias)), gradients(expected, (x, weight, bias)), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_gradients(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def norm(*arguments):
        return group_norm(arguments[0].contiguous(memory_format=layout), 2, *arguments[1:])

    assert torch.autograd.gradcheck(norm, (x, weight, bias))
    assert torch.autograd.gradgradcheck(norm, (x, weight, bias))


def test_a_gradient_penalty_in_channels_last_has_a_gradient():
    penalties = []
    for layout in LAYOUTS:
        x, weight, bias = inputs((2, 8, 6, 7), layout=layout)
        direction = torch.linspace(-1, 1, x.numel()).view(x.shape)
        [of_input] = torch.autograd.grad((group_norm(x, 4, weight, bias) * direction).sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(of_input.square().sum(), (x, weight)))
    for first, second in zip(*penalties, strict=True):
        assert first.norm() > 0
        torch.testing.assert_close(first, second.contiguous(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 32, 9, 9), (1, 512, 32, 32)])
@pytest.mark.parametrize("groups", [1, 2])
def test_behind_a_frozen_stem(shape, groups):
    x, weight, bias = inputs(shape)
    frozen = x.detach().contiguous(memory_format=torch.channels_last)  # torch 2.11 ends the process here
    found = gradients(group_norm(frozen, groups, weight, bias), (weight, bias))
    expected = gradients(F.group_norm(x.detach(), groups, weight, bias), (weight, bias))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_no_images(layout):
    x = torch.empty(0, 8, 5, 5).contiguous(memory_format=layout).requires_grad_()
    output = group_norm(x, 4, torch.ones(8), torch.zeros(8))
    assert output.shape == x.shape
    output.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_affine_in_half_precision_leaves_the_statistics_in_float32(dtype):
    x, *affine = inputs((2, 64, 5, 7), dtype, offset=20.0)
    halves = [t.detach().to(dtype).requires_grad_() for t in affine]
    [found] = gradients(group_norm(x, 8, *halves), (x,))
    [expected] = gradients(group_norm(x, 8, *(t.detach().float() for t in halves)), (x,))
    assert torch.equal(found, expected)
    assert torch.equal(group_norm(x, 8), F.group_norm(x, 8))  # and without any


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("meta", torch.float32)])
def test_half_precision_is_normalized_in_float32_on_other_devices(monkeypatch, device, dtype):
    seen, plain = [], F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda input, *rest: seen.append(input.dtype) or plain(input, *rest))
    x = torch.zeros(2, 32, 4, 4, dtype=torch.bfloat16, device=device)
    output = group_norm(x, 8, torch.ones(32, device=device), torch.zeros(32, device=device))
    assert seen == [dtype]
    assert (output.dtype, output.shape) == (torch.bfloat16, x.shape)


@pytest.mark.parametrize("shape", NARROW)
@pytest.mark.parametrize("trained", ["nothing", "weight", "bias"])
def test_a_part_of_the_affine_in_channels_last(shape, trained):
    x, weight, bias = inputs(shape, layout=torch.channels_last)
    parts = {"nothing": (None, None), "weight": (weight, bias.detach()), "bias": (weight.detach(), bias)}[trained]
    wanted = [x, *(part for part in parts if part is not None and part.requires_grad)]
    found = gradients(group_norm(x, shape[1] // 2, *parts), wanted)
    expected = gradients(F.group_norm(x.contiguous(), shape[1] // 2, *parts), wanted)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm()


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 3, 4, 5)])
def test_rows_sequences_and_volumes(shape):
    x = torch.randn(shape)
    torch.testing.assert_close(group_norm(x, 2), F.group_norm(x, 2))


def test_usual_numbers_of_groups():
    assert GroupNorm(64).num_groups == 32
    assert [fitting_group_count(channels) for channels in (66, 2, 1)] == [22, 1, 1]
