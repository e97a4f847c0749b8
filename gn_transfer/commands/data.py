"""``gn-transfer data check | sample | cache | show``: what can be known and done about the images before training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from gn_transfer.commands.data_check import check
from gn_transfer.commands.parsing import Parser
from gn_transfer.commands.short_help import DATA_COMMANDS
from gn_transfer.commands.training_cli import parsed
from gn_transfer.config import ConfigError, did_you_mean
from gn_transfer.data import ImageDataModule
from gn_transfer.data.cache import mib
from gn_transfer.data.sample import write_sample
from gn_transfer.data.workers import core_count
from gn_transfer.training.task import TransferTask

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
        cli.refuse_dry_run(f"data {command}")
        cli.datamodule.channels = cli.task.model_config.resolved_in_chans
        cli.datamodule.prepare_data()
        return tasks[command](cli.datamodule, cli.task, options)


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
        parser.add_argument(
            "--output",
            type=Path,
            metavar="DIR",
            help="write a page with the images in question there, index.html; or the path of an .html file",
        )
    elif command == "show":
        parser.add_argument("--output", default="contact_sheet.png", help="PNG file to write")
        parser.add_argument("--count", type=_positive, default=24, help="how many images")
    elif command == "sample":
        parser.add_argument("--root", default="data_sample", help="folder that will hold oxford-iiit-pet")
        parser.add_argument("--seed", type=_seed, default=0, help="seed of the drawings")
    return parser


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give 0 to 4294967295")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give 1 or more")
    return number
