"""The verb ``predict``: pictures through a bundle. Imports no torch, lightning, timm or albumentations."""

from __future__ import annotations

import csv
import glob
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import cv2

from gn_transfer.bundle import Bundle, Prediction, load_bundle
from gn_transfer.config import ConfigError
from gn_transfer.data.decode import SUFFIXES, BadImageError
from gn_transfer.messages import Parser

FIGURE_PICTURES = 24
"""How many pictures ``--figure`` shows: the first ones."""

_MANY = 50  # pictures from which on a progress bar is worth its place


def run(arguments: Sequence[str]) -> int:
    """Run ``gn-transfer predict``.

    Args:
        arguments: What stands behind the verb.

    Returns:
        Exit code: 0, or 3 where some pictures could not be read.

    Raises:
        ConfigError: The user's mistake.
    """
    parser = Parser(
        prog="gn-transfer predict",
        description="Classify pictures with a bundle of gn-transfer export.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="the bundle's folder")
    parser.add_argument(
        "pictures",
        metavar="PICTURES",
        nargs="+",
        help='picture files, folders (with all below them), or patterns in quotes, such as "holiday/**/*.jpg"',
    )
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="classes per picture (default 1)")
    parser.add_argument("--format", choices=list(FORMATS), default="table", help="what goes to standard output")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="pictures per run of the graph (default 16)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="compute threads (default: OMP_NUM_THREADS, else all cores)"
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help=f"draw the first {FIGURE_PICTURES} pictures with their classes: .png, .pdf, .svg or .jpg",
    )
    options = parser.parse_args(arguments)
    for name in ("top_k", "batch_size", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is out of range; give an integer of at least 1.")
    if options.figure is not None:
        _check_figure(options.figure)
    cv2.setNumThreads(0)  # its pool would compete with the graph's threads
    bundle = load_bundle(options.bundle, threads=options.threads)
    paths = find_pictures(options.pictures)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what decoders warn of is either read, or refused and listed
            failed = _predict(bundle, paths, options.top_k, options.batch_size, FORMATS[options.format])
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if options.figure is not None:
        _draw(bundle, [path for path in paths if path not in failed], options.figure)
        print(f"figure {options.figure}", file=sys.stderr)
    if failed:
        print(f"{len(failed):,} of {len(paths):,} pictures could not be read:", file=sys.stderr)
        for path, reason in failed.items():
            print(f"  {shown(path)}: {reason}", file=sys.stderr)
    return 3 if failed else 0


def find_pictures(sources: Sequence[str]) -> list[str]:
    """List the pictures that are meant.

    Args:
        sources: Files, which count whatever their name; folders, searched with all below them for the endings of
            pictures, hidden names left out; patterns with ``*``, ``?``, ``[]`` and ``**``.

    Returns:
        Paths in the order of the sources, sorted within a folder or pattern, each once.

    Raises:
        ConfigError: A source that is not there, or no picture in all of them.
    """
    found: dict[str, None] = {}
    for source in sources:
        matches = [source]
        if not os.path.lexists(source) and glob.has_magic(source):
            matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 - Path.glob refuses absolute patterns
            if not matches:
                raise ConfigError(f"{source}: no file or folder fits this pattern.")
        for match in matches:
            if Path(match).is_dir():
                found |= dict.fromkeys(_pictures_below(match))
            elif Path(match).is_file():
                found[match] = None
            else:
                raise ConfigError(f"{match}: no such file or folder; give pictures, folders, or patterns in quotes.")
    if not found:
        raise ConfigError(
            f"{', '.join(sources)}: no picture in there; files with the endings {', '.join(sorted(SUFFIXES))} count, "
            "in any case. Of a video, extract the frames first."
        )
    return list(found)


def _pictures_below(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith(".") and path.is_file():
                yield str(path)


class Columns(NamedTuple):
    """What a writer knows before the first result.

    Attributes:
        top_k: Classes per picture.
        path_width: Length of the longest path, in characters.
        class_width: Length of the longest class name, in characters.
    """

    top_k: int
    path_width: int
    class_width: int


Writer = Callable[[Iterable[Prediction | BadImageError], Columns, TextIO], None]


def _predict(bundle: Bundle, paths: list[str], top_k: int, batch_size: int, write: Writer) -> dict[str, str]:
    """Predict, write as results come, and return the pictures that failed with the reason."""
    failed: dict[str, str] = {}

    def results() -> Iterator[Prediction | BadImageError]:
        with _progress(len(paths)) as advance:
            for result in bundle.iter_predict(paths, top_k=top_k, batch_size=batch_size):
                if isinstance(result, BadImageError):
                    failed[result.path] = result.reason
                advance()
                yield result

    widths = [max(map(len, names)) for names in (map(shown, paths), bundle.classes)]
    write(results(), Columns(min(top_k, len(bundle.classes)), *widths), sys.stdout)
    sys.stdout.flush()
    return failed


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
"""What ``--format`` offers. The table leaves failing pictures to the list at the end."""


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
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error, where there is a terminal and enough to wait for."""
    if total < _MANY or not sys.stderr.isatty():
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ModuleNotFoundError:  # installed for prediction alone
        yield lambda: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), "pictures", TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _check_figure(path: Path) -> None:
    if path.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg", ".jpeg"):
        raise ConfigError(f"--figure {path}: give a file ending in .png, .pdf, .svg or .jpg.")
    if not path.parent.is_dir():
        raise ConfigError(f"--figure {path}: there is no folder {path.parent}; create it first.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--figure needs matplotlib, which is not installed; pip install matplotlib.")


def _draw(bundle: Bundle, paths: Sequence[str], target: Path) -> None:
    from gn_transfer.figures import picture_grid

    first = list(islice(paths, FIGURE_PICTURES))
    squares = [bundle.square(path) for path in first]
    captions = [f"{p.label}\n{p.prob:.1%}" for p in bundle.predict(squares)]
    picture_grid(list(zip(squares, captions, strict=True))).savefig(target, dpi=120)
