"""``gn-transfer data check | sample | cache | show``: what can be known and done about the pictures before training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from PIL import Image
from rich import get_console
from rich.table import Table

from gn_transfer.arguments import Arguments
from gn_transfer.callbacks import training_sheet
from gn_transfer.classifier import TransferClassifier
from gn_transfer.cli import Command
from gn_transfer.cli import run as run_command
from gn_transfer.config import ConfigError, did_you_mean
from gn_transfer.data import Pets, PictureData
from gn_transfer.data.base import core_count
from gn_transfer.data.cache import mib
from gn_transfer.data.check import Inspected, Report, check_pictures
from gn_transfer.data.pets_counts import BREEDS, compare_counts
from gn_transfer.data.progress import progress_bar
from gn_transfer.data.sample import write_sample

VERBS = {
    "check": "decode everything; report damage, duplicates, the same picture in two splits, counts",
    "sample": "write the embedded sample: gn-transfer data sample --root data_sample",
    "cache": "decode everything into the disk cache ahead of training",
    "show": "write a contact sheet of what the net sees: gn-transfer data show --config X --output sheet.png",
}

_HELP = """\
usage: gn-transfer data VERB [options]

{verbs}

check, cache and show take --config and every other option of fit (gn-transfer fit --help), such as --data Folder
--data.root PATH; gn-transfer data VERB --help lists what each has besides."""

_SHOWN = 10

Task = Callable[[PictureData, TransferClassifier, argparse.Namespace], int]


def run(arguments: Sequence[str]) -> int:
    """Run a verb of ``data``.

    Args:
        arguments: What stands behind ``data``.

    Returns:
        Exit code: 0 done, 2 when ``check`` found what would stop a training or ``cache`` could not be completed.

    Raises:
        ConfigError: The user's mistake.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        print(_HELP.format(verbs="\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())))
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS:
        raise ConfigError(f"data {verb}: not a verb; {did_you_mean(verb, VERBS)}. See gn-transfer data --help.")
    try:
        options, others = _parser(verb).parse_known_args(rest)
    except SystemExit:  # after --help
        return 0
    if verb == "sample":
        if others:
            raise ConfigError(f"data sample: {others[0]} is not an option; there are --root and --seed.")
        print(f"the sample is in {write_sample(Path(options.root), options.seed)}")
        return 0
    tasks: dict[str, Task] = {"check": check, "cache": cache, "show": show}
    return run_command("fit", others, lambda prepared: DataCommand(prepared, tasks[verb], options))


class DataCommand(Command):
    """Read the configuration as ``fit`` does, and do something else with its data.

    Args:
        arguments: The prepared arguments.
        task: What to do.
        options: The verb's own options.
    """

    def __init__(self, arguments: Arguments, task: Task, options: argparse.Namespace) -> None:
        self._task = task
        self._options = options
        super().__init__(arguments)

    def fit(self, **kwargs: object) -> None:
        """Do the task."""
        self.datamodule.channels = self.model.in_chans
        self.datamodule.prepare_data()
        self.exit_code = self._task(self.datamodule, self.model, self._options)


def check(data: PictureData, model: TransferClassifier, options: argparse.Namespace) -> int:
    """Verify the pictures of all splits; see :func:`gn_transfer.data.check.check_pictures`."""
    splits, notes = data.list_all()
    with progress_bar("decoding", sum(map(len, splits.values()))) as advance:
        report = check_pictures(
            Path(data.root),
            splits,
            data.classes,
            skips_bad=data.on_bad_image == "skip",
            threads=core_count(),
            advance=advance,
        )
    if isinstance(data, Pets):
        notes += _compare_with_official(report)
    if options.format == "json":
        print(json.dumps({**report.as_dict(), "notes": notes}, indent=2, ensure_ascii=False))
    else:
        get_console().print(_table(report, notes, data))
    return 2 if report.problems else 0


def cache(data: PictureData, model: TransferClassifier, options: argparse.Namespace) -> int:
    """Decode training and validation pictures into the disk cache."""
    data.setup("fit")
    plan = data.cache_plan
    if plan.mode != "disk":
        why = plan.reason or f"data.cache is {plan.mode}"
        raise ConfigError(
            f"data cache fills the disk cache, and there is none: {why} ({data.cache_dir}, about "
            f"{mib(plan.bytes_needed)} needed). Free some room, set data.cache_dir, or data.cache=disk for a part."
        )
    complete = True
    for split, dataset in (("train", data.train_dataset), ("val", data.val_dataset)):
        filled = data.fill_cache(dataset)
        assert filled is not None
        complete = complete and filled.problem is None
        bad = f", {filled.bad} cannot be decoded (see gn-transfer data check)" if filled.bad else ""
        print(f"{split:<5}  {filled.present:,} of {len(dataset):,} there, {filled.decoded:,} of them new{bad}")
    print(f"cache  {data.cache_dir}")
    return 0 if complete else 2


def show(data: PictureData, model: TransferClassifier, options: argparse.Namespace) -> int:
    """Write a contact sheet of the first training pictures as the net sees them."""
    data.setup("fit")
    mixer = model.create_mixer(data.seed, rank=0)
    output = Path(options.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(training_sheet(data, mixer, options.count)).save(output)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output {output} cannot be written ({error}); give a path that ends in .png.") from error
    print(f"{min(options.count, len(data.train_dataset))} training pictures, recipe {data.recipe}: {output}")
    return 0


def _compare_with_official(report: Report) -> list[str]:
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
            notes.append(f"{split}: {sum(known.values()):,} pictures of {breeds}, as officially published")
    return notes


def _table(report: Report, notes: Sequence[str], data: PictureData) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    facts = report.as_dict()
    table.add_row("data", f"{type(data).__name__} in {data.root}")
    for split, counts in report.class_counts.items():
        spread = f"{min(counts.values())} to {max(counts.values())} per class"
        table.add_row(split, f"{sum(counts.values()):,} pictures, {len(counts)} classes, {spread}")
    for name in ("formats", "modes"):
        table.add_row(name, ", ".join(f"{key} {count:,}" for key, count in facts[name].items()))
    if facts["short_side"]:
        side = facts["short_side"]
        table.add_row("short side", f"{side['least']} to {side['greatest']} px, median {side['median']}")
    _rows(table, "unreadable", [f"{_name(file)}: {file.error}" for file in report.unreadable])
    _rows(table, "odd", [f"{_name(file)}: {file.warning}" for file in report.odd])
    _rows(table, "same pixels", [" = ".join(map(_name, group)) for group in report.duplicates])
    _rows(table, "alike", [f"{_name(one)} ~ {_name(other)} ({apart:.1f})" for one, other, apart in report.alike])
    for name, lines in (("note", notes), ("warning", report.warnings), ("problem", report.problems)):
        for line in lines:
            table.add_row(name, line)
    table.add_row("result", "something would stop a training" if report.problems else "nothing would stop a training")
    return table


def _name(file: Inspected) -> str:
    return f"{file.path} ({file.split})"


def _rows(table: Table, name: str, lines: Sequence[str]) -> None:
    for number, line in enumerate(lines[:_SHOWN]):
        table.add_row(name if number == 0 else "", line)
    if len(lines) > _SHOWN:
        table.add_row("", f"... and {len(lines) - _SHOWN} more; --format json lists all")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}.")


def _parser(verb: str) -> _Parser:
    parser = _Parser(prog=f"gn-transfer data {verb}", description=VERBS[verb], allow_abbrev=False)
    if verb == "check":
        parser.add_argument("--format", choices=["table", "json"], default="table", help="what to print")
    elif verb == "show":
        parser.add_argument("--output", default="contact_sheet.png", help="PNG file to write")
        parser.add_argument("--count", type=_positive, default=24, help="how many pictures")
    elif verb == "sample":
        parser.add_argument("--root", default="data_sample", help="folder that will hold oxford-iiit-pet")
        parser.add_argument("--seed", type=int, default=0, help="seed of the drawings")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give 1 or more")
    return number
