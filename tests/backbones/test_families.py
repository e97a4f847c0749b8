"""Every family of convolutional models of timm under every norm: one step, groups and convolutions as they should be.

The same families through fit, 20 steps, and export are in ``benchmarks/families.py``.
"""

from __future__ import annotations

import pytest
import torch

from gn_transfer.backbones import create_backbone
from gn_transfer.backbones.families import TESTED_FAMILIES
from gn_transfer.config import ConfigError
from gn_transfer.layers import FrozenBatchNorm2d, StdConv2d, group_counts


@pytest.mark.parametrize("norm", ["bn", "bn_frozen", "gn", "gn_ws"])
@pytest.mark.parametrize("family", TESTED_FAMILIES)
def test_one_step_of_every_family(family, norm):
    built = create_backbone(family, norm=norm, num_classes=3)
    size = 96 if family == "inception_v3" else 64
    output = built.model.train()(torch.randn(2, 3, size, size))
    assert output.shape == (2, 3)
    output.square().sum().backward()
    without = [name for name, p in built.model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    norms = [layer for layer in built.model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert (norm.startswith("bn")) == bool(norms)
    assert all(isinstance(layer, FrozenBatchNorm2d) for layer in norms) == (norm != "bn" or not norms)
    assert bool(group_counts(built.model)) == norm.startswith("gn")
    assert any(isinstance(layer, StdConv2d) for layer in built.model.modules()) == (norm == "gn_ws")


@pytest.mark.parametrize(
    ("name", "norm", "said"),
    [
        ("convnext_atto", "gn", "no BatchNorm or GroupNorm for model.norm to replace .its norms are LayerNorm2d"),
        ("vgg11", "bn_frozen", "it has no norms"),
        ("levit_128", "gn", "norms of another kind than BatchNorm2d"),
    ],
)
def test_models_whose_norms_cannot_be_replaced(name, norm, said):
    with pytest.raises(ConfigError, match=said):
        create_backbone(name, norm=norm, num_classes=3)
