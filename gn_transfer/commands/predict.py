"""The command ``predict``: classify images with a bundle. Imports no torch, lightning, timm or albumentations."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2

from gn_transfer.commands.parsing import Parser
from gn_transfer.config import ConfigError, check_range
from gn_transfer.data.decode import BadImageError
from gn_transfer.data.layout import describe_ignored
from gn_transfer.data.progress import progress_bar
from gn_transfer.files import whole_file
from gn_transfer.inference.bundle import Bundle, Prediction, load_bundle
from gn_transfer.inference.image_files import find_images, shown
from gn_transfer.inference.prediction_formats import FORMATS, Columns, Writer

if TYPE_CHECKING:
    from collections.abc import Sequence

FIGURE_IMAGES = 24
"""Number of images that ``--figure`` shows: the first ones."""

_MANY = 50  # images from which on a progress bar is worth its place


def run(arguments: Sequence[str]) -> int:
    """Run ``gn-transfer predict``.

    Args:
        arguments: The words behind the command.

    Returns:
        Exit code: 0, or 3 where some images could not be read.

    Raises:
        ConfigError: The user's mistake.
    """
    options = create_parser().parse_args(arguments)
    for name in ("top_k", "batch_size", "threads"):
        if (value := getattr(options, name)) is not None:
            check_range(f"--{name}", value, low=1)
    if options.output is not None and (options.output.is_dir() or not options.output.parent.is_dir()):
        raise ConfigError(f"--output {options.output}: give the path of a file in an existing folder.")
    if options.figure is not None and (options.figure.suffix.lower() != ".png" or not options.figure.parent.is_dir()):
        raise ConfigError(f"--figure {options.figure}: give a path in an existing folder that ends in .png.")
    cv2.setNumThreads(0)  # its pool would compete with the graph's threads
    bundle = load_bundle(options.bundle, threads=options.threads)
    paths = find_images(options.images)
    ending = "" if options.output is None else options.output.suffix.lower().removeprefix(".")
    write = FORMATS[options.format or (ending if ending in FORMATS else "table")]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what decoders warn of is either read, or refused and listed
            first, failed = predict(bundle, paths, options.top_k, options.batch_size, write, options.output)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if options.output is not None:
        print(f"results {options.output}", file=sys.stderr)
    if options.figure is not None:
        write_figure(bundle, first, options.figure)
        print(f"figure {options.figure}", file=sys.stderr)
    for folder in (Path(source) for source in options.images):
        if folder.is_dir() and (ignored := describe_ignored(folder)):
            print(f"ignored in {shown(str(folder))}: {ignored}", file=sys.stderr)
    if failed:
        print(f"{len(failed):,} of {len(paths):,} images could not be read:", file=sys.stderr)
        for path, reason in failed.items():
            print(f"  {shown(path)}: {reason}", file=sys.stderr)
    return 3 if failed else 0


def create_parser() -> Parser:
    """Create the parser of the command."""
    parser = Parser(prog="gn-transfer predict", description="Classify images with a bundle of gn-transfer export.")
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="the bundle's folder")
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help='image files, folders (with all below them), or patterns in quotes, such as "holiday/**/*.jpg"',
    )
    parser.add_argument("--top_k", type=int, default=1, metavar="K", help="classes per image (default 1)")
    parser.add_argument(
        "--format", choices=list(FORMATS), help="default: by the ending of --output (.json, .csv), else table"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the results there instead of to standard output"
    )
    parser.add_argument(
        "--batch_size", type=int, default=16, metavar="N", help="images per run of the graph (default 16)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="compute threads (default: OMP_NUM_THREADS, else all cores)"
    )
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help=f"show the first {FIGURE_IMAGES} images with their classes in a PNG"
    )
    return parser


def predict(
    bundle: Bundle, paths: list[str], top_k: int, batch_size: int, write: Writer, output: Path | None
) -> tuple[list[Prediction], dict[str, str]]:
    """Predict, and write the results while they come.

    Args:
        bundle: The bundle.
        paths: The images.
        top_k: Classes per image.
        batch_size: Images per run of the graph.
        write: Writes the results; one of :data:`gn_transfer.inference.prediction_formats.FORMATS`.
        output: File for the results, which appears when it is whole; None takes standard output.

    Returns:
        The first predictions, for a figure, and the images that failed with the reason.
    """
    first: list[Prediction] = []
    failed: dict[str, str] = {}

    def results() -> Iterator[Prediction | BadImageError]:
        with progress_bar("images", len(paths), fewest=_MANY) as advance:
            for result in bundle.iter_predict(paths, top_k=top_k, batch_size=batch_size):
                if isinstance(result, BadImageError):
                    failed[result.path] = result.reason
                elif len(first) < FIGURE_IMAGES:
                    first.append(result)
                advance()
                yield result

    widths = [max(map(len, names)) for names in (map(shown, paths), bundle.classes)]
    columns = Columns(min(top_k, len(bundle.classes)), *widths)
    if output is None:
        write(results(), columns, sys.stdout)
        sys.stdout.flush()
    else:
        with whole_file(output) as file:
            write(results(), columns, file)
    return first, failed


def write_figure(bundle: Bundle, predictions: Sequence[Prediction], target: Path) -> None:
    """Write a contact sheet of images with their classes.

    Args:
        bundle: The bundle.
        predictions: Its predictions of image files, at least one.
        target: PNG file to write.
    """
    from PIL import Image

    from gn_transfer.data.contact_sheet import contact_sheet

    tiles = [(bundle.square(p.path), [p.label, f"{p.prob:.1%}"]) for p in predictions if p.path is not None]
    if tiles:
        Image.fromarray(contact_sheet(tiles)).save(target)
