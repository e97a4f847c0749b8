"""``gn-transfer data check | sample | cache | show``: what can be known and done about the images before training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from rich import get_console
from rich.table import Table

from gn_transfer.commands.parsing import Parser
from gn_transfer.commands.short_help import DATA_COMMANDS
from gn_transfer.commands.training_cli import parsed
from gn_transfer.config import ConfigError, did_you_mean
from gn_transfer.data import Folder, ImageDataModule, Pets, SegmentationDataModule
from gn_transfer.data.cache import mib
from gn_transfer.data.check import CheckResult, check_images, list_all
from gn_transfer.data.duplicates import Inspected
from gn_transfer.data.mask_check import MaskCheckResult, check_split_masks
from gn_transfer.data.masks import describe_shares
from gn_transfer.data.pets_counts import BREEDS, compare_counts
from gn_transfer.data.progress import progress_bar
from gn_transfer.data.sample import write_sample
from gn_transfer.data.workers import core_count
from gn_transfer.training.task import TransferTask

_SHOWN = 10

Task = Callable[[ImageDataModule, TransferTask, argparse.Namespace], int]


def run(arguments: Sequence[str]) -> int:
    """Run a command of ``data``.

    Args:
        arguments: The words behind ``data``.

    Returns:
        Exit code: 0 done, 2 when ``check`` found what would stop a training or ``cache`` could not be completed.

    Raises:
        ConfigError: The user's mistake.
    """
    command, *rest = arguments
    if command not in DATA_COMMANDS:
        raise ConfigError(
            f"data {command}: not a command; {did_you_mean(command, DATA_COMMANDS)}. See gn-transfer data --help."
        )
    try:
        options, others = create_parser(command).parse_known_args(rest)
    except SystemExit:  # after --help
        return 0
    if command == "sample":
        if others:
            raise ConfigError(f"data sample: {others[0]} is not an option; there are --root and --seed.")
        print(f"the sample is in {write_sample(Path(options.root), options.seed)}")
        return 0
    tasks: dict[str, Task] = {"check": check, "cache": cache, "show": show}
    with parsed("fit", others) as cli:
        cli.datamodule.channels = cli.task.model_config.resolved_in_chans
        cli.datamodule.prepare_data()
        return tasks[command](cli.datamodule, cli.task, options)


def check(data: ImageDataModule, task: TransferTask, options: argparse.Namespace) -> int:
    """Verify the images of all splits; see :func:`gn_transfer.data.check.check_images`."""
    splits, notes = list_all(data)
    masks = None
    classes = data.classes
    if isinstance(data, SegmentationDataModule):
        classes, splits = ["image"], {name: [one._replace(target=0) for one in some] for name, some in splits.items()}
        with progress_bar("decoding masks", sum(map(len, splits.values()))) as advance:
            masks = check_split_masks(data, splits, threads=core_count(), advance=advance)
    with progress_bar("decoding", sum(map(len, splits.values()))) as advance:
        report = check_images(
            Path(data.root),
            splits,
            classes,
            skips_bad=data.on_bad_image == "skip",
            threads=core_count(),
            advance=advance,
        )
    if masks is not None:
        report.problems.extend(masks.problems)
        report.warnings.extend(masks.warnings)
    if not report.problems:
        try:
            data.setup("fit")  # what it refuses would stop a training, too
        except ConfigError as error:
            report.problems.append(str(error))
    if isinstance(data, Pets) and masks is None:
        notes += _compare_with_official(report)
    if options.format == "json":
        of_masks = {} if masks is None else masks.as_dict()
        print(json.dumps({**report.as_dict(), **of_masks, "notes": notes}, indent=2, ensure_ascii=False))
    else:
        console = get_console()
        console.print(_table(report, notes, data, masks), width=None if console.is_terminal else 400, crop=False)
    return 2 if report.problems else 0


def cache(data: ImageDataModule, task: TransferTask, options: argparse.Namespace) -> int:
    """Decode training and validation images into the disk cache."""
    data.setup("fit")
    plan = data.decoded_cache.plan
    if plan.mode != "disk":
        why = plan.reason or f"data.cache is {plan.mode}"
        raise ConfigError(
            f"data cache fills the disk cache, and there is none: {why} ({data.decoded_cache.folder}, about "
            f"{mib(plan.bytes_needed)} needed). Free some room, set data.cache_dir, or data.cache=disk for a part."
        )
    complete = True
    for split, dataset in (("train", data.train_dataset), ("val", data.val_dataset)):
        for what, filled in zip(("", " masks"), data.decoded_cache.fill(dataset, core_count()), strict=False):
            complete = complete and filled.problem is None
            bad = f", {filled.bad} cannot be decoded (see gn-transfer data check)" if filled.bad else ""
            print(
                f"{split:<5}  {filled.present:,} of {len(dataset):,}{what} there, {filled.decoded:,} of them new{bad}"
            )
    print(f"cache  {data.decoded_cache.folder}")
    return 0 if complete else 2


def show(data: ImageDataModule, task: TransferTask, options: argparse.Namespace) -> int:
    """Write a contact sheet of the first training images as the model sees them."""
    data.setup("fit")
    output = Path(options.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(task.training_sheet(data, options.count)).save(output)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output {output} cannot be written ({error}); give a path that ends in .png.") from error
    print(f"{min(options.count, len(data.train_dataset))} training images, recipe {data.recipe}: {output}")
    return 0


def _compare_with_official(report: CheckResult) -> list[str]:
    """Compare a Pets download, or some of its breeds, with the official counts; differences become warnings."""
    notes = []
    for split in ("trainval", "test"):
        counts = report.class_counts.get(split, {})
        known = {breed: count for breed, count in counts.items() if breed in BREEDS}
        if not known:
            continue
        differences = compare_counts(split, known)
        report.warnings.extend(differences)
        if not differences:
            breeds = "all 37 breeds" if len(known) == len(BREEDS) else f"{len(known)} of the 37 breeds"
            notes.append(f"{split}: {sum(known.values()):,} images of {breeds}, as officially published")
    return notes


def _table(
    report: CheckResult, notes: Sequence[str], data: ImageDataModule, masks: MaskCheckResult | None = None
) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    facts = report.as_dict()
    table.add_row("data", f"{type(data).__name__} in {data.root}")
    if isinstance(data, Folder):
        broken = f"; {len(report.unreadable):,} of the image files cannot be decoded" if report.unreadable else ""
        table.add_row("files", f"{data.count_files().describe()}{broken}")
    for split, counts in report.class_counts.items():
        least, most = min(counts.values()), max(counts.values())
        spread = f"{least} per class" if least == most else f"{least} to {most} per class"
        cut = "; validation is cut from them" if split == "trainval" else ""
        said = f"{len(counts)} classes, {spread}" if masks is None else describe_shares(masks.pixels[split])
        table.add_row(split, f"{sum(counts.values()):,} images, {said}{cut}")
    for name in ("formats", "modes"):
        table.add_row(name, ", ".join(f"{key} {count:,}" for key, count in facts[name].items()))
    if facts["short_side"]:
        side = facts["short_side"]
        table.add_row("short side", f"{side['least']} to {side['greatest']} px, median {side['median']}")
    _rows(table, "unreadable", [f"{_name(file)}: {file.error}" for file in report.unreadable])
    _rows(table, "bad masks", [] if masks is None else [f"{path}: {reason}" for path, reason in masks.bad])
    _rows(table, "suspicious", [f"{_name(file)}: {file.warning}" for file in report.suspicious])
    _rows(table, "same pixels", [" = ".join(map(_name, group)) for group in report.duplicates])
    _rows(
        table,
        "near-duplicates",  # those of different splits first: they make a test too easy
        [
            f"{_name(one)} ~ {_name(other)}, {apart:.1f} of 255 grey levels apart"
            for one, other, apart in sorted(report.near_duplicates, key=lambda pair: pair[0].split == pair[1].split)
        ],
    )
    for name, lines in (("note", notes), ("warning", report.warnings), ("problem", report.problems)):
        for line in lines:
            table.add_row(name, line)
    ready = "ready to train; see the warning about two splits" if report.leaks else "ready to train"
    table.add_row("result", "not ready: see the problems" if report.problems else ready)
    return table


def _name(file: Inspected) -> str:
    return f"{file.path} ({file.split})"


def _rows(table: Table, name: str, lines: Sequence[str]) -> None:
    for number, line in enumerate(lines[:_SHOWN]):
        table.add_row(name if number == 0 else "", line)
    if len(lines) > _SHOWN:
        table.add_row("", f"... and {len(lines) - _SHOWN} more; --format json lists all")


def create_parser(command: str) -> Parser:
    """Create the parser of a command of ``data``."""
    also = "Takes PATH, the folder of images, and the options of fit that are about data, too."
    parser = Parser(
        prog=f"gn-transfer data {command}",
        description=DATA_COMMANDS[command],
        epilog=None if command == "sample" else also,
    )
    if command == "check":
        parser.add_argument("--format", choices=["table", "json"], default="table", help="what to print")
    elif command == "show":
        parser.add_argument("--output", default="contact_sheet.png", help="PNG file to write")
        parser.add_argument("--count", type=_positive, default=24, help="how many images")
    elif command == "sample":
        parser.add_argument("--root", default="data_sample", help="folder that will hold oxford-iiit-pet")
        parser.add_argument("--seed", type=int, default=0, help="seed of the drawings")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give 1 or more")
    return number
