"""Predictions as a table, JSON or CSV, written while they come."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TextIO

from gn_transfer.data.decode import BadImageError
from gn_transfer.files import spreadsheet_cell
from gn_transfer.inference.classification import Prediction
from gn_transfer.inference.image_files import shown
from gn_transfer.inference.segmentation import Segmentation


class Layout(Protocol):
    """What a prediction of a task looks like in each format."""

    def line(self, result: Any) -> str:
        """Give its line of a table, without the path."""
        ...

    def entry(self, result: Any) -> dict[str, Any]:
        """Give its keys in JSON, without the path."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """Names of its columns in CSV, without path and error."""
        ...

    def row(self, result: Any) -> Sequence[object]:
        """Give its values in these columns."""
        ...


class ClassificationLayout:
    """Classes with their probabilities.

    Args:
        classes: Names of all classes.
        top_k: Classes per image.
        may_be_unknown: Whether the bundle has a threshold.
    """

    def __init__(self, classes: Sequence[str], top_k: int, *, may_be_unknown: bool) -> None:
        self._width = max(map(len, classes))
        self._may_be_unknown = may_be_unknown
        more = [f"{name}_{place}" for place in range(2, min(top_k, len(classes)) + 1) for name in ("class", "prob")]
        self.columns = ["class", "prob", *more, *(["known"] if may_be_unknown else [])]

    def line(self, result: Prediction) -> str:
        """See :class:`Layout`."""
        top = "  ".join(f"{prob:6.1%} {label:<{self._width}}" for label, prob in result.top)
        return top if result.known else f"{top}  unknown: below the threshold"

    def entry(self, result: Prediction) -> dict[str, Any]:
        """See :class:`Layout`."""
        top = [{"class": label, "prob": prob} for label, prob in result.top]
        known = {"known": result.known} if self._may_be_unknown else {}
        return {"class": result.label, "prob": result.prob, **known, "top": top}

    def row(self, result: Prediction) -> list[object]:
        """See :class:`Layout`."""
        known = [str(result.known).lower()] if self._may_be_unknown else []
        return [*(value for pair in result.top for value in pair), *known]


class SegmentationLayout:
    """Area of every class: its share of the image, and its pixels.

    Args:
        classes: Names of all classes.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.columns = ["width", "height", *(f"pixels:{name}" for name in classes)]

    def line(self, result: Segmentation) -> str:
        """See :class:`Layout`."""
        return "  ".join(f"{count / result.mask.size:6.1%} {name}" for name, count in result.pixels.items())

    def entry(self, result: Segmentation) -> dict[str, Any]:
        """See :class:`Layout`."""
        height, width = result.mask.shape
        return {"width": width, "height": height, "pixels": result.pixels}

    def row(self, result: Segmentation) -> list[object]:
        """See :class:`Layout`."""
        height, width = result.mask.shape
        return [width, height, *result.pixels.values()]


Results = Iterable[Prediction | Segmentation | BadImageError]
Writer = Callable[[Results, Layout, int, TextIO], None]
"""Takes results, their layout, the length of the longest path in characters, and the file."""


def _write_table(results: Results, layout: Layout, path_width: int, out: TextIO) -> None:
    for result in results:
        if not isinstance(result, BadImageError):
            out.write(f"{shown(str(result.path)):<{path_width}}  {layout.line(result)}".rstrip() + "\n")


def _write_json(results: Results, layout: Layout, path_width: int, out: TextIO) -> None:
    separator, end = "[\n", "[]\n"
    for result in results:
        found = {"error": result.reason} if isinstance(result, BadImageError) else layout.entry(result)
        out.write(separator + json.dumps({"path": shown(str(result.path)), **found}))
        separator, end = ",\n", "\n]\n"
    out.write(end)


def _write_csv(results: Results, layout: Layout, path_width: int, out: TextIO) -> None:
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["path", *layout.columns, "error"])
    for result in results:
        if isinstance(result, BadImageError):
            writer.writerow(map(spreadsheet_cell, [shown(result.path), *[""] * len(layout.columns), result.reason]))
        else:
            writer.writerow(map(spreadsheet_cell, [shown(str(result.path)), *layout.row(result), ""]))


FORMATS: dict[str, Writer] = {"table": _write_table, "json": _write_json, "csv": _write_csv}
"""What ``--format`` offers. The table leaves failing images to the list at the end."""
