"""Frozen batch norm, and batch norms with an activation."""

import pytest
import torch
from timm.layers import BatchNormAct2d as TimmBatchNormAct2d
from torch import nn

from gn_transfer.config import ConfigError
from gn_transfer.layers import (
    BatchNormAct2d,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    batch_statistics,
    corrected_momentum,
    reestimate_statistics,
)
from gn_transfer.layers.batch_norm import cuda_available, inputs_of


def filled(norm):
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


def test_frozen_uses_the_stored_statistics_in_training_and_keeps_them():
    reference = filled(nn.BatchNorm2d(6)).eval()
    frozen = FrozenBatchNorm2d(6).train()
    frozen.load_state_dict(reference.state_dict())
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(frozen(x), reference(x), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(frozen.buffers(), reference.buffers(), strict=True))
    frozen(x).square().sum().backward()
    assert frozen.weight.grad.abs().min() > 0
    assert frozen.bias.grad.abs().min() > 0


def test_batch_statistics_are_those_of_the_batch_at_hand_and_leave_the_running_ones():
    model = nn.Sequential(nn.BatchNorm2d(1), FrozenBatchNorm2d(1)).eval()
    model[1].running_mean.fill_(3.0)
    before = [buffer.clone() for buffer in model.buffers()]
    x = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(2, 1, 1, 2)  # mean 3, biased variance 3.5
    with batch_statistics(model):
        found = model(x)
    torch.testing.assert_close(found, (x - 3.0) / 3.5**0.5 - 3.0, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    torch.testing.assert_close(model(x), x - 3.0, rtol=1e-4, atol=1e-4)


def test_batch_statistics_need_a_norm_that_looks_at_its_batch():
    with (
        pytest.raises(ConfigError, match="no batch norm that looks at its batch"),
        batch_statistics(FrozenBatchNorm2d(1)),
    ):
        pass


def test_frozen_works_on_one_value_per_channel():
    assert FrozenBatchNorm2d(6).train()(torch.randn(1, 6, 1, 1)).shape == (1, 6, 1, 1)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_with_activation_equals_timm(training):
    theirs, ours = filled(TimmBatchNormAct2d(6)).train(training), BatchNormAct2d(6).train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_frozen_with_activation():
    frozen = FrozenBatchNormAct2d(6, act=nn.Tanh())
    plain = FrozenBatchNorm2d(6)
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(frozen(x), plain(x).tanh())
    assert frozen.state_dict().keys() == plain.state_dict().keys() == nn.BatchNorm2d(6).state_dict().keys()


def test_moments_are_pooled_not_variances():
    """Images of the values 1 and 5 vary by nothing within a batch of one, and by 4 together."""
    norm = nn.BatchNorm2d(1)
    images = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1, 1).expand(2, 1, 1, 2, 2)
    assert reestimate_statistics(norm, images) == 1
    assert norm.running_mean.item() == 3.0
    assert norm.running_var.item() == pytest.approx(4.0 * 8 / 7)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, FrozenBatchNorm2d, TimmBatchNormAct2d, BatchNormAct2d])
def test_reestimating_on_one_batch_gives_what_training_on_it_computes(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), filled(kind(4)), nn.Conv2d(4, 4, 3), filled(kind(4))).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(6, 3, 12, 12)
    reestimate_statistics(model, [(x, torch.zeros(6))])  # as a data loader gives it
    first = nn.functional.conv2d(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model[1].running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, first.var((0, 2, 3)) * 1, rtol=1e-4, atol=1e-5)
    normal = nn.functional.batch_norm(first, None, None, model[1].weight, model[1].bias, training=True)
    second = nn.functional.conv2d(
        model[1].act(normal) if hasattr(model[1], "act") else normal, model[2].weight, model[2].bias
    )
    torch.testing.assert_close(model[3].running_mean, second.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not model.training
    kept = [key for key in state if "running" not in key]
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in kept)
    assert model[1](first).shape == first.shape
    with pytest.raises(ConfigError, match="no image reached"):
        reestimate_statistics(model, [])


def test_corrected_momentum_forgets_as_fast_per_image():
    assert (1 - corrected_momentum(4)) ** 4 == pytest.approx(0.9)
    assert corrected_momentum(32) == pytest.approx(1 - 0.81)


def test_frozen_refuses_what_batch_norm_refuses():
    with pytest.raises(ValueError, match="expected 4D input"):
        FrozenBatchNorm2d(6)(torch.randn(2, 6))


def test_only_the_layers_that_are_given_are_reestimated():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1))
    images = torch.randn(1, 4, 1, 3, 3) + 5.0
    assert reestimate_statistics(model, images, layers=[model[1]]) == 1
    assert model[0].running_mean.item() == 0.0
    assert model[1].running_mean.item() == pytest.approx(images.mean().item(), abs=1e-3)


def test_dropout_is_off_while_statistics_are_reestimated():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1)).train()
    reestimate_statistics(model, [torch.ones(4, 1, 8, 8)])
    assert model[1].running_var.item() == 0.0
    assert model[0].training


def test_two_values_have_an_unbiased_variance():
    norm = nn.BatchNorm2d(1)
    reestimate_statistics(norm, torch.tensor([1.0, 5.0]).view(1, 2, 1, 1, 1))
    assert norm.running_var.item() == pytest.approx(8.0)


def test_the_images_of_a_batch():
    images, several = torch.zeros(2, 3, 4, 4), [torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)]
    assert inputs_of((images, torch.zeros(2))) is images
    assert inputs_of(several) is several  # as models of detection take them
    assert inputs_of((several, [{}, {}])) is several


def test_the_usual_activation_works_in_place():
    assert BatchNormAct2d(6).act.inplace


@pytest.mark.parametrize("available", [True, False])
def test_cuda_is_there_where_torch_says_so(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert cuda_available() is available
