"""Layers of the small-batch engine: a plain torch library, usable without the rest of the package."""

from gn_transfer.layers.accumulation_engine import AccumulationEngine
from gn_transfer.layers.batch_norm import (
    BatchNormAct2d,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    SyncBatchNormAct,
    batch_statistics,
    corrected_momentum,
    reestimate_statistics,
)
from gn_transfer.layers.convert import (
    Replacement,
    convert_norm,
    default_groups,
    group_counts,
    is_norm,
    plain_conv,
    uses_weight_standardization,
)
from gn_transfer.layers.cuda_graph import GraphedModel
from gn_transfer.layers.diagnosis import Diagnosis
from gn_transfer.layers.freeze import freeze_batch_norm
from gn_transfer.layers.group_norm import GroupNorm, GroupNormAct, fitting_group_count, group_count
from gn_transfer.layers.measure_norms import diagnose
from gn_transfer.layers.memory_format import preferred_memory_format
from gn_transfer.layers.std_conv import StdConv2d, standardize_weight

__all__ = [
    "AccumulationEngine",
    "BatchNormAct2d",
    "Diagnosis",
    "FrozenBatchNorm2d",
    "FrozenBatchNormAct2d",
    "GraphedModel",
    "GroupNorm",
    "GroupNormAct",
    "Replacement",
    "StdConv2d",
    "SyncBatchNormAct",
    "batch_statistics",
    "convert_norm",
    "corrected_momentum",
    "default_groups",
    "diagnose",
    "fitting_group_count",
    "freeze_batch_norm",
    "group_count",
    "group_counts",
    "is_norm",
    "plain_conv",
    "preferred_memory_format",
    "reestimate_statistics",
    "standardize_weight",
    "uses_weight_standardization",
]
