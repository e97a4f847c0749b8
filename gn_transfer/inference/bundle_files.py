"""The files of a bundle: reading, verifying and sealing them. Needs no torch.

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
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from gn_transfer.config import ConfigError, shortened
from gn_transfer.files import parse_json, read_text, sha256, write_json

FORMAT = "gn_transfer bundle"
FORMAT_VERSION = 2
"""Version of the folder's layout and of bundle.json; a reader refuses what is newer. Version 1 knew one task."""

METADATA = "bundle.json"
GRAPH = "model.onnx"
WEIGHTS = "model.safetensors"
CARD = "README.md"

_REQUIRED: dict[str, dict[str, tuple[type, ...]]] = {
    "classification": {"img_size": (int,), "crop_fraction": (int, float)},
    "segmentation": {"short_side": (int,), "tile_size": (int, NoneType)},
}
for _task in _REQUIRED.values():
    _task |= {"classes": (list,), "norm": (str,), "backbone": (str,), "weights": (str,), "files": (dict,)}

_LARGEST_SIDES = {"img_size": 4096, "short_side": 16_384, "tile_size": 16_384}  # pixels
_MOST_CLASSES = 255  # of a mask of 8 bits, in which one value does not count
_LONGEST_NAME = 100
_SUFFIXES = (".onnx", ".safetensors", ".json", ".md")


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
        metadata = parse_json(read_text(path))
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
    if not isinstance(task, str) or task not in _REQUIRED:
        raise ConfigError(f"{path} names the task {task!r}, which this gn-transfer does not know; update gn-transfer.")
    _check_values(path, metadata, _REQUIRED[task])
    files = metadata["files"]
    for name in files:
        plain = name.isprintable() and len(name) <= _LONGEST_NAME
        if not plain or name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name:
            raise ConfigError(
                f"{path} names the file {shortened(name)}, which is not a plain name inside the bundle; refused."
            )
        if not name.endswith(_SUFFIXES):
            raise ConfigError(f"{path} names the file {name!r}, which no export writes; refused.")
        if Path(os.path.realpath(folder / name)).parent != Path(os.path.realpath(folder)):  # resolve() fails in circles
            raise ConfigError(f"{folder / name} is a link that leads out of the bundle; refused.")
    if metadata.get("sha256") != metadata_sha256(metadata):
        raise ConfigError(
            f"{path} was changed after the export; copy the bundle again, or export the checkpoint again."
        )
    return {"task": task, **metadata}


def _check_values(path: Path, metadata: Mapping[str, Any], required: Mapping[str, tuple[type, ...]]) -> None:
    """Refuse values that no export writes."""
    if missing := [key for key in required if key not in metadata]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; export the checkpoint again.")
    wrong = [key for key, kinds in required.items() if not isinstance(metadata[key], kinds)]
    if not wrong:
        names, files = metadata["classes"], metadata["files"]
        wrong += [key for key in ("norm", "backbone", "weights") if not metadata[key].isprintable()]
        if not all(isinstance(name, str) and name.isprintable() for name in names) or not _are_classes(names, metadata):
            wrong.append("classes")
        wrong += [key for key in ("versions", "provenance") if not isinstance(metadata.get(key, {}), dict)]
        if GRAPH not in files:
            raise ConfigError(f"{path} names no {GRAPH}; export the checkpoint again.")
        if not _is_sound(metadata.get("confidence", {})):
            wrong.append("confidence")
        if not all(isinstance(digest, str) for digest in files.values()):
            wrong.append("files")
        sides = {key: metadata.get(key) or 0 for key in _LARGEST_SIDES}
        if not all(0 <= side <= _LARGEST_SIDES[key] for key, side in sides.items()) or metadata.get("img_size") == 0:
            wrong.append("sizes in pixels")
        if not _is_parity(metadata.get("parity")):
            wrong.append("parity")
        quantization = metadata.get("quantization")
        if quantization is not None and not (
            isinstance(quantization, dict) and _is_number(quantization.get("metric_int8"))
        ):
            wrong.append("quantization")
    if wrong:
        raise ConfigError(f"{path} is corrupt: no export writes such {', '.join(wrong)}; export the checkpoint again.")


def _are_classes(names: Sequence[str], metadata: Mapping[str, Any]) -> bool:
    """Say whether every class has a name of its own, and its number fits into a mask."""
    return 0 < len(set(names)) == len(names) and (metadata.get("task") != "segmentation" or len(names) <= _MOST_CLASSES)


def _is_parity(parity: Any) -> bool:
    """Say whether a comparison with the checkpoint can be used; while a bundle is exported it has none yet."""
    if not isinstance(parity, dict):
        return parity is None
    kinds = {"metric": str, "images": int}
    return _is_number(parity.get("metric_bundle")) and all(isinstance(parity.get(k), kind) for k, kind in kinds.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_sound(confidence: Any) -> bool:
    """Say whether what bundle.json says of confidence can be used: its threshold is a probability, or there is none."""
    if not isinstance(confidence, dict):
        return False
    threshold = confidence.get("threshold")
    probability = threshold.get("probability") if isinstance(threshold, dict) else threshold
    return probability is None if threshold is None else isinstance(probability, float) and 0 <= probability <= 1


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


def seal(folder: Path, metadata: dict[str, Any]) -> None:
    """Write bundle.json over the files that are there.

    Args:
        folder: The bundle's folder.
        metadata: Its content; ``files`` and ``sha256`` are renewed.
    """
    metadata["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != METADATA}
    metadata["sha256"] = metadata_sha256(metadata)
    write_json(folder / METADATA, metadata)
