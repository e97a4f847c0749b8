"""The commands ``validate`` and ``test``: evaluate a checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from gn_transfer.commands.training_cli import TrainingCLI, parsed
from gn_transfer.data import ImageDataModule
from gn_transfer.data.describe import describe_data
from gn_transfer.report.calibration import wilson_interval
from gn_transfer.training.checkpoint import check_classes, read_checkpoint
from gn_transfer.training.classification import TransferClassifier
from gn_transfer.training.predictions import ImagePredictions
from gn_transfer.training.run_config import find
from gn_transfer.training.run_folder import run_of_checkpoint
from gn_transfer.training.run_log import RunLog
from gn_transfer.training.task import TransferTask
from gn_transfer.training.tasks import load_task
from gn_transfer.training.train import evaluate


def run(stage: str, arguments: Sequence[str], log: RunLog | None = None) -> int:
    """Run ``gn-transfer validate`` or ``gn-transfer test``.

    Args:
        stage: The command.
        arguments: The words behind it.
        log: Where its lines go; None prints them.

    Returns:
        Exit code.

    Raises:
        ConfigError: The user's mistake.
    """
    with parsed(stage, arguments, log) as cli:
        run_parsed(cli, stage)
    return 0


def run_parsed(cli: TrainingCLI, stage: str) -> None:
    """Evaluate what was parsed, and print the metrics."""
    stored, checkpoint = cli.arguments.stored, cli.arguments.checkpoint
    assert stored is not None
    assert checkpoint is not None
    task, data = cli.task, cli.datamodule
    task.restore(stored)
    data.channels = task.model_config.resolved_in_chans
    data.prepare_data()
    data.setup(stage)
    check_classes(stored["classes"], data.classes)
    trainer = cli.build_trainer()
    say = cli.log.print if trainer.is_global_zero else _say_nothing
    say(f"checkpoint {checkpoint}")
    for name, text in describe_data(data):
        if name in ("data", "images", "files", "skipped"):
            say(f"{name:<9}  {text}")
    if cli.section.dry_run:
        return
    metrics = evaluate(task, data, trainer, checkpoint, stage, say)
    for name, value in metrics.items():
        say(f"{name:<20} {value:.4f}")
    if isinstance(task, TransferClassifier):
        evaluated = len(data.test_dataset if stage == "test" else data.val_dataset)
        images = min(evaluated, find(trainer, ImagePredictions).count)  # limit_val_batches; ranks are filled up
        say(_count_right(metrics, stage, images))
    run = run_of_checkpoint(checkpoint)
    if run is not None and (run.logs / "metrics.json").is_file():
        say(f"next       gn-transfer report {shlex.quote(str(run.logs))}")


def load_run(cli: TrainingCLI) -> tuple[dict[str, Any], TransferTask]:
    """Load the checkpoint that was parsed, and set up the images of its run, those of training too.

    Args:
        cli: What was parsed for ``validate``.

    Returns:
        The checkpoint's content, and its module.

    Raises:
        ConfigError: A checkpoint or images that do not fit.
    """
    assert cli.arguments.checkpoint is not None
    content = read_checkpoint(cli.arguments.checkpoint)
    task = load_task(content, cli.arguments.checkpoint)
    set_up_images(cli.datamodule, task)
    check_classes(content["gn_transfer"]["classes"], cli.datamodule.classes)
    return content, task


def set_up_images(data: ImageDataModule, task: TransferTask) -> None:
    """Set up the images of training and validation for a module."""
    data.channels = task.model_config.resolved_in_chans
    data.prepare_data()
    data.setup("fit")


def _say_nothing(line: str) -> None:
    """What the other processes of an evaluation print."""


def _count_right(metrics: Mapping[str, float], stage: str, images: int) -> str:
    """Say how many images were classified right, with an interval."""
    right = round(metrics[f"{'test' if stage == 'test' else 'val'}/acc1"] * images)
    low, high = wilson_interval(right, images)
    return f"{right:,} of {images:,} images are right: {right / images:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
