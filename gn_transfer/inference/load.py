"""One call for what a training leaves: a checkpoint to train on, or a bundle to predict with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gn_transfer.config import ConfigError
from gn_transfer.inference.bundle import METADATA, Bundle, load_bundle

if TYPE_CHECKING:
    from gn_transfer.training.classification import TransferClassifier


def load(path: str | os.PathLike[str]) -> Bundle | TransferClassifier:
    """Load a bundle, or a checkpoint of ``gn-transfer fit``. No code in it is run.

    Args:
        path: Folder of a bundle; a ``.ckpt`` file; or the folder of a run under ``checkpoints/``, of which the best
            checkpoint is taken.

    Returns:
        A bundle, which needs no torch; or the module on the CPU, in evaluation mode.

    Raises:
        ConfigError: Neither of these, or it is corrupt.
    """
    path = Path(path)
    if (path / METADATA).is_file():
        return load_bundle(path)
    if (path / "best.ckpt").is_file():
        path = path / "best.ckpt"
    if not path.is_file():
        raise ConfigError(
            f"{path}: neither a bundle (a folder with {METADATA}) nor a checkpoint; give the folder of a bundle, a "
            ".ckpt file, or a folder checkpoints/CONFIG/RUN."
        )
    from gn_transfer.training.classification import TransferClassifier

    return TransferClassifier.load_from_checkpoint(path)
