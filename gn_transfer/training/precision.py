"""Mixed precision by name, resolved to what the device can do before the Trainer exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from gn_transfer.config import ConfigError

Mode = Literal["auto", "bf16", "fp16", "fp32"]
LightningPrecision = Literal["bf16-mixed", "16-mixed", "32-true"]


def device_type(accelerator: str) -> str:
    """Say on which kind of device Lightning's accelerator will train.

    Args:
        accelerator: ``trainer.accelerator``: ``auto``, ``cpu``, ``gpu``, ``cuda``, ``mps``, ...

    Returns:
        ``cpu``, ``cuda`` or ``mps``.
    """
    if accelerator in ("auto", "gpu"):
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return accelerator


def has_bf16(device: str) -> bool:
    """Say whether a device computes bf16 in hardware.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``.
    """
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any(
            getattr(torch.cpu, probe, bool)() for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        )
    return False


def resolve_precision(mode: Mode, device: str) -> LightningPrecision:
    """Choose Lightning's precision.

    Args:
        mode: ``auto`` takes bf16 where the device has it, else fp16 with loss scaling on CUDA, else fp32.
        device: ``cpu``, ``cuda`` or ``mps``.

    Returns:
        Lightning's name for it.

    Raises:
        ConfigError: fp16 without CUDA, where there is no loss scaling.
    """
    if mode == "auto":
        mode = "bf16" if has_bf16(device) else "fp16" if device == "cuda" else "fp32"
    if mode == "fp16" and device != "cuda":
        raise ConfigError(
            f"mixed_precision.mode=fp16 needs a CUDA device for its loss scaling, this run is on {device}; "
            "use bf16, fp32 or auto."
        )
    table: dict[str, LightningPrecision] = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}
    return table[mode]


@dataclass
class MixedPrecisionConfig:
    """Precision of training. Weights, their gradients and the statistics of norms stay in float32, evaluation too.

    Args:
        mode: auto takes bf16 where the device has it, else fp16 with loss scaling on CUDA, else fp32.
    """

    mode: Mode = "auto"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Dtype of autocast under one of Lightning's precisions; None without autocast."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
