"""The rule that chooses between channels-last and contiguous."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gn_transfer.backbones import ModelConfig
from gn_transfer.layers.conv import is_depthwise
from gn_transfer.layers.memory_format import preferred_memory_format
from gn_transfer.training.classification import TransferClassifier

LAST, FIRST = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    ("norm", "half", "expected"),
    [("gn", False, FIRST), ("gn", True, FIRST), ("bn_frozen", True, FIRST), ("bn_frozen", False, LAST)],
)
def test_depthwise_convolutions_on_a_cpu(norm, half, expected):
    assert preferred_memory_format(norm, "cpu", depthwise=True, half=half) == expected
    assert preferred_memory_format(norm, "cpu", half=half) == LAST
    assert preferred_memory_format(norm, "cpu", segments=True, half=half) == FIRST


def test_what_is_depthwise():
    assert is_depthwise(nn.Conv2d(4, 8, 3, groups=4))
    assert not any(is_depthwise(layer) for layer in (nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(1, 8, 3), nn.Linear(1, 1)))


@pytest.mark.parametrize(
    ("backbone", "precision", "expected"),
    [("resnet18", "bf16-mixed", LAST), ("mobilenetv3_small_050", "bf16-mixed", FIRST)],
)
def test_a_module_asks_its_model(backbone, precision, expected):
    task = TransferClassifier(ModelConfig(backbone, "bn_frozen"))
    task.build(["a", "b"])
    assert task.memory_format("cpu", precision) == expected
    task.model_config.channels_last = True
    assert task.memory_format("cpu", precision) == LAST
