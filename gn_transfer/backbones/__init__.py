"""Build a model under a norm, and fill it with pretrained weights."""

from gn_transfer.backbones.create import (
    Backbone,
    check_input,
    create_backbone,
    default_channels,
    parameter_depths,
    rebuild,
    replace_norms,
)
from gn_transfer.backbones.model_config import ModelConfig, build_backbone, rebuild_backbone
from gn_transfer.backbones.pretrained import auto_table, named_weights, resolve_pretrained
from gn_transfer.backbones.transfer import BN_FAMILY, TransferReport

__all__ = [
    "BN_FAMILY",
    "Backbone",
    "ModelConfig",
    "TransferReport",
    "auto_table",
    "build_backbone",
    "check_input",
    "create_backbone",
    "default_channels",
    "named_weights",
    "parameter_depths",
    "rebuild",
    "rebuild_backbone",
    "replace_norms",
    "resolve_pretrained",
]
