"""Frozen batch norm, and batch norms with an activation."""

import pytest
import torch
from timm.layers import BatchNormAct2d as TimmBatchNormAct2d
from torch import nn

from gn_transfer.layers import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d


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
