"""From a checkpoint to the module of its task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gn_transfer.training.checkpoint import rebuild_task
from gn_transfer.training.classification import TransferClassifier
from gn_transfer.training.segmentation import TransferSegmenter


def load_task(content: Mapping[str, Any], path: Path) -> TransferClassifier | TransferSegmenter:
    """Build the module of a checkpoint, on the CPU and in evaluation mode.

    Args:
        content: What :func:`gn_transfer.training.checkpoint.read_checkpoint` gave.
        path: Its path, for messages.

    Returns:
        A classifier, or a segmenter where the checkpoint has a decoder.

    Raises:
        ConfigError: See :func:`gn_transfer.training.checkpoint.rebuild_task`.
    """
    segments = "decoder" in content["gn_transfer"].get("architecture", {})
    kind: type[TransferClassifier | TransferSegmenter] = TransferSegmenter if segments else TransferClassifier
    return rebuild_task(kind, content, path).eval()
