"""The command ``predict``: classify or segment images with a bundle. Imports no torch, lightning or timm."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from gn_transfer.commands.parsing import Parser
from gn_transfer.config import ConfigError, check_range
from gn_transfer.data.contact_sheet import Line, contact_sheet
from gn_transfer.data.decode import BadImageError, decode_image
from gn_transfer.data.layout import describe_ignored
from gn_transfer.data.overlay import legend, overlay, square
from gn_transfer.data.progress import progress_bar
from gn_transfer.files import whole_file
from gn_transfer.inference.classification import ClassificationBundle, Prediction
from gn_transfer.inference.image_files import find_images, shown
from gn_transfer.inference.load import load_bundle
from gn_transfer.inference.mask_files import MaskWriter
from gn_transfer.inference.prediction_formats import (
    FORMATS,
    ClassificationLayout,
    Layout,
    SegmentationLayout,
    Writer,
)
from gn_transfer.inference.segmentation import Segmentation, SegmentationBundle

FIGURE_IMAGES = 24
"""Number of images that ``--figure`` shows: the first ones."""

_BATCH_SIZE = 16
_MOST = 4096  # threads, images at a time, classes
_MANY = 50  # images from which on a progress bar is worth its place
_SIDE = 224  # of a segmented image in the figure

Tile = tuple[npt.NDArray[np.uint8], list[Line]]


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
            check_range(f"--{name}", value, low=1, high=_MOST, open_high=False)
    if options.output is not None and (options.output.is_dir() or not options.output.parent.is_dir()):
        raise ConfigError(f"--output {options.output}: give the path of a file in an existing folder.")
    if options.figure is not None and (options.figure.suffix.lower() != ".png" or not options.figure.parent.is_dir()):
        raise ConfigError(f"--figure {options.figure}: give a path in an existing folder that ends in .png.")
    cv2.setNumThreads(0)  # its pool would compete with the graph's threads
    bundle = load_bundle(options.bundle, threads=options.threads)
    _check_options(options, bundle)
    paths, unreadable = find_images(options.images)
    _refuse_inputs(options, paths)
    masks = None if options.masks is None else MaskWriter(options.masks, paths)
    layout: Layout = SegmentationLayout(bundle.classes)
    how: dict[str, int] = {}
    if isinstance(bundle, ClassificationBundle):
        how = {"top_k": options.top_k or 1, "batch_size": options.batch_size or _BATCH_SIZE}
        layout = ClassificationLayout(bundle.classes, how["top_k"], may_be_unknown=bundle.threshold is not None)
    ending = "" if options.output is None else options.output.suffix.lower().removeprefix(".")
    write = FORMATS[options.format or (ending if ending in FORMATS else "table")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what decoders warn of is either read, or refused and listed
        results = _Results(bundle, paths, how, masks, figure=options.figure is not None)
        _write(results, write, layout, options.output)
    if options.output is not None:
        print(f"results {options.output}", file=sys.stderr)
    if options.figure is not None:
        _write_figure(results.tiles, options.figure)
        print(f"figure {options.figure}", file=sys.stderr)
    if options.masks is not None:
        print(f"masks {options.masks}", file=sys.stderr)
    for folder in (Path(source) for source in options.images):
        with suppress(ConfigError):  # a folder in it cannot be read, which is listed below
            if folder.is_dir() and (ignored := describe_ignored(folder)):
                print(f"ignored in {shown(str(folder))}: {ignored}", file=sys.stderr)
    for what, of_all, failed in (("images", f" of {len(paths):,}", results.failed), ("folders", "", unreadable)):
        if failed:
            print(f"{len(failed):,}{of_all} {what} could not be read:", file=sys.stderr)
        for path, reason in failed.items():
            print(f"  {shown(path)}: {reason}", file=sys.stderr)
    return 3 if results.failed or unreadable else 0


def _refuse_inputs(options: argparse.Namespace, paths: Sequence[str]) -> None:
    """Refuse to write over an image that is looked at, or into the bundle."""
    inputs = {os.path.realpath(path) for path in paths}
    for name in ("output", "figure", "masks"):
        target: Path | None = getattr(options, name)
        if target is None:
            continue
        place = target.resolve()
        if str(place) in inputs or place.is_relative_to(options.bundle.resolve()):
            what = "one of the images" if str(place) in inputs else "in the bundle"
            raise ConfigError(f"--{name} {target} is {what}, which would be changed; name another place.")


def create_parser() -> Parser:
    """Create the parser of the command."""
    parser = Parser(
        prog="gn-transfer predict",
        description="Classify images, or their pixels, with a bundle of gn-transfer export.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="the bundle's folder")
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help='image files, folders (with all below them), or patterns in quotes, such as "holiday/**/*.jpg"',
    )
    parser.add_argument("--top_k", type=int, metavar="K", help="classes per image (default 1); not for masks")
    parser.add_argument(
        "--format", choices=list(FORMATS), help="default: by the ending of --output (.json, .csv), else table"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the results there instead of to standard output"
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        help=f"images per run of the graph (default {_BATCH_SIZE}); not for masks",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="compute threads (default: OMP_NUM_THREADS, else all cores)"
    )
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help=f"show the first {FIGURE_IMAGES} images with their classes in a PNG"
    )
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="write the mask of every image there, a PNG whose values are the numbers of the classes (segmentation)",
    )
    return parser


def _check_options(options: Any, bundle: ClassificationBundle | SegmentationBundle) -> None:
    """Refuse options that mean nothing for the task of the bundle."""
    if isinstance(bundle, ClassificationBundle) and options.masks is not None:
        raise ConfigError(f"--masks {options.masks}: {options.bundle} classifies whole images and gives no masks.")
    if isinstance(bundle, SegmentationBundle):
        for name in ("top_k", "batch_size"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name}: {options.bundle} segments images, one at a time; leave it out.")


class _Results:
    """The predictions of images, one by one, and what is kept of them.

    Args:
        bundle: The bundle.
        paths: The images.
        options: Of the bundle's ``iter_predict``.
        masks: Writes the masks; None writes none.
        figure: Whether the first images are kept for a figure.

    Attributes:
        tiles: The first images for the figure.
        failed: Images that could not be read, with the reason.
    """

    def __init__(
        self,
        bundle: ClassificationBundle | SegmentationBundle,
        paths: list[str],
        options: dict[str, int],
        masks: MaskWriter | None,
        *,
        figure: bool,
    ) -> None:
        self.bundle, self.paths, self.options, self.masks = bundle, paths, options, masks
        self.tiles: list[Tile] = []
        self.failed: dict[str, str] = {}
        self._shown = FIGURE_IMAGES if figure else 0

    def __iter__(self) -> Iterator[Prediction | Segmentation | BadImageError]:
        with progress_bar("images", len(self.paths), fewest=_MANY) as advance:
            for result in self.bundle.iter_predict(self.paths, **self.options):
                if isinstance(result, BadImageError):
                    self.failed[result.path] = result.reason
                else:
                    if self.masks is not None and isinstance(result, Segmentation):
                        self.masks.write(result)
                    if len(self.tiles) < self._shown:
                        self.tiles.append(_tile(self.bundle, result))
                advance()
                yield result


def _write(results: _Results, write: Writer, layout: Layout, output: Path | None) -> None:
    """Write results while they come; a file appears when it is whole."""
    path_width = max((len(shown(path)) for path in results.paths), default=0)
    if output is None:
        write(results, layout, path_width, sys.stdout)
        sys.stdout.flush()
    else:
        with whole_file(output) as file:
            write(results, layout, path_width, file)


def _tile(bundle: ClassificationBundle | SegmentationBundle, result: Prediction | Segmentation) -> Tile:
    """Show an image: with its class, or with the colors of its classes over it."""
    assert result.path is not None
    if isinstance(result, Prediction):
        assert isinstance(bundle, ClassificationBundle)
        said = "" if result.known else ", unknown"
        return bundle.graph_input(result.path), [result.label, f"{result.prob:.1%}{said}"]

    number = len(result.classes)
    shares = [(name, count / result.mask.size) for name, count in result.pixels.items()]
    texts = {place: f"{name} {share:.1%}" for place, (name, share) in enumerate(shares) if share}
    return square(overlay(decode_image(result.path), result.mask, number), _SIDE), legend(texts, number)


def _write_figure(tiles: list[Tile], target: Path) -> None:
    """Write images with their classes as a contact sheet."""
    if tiles:
        Image.fromarray(contact_sheet(tiles)).save(target)
