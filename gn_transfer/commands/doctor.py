"""The command ``doctor``: what batch norm does to a model at a batch size, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gn_transfer.commands.evaluate import load_run, set_up_images
from gn_transfer.commands.parsing import Parser
from gn_transfer.commands.training_cli import parsed
from gn_transfer.config import ConfigError, shortened
from gn_transfer.data import ImageDataModule, SegmentationDataModule
from gn_transfer.layers.diagnosis import (
    MOST_BATCH_NOISE,
    MOST_MEAN_SHIFT,
    MOST_VARIANCE_FACTOR,
    BatchNormLayer,
    Diagnosis,
)
from gn_transfer.layers.measure_norms import diagnose
from gn_transfer.training.task import TransferTask

_SHOWN = 12  # layers of the table


def run(arguments: Sequence[str]) -> int:
    """Run ``gn-transfer doctor``.

    Args:
        arguments: The words behind the command.

    Returns:
        Exit code.

    Raises:
        ConfigError: The user's mistake.
    """
    options, rest = create_parser().parse_known_args(arguments)
    if options.batch_size is not None and not 1 <= options.batch_size < 2**31:
        raise ConfigError(
            f"--batch_size {shortened(options.batch_size)} is out of range; use a number from 1 to 2147483647."
        )
    of_run = Path(options.subject).exists() or options.subject.endswith(".ckpt")
    with _loaded(options.subject, rest, of_run=of_run) as (task, data):
        size = options.batch_size or data.batch_size
        assert task.model is not None
        batches = _batches(task, data, with_targets=of_run)  # a new last layer only guesses
        found = diagnose(task.model, batches, batch_size=size)
    if options.figure is not None:
        try:
            draw(found).savefig(options.figure)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--figure {options.figure} cannot be written: {error}; use .png or .svg.") from error
    if options.format == "json":
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print(found.as_text(commands=True))
        _print_layers(found.layers)
    return 0


@contextmanager
def _loaded(subject: str, rest: Sequence[str], *, of_run: bool) -> Iterator[tuple[TransferTask, ImageDataModule]]:
    """Load a checkpoint with the images of its run, or build a model of timm for images that are named."""
    if of_run:
        with parsed("validate", [subject, *rest]) as cli:
            cli.refuse_dry_run("doctor")
            yield load_run(cli)[1], cli.datamodule
        return
    given = {word.partition("=")[0] for word in rest}
    chosen = {"--model.norm": "bn", "--model.pretrained": "auto"}
    words = [word for key, value in chosen.items() if key not in given for word in (key, value)]
    configured = bool(given & {"--config", "-c"}) or any(word.startswith("--data") for word in given)
    if not configured and (not rest or rest[0].startswith("-")):
        raise ConfigError(
            f"doctor {subject}: no images are named; give their folder, gn-transfer doctor {subject} PHOTOS, or of a "
            "run the path of its checkpoint."
        )
    with parsed("fit", [*rest, "--model.backbone", subject, *words]) as cli:
        cli.refuse_dry_run("doctor")
        set_up_images(cli.datamodule, cli.task)
        cli.task.build_for(cli.datamodule)
        yield cli.task, cli.datamodule


def _batches(
    task: TransferTask, data: ImageDataModule, *, with_targets: bool
) -> Iterator[tuple[Tensor, Tensor] | Tensor]:
    """Give images in a mixed order, since lists are sorted by class: of validation, or crops of a segmentation.

    Masks, in which some pixels do not count, are left out.
    """
    crops = isinstance(data, SegmentationDataModule)
    dataset = data.train_dataset if crops else data.val_dataset
    positions = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(positions), 8):
        images, targets = dataset.batch(positions[start : start + 8])
        pixels = task.normalize(images)
        yield (pixels, targets) if with_targets and not crops else pixels


def _print_layers(layers: Sequence[BatchNormLayer]) -> None:
    """Print the layers whose statistics fit the images least."""
    measured = [layer for layer in layers if layer.mean_shift is not None and layer.variance_factor is not None]
    if not measured:
        return
    measured.sort(key=lambda layer: max(layer.mean_shift or 0.0, (layer.variance_factor or 1.0) - 1), reverse=True)
    console = Console()
    console = Console(width=max(console.width, 110))  # names of layers are long
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "values", "batch mean off", "running mean off", "variance factor"):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for layer in measured[:_SHOWN]:
        table.add_row(
            layer.name,
            f"{layer.values_per_channel:,}",
            "" if layer.batch_noise is None else f"{layer.batch_noise:.2f}",
            f"{layer.mean_shift:.2f}",
            f"{layer.variance_factor:.2f}",
        )
    console.print()
    console.print(table, markup=False, highlight=False)
    if len(measured) > _SHOWN:
        console.print(f"and {len(measured) - _SHOWN} more, which fit better; --format json has all", highlight=False)


def draw(found: Diagnosis) -> Figure:
    """Draw the noise of a batch and the error of the running statistics, layer by layer, with the limits."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    numbers = range(1, len(found.layers) + 1)
    values = (
        [layer.batch_noise or 0.0 for layer in found.layers],
        [layer.mean_shift or 0.0 for layer in found.layers],
        [layer.variance_factor or 1.0 for layer in found.layers],
    )
    limits = (MOST_BATCH_NOISE, MOST_MEAN_SHIFT, MOST_VARIANCE_FACTOR)
    labels = (f"mean of {found.batch_size},\noff by (sd)", "running mean,\noff by (sd)", "running variance,\nfactor")
    for axes, heights, limit, label in zip(panels, values, limits, labels, strict=True):
        axes.bar(numbers, heights, color=["#b2432f" if height > limit else "#4a7ba6" for height in heights])
        axes.axhline(limit, color="#888", linewidth=0.8, linestyle=":")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[2].set_yscale("log")
    panels[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[2].set_xlabel("batch norm, from the first to the last")
    figure.suptitle(f"Statistics of batches of {found.batch_size}, and running ones, against {found.images} images")
    return figure


def create_parser() -> Parser:
    """Create the parser of the command."""
    parser = Parser(
        prog="gn-transfer doctor",
        description="Tell what batch norm does to a model at a batch size, measured on images, and what to do about "
        "it. Every option of validate (of a checkpoint) or fit (of a model) can follow.",
    )
    parser.add_argument(
        "subject",
        metavar="CKPT_OR_MODEL",
        help="a checkpoint, a run's folder, or a model of timm, such as resnet50, with the folder of images behind it",
    )
    parser.add_argument(
        "--batch_size", metavar="N", type=int, help="images per forward pass to ask about (default: data.batch_size)"
    )
    parser.add_argument("--format", choices=["table", "json"], default="table", help="how to print (default: table)")
    parser.add_argument("--figure", metavar="FILE", type=Path, help="draw the layers: a .png or .svg file")
    return parser
