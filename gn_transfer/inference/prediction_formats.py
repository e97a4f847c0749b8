"""Predictions as a table, JSON or CSV, written while they come."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TextIO

from gn_transfer.data.decode import BadImageError
from gn_transfer.inference.bundle import Prediction
from gn_transfer.inference.image_files import shown


class Columns(NamedTuple):
    """What a writer knows before the first result.

    Attributes:
        top_k: Classes per image.
        path_width: Length of the longest path, in characters.
        class_width: Length of the longest class name, in characters.
    """

    top_k: int
    path_width: int
    class_width: int


Writer = Callable[[Iterable[Prediction | BadImageError], Columns, TextIO], None]


def _write_table(results: Iterable[Prediction | BadImageError], columns: Columns, out: TextIO) -> None:
    for result in results:
        if isinstance(result, Prediction):
            classes = "  ".join(f"{prob:6.1%} {label:<{columns.class_width}}" for label, prob in result.top)
            out.write(f"{shown(str(result.path)):<{columns.path_width}}  {classes}".rstrip() + "\n")


def _write_json(results: Iterable[Prediction | BadImageError], columns: Columns, out: TextIO) -> None:
    separator = "[\n"
    for result in results:
        entry: dict[str, Any] = {"path": shown(str(result.path))}
        if isinstance(result, BadImageError):
            entry["error"] = result.reason
        else:
            entry |= {"class": result.label, "prob": result.prob}
            entry["top"] = [{"class": label, "prob": prob} for label, prob in result.top]
        out.write(separator + json.dumps(entry))
        separator = ",\n"
    out.write("\n]\n")


def _write_csv(results: Iterable[Prediction | BadImageError], columns: Columns, out: TextIO) -> None:
    writer = csv.writer(out, lineterminator="\n")
    more = [f"{name}_{place}" for place in range(2, columns.top_k + 1) for name in ("class", "prob")]
    writer.writerow(["path", "class", "prob", *more, "error"])
    for result in results:
        if isinstance(result, BadImageError):
            writer.writerow([shown(result.path), *[""] * (2 * columns.top_k), result.reason])
        else:
            writer.writerow([shown(str(result.path)), *(x for pair in result.top for x in pair), ""])


FORMATS: dict[str, Writer] = {"table": _write_table, "json": _write_json, "csv": _write_csv}
"""What ``--format`` offers. The table leaves failing images to the list at the end."""
