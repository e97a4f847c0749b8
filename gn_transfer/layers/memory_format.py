"""Which memory layout a model trains fastest in: a rule read off measurements."""

from __future__ import annotations

import torch

from gn_transfer.config import Norm


def preferred_memory_format(
    norm: Norm, device_type: str, *, segments: bool = False, depthwise: bool = False, half: bool = False
) -> torch.memory_format:
    """Choose the layout of images and activations (``channels_last: auto``).

    On a CPU channels-last wins for every norm and batch size of a classification (``benchmarks/README.md``) without
    depthwise convolutions: oneDNN's convolutions read it as it is, and :func:`gn_transfer.layers.group_norm` has a
    kernel for it where torch's is slow.
    The decoder of a segmentation has convolutions from many channels to few on large maps, whose weight gradients are
    up to twice as slow in channels-last. Depthwise convolutions are slower there in half precision, and between group
    norms: EfficientNet-Lite0 at batch 1 trains 15.2 against 9.3 images/s in bf16 and 17.3 against 15.2 in float32 with
    group norm, but 16.9 against 18.2 in float32 with frozen batch norms (two threads, AVX-512). On CUDA batch norm
    gains half again from it (RTX 3090, AMP, ResNet-50: 1,218 against 826 images/s) while group norm loses 10 % (482
    against 532), since torch's group norm there leaves channels-last (timm's published benchmark).

    Args:
        norm: The normalization.
        device_type: ``cpu``, ``cuda``, ...
        segments: Whether the model has a decoder.
        depthwise: Whether it has depthwise convolutions.
        half: Whether it computes in half precision.

    Returns:
        ``torch.channels_last`` or ``torch.contiguous_format``.

    Example:
        >>> preferred_memory_format("gn_ws", "cuda")
        torch.contiguous_format
        >>> preferred_memory_format("bn", "cpu"), preferred_memory_format("bn", "cpu", segments=True)
        (torch.channels_last, torch.contiguous_format)
    """
    group_norm = norm in ("gn", "gn_ws", "ln", "in")
    if device_type == "cpu":
        last = not segments and not (depthwise and (half or group_norm))
    else:
        last = device_type == "cuda" and not group_norm
    return torch.channels_last if last else torch.contiguous_format
