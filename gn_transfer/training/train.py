"""Train and evaluate, from a script or from the command line: the steps of a run in the order in which they happen.

A script needs no command line::

    task = TransferClassifier(ModelConfig("resnetv2_18", "gn_ws", pretrained="auto"), OptimizerConfig(lr=0.01))
    data = Folder("photos", img_size=64)
    trainer = create_trainer(max_epochs=5, callbacks=[GradientAccumulation(effective_batch_size=8)])
    prepare(task, data)
    train(task, data, trainer, claim_run(Path("."), "photos", task.norm, data.batch_size, data.seed))
"""

from __future__ import annotations

import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from gn_transfer.config import ConfigError
from gn_transfer.data import ImageDataModule
from gn_transfer.data.describe import test_images
from gn_transfer.data.splits import file_identities, split_digest
from gn_transfer.files import going_on_without, partial_of, read_json, remove_leftovers, write_json, write_text
from gn_transfer.layers import group_counts
from gn_transfer.training.accumulation import GradientAccumulation
from gn_transfer.training.batch_norm_statistics import BatchNormStatistics
from gn_transfer.training.checkpoint import check_classes
from gn_transfer.training.checkpoint_callbacks import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from gn_transfer.training.divergence import DivergenceCheck
from gn_transfer.training.early_stopping import EarlyStopping
from gn_transfer.training.ema import AS_TRAINED, ExponentialMovingAverage
from gn_transfer.training.environment import environment
from gn_transfer.training.plan import Plan
from gn_transfer.training.precision import MixedPrecisionConfig, device_type, resolve_precision
from gn_transfer.training.predictions import ImagePredictions
from gn_transfer.training.progress import EpochLines, RunProgressBar, Throughput
from gn_transfer.training.record import RunRecord
from gn_transfer.training.run_config import config_of, find
from gn_transfer.training.run_folder import BEST, RunFolder, run_of_checkpoint
from gn_transfer.training.run_log import RunLog
from gn_transfer.training.split_check import check_split, split_of_run
from gn_transfer.training.task import TransferTask
from gn_transfer.training.tensorboard import RunLogger, TrainingImages, ValidationFigures, flat_hparams

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 10,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,  # the plan has checked shapes and files already
    "enable_model_summary": False,  # the plan says it in a line
    "use_distributed_sampler": False,  # the data's own sampler knows ranks and resumes inside an epoch
}


def create_trainer(
    *,
    mode: MixedPrecisionConfig | None = None,
    callbacks: Sequence[Callback] = (),
    interactive: bool = False,
    figures: bool = True,
    evaluates: bool = False,
    **arguments: Any,
) -> Trainer:
    """Build a Trainer with the callbacks that every run needs.

    Args:
        mode: Precision of training; None means auto.
        callbacks: Further callbacks. One of a kind that every run needs replaces the default; those whose ``enabled``
            is False are left out.
        interactive: Show a progress bar.
        figures: Log images and figures to TensorBoard.
        evaluates: For validate and test: nothing is saved.
        **arguments: Lightning's arguments of the Trainer, on top of :data:`TRAINER_DEFAULTS`.

    Returns:
        The Trainer; :func:`train` gives it its loggers.
    """
    needed: list[Callback] = [GradientAccumulation(), BatchNormStatistics(), Throughput(), ImagePredictions()]
    lines = EpochLines(every_seconds=None if interactive else 30.0)
    needed += [] if evaluates else [DivergenceCheck(), lines, BestCheckpoint(), LastCheckpoint()]
    needed += [RunProgressBar()] if interactive and not evaluates else []
    needed += [ValidationFigures(), *([] if evaluates else [TrainingImages()])] if figures else []
    given = [callback for callback in callbacks if getattr(callback, "enabled", True)]
    device = device_type(str(arguments.get("accelerator") or "auto"))
    precision = resolve_precision((mode or MixedPrecisionConfig()).mode, device)
    plugins = arguments.pop("plugins", None) or []
    return Trainer(
        **{
            **TRAINER_DEFAULTS,
            "precision": precision,
            "logger": False,
            "enable_progress_bar": interactive,
            **arguments,
            "callbacks": [*given, *(c for c in needed if not any(isinstance(other, type(c)) for other in given))],
            "plugins": [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()],
        }
    )


def prepare(task: TransferTask, data: ImageDataModule, *, stored: Mapping[str, Any] | None = None) -> None:
    """Set up the data and build the model: everything that can fail before a run has a folder.

    Args:
        task: The module.
        data: The data.
        stored: What a checkpoint holds under ``gn_transfer``, to continue its run.

    Raises:
        ConfigError: Data, weights and batch do not fit together.
    """
    data.channels = task.model_config.resolved_in_chans
    data.prepare_data()
    data.setup("fit")
    if stored is not None:
        task.restore(dict(stored))
        check_classes(stored["classes"], data.classes)
        check_split(task.run_config, data, "fit")
    task.build_for(data)
    task.check_batch(batch_size=data.batch_size, img_size=data.img_size)


def train(
    task: TransferTask,
    data: ImageDataModule,
    trainer: Trainer,
    run: RunFolder,
    *,
    config: Mapping[str, Any] | None = None,
    log: RunLog | None = None,
    loggers: Sequence[Logger] | None = (),
    facts: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    ckpt_path: str | Path | None = None,
) -> None:
    """Train a prepared task, with everything that the run leaves in its folders.

    Args:
        task: The module; see :func:`prepare`.
        data: The data, set up.
        trainer: See :func:`create_trainer`.
        run: Folder of the run; see :func:`gn_transfer.training.run_folder.claim_run`.
        config: The configuration that the run and its checkpoints store; None derives it from the objects.
        log: Goes on in the run's ``run.log``; None starts one.
        loggers: Loggers beside TensorBoard; None disables all logging.
        facts: Further entries of ``metrics.json``.
        plan: What was announced; the run keeps it.
        ckpt_path: Checkpoint to continue.

    Raises:
        ConfigError: The checkpoint does not fit, or the training went wrong; see
            :class:`gn_transfer.training.divergence.DivergenceCheck`.
    """
    assert task.report is not None
    config = yaml.safe_load(yaml.safe_dump(dict(config or config_of(task, data, trainer))))  # plain values
    config_name = run.name.partition("/")[0]
    task.run_config = {"config": config, "config_name": config_name, "split": split_of_run(data)}
    best = find(trainer, BestCheckpoint)
    best.dirpath, best.monitor = str(run.checkpoints), task.monitor
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping):
            callback.monitor = task.monitor
    find(trainer, LastCheckpoint).directory = run.checkpoints
    hparams = flat_hparams(config)
    groups = group_counts(task.model) if task.model is not None else {}
    facts = {**({"num_groups": max(groups.values())} if groups else {}), **(facts or {})}
    record = RunRecord(
        run.logs / "metrics.json",
        {**hparams, **describe_run(task, data, trainer), "config": config_name, "run": run.name, **facts},
        find(trainer, ImagePredictions),
        run.checkpoints / BEST,
    )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(callbacks.index(best), record)  # a checkpoint of a validation holds its row
    if ckpt_path is not None and Path(ckpt_path).name == BEST and trainer.is_global_zero:
        _take_best_along(Path(ckpt_path), run.checkpoints / BEST)
    own_log = RunLog() if log is None else None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ValidationFigures):  # in every process: what draws it gathers from all
            callback.path = run.logs / "worst_images.jpg"
        if getattr(callback, "say", None) is print:
            callback.say = (log or own_log).print  # type: ignore[union-attr]
    if trainer.is_global_zero:
        run.logs.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run.logs)
        write_text(run.logs / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        held_back = {"test": [image.path for image in found]} if (found := test_images(data)) else {}
        write_json(run.logs / "split.json", {**data.split(), **held_back})
        write_json(run.logs / "transfer_report.json", task.report.as_dict())
        if plan is not None:
            write_json(run.logs / "plan.json", {"rows": plan.rows, "warnings": plan.warnings})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TrainingImages):
                callback.path = run.logs / "training_images.jpg"
        (log or own_log).attach(run.logs / "run.log")  # type: ignore[union-attr]
    if loggers is not None:
        tensorboard = RunLogger(run, hparams)
        for logger in loggers:
            logger.log_hyperparams(hparams)
        trainer.loggers = [tensorboard, *loggers]
        if trainer.is_global_zero:
            tensorboard.announce()
    try:
        with explained_restoring(ckpt_path):
            trainer.fit(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    finally:
        if own_log is not None:
            own_log.close()


def _take_best_along(source: Path, target: Path) -> None:
    """Copy the best checkpoint of the run that a new one goes on from."""
    if source.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with going_on_without(BEST):
            partial = partial_of(target)
            shutil.copyfile(source, partial)
            partial.replace(target)


@contextmanager
def explained_restoring(checkpoint: str | Path | None) -> Iterator[None]:
    """Say of which checkpoint Lightning cannot restore its state; other errors pass.

    Raises:
        ConfigError: A state of another kind than a training of ours writes.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # whatever a state of the wrong kind leads to
        files = {Path(frame.f_code.co_filename).name for frame, _ in traceback.walk_tb(error.__traceback__)}
        if checkpoint is None or "checkpoint_connector.py" not in files:
            raise
        raise ConfigError(
            f"{checkpoint} holds a state that cannot be restored ({type(error).__name__}: {error}); use another "
            "checkpoint of the run, or the version of gn-transfer that wrote it."
        ) from error


def evaluate(
    task: TransferTask,
    data: ImageDataModule,
    trainer: Trainer,
    checkpoint: str | Path,
    stage: str,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Evaluate a checkpoint; a test is recorded in the metrics.json of its run.

    Args:
        task: The module, restored from the checkpoint.
        data: The data, set up for the stage.
        trainer: See :func:`create_trainer`.
        checkpoint: Path of the checkpoint.
        stage: ``validate`` or ``test``.
        say: Prints a line.

    Returns:
        The metrics.

    Raises:
        ConfigError: Images that the checkpoint was trained on.
    """
    checkpoint = Path(checkpoint)
    for remark in check_split(task.run_config, data, stage):
        say(f"note       {remark}")
    run_stage = getattr(trainer, stage)
    with warnings.catch_warnings():  # evaluation needs none of the callbacks of training
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
        with explained_restoring(checkpoint):
            [metrics] = run_stage(task, datamodule=data, ckpt_path=str(checkpoint), verbose=False, weights_only=True)
    run = run_of_checkpoint(checkpoint)
    record = None if run is None or not trainer.is_global_zero else run.logs / "metrics.json"
    sizes = _other_sizes(task, data)
    own = stage == "test" and record is not None and record.is_file() and _is_own_data(task, data, record)
    count = find(trainer, ImagePredictions).count
    if own and not sizes and count >= len(data.test_dataset):
        assert record is not None
        before = read_json(record)
        name = task.monitor.replace("val/", "test/")
        if isinstance(before.get(name), float):
            say(
                f"note       this run was tested before ({name} {before[name]:.4f}). A choice made from a test figure "
                "makes the next one too high."
            )
        images = data.test_dataset.images
        facts = {
            "test/checkpoint": checkpoint.name,
            "test_split": split_digest(data.test_dataset.paths),
            "test_images": len(images),
        }
        find(trainer, ImagePredictions).write(record.with_name("predictions_test.csv"), images, task)
        write_json(record, {**before, **metrics, **facts})
        say(f"recorded   in {record}")
    elif stage == "test" and record is not None:
        why = "these are other images than the run's own"
        if own:
            why = f"these are other sizes than the run's ({sizes})" if sizes else f"only {count:,} images were tested"
        say(f"note       {why}, so the run keeps its record as it is")
    found: dict[str, float] = metrics
    return found


def _is_own_data(task: TransferTask, data: ImageDataModule, record: Path) -> bool:
    """Whether images come from the folder that the checkpoint was trained on, from where that was moved, or a copy."""
    arguments = task.run_config.get("config", {}).get("data", {}).get("init_args", {})
    trained_in = Path(str(arguments.get("root"))).resolve()
    if trained_in == Path(data.root).resolve() or not trained_in.exists():
        return True
    stored = task.run_config.get("split") or {}
    known = {**stored.get("train", {}), **stored.get("val", {})}
    same_test = read_json(record.with_name("split.json")).get("test") == [image.path for image in data.list_test()]
    return bool(known) and same_test and file_identities(Path(data.root), list(known)) == known


def _other_sizes(task: TransferTask, data: ImageDataModule) -> str:
    """Say at which other sizes than in the run's validation images are evaluated; empty where they are the same."""
    arguments = task.run_config.get("config", {}).get("data", {}).get("init_args", {})
    stored = {name: arguments[name] for name in ("img_size", "tile_size") if name in arguments}
    here = {name: getattr(data, name, None) for name in stored}
    if "short_side" in arguments:  # a segmentation, whose crops are another matter
        side = stored.pop("img_size", None)
        stored["short_side"] = side if arguments["short_side"] is None else arguments["short_side"]
        here["short_side"] = getattr(data, "resolved_short_side", None)
    if stored.get("img_size", 0) is None:  # the size of the weights
        del stored["img_size"]
    different = [name for name, value in stored.items() if value != here[name]]
    return ", ".join(f"data.{name} is {stored[name]} in the run and {here[name]} here" for name in different)


def describe_run(task: TransferTask, data: ImageDataModule, trainer: Trainer) -> dict[str, Any]:
    """Collect what is known about a run before its first step, for ``metrics.json``."""
    assert task.report is not None
    averages = [callback for callback in trainer.callbacks if isinstance(callback, ExponentialMovingAverage)]  # type: ignore[attr-defined]
    return {
        **environment(),
        "data": type(data).__name__,
        "data_root": str(Path(data.root).resolve()),
        **{f"{name}_split": split_digest(paths) for name, paths in data.split().items()},
        "classes": data.num_classes,
        **{f"{name}_images": len(paths) for name, paths in data.split().items()},
        **({"skipped_images": len(data.bad_images)} if data.bad_images else {}),
        "architecture": task.report.architecture,
        "weights": task.report.source,
        "weights_pretrained_on": task.report.pretrained_on,
        "evaluated_weights": averages[0].describe() if averages else AS_TRAINED,
    }
