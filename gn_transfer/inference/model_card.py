"""The README.md of a bundle: what it is, how good it is, how to use it without us."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gn_transfer.backbones.pretrained import ALIASES
from gn_transfer.config import code_span, markdown_text
from gn_transfer.inference.bundle import validation_metric
from gn_transfer.inference.confidence import Temperature, Threshold
from gn_transfer.report.calibration import wilson_interval

_CARD = """\
# {backbone} ({norm}), {count} classes

{classes}

{sizes}; weights {weights}; {transfer}.
Run {run}, {checkpoint} (epoch {epoch}, {optimizer_steps} optimizer steps). Exported {created} by gn-transfer \
{version}.

## How good

| figure | value |
|---|---|
{metrics}

{errors}

{confidence}## Agreement with the trained model

On {images} validation images the logits of {graph} and of the checkpoint in torch differ by at most \
{max_difference:.1e} (allowed {tolerance:.1e}); the top class is equal on {same_class:,} of {compared:,} {items}; \
{metric} {metric_bundle:.4f} against {metric_checkpoint:.4f}.{int8}

## Use it with numpy and onnxruntime alone

{usage}

## Train on

`model.safetensors` holds the weights under {names}; feed it pixels as `(x / 255 - mean) / std` with mean \
{mean} and std {std}.

```python
{rebuild}
```

`bundle.json` holds all of this for programs, and the SHA-256 of every file.
"""

_LOAD = 'model.load_state_dict(load_file("model.safetensors"))'

_INT8 = """ \
`model.onnx` computes with 8-bit integers (ranges of {images} training images): {metric} {metric_int8:.4f}."""

_CLASSIFICATION = """\
```python
import json
from pathlib import Path
import numpy as np
import onnxruntime

classes = json.loads(Path("bundle.json").read_text())["classes"]
session = onnxruntime.InferenceSession("model.onnx")
images = np.load("images.npy")  # uint8, RGB, shape (batch, {img_size}, {img_size}, 3)
logits, probs = session.run(None, {{"images": images}})
for row in probs:
    print(classes[row.argmax()], f"{{row.max():.3f}}")
```

An image becomes such a square as in validation: decode it upright to RGB, cut the centre square of \
{crop_percent:g} % of its short side, resize that to {img_size} x {img_size} (OpenCV's `INTER_AREA` where it shrinks, \
`INTER_LINEAR` where it grows). The graph subtracts the mean and divides by the standard deviation itself. \
With gn-transfer installed, `gn-transfer predict BUNDLE IMAGES` does all of it, and in Python:

```python
from gn_transfer import load_bundle

for prediction in load_bundle(".").predict(["cat.jpg"], top_k=3):
    print(prediction.path, prediction.label, prediction.prob, prediction.top)
```"""

_SEGMENTATION = """\
```python
import json
from pathlib import Path
import numpy as np
import onnxruntime

names = json.loads(Path("bundle.json").read_text())["classes"]
session = onnxruntime.InferenceSession("model.onnx")
images = np.load("images.npy")  # uint8, RGB, shape (batch, height, width, 3), any height and width
logits, probs, classes = session.run(None, {{"images": images}})
for number, name in enumerate(names):
    print(name, f"{{(classes == number).mean():.1%}} of the pixels")
```

An image is segmented as in validation: decode it upright to RGB{reduced}. The graph subtracts the mean, divides by \
the standard deviation, and pads. {tiles}With gn-transfer installed, `gn-transfer predict BUNDLE IMAGES` does all of \
it, and in Python:

```python
from gn_transfer import load_bundle

for segmentation in load_bundle(".").predict(["cat.jpg"]):
    print(segmentation.path, segmentation.mask.shape, segmentation.pixels)
```"""


def model_card(metadata: Mapping[str, Any]) -> str:
    """Write the card.

    Args:
        metadata: Content of bundle.json.

    Returns:
        Markdown.
    """
    origin, parity = metadata["provenance"], metadata["parity"]
    report, classes = origin["transfer_report"], metadata["classes"]
    quantization = metadata.get("quantization")
    metrics = {**metadata["metrics"], f"validation {parity['metric']} of this bundle": validation_metric(metadata)}
    start = (
        "trained from scratch" if report["source"] == "from scratch" else f"started from {code_span(report['source'])}"
    )
    return _CARD.format(
        backbone=metadata["backbone"],
        norm=metadata["norm"],
        count=len(classes),
        classes=markdown_text(", ".join(classes)),
        weights=markdown_text(metadata["weights"]),
        transfer=start,
        run=code_span(origin["run"]),
        checkpoint=code_span(origin["checkpoint"]),
        epoch=origin["epoch"],
        optimizer_steps=origin["optimizer_steps"],
        created=metadata["created"],
        version=metadata["versions"]["gn-transfer"],
        metrics="\n".join(_metric_row(name, value, metadata["evaluated_images"]) for name, value in metrics.items()),
        **parity,
        confidence=_of_confidence(metadata.get("confidence")),
        graph="`model.onnx`" if quantization is None else "the graph in float, before it was quantized,",
        int8="" if quantization is None else _INT8.format(**quantization, metric=parity["metric"]),
        mean=metadata["mean"],
        std=metadata["std"],
        **(_of_segmentation(metadata) if metadata["task"] == "segmentation" else _of_classification(metadata)),
    )


def _of_confidence(confidence: Mapping[str, Any] | None) -> str:
    """Write what a card says of the probabilities; nothing for a segmentation."""
    if confidence is None:
        return ""
    lines = [f"`probs` is the softmax of the logits with {Temperature(**confidence['temperature']).summary()}."]
    if (threshold := confidence["threshold"]) is not None:
        lines.append(f"`gn-transfer predict` calls an image {Threshold(**threshold).summary()}.")
    return "## Confidence\n\n" + "\n".join(lines) + "\n\n"


def _of_classification(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Write what a card says of a classification alone."""
    confused, size = metadata["validation"]["confused"], metadata["img_size"]
    pairs = [(markdown_text(pair["true"]), markdown_text(pair["predicted"]), pair["count"]) for pair in confused]
    rows = [f"| {true} | {predicted} | {count} |" for true, predicted, count in pairs]
    table = "\n".join(["Most confused in validation:\n", "| true | seen as | images |", "|---|---|---|", *rows])
    return {
        "sizes": f"Images of {size} x {size} pixels",
        "errors": table if rows else "No validation image was taken for another class.",
        "items": "images",
        "usage": _CLASSIFICATION.format(img_size=size, crop_percent=100 * metadata["crop_fraction"]),
        "names": "timm's names",
        "rebuild": f"{timm_lines(metadata['architecture'], len(metadata['classes']))}\n{_LOAD}",
    }


def _of_segmentation(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Write what a card says of a segmentation alone."""
    architecture, short_side, tile = metadata["architecture"], metadata["short_side"], metadata["tile_size"]
    by_class = {markdown_text(name): found for name, found in metadata["validation"]["by_class"].items()}
    rows = [
        f"| {name} | {'-' if found['iou'] is None else format(found['iou'], '.4f')} | {found['count']:,} |"
        for name, found in by_class.items()
    ]
    table = ["Intersection over union in validation, by class:\n", "| class | IoU | labeled pixels |", "|---|---|---|"]
    reduced = f", reduce its short side to {short_side} pixels if it is longer (OpenCV's `INTER_AREA`)"
    tiles = f"Larger images go through it in tiles of {tile} pixels, whose overlaps are blended. "
    return {
        "sizes": f"Images of any size, the decoder {architecture['decoder']} with {architecture['decoder_norm']}",
        "errors": "\n".join([*table, *rows]),
        "items": "labeled pixels",
        "usage": _SEGMENTATION.format(reduced=reduced if short_side else "", tiles=tiles if tile else ""),
        "names": "the names of gn_transfer's segmentation model",
        "rebuild": 'from gn_transfer import load_for_training\n\ntask = load_for_training(".")',
    }


def confused_pairs(confusion: npt.NDArray[np.int64], classes: Sequence[str], most: int = 10) -> list[dict[str, Any]]:
    """Find the pairs of classes that are confused most.

    Args:
        confusion: Images, or pixels, of each class (rows) that were given each class (columns).
        classes: Their names.
        most: How many pairs to give.

    Returns:
        ``true``, ``predicted`` and the ``count`` of each pair, the most frequent first.

    Example:
        >>> confused_pairs(np.array([[0, 1], [0, 1]]), ["ant", "bee"])
        [{'true': 'ant', 'predicted': 'bee', 'count': 1}]
    """
    wrong = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [(int(place) // len(classes), int(place) % len(classes)) for place in order]
    return [
        {"true": classes[true], "predicted": classes[pred], "count": int(wrong[true, pred])}
        for true, pred in pairs
        if wrong[true, pred]
    ]


def _metric_row(name: str, value: float, images: Mapping[str, int]) -> str:
    number = images.get(name.partition("/")[0])
    if number is None or not name.endswith("/acc1"):
        return f"| {name} | {value:.4f} |"
    low, high = wilson_interval(round(value * number), number)
    return f"| {name} | {value:.4f} ({number:,} images, 95 % interval {low:.3f} to {high:.3f}) |"


def timm_lines(architecture: Mapping[str, Any], num_classes: int) -> str:
    """Write the Python that builds the model in timm, ready for the weights.

    Args:
        architecture: ``architecture`` of bundle.json.
        num_classes: Width of the head.

    Returns:
        Lines of Python that define ``model`` and import ``load_file``; they need gn_transfer only for models that timm
        cannot build with this norm.
    """
    name, norm = architecture["architecture"], architecture["norm"]
    base, extra = ALIASES.get(name, (name, {}))
    arguments = [repr(base), f"num_classes={num_classes}", *(f"{key}={value!r}" for key, value in extra.items())]
    imports = ["import timm", "from safetensors.torch import load_file"]
    groups = f"num_groups={architecture['num_groups']}"
    if architecture["group_size"] is not None:
        groups = f"group_size={architecture['group_size']}"
    as_built = norm == "gn_ws" and groups == "num_groups=32" if base.endswith("_bit") else norm.startswith("bn")
    if as_built and norm != "bn_ws":
        pass
    elif base.startswith("resnetv2") and not base.endswith("_bit") and norm != "none":
        groups = {"ln": "num_groups=1", "in": "group_size=1"}.get(norm, groups)
        if norm != "bn_ws":
            arguments.append(f"norm_layer=partial(GroupNormAct, {groups})")
        if norm.endswith("_ws"):
            arguments.append("conv_layer=partial(StdConv2d, eps=1e-8)")
        imports = ["from functools import partial\n", *imports, "from timm.layers import GroupNormAct, StdConv2d"]
    else:
        return "\n".join(
            [
                *imports,
                "from gn_transfer.layers import convert_norm\n",
                f"model = timm.create_model({', '.join(arguments)})",
                f"convert_norm(model, {norm!r}, {groups}, skip={{{architecture['head']!r}}})",
            ]
        )
    return "\n".join(imports) + f"\n\nmodel = timm.create_model({', '.join(arguments)})"
