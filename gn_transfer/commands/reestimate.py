"""The command ``reestimate``: set the running statistics of a checkpoint from a pass over training images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gn_transfer.commands.evaluate import load_run
from gn_transfer.commands.parsing import Parser
from gn_transfer.commands.training_cli import parsed
from gn_transfer.config import ConfigError, printable
from gn_transfer.layers import reestimate_statistics
from gn_transfer.layers.batch_norm import batch_norms
from gn_transfer.training.batch_norm_statistics import FROZEN_STATISTICS_BATCH
from gn_transfer.training.checkpoint_callbacks import write_checkpoint
from gn_transfer.training.train import evaluate


def run(arguments: Sequence[str]) -> int:
    """Run ``gn-transfer reestimate``.

    Args:
        arguments: The words behind the command.

    Returns:
        Exit code.

    Raises:
        ConfigError: The user's mistake.
    """
    options, rest = create_parser().parse_known_args(arguments)
    if options.images < 1:
        raise ConfigError(f"--images {options.images} is out of range; use a number of 1 or more.")
    with parsed("validate", [options.checkpoint, *rest]) as cli:
        cli.refuse_dry_run("reestimate")
        checkpoint, data = cli.arguments.checkpoint, cli.datamodule
        assert checkpoint is not None
        output = options.output or checkpoint.with_name(f"{checkpoint.stem}_reestimated.ckpt")
        if output.exists():
            raise ConfigError(f"--output {output} exists already; name another file.")
        content, task = load_run(cli)
        if not any(name.endswith("running_mean") for name in content["state_dict"]):
            raise ConfigError(f"{checkpoint}: model.norm={task.norm} has no running statistics to re-estimate.")
        trainer = cli.build_trainer()
        before = evaluate(task, data, trainer, checkpoint, "validate")
        images = data.training_images(options.images)
        assert task.model is not None
        learning = batch_norms(task.model, frozen=False)  # as in training: frozen ones beside them stay
        size = data.batch_size if learning else FROZEN_STATISTICS_BATCH
        batches = (task.normalize(part) for part in torch.split(images, size))
        layers = reestimate_statistics(task.model, batches, layers=learning or None)
        content["state_dict"] = task.state_dict()
        content["gn_transfer"]["statistics"] = f"re-estimated on {len(images):,} training images"
        write_checkpoint(content, output)
        after = evaluate(task, data, trainer, output, "validate")
    print(f"statistics of {layers} batch norms, re-estimated on {len(images):,} training images in batches of {size}")
    for name, value in before.items():
        print(f"{name:<20} {value:.4f} before, {after[name]:.4f} after")
    print(f"checkpoint {printable(str(output))}")
    return 0


def create_parser() -> Parser:
    """Create the parser of the command."""
    parser = Parser(
        prog="gn-transfer reestimate",
        description="Set the running statistics of the batch norms of a checkpoint from a pass over its training "
        "images, and show the validation figures before and after. The checkpoint stays; another is written beside "
        "it. Every option of validate can follow.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, or a run's folder: then its best.ckpt")
    parser.add_argument("--images", metavar="N", type=int, default=1000, help="training images to use (default: 1000)")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="checkpoint to write (default: CKPT_reestimated.ckpt beside it)"
    )
    return parser
