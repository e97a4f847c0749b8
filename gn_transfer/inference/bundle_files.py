"""The files of a bundle: reading and verifying them. Needs no torch.

A bundle is one flat folder:

- ``model.onnx``: uint8 images in, float32 logits and probabilities out; the statistics of the pixels, and standardized
  weights, are inside. See :class:`gn_transfer.inference.classification.ClassificationBundle` and
  :class:`gn_transfer.inference.segmentation.SegmentationBundle` for the shapes.
- ``model.safetensors``: the weights under the names of the trained model, to train on.
- ``bundle.json``: task, classes, preprocessing, metrics, provenance, and the SHA-256 of every other file.
- ``README.md``: the model card.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gn_transfer.config import ConfigError
from gn_transfer.files import sha256

FORMAT = "gn_transfer bundle"
FORMAT_VERSION = 2
"""Version of the folder's layout and of bundle.json; a reader refuses what is newer. Version 1 knew one task."""

METADATA = "bundle.json"
GRAPH = "model.onnx"
WEIGHTS = "model.safetensors"
CARD = "README.md"

_REQUIRED = {
    "classification": ("classes", "img_size", "crop_fraction", "norm", "backbone", "weights", "files"),
    "segmentation": ("classes", "short_side", "tile_size", "norm", "backbone", "weights", "files"),
}


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read and check bundle.json.

    Args:
        folder: The bundle's folder.

    Returns:
        Its content; every file that it names is directly in the folder.

    Raises:
        ConfigError: Not a bundle, corrupt, newer than this reader, or naming a file outside the folder.
    """
    path = folder / METADATA
    if not path.is_file():
        what = "no such folder" if not folder.exists() else f"not a bundle, it has no {METADATA}"
        raise ConfigError(
            f"{folder}: {what}; make one with gn-transfer export "
            f"{shlex.quote(str(folder)) if folder.exists() else 'CHECKPOINT'} --output DIR."
        )
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise ConfigError(f"{path} is corrupt ({error}); export the checkpoint again.") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ConfigError(f"{path} does not describe a gn_transfer bundle; make one with gn-transfer export.")
    version = metadata.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ConfigError(
            f"{folder} was written by a newer gn-transfer (bundle format {version}, this one reads up to "
            f"{FORMAT_VERSION}); update gn-transfer."
        )
    task = metadata.get("task", "classification")  # version 1 names none
    if task not in _REQUIRED:
        raise ConfigError(f"{path} names the task {task!r}, which this gn-transfer does not know; update gn-transfer.")
    missing = [key for key in _REQUIRED[task] if key not in metadata]
    files = metadata.get("files")
    if missing or not isinstance(files, dict) or GRAPH not in files:
        said = f"lacks {', '.join(missing)}" if missing else f"names no {GRAPH}"
        raise ConfigError(f"{path} {said}; export the checkpoint again.")
    for name in files:
        if name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name:
            raise ConfigError(f"{path} names the file {name!r}, which is not a plain name inside the bundle; refused.")
        if (folder / name).resolve().parent != folder.resolve():
            raise ConfigError(f"{folder / name} is a link that leads out of the bundle; refused.")
    if metadata.get("sha256") != metadata_sha256(metadata):
        raise ConfigError(
            f"{path} was changed after the export; copy the bundle again, or export the checkpoint again."
        )
    return {"task": task, **metadata}


def verify_files(folder: Path, files: Mapping[str, str]) -> None:
    """Compare every file with its SHA-256.

    Args:
        folder: The bundle's folder.
        files: Name to hexadecimal SHA-256.

    Raises:
        ConfigError: A file is missing or has changed.
    """
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing; copy the bundle again, whole, or export the checkpoint again.")
        if sha256(path) != expected:
            raise ConfigError(
                f"{path} is not the file that was exported (its SHA-256 differs from the one in {METADATA}); copy the "
                "bundle again, or export the checkpoint again."
            )


def metadata_sha256(metadata: Mapping[str, Any]) -> str:
    """Hash what bundle.json says, its own field ``sha256`` left out and whatever the order and the white space."""
    said = {key: value for key, value in metadata.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
