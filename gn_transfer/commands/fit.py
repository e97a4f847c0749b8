"""The command ``fit``: train, or continue a training."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from gn_transfer.backbones import auto_table
from gn_transfer.commands.training_cli import TrainingCLI, parsed
from gn_transfer.config import ConfigError
from gn_transfer.data.describe import test_images
from gn_transfer.training.batch_size import BatchSizeChoice, choose_batch_size
from gn_transfer.training.checkpoint_callbacks import BestCheckpoint, LastCheckpoint
from gn_transfer.training.plan import Plan, epochs_of, make_plan
from gn_transfer.training.progress import Throughput
from gn_transfer.training.run_config import find
from gn_transfer.training.run_folder import LAST, PREVIOUS, RunFolder, claim_run, run_of_checkpoint
from gn_transfer.training.task import TransferTask
from gn_transfer.training.train import prepare, train

_RUN_OF_THIS_TRAINING = "GN_TRANSFER_RUN"  # tells the other processes of a training the name of its run


def run(arguments: Sequence[str]) -> int:
    """Run ``gn-transfer fit``.

    Args:
        arguments: The words behind the command.

    Returns:
        Exit code.

    Raises:
        ConfigError: The user's mistake.
        KeyboardInterrupt: Interrupted, after the checkpoint was saved.
    """
    with parsed("fit", arguments) as cli:
        fit(cli)
    return 0


def fit(
    cli: TrainingCLI, *, run: RunFolder | None = None, facts: Mapping[str, Any] | None = None, figures: bool = True
) -> Plan:
    """Train what was parsed.

    Args:
        cli: The parsed command line.
        run: Folder of the run; None claims one.
        facts: Further entries of ``metrics.json``.
        figures: Log images and figures to TensorBoard.

    Returns:
        The plan, which was printed before the first step.
    """
    stored, log = cli.arguments.stored, cli.log
    for number, remark in enumerate(cli.arguments.remarks):
        log.print(f"{'chosen' if number == 0 else '':<10} {remark}")
    for note in cli.arguments.notes:
        log.print(f"note       {note}")
    trainer = cli.build_trainer(figures=figures)
    prepare(cli.task, cli.datamodule, stored=stored)
    sizes = measure_batch_sizes(cli, trainer)
    if cli.section.samples is not None:
        limit_samples(cli, trainer)
    check_validation(cli, trainer)
    plan = plan_of(cli, trainer, sizes)
    if trainer.is_global_zero:
        log.print(plan.table())
        for warning in plan.warnings:
            log.print(f"warning: {warning}")
    if cli.section.dry_run:
        return plan
    if trainer.num_nodes > 1 and trainer.is_global_zero:
        log.print(f"note       the training begins when this command runs on all {trainer.num_nodes} nodes")
    run = run or choose_run(cli, trainer)
    if trainer.is_global_zero:
        log.print(f"{'continuing' if _continues(cli, run) else 'run':<10} {run.logs}")
        first = run.logs.with_name(re.sub(r"-\d+$", "", run.logs.name))
        if first != run.logs and first.is_dir() and not _continues(cli, run):
            log.print(f"note       there is a run {first.name} already; --ckpt_path last would continue the newest")
        if cli.augmentation_changes:
            log.print(f"augmentation changes from here on: {', '.join(cli.augmentation_changes)}")
    try:
        trainer = train_within_memory(cli, trainer, run, plan, facts=facts, figures=figures)
        if trainer.is_global_zero:
            for line in summary(cli, trainer, run):
                log.print(line)
    except SystemExit:  # Lightning's way out after Ctrl-C
        saved = run.checkpoints / LAST
        if facts and "study" in facts:
            log.print(f"stopped    continue with the command that runs the study {facts['study']}")
        elif saved.is_file():
            words = ["gn-transfer", "fit", "--ckpt_path", str(saved), *_words_of_processes(cli, trainer)]
            log.print(f"stopped    continue with: {shlex.join(words)}")
        raise
    finally:
        log.close()
    return plan


def train_within_memory(
    cli: TrainingCLI, trainer: Trainer, run: RunFolder, plan: Plan, *, facts: Mapping[str, Any] | None, figures: bool
) -> Trainer:
    """Train; where a step finds no memory, go on from the optimizer step before it with fewer images at a time.

    Returns:
        The Trainer that finished.
    """
    ckpt_path: str | Path | None = cli.section.ckpt_path
    while True:
        size = cli.datamodule.batch_size
        used = {"micro_batch_size": size} if size != cli.section.data.init_args.batch_size else {}
        try:
            train(
                cli.task,
                cli.datamodule,
                trainer,
                run,
                config=cli.plain_config(),
                log=cli.log,
                loggers=cli.loggers,
                facts={**used, **(facts or {})},
                plan=plan,
                ckpt_path=ckpt_path,
            )
            return trainer
        except (RuntimeError, MemoryError) as error:
            smaller = smaller_batch_size(cli, trainer, error)
            if smaller is None:
                raise
        # Out of the handler, nothing holds on to what the failed step had in memory.
        ckpt_path = find(trainer, LastCheckpoint).saved or ckpt_path
        cli.log.print(f"note       out of memory: on from the last optimizer step, with data.batch_size={smaller}")
        cli.datamodule.use_batch_size(smaller)
        limit, epochs = trainer.limit_train_batches, trainer.max_epochs
        trainer = cli.build_trainer(figures=figures)
        trainer.fit_loop.max_epochs = epochs  # a budget of images has set both
        trainer.limit_train_batches = -(-limit * size // smaller) if isinstance(limit, int) else limit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure_batch_sizes(cli: TrainingCLI, trainer: Trainer) -> BatchSizeChoice | None:
    """Choose ``data.batch_size=auto``; None where it is given.

    A run that goes on keeps its number, unless a memory limit is given.

    Raises:
        ConfigError: The norm looks at the batch, so that the choice is the user's.
    """
    data, stored, limit = cli.datamodule, cli.arguments.stored, cli.section.memory_limit
    if not data.batch_size_is_auto:
        return None
    if stored is not None and limit is None and isinstance(stored.get("batch_size"), int):
        data.use_batch_size(stored["batch_size"])
        return None
    sizes = choose_batch_size(
        cli.task,
        data,
        accumulation=cli.callback("accumulation"),
        precision=str(trainer.precision),
        device=trainer.strategy.root_device,
        num_devices=trainer.world_size,
        memory_limit_gib=limit,
    )
    if sizes.over_batch is not None:
        cli.log.print(Plan(sizes.rows()).table())
        raise ConfigError(
            f"data.batch_size=auto: norm {sizes.over_batch} takes its statistics from the batch, so each of these "
            "numbers trains another model; give the one that you want, such as --data.batch_size "
            f"{sizes.candidates[-1].batch_size}, or choose gn_ws, gn or bn_frozen."
        )
    data.use_batch_size(sizes.chosen.batch_size)
    return sizes


def smaller_batch_size(cli: TrainingCLI, trainer: Trainer, error: BaseException) -> int | None:
    """Give the number of images with which a training that ran out of memory goes on; None where it cannot.

    Raises:
        ConfigError: The norm looks at the batch.
    """
    size, effective = cli.datamodule.batch_size, cli.callback("accumulation").effective_batch_size
    if not find(trainer, LastCheckpoint).out_of_memory or size == 1 or effective is None:
        return None
    if norm := cli.task.model_config.norm_over_batch:
        raise ConfigError(
            f"out of memory with data.batch_size={size}. Norm {norm} takes its statistics from these images, so with "
            "fewer it would go on as another model: begin anew with a lower data.batch_size or data.img_size, with "
            "model.gradient_checkpointing=true, or with gn_ws, gn or bn_frozen, under which the training would go on."
        ) from error
    return next(part for part in range(size // 2, 0, -1) if effective % part == 0)


def plan_of(cli: TrainingCLI, trainer: Trainer, sizes: BatchSizeChoice | None = None) -> Plan:
    """Plan what was parsed; the task is prepared, and ``sizes`` is what was measured for ``data.batch_size=auto``."""
    return make_plan(
        cli.task,
        cli.datamodule,
        accumulation=cli.callback("accumulation"),
        batch_norm=cli.callback("batch_norm"),
        frozen_epochs=cli.callback("freezing").epochs,
        precision=str(trainer.precision),
        device=trainer.strategy.root_device,
        num_devices=trainer.world_size,
        max_epochs=-1 if trainer.max_epochs is None else trainer.max_epochs,
        max_steps=trainer.max_steps,
        limit_batches=trainer.limit_train_batches,
        batch_sizes=sizes,
    )


def check_validation(cli: TrainingCLI, trainer: Trainer) -> None:
    """Refuse a validation that would come later than an epoch ends, which Lightning finds out when it starts."""
    interval = cli.section.trainer.val_check_interval
    batches = -(-len(cli.datamodule.train_dataset) // (cli.datamodule.batch_size * trainer.world_size))
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    within_epochs = trainer.check_val_every_n_epoch is not None and not trainer.fast_dev_run  # type: ignore[attr-defined]
    if within_epochs and isinstance(interval, int) and not isinstance(interval, bool) and interval > batches:
        raise ConfigError(
            f"trainer.val_check_interval={interval} is more than the {batches:,} batches of an epoch; use fewer, or "
            "trainer.check_val_every_n_epoch: a number of epochs between validations, or null to count over epochs."
        )


def limit_samples(cli: TrainingCLI, trainer: Trainer) -> None:
    """Set the length of the training to a number of images (``samples``)."""
    samples, section = cli.section.samples, cli.section.trainer
    if section.max_steps != -1:
        raise ConfigError(f"samples={samples} and trainer.max_steps={section.max_steps}: set one of them.")
    at_once = cli.datamodule.batch_size * trainer.world_size
    epochs, batches = epochs_of(samples, len(cli.datamodule.train_dataset), at_once)
    limit = section.limit_train_batches
    typed = any(word.startswith("--trainer.limit_train_batches") for word in cli.arguments.argv)
    # Below one epoch, the limit in a run's own configuration is that of its samples.
    if typed or (batches is None and limit is not None and cli.arguments.stored is None):
        raise ConfigError(f"samples={samples} and trainer.limit_train_batches={limit}: set one of them.")
    trainer.fit_loop.max_epochs = section.max_epochs = epochs
    if batches is not None:
        trainer.limit_train_batches = batches
        if not cli.datamodule.batch_size_is_auto:  # else the configurations of equal runs would differ
            section.limit_train_batches = batches


def choose_run(cli: TrainingCLI, trainer: Trainer) -> RunFolder:
    """Choose the run's folder: last.ckpt continues its own run, any other checkpoint opens a new one."""
    checkpoint = cli.arguments.checkpoint
    if checkpoint is not None and checkpoint.name in (LAST, PREVIOUS) and (own := run_of_checkpoint(checkpoint)):
        return own
    root = Path(cli.section.trainer.default_root_dir or ".")
    if name := os.environ.get(_RUN_OF_THIS_TRAINING):
        return RunFolder(name, root)
    if not trainer.is_global_zero:  # started by torchrun or SLURM: the first process writes, in a folder that it claims
        return RunFolder(f"{cli.arguments.config_name}/process{trainer.global_rank}", root)
    seed = cli.section.seed_everything
    size = cli.section.data.init_args.batch_size
    run = claim_run(root, cli.arguments.config_name, cli.task.norm, size, seed)
    if trainer.world_size > 1:
        os.environ[_RUN_OF_THIS_TRAINING] = run.name
    return run


def summary(cli: TrainingCLI, trainer: Trainer, run: RunFolder) -> list[str]:
    """Say what the run reached, and which commands come next."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return ["done       training and validation ran for a batch or two (trainer.fast_dev_run); nothing was saved"]
    score, kept = find(trainer, BestCheckpoint).best_model_score, run.checkpoints / "best.ckpt"
    if not kept.is_file():  # nothing was validated
        kept = run.checkpoints / LAST
    speed = find(trainer, Throughput).images_per_sec
    reached = [] if score is None else [f"reached    best {cli.task.monitor} {float(score):.4f}, {speed:.1f} images/s"]
    checkpoint, logs = shlex.quote(str(kept)), shlex.quote(str(run.root / "runs"))
    commands = [
        f"gn-transfer export {checkpoint} --output bundle",
        f"gn-transfer report {shlex.quote(str(run.logs))}",
        f"tensorboard --logdir {logs}",
    ]
    other = f"gn-transfer fit {shlex.join(_words_without_norm(cli.arguments.typed))} {_other_norm(cli.task)}"
    if test_images(cli.datamodule):
        commands.insert(0, f"gn-transfer test {checkpoint}")
    return [
        *reached,
        f"{kept.stem:<10} {kept}",
        f"metrics    {run.logs / 'metrics.json'}",
        *(f"{'' if number else 'next':<10} {command}" for number, command in enumerate(commands)),
        f"{'to compare':<10} {other}",
    ]


def _continues(cli: TrainingCLI, run: RunFolder) -> bool:
    checkpoint = cli.arguments.checkpoint
    return checkpoint is not None and checkpoint.resolve().parent == run.checkpoints.resolve()


def _words_of_processes(cli: TrainingCLI, trainer: Trainer) -> list[str]:
    """Say on how many processes a training runs: nothing starts several because a checkpoint says so."""
    if trainer.world_size == 1:
        return []
    values = {"devices": trainer.num_devices, "num_nodes": trainer.num_nodes, "strategy": cli.section.trainer.strategy}
    return [word for key, value in values.items() for word in (f"--trainer.{key}", str(value))]


def _other_norm(task: TransferTask) -> str:
    """The norm that is worth comparing, as options that work with the weights that there are."""
    config = task.model_config
    if config.norm == "gn_ws":
        return "--model.norm bn_frozen"
    scratch = config.pretrained is None
    if scratch or any((backbone, norm) == (config.backbone, "gn_ws") for backbone, norm, _ in auto_table()):
        return "--model.norm gn_ws"
    return "--model.norm gn --model.conversion calibrated"


def _words_without_norm(typed: Sequence[str]) -> list[str]:
    """Repeat what the user typed, without the norm and the checkpoint."""
    words, kept = iter(typed), []
    for word in words:
        if word in ("--model.norm", "--ckpt_path"):
            next(words, None)
        elif not word.startswith(("--model.norm=", "--ckpt_path=")):
            kept.append(word)
    return kept
