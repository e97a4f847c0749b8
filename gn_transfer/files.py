"""Files and folders that are whole or absent, never half-written."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from gn_transfer.config import ConfigError

_MAX_TEXT = 256 * 2**20  # bytes
_MISSED: set[str] = set()


def read_text(path: Path) -> str:
    """Read a text file, as UTF-8; names of files in it may be bytes that are no text, as in :func:`write_text`.

    Args:
        path: The file.

    Raises:
        OSError: It is not there, or no regular file: reading a pipe would never end.
        ValueError: It is larger than 256 MiB.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    if path.stat().st_size > _MAX_TEXT:
        raise ValueError(f"larger than {_MAX_TEXT / 2**20:.0f} MiB")
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def parse_json(text: str) -> Any:
    """Read JSON.

    Raises:
        ValueError: It is none, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path | None) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Args:
        path: The file, or None.

    Returns:
        Its content; empty without a file, and where the file is missing, corrupt or holds something else.
    """
    try:
        content = parse_json(read_text(path)) if path is not None else {}
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
        values: Plain values. Numbers that are not finite, which JSON does not know, become null.
    """
    write_text(path, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, header: Sequence[object], rows: Iterable[Sequence[Any]]) -> None:
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


def spreadsheet_cell(value: object) -> object:
    """Write a text that a spreadsheet would run as a formula behind an apostrophe, as spreadsheets do themselves."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


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
    if path.exists() and (not path.is_file() or path.is_relative_to("/dev")):  # is written to, and not replaced
        with path.open("w", encoding="utf-8", errors="surrogateescape") as file:
            yield file
        return
    partial = partial_of(path)
    try:
        with partial.open("x", encoding="utf-8", errors="surrogateescape") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Name the file beside a target that is written first, and remove what has this name: a link would be followed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove(partial)
    return partial


def refuse_link(path: Path) -> None:
    """Refuse to write or remove something through a link, which may lead out of the folder that it is in.

    Args:
        path: A file or a folder; need not exist.

    Raises:
        ConfigError: It is a link.
    """
    if path.is_symlink():
        raise ConfigError(
            f"{path} is a link to {path.readlink()}, which would be changed; put a file or folder in its place, or "
            "remove it."
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Fill a folder beside the target, and rename it when the block ends without an error.

    Args:
        target: Folder to write; one that is there is replaced. Its parent folder exists.

    Yields:
        An empty folder to fill; removed after an error, which leaves the target as it was.
    """
    target = target.resolve()
    remove_leftovers(target.parent, target.name)  # the others there are not ours
    partial, old = partial_of(target), target.with_name(f".{target.name}.{os.getpid()}.old")
    _remove(old)
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


@contextmanager
def going_on_without(what: str) -> Iterator[None]:
    """Let a long run go on where one of its files cannot be written, and say so, once for each kind of file.

    Args:
        what: The kind of file.
    """
    try:
        yield
    except OSError as error:
        if what not in _MISSED:
            _MISSED.add(what)
            reason = error.strerror or str(error)
            logging.getLogger("gn_transfer").warning(
                "warning: %s cannot be written (%s); the run goes on without", what, reason
            )


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left half-written, and put back what they had moved aside.

    Args:
        folder: Where :func:`whole_file`, :func:`whole_folder` or checkpoints were written; need not exist.
        name: Of the one target whose leftovers are looked at; None: of all, in a folder that is only ours.
    """
    with suppress(OSError):
        for path in list(folder.iterdir()):
            found = re.fullmatch(r"\.(.+)\.(\d+)\.(part|old)", path.name)
            if found is None or name not in (None, found[1]) or _runs(int(found[2])):
                continue
            if found[3] == "old" and not (folder / found[1]).exists():
                path.rename(folder / found[1])
            else:
                _remove(path)


def _runs(pid: int) -> bool:
    """Tell whether a process of this number runs; one that may not be asked does."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
