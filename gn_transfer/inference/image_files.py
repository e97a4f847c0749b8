"""Which image files the user means: files, folders, patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gn_transfer.config import ConfigError, printable
from gn_transfer.data.decode import SUFFIXES


def find_images(sources: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """List the images that are meant.

    Args:
        sources: Files, which count whatever their name; folders, searched with all below them for the endings of
            images, hidden names left out; patterns with ``*``, ``?``, ``[]`` and ``**``.

    Returns:
        Paths in the order of the sources, sorted within a folder or pattern, each once; and the folders that could not
        be read, with the reason.

    Raises:
        ConfigError: A source that is not there, or no image in all of them.
    """
    found: dict[str, None] = {}
    unreadable: dict[str, str] = {}
    for source in sources:
        matches = [source]
        if not os.path.lexists(source) and glob.has_magic(source):
            matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 - Path.glob refuses absolute patterns
            if not matches:
                raise ConfigError(f"{source}: no file or folder fits this pattern.")
        for match in matches:
            if Path(match).is_dir():
                found |= dict.fromkeys(_images_below(match, unreadable))
            elif Path(match).is_file():
                found[match] = None
            else:
                raise ConfigError(f"{match}: no such file or folder; give images, folders, or patterns in quotes.")
    if not found and not unreadable:
        raise ConfigError(
            f"{', '.join(sources)}: no image in there; files with the endings {', '.join(sorted(SUFFIXES))} count, "
            "in any case. Of a video, extract the frames first."
        )
    return list(found), unreadable


def _images_below(folder: str, unreadable: dict[str, str], seen: set[str] | None = None) -> Iterator[str]:
    """Walk through a folder, and then through the linked folders in it, none twice and never upwards."""
    seen = set() if seen is None else seen
    links: list[str] = []

    def note(error: OSError) -> None:
        unreadable[os.fsdecode(error.filename)] = error.strerror or "cannot be read"

    for parent, folders, names in os.walk(folder, onerror=note):
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "@")))
        links += [str(path) for name in folders if (path := Path(parent, name)).is_symlink()]
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith(".") and path.is_file():
                yield str(path)
    for link in links:
        place = Path(os.path.realpath(link))
        if not any(Path(known).is_relative_to(place) for known in seen):
            yield from _images_below(link, unreadable, seen)


def shown(path: str) -> str:
    """Make a file's name printable: bytes that are no text, and control characters, are written as escapes.

    Args:
        path: The name as Python has it.

    Returns:
        One line of text.

    Example:
        >>> shown("two\\nlines.jpg")
        'two\\\\nlines.jpg'
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")
