"""Files and folders that are whole or absent, never half-written."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


def read_json(path: Path | None) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Args:
        path: The file, or None.

    Returns:
        Its content; empty without a file, and where the file is missing, corrupt or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file of any size, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file atomically.

    Args:
        path: Target file; its folder exists.
        values: Plain values.
    """
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically.

    Args:
        path: Target file; its folder exists.
        header: Names of the columns.
        rows: Their values; None is an empty field.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8.

    Args:
        path: Target file; its folder exists.
        text: What goes into it; names of files that are no text are written as the bytes that they are.
    """
    with whole_file(path) as file:
        file.write(text)


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Write a text file, as UTF-8, that appears when the block ends without an error.

    Args:
        path: Target file; its folder exists.

    Yields:
        The file to write to; after an error nothing is left of it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("w", encoding="utf-8", errors="surrogateescape") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Fill a folder beside the target, and rename it when the block ends without an error.

    Args:
        target: Folder to write; one that is there is replaced. Its parent folder exists.

    Yields:
        An empty folder to fill; removed after an error, which leaves the target as it was.
    """
    target = target.resolve()
    partial, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
