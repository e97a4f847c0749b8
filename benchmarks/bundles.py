"""What int8 costs and saves, and what the temperature does, for bundles of real runs.

Every run is exported twice, in float and in int8. Both graphs run on the same images in turn (A B A B), one image at a
time; medians, and the median of the ratios. The metric is on the run's validation images. The calibration error is on
its test images, which neither the temperature nor any other choice has seen.

    python benchmarks/bundles.py RUN_OR_CKPT... --data.root PATH --json

RUN_OR_CKPT is what ``gn-transfer export`` takes; --data.root, if given, holds the images of all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from inference import spread
from scipy.special import softmax

from gn_transfer import load_bundle
from gn_transfer.inference.classification import ClassificationBundle
from gn_transfer.inference.export import export_bundle
from gn_transfer.inference.export_source import find_checkpoint, run_data
from gn_transfer.report.evaluation import compare_confidence
from gn_transfer.training.checkpoint import read_checkpoint
from gn_transfer.training.environment import environment


def measure(checkpoint: Path, root: str | None, rounds: int) -> dict[str, Any]:
    """Export a checkpoint in float and int8, and compare the two."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("float", "int8")}
        for name, folder in folders.items():
            export_bundle(
                checkpoint,
                folder,
                data_root=root,
                int8=name == "int8",
                max_drop=100,
                say=partial(print, file=sys.stderr),
            )
        bundles = {name: load_bundle(folder) for name, folder in folders.items()}
        stored = read_checkpoint(checkpoint)["gn_transfer"]
        data = run_data(stored["config"], stored["classes"], root, "test")
        files = [data.test_dataset.root / image.path for image in data.test_dataset.images]
        targets = np.array([image.target for image in data.test_dataset.images])
        inputs = [bundles["float"].graph_input(path)[None] for path in files[:: max(1, len(files) // rounds)][:rounds]]
        seconds: dict[str, list[float]] = {name: [] for name in bundles}
        for place, pixels in enumerate(inputs[:3] + inputs):  # the first three warm up
            for name, bundle in bundles.items():
                start = time.perf_counter()
                bundle._run(pixels, "logits")
                if place >= 3:
                    seconds[name].append(time.perf_counter() - start)
        metadata = bundles["int8"].metadata
        quantization = metadata["quantization"]
        row: dict[str, Any] = {
            "backbone": metadata["backbone"],
            "norm": metadata["norm"],
            "task": metadata["task"],
            "pixels": list(inputs[0].shape[1:3]) if metadata["task"] == "classification" else "of each image",
            "latency_ms": {name: spread([1000 * value for value in some], 2) for name, some in seconds.items()},
            "times_as_fast": round(
                statistics.median(a / b for a, b in zip(seconds["float"], seconds["int8"], strict=True)), 2
            ),
            "graph_mib": {
                name: round((folder / "model.onnx").stat().st_size / 2**20, 1) for name, folder in folders.items()
            },
            "metric": metadata["parity"]["metric"],
            "validation_images": metadata["parity"]["images"],
            "float": quantization["metric_float"],
            "int8": quantization["metric_int8"],
            "same_class": quantization["same_class"] / metadata["parity"]["compared"],
            "layers_in_float": quantization["layers_in_float"],
        }
        if isinstance(bundles["float"], ClassificationBundle):
            row |= _calibration(bundles["float"], files, targets)
        return row


def _calibration(bundle: ClassificationBundle, files: list[Path], targets: np.ndarray) -> dict[str, Any]:
    """Measure the calibration error of the test images without and with the temperature."""
    logits = np.stack([prediction.logits for prediction in bundle.predict(files)])
    right = logits.argmax(1) == targets
    temperature = bundle.metadata["confidence"]["temperature"]
    errors = [
        compare_confidence(softmax(logits / value, axis=1).max(1), right).error for value in (1.0, temperature["value"])
    ]
    return {
        "temperature": temperature["value"],
        "ece_validation": [temperature["ece_before"], temperature["ece_after"]],
        "ece_test": errors,
        "test_images": len(files),
        "test_accuracy": float(right.mean()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_OR_CKPT")
    parser.add_argument("--data.root", dest="root")
    parser.add_argument("--rounds", type=int, default=60, help="images of the latency")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    rows = [measure(find_checkpoint(run), options.root, options.rounds) for run in options.runs]
    if options.json:
        print(json.dumps({"rows": rows, **environment()}, indent=2))
        return
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
