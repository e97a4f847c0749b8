"""The verbs that train and evaluate: Lightning's command line, with runs, checkpoints and messages of our own."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gn_transfer.arguments import Arguments
from gn_transfer.callbacks import (
    AtomicCheckpointIO,
    BestCheckpoint,
    EpochLines,
    GradientAccumulation,
    LastCheckpoint,
    MixedPrecision,
    OptionalEarlyStopping,
    PicturePredictions,
    ProgressBar,
    RunRecord,
    Throughput,
    TrainingPictures,
    ValidationFigures,
    WeightAverage,
    device_type,
    micro_batches_per_window,
    resolve_precision,
)
from gn_transfer.classifier import TransferClassifier
from gn_transfer.config import ConfigError
from gn_transfer.data import Digits, Folder, Pets, PictureData, Sample, TinyImageNet
from gn_transfer.data.base import core_count
from gn_transfer.data.splits import split_digest
from gn_transfer.files import write_json
from gn_transfer.learning_rate import range_test, smooth, suggest
from gn_transfer.loggers import (
    RunFolder,
    RunLog,
    RunLogger,
    claim_run,
    environment,
    flat_hparams,
    run_of_checkpoint,
)
from gn_transfer.messages import explain
from gn_transfer.plan import Plan, epochs_of, make_plan

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 10,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,  # the plan has checked shapes and files already
    "enable_model_summary": False,  # the plan says it in a line
    "use_distributed_sampler": False,  # the data's own sampler knows ranks and resumes inside an epoch
}

DATA = (Sample, Pets, Folder, TinyImageNet, Digits)
"""What ``--data NAME`` offers; jsonargparse finds subclasses of PictureData that are imported."""

# What decides the course of a training: a resumed run must not change it. The number of epochs may grow.
_FIXED_ON_RESUME = ("seed_everything", "data", "model", "accumulation", "mixed_precision", "ema")
_FREE_ON_RESUME = {
    "data.init_args.root",
    "data.init_args.num_workers",
    "data.init_args.download",
    "data.init_args.cache",
    "data.init_args.cache_dir",
    "data.init_args.recipe",
    "data.init_args.crop_area",
    "model.compile",
    "model.channels_last",
    "model.pretrained",
    "mixed_precision.evaluation",
}


def run(verb: str, arguments: Sequence[str], kind: Callable[[Arguments], Command] | None = None) -> int:
    """Run ``fit``, ``validate`` or ``test``.

    Args:
        verb: The verb.
        arguments: What stands behind it.
        kind: What to run in place of :class:`Command`; it reads the same configuration.

    Returns:
        Exit code.

    Raises:
        ConfigError: The user's mistake.
        KeyboardInterrupt: Interrupted, after the checkpoint was saved.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    prepared = Arguments(verb, arguments)
    with prepared.files() as argv, _quiet_warnings(), _own_argv(argv):
        try:
            command = (kind or Command)(prepared)
        except ArgumentError as error:
            raise ConfigError(explain(str(error), known_keys(), [kind.__name__ for kind in DATA])) from error
        except SystemExit as error:
            # Lightning turns Ctrl-C into exit code 1, SIGTERM into none; jsonargparse leaves with 0 after help.
            if error.code in (0, None) and not isinstance(error, SIGTERMException):
                return 0
            raise KeyboardInterrupt from error
        except OSError as error:
            if error.errno is not None and error.errno == 28:  # no space left on device
                raise ConfigError(
                    f"the disk is full: {error}; free some room and continue with --ckpt_path last."
                ) from error
            raise
    return command.exit_code


class Command(LightningCLI):
    """LightningCLI with our keys, in the order in which data flows.

    Args:
        arguments: The prepared arguments.
        log: What the run says goes there; None: to the terminal.

    Attributes:
        draws: Whether TensorBoard gets pictures beside curves.
    """

    draws = True

    def __init__(self, arguments: Arguments, log: RunLog | None = None) -> None:
        self.arguments = arguments
        self.log = log or RunLog()
        self.plan: Plan | None = None
        self.exit_code = 0
        self.run_folder: RunFolder | None = None
        self.augmentation_changes: list[str] = []
        self.best = BestCheckpoint()
        self.predictions = PicturePredictions()
        strict = {"exit_on_error": False}
        super().__init__(
            TransferClassifier,
            PictureData,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={**strict, **{verb: dict(strict) for verb in self.subcommands()}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    # -- parsing ------------------------------------------------------------------------------------------------

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs of Lightning that we serve, with the arguments that are ours to fill."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "verbose", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "verbose", "weights_only"},
        }

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed."""
        parser.add_argument(
            "--seed_everything", type=int, default=0, help="One seed for weights, split, order and augmentation."
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our keys in the order of the data's path."""
        parser.add_lightning_class_args(PictureData, "data", subclass_mode=True)
        parser.add_lightning_class_args(TransferClassifier, "model")
        parser.add_lightning_class_args(GradientAccumulation, "accumulation")
        parser.add_lightning_class_args(MixedPrecision, "mixed_precision")
        parser.add_lightning_class_args(WeightAverage, "ema")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(OptionalEarlyStopping, "early_stopping")
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.add_argument(
            "--samples",
            type=int | None,
            default=None,
            help="Pictures to train on, with repetitions, in whole epochs; in place of trainer.max_epochs.",
        )
        parser.add_argument("--dry_run", action="store_true", help="Print the plan and stop.")
        parser.add_argument("--lr_find", action="store_true", help="Try rising learning rates, suggest one and stop.")

    def _parse_ckpt_path(self) -> None:
        """Do not let a checkpoint overrule the command line in silence, as Lightning would; see :meth:`_settle`."""

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot be, before anything is built."""
        config = self._section()
        if config.trainer.precision is not None:
            raise ConfigError(f"trainer.precision={config.trainer.precision}: set mixed_precision.mode instead.")
        if config.trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={config.trainer.accumulate_grad_batches}: set "
                "accumulation.effective_batch_size (pictures per optimizer step) instead."
            )
        if config.trainer.gradient_clip_val is not None:
            raise ConfigError(
                f"trainer.gradient_clip_val={config.trainer.gradient_clip_val}: set model.clip_norm instead."
            )
        if self.arguments.stored is not None:
            self._settle(self.arguments.stored)
        workers = config.data.init_args.get("num_workers")
        if device_type(str(config.trainer.accelerator)) == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            # Compute threads and data workers share the cores: a busy neighbour slows each step several times.
            torch.set_num_threads(max(1, core_count() - (workers or 0)))

    def _settle(self, stored: dict[str, Any]) -> None:
        """Compare the configuration in force with the checkpoint's."""
        theirs, ours = _flatten(stored["config"]), _flatten(self.plain_config())
        keys = _FIXED_ON_RESUME if self.subcommand == "fit" else ("model.backbone", "model.norm", "model.num_groups")
        different = [
            key
            for key in ours
            if key.startswith(keys) and key not in _FREE_ON_RESUME and key in theirs and theirs[key] != ours[key]
        ]
        if different:
            said = "; ".join(f"{key} is {theirs[key]} in the checkpoint and {ours[key]} here" for key in different)
            raise ConfigError(
                f"--ckpt_path {self.arguments.checkpoint} belongs to another run: {said}. To continue that run leave "
                "these options out; to start a new run from its weights set model.pretrained to the checkpoint instead."
            )
        self.augmentation_changes = [
            f"{key.removeprefix('data.init_args.')} {theirs.get(key)} -> {ours[key]}"
            for key in ("data.init_args.recipe", "data.init_args.crop_area")
            if theirs.get(key) != ours.get(key)
        ]

    def plain_config(self) -> dict[str, Any]:
        """Give the resolved configuration as plain values, with the seed and without what only this call needs."""
        dumped = yaml.safe_load(self._parser(self.subcommand).dump(self._section(), skip_none=False, format="yaml"))
        for key in ("ckpt_path", "dry_run", "lr_find", "config"):
            dumped.pop(key, None)
        plain: dict[str, Any] = dumped
        return plain

    def _section(self) -> Namespace:
        section: Namespace = self.config[str(self.subcommand)]
        return section

    # -- building -----------------------------------------------------------------------------------------------

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with resolved precision and our callbacks; its logger comes when the run has a folder."""
        config = self._section()
        accelerator = str(config.trainer.accelerator)
        self.precision = resolve_precision(config.mixed_precision.mode, device_type(accelerator))
        callbacks = [Throughput(), self.predictions, EpochLines(self.log.print)]
        interactive = sys.stdout.isatty() and config.trainer.enable_progress_bar is not False
        if interactive and self.subcommand == "fit":
            callbacks.append(ProgressBar(leave=False))
        if self.subcommand == "fit":
            callbacks.append(self.best)
        if self.draws:
            callbacks += (
                [ValidationFigures(), TrainingPictures()] if self.subcommand == "fit" else [ValidationFigures()]
            )
        self.extra_loggers = self._loggers()
        trainer_config = {
            **self._get(self.config_init, "trainer", default={}),
            "precision": self.precision,
            "logger": False,
            "enable_progress_bar": interactive,
            "plugins": [*_as_list(self._get(self.config_init, "trainer").plugins), AtomicCheckpointIO()],
            **kwargs,
        }
        groups = ["accumulation", "mixed_precision", "ema", "checkpoint", "early_stopping"]
        ours = [self._get(self.config_init, group) for group in groups]
        return self._instantiate_trainer(trainer_config, [*ours, *callbacks])

    def _loggers(self) -> list[Logger]:
        logger = self._get(self.config_init, "trainer").logger
        return [] if logger in (None, True, False) else _as_list(logger)

    # -- fit ----------------------------------------------------------------------------------------------------

    def fit(self, **kwargs: Any) -> None:
        """Prepare everything that can fail, print the plan, claim the run's folder, train, say what comes next."""
        config, model, data, trainer = self._section(), self.model, self.datamodule, self.trainer
        resumed = self.arguments.stored
        data.channels, data.evaluate_in_training_batches = model.in_chans, model.bn_evaluation == "batch"
        data.prepare_data()
        data.setup("fit")
        if resumed is not None:
            model.restore(resumed)
            _check_classes(resumed["classes"], data.classes)
        model.build_for(data)
        model.check_batch(batch_size=data.batch_size, img_size=data.img_size)
        if config.samples is not None:
            self._spend(config.samples)
        self.plan = plan = make_plan(
            model,
            data,
            effective_batch_size=config.accumulation.effective_batch_size,
            precision=self.precision,
            device=trainer.strategy.root_device,
            num_devices=trainer.world_size,
            max_epochs=-1 if trainer.max_epochs is None else trainer.max_epochs,
            max_steps=trainer.max_steps,
            limit_batches=trainer.limit_train_batches,
        )
        if trainer.is_global_zero:
            self.log.print(plan.table())
            for warning in plan.warnings:
                self.log.print(f"warning: {warning}")
        if config.dry_run:
            return
        if config.lr_find:
            self._find_learning_rate()
            return
        run_folder = self.claim_folder(resumed)
        self._equip(run_folder, trainer, model, data)
        if trainer.is_global_zero:
            verb = "continuing" if resumed is not None and self._continues(run_folder) else "run"
            self.log.print(f"{verb:<9}  {run_folder.logs}")
            self.log.attach(run_folder.logs / "run.log")
            if self.augmentation_changes:
                self.log.print(f"augmented  otherwise from here on: {', '.join(self.augmentation_changes)}")
        try:
            trainer.fit(model, datamodule=data, ckpt_path=kwargs.get("ckpt_path"))
            if trainer.is_global_zero:
                self._epilogue(run_folder)
        except SystemExit:  # Lightning's way out after Ctrl-C
            saved = run_folder.checkpoints / "last.ckpt"
            if saved.is_file():
                self.log.print(f"stopped    go on with: gn-transfer fit --ckpt_path {saved}")
            raise
        finally:
            self.log.close()

    def _find_learning_rate(self) -> None:
        """Run the range test and print it; nothing is written, and the seeds of a later run are its own."""
        micro_batches = micro_batches_per_window(
            self._section().accumulation.effective_batch_size, self.datamodule.batch_size, 1
        )
        tested = range_test(
            self.model,
            self.datamodule,
            micro_batches=micro_batches,
            precision=self.precision,
            device=self.trainer.strategy.root_device,
        )
        losses = smooth([loss for _, loss in tested])
        for (rate, _), loss in list(zip(tested, losses, strict=True))[:: max(1, len(tested) // 16)]:
            self.log.print(f"lr {rate:<9.2g} loss {loss:.4f}")
        found = suggest(tested)
        if found is None:
            self.log.print("the loss did not fall at any learning rate; look at the data and the weights first")
        else:
            self.log.print(
                f"suggested  --model.lr {found:g}, where the loss fell fastest ({len(tested)} optimizer steps of "
                f"{micro_batches * self.datamodule.batch_size} pictures); compare it with its thirds and triples on "
                "validation"
            )

    def _continues(self, run_folder: RunFolder) -> bool:
        checkpoint = self.arguments.checkpoint
        return checkpoint is not None and checkpoint.resolve().parent == run_folder.checkpoints.resolve()

    def _spend(self, samples: int) -> None:
        """Set the length of the training to a number of pictures."""
        config, trainer = self._section(), self.trainer
        if config.trainer.max_steps != -1:
            raise ConfigError(f"samples={samples} and trainer.max_steps={config.trainer.max_steps}: set one of them.")
        at_once = self.datamodule.batch_size * trainer.world_size
        epochs, batches = epochs_of(samples, len(self.datamodule.train_dataset), at_once)
        trainer.fit_loop.max_epochs = config.trainer.max_epochs = epochs
        if batches is not None:
            trainer.limit_train_batches = config.trainer.limit_train_batches = batches

    def facts(self) -> dict[str, Any]:
        """Give what metrics.json says beside what every run says there."""
        return {}

    def claim_folder(self, resumed: dict[str, Any] | None) -> RunFolder:
        """Choose the run's folder: last.ckpt continues its own run, any other checkpoint opens a new one."""
        checkpoint, config, data = self.arguments.checkpoint, self._section(), self.datamodule
        if resumed is not None and checkpoint is not None and checkpoint.name == "last.ckpt":
            own = run_of_checkpoint(checkpoint)
            if own is not None:
                return own
        handed_down = os.environ.get("GN_TRANSFER_RUN")  # other processes of the same training
        root = Path(config.trainer.default_root_dir or ".")
        if handed_down:
            return RunFolder(handed_down, root)
        run_folder = claim_run(
            root, self.arguments.config_name, self.model.norm, data.batch_size, config.seed_everything
        )
        if self.trainer.world_size > 1:
            os.environ["GN_TRANSFER_RUN"] = run_folder.name
        return run_folder

    def _equip(self, run_folder: RunFolder, trainer: Trainer, model: TransferClassifier, data: PictureData) -> None:
        """Give Trainer, callbacks and model what depends on the run's folder."""
        plain, config = self.plain_config(), self._section()
        plain["data"]["init_args"]["seed"] = config.seed_everything
        model.run_config = {"config": _without_links(plain), "config_name": self.arguments.config_name}
        hparams = {**flat_hparams(plain), "num_groups": model.num_groups}
        self.best.dirpath = str(run_folder.checkpoints)
        last = self._get(self.config_init, "checkpoint")
        last.directory = run_folder.checkpoints
        averaged = self._get(self.config_init, "ema").describe()
        assert model.report is not None
        split = data.split()
        facts = {
            **hparams,
            **environment(),
            "data": type(data).__name__,
            "data_root": str(Path(data.root).resolve()),
            **{f"{name}_split": split_digest(paths) for name, paths in split.items()},
            "architecture": model.report.architecture,
            "weights": model.report.source,
            "weights_saw": model.report.saw,
            "evaluated_weights": averaged,
            "config": self.arguments.config_name,
            "run": run_folder.name,
            **self.facts(),
        }
        if trainer.is_global_zero:
            (run_folder.logs / "config.yaml").write_text(
                yaml.safe_dump(_without_links(plain), sort_keys=False), encoding="utf-8"
            )
            write_json(run_folder.logs / "split.json", split)
            write_json(run_folder.logs / "transfer_report.json", model.report.as_dict())
        trainer.callbacks.append(RunRecord(run_folder.logs / "metrics.json", facts, self.best, self.predictions))  # type: ignore[attr-defined]
        if config.trainer.logger is not False:
            own = RunLogger(run_folder, hparams)
            for logger in self.extra_loggers:
                logger.log_hyperparams(hparams)
            trainer.loggers = [own, *self.extra_loggers]
            if trainer.is_global_zero:
                own.announce()

    def _epilogue(self, run_folder: RunFolder) -> None:
        score, best = self.best.best_model_score, run_folder.checkpoints / "best.ckpt"
        speed = next(c for c in self.trainer.callbacks if isinstance(c, Throughput)).images_per_sec  # type: ignore[attr-defined]
        if score is not None:
            self.log.print(f"reached    val/acc1 {float(score):.4f} at its best, {speed:.1f} images/s")
        self.log.print(f"best       {best}\nmetrics    {run_folder.logs / 'metrics.json'}")
        other = "bn" if self.model.norm == "gn_ws" else "gn_ws"
        self.log.print(
            "next       "
            f"gn-transfer validate --ckpt_path {best}\n"
            f"           tensorboard --logdir {run_folder.root / 'runs'}\n"
            f"           gn-transfer fit {self._typed()} --model.norm {other}"
        )

    def _typed(self) -> str:
        """Repeat what the user typed, less the norm and the checkpoint."""
        words = iter(self.arguments.typed)
        kept = []
        for word in words:
            if word in ("--model.norm", "--ckpt_path"):
                next(words, None)
            elif not word.startswith(("--model.norm=", "--ckpt_path=")):
                kept.append(word)
        return " ".join(kept)

    # -- validate and test --------------------------------------------------------------------------------------

    def validate(self, **kwargs: Any) -> None:
        """Evaluate a checkpoint on the validation split."""
        self._evaluate("validate")

    def test(self, **kwargs: Any) -> None:
        """Evaluate a checkpoint on the test split, and note the figure in the run's metrics.json."""
        self._evaluate("test")

    def _evaluate(self, stage: str) -> None:
        stored, checkpoint = self.arguments.stored, self.arguments.checkpoint
        assert stored is not None
        assert checkpoint is not None
        self.model.restore(stored)
        self.datamodule.channels = self.model.in_chans
        self.datamodule.evaluate_in_training_batches = self.model.bn_evaluation == "batch"
        self.datamodule.prepare_data()
        self.datamodule.setup(stage)
        _check_classes(stored["classes"], self.datamodule.classes)
        for name, value in self.datamodule.describe()[:3]:
            self.log.print(f"{name:<9}  {value}")
        if self._section().dry_run:
            return
        verb = getattr(self.trainer, stage)
        [metrics] = verb(self.model, datamodule=self.datamodule, ckpt_path=str(checkpoint), verbose=False)
        for name, value in metrics.items():
            self.log.print(f"{name:<20} {value:.4f}")
        run_folder = run_of_checkpoint(checkpoint)
        record = None if run_folder is None else run_folder.logs / "metrics.json"
        if stage == "test" and record is not None and record.is_file():
            known = yaml.safe_load(record.read_text(encoding="utf-8"))
            pictures, classes = self.datamodule.test_dataset.pictures, self.datamodule.classes
            digest = split_digest(picture.path for picture in pictures)
            self.predictions.write(record.with_name("predictions_test.csv"), pictures, classes)
            write_json(record, {**known, **metrics, "test/checkpoint": checkpoint.name, "test_split": digest})
            self.log.print(f"noted in {record}")


def _check_classes(stored: Sequence[str], found: Sequence[str]) -> None:
    if list(stored) != list(found):
        raise ConfigError(
            f"the checkpoint knows {len(stored)} classes ({', '.join(stored[:4])}, ...), the data has {len(found)} "
            f"({', '.join(found[:4])}, ...); point data.root at the data it was trained on."
        )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _without_links(config: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the data's seed, which is linked to seed_everything and refused when it is given."""
    data = dict(config["data"])
    data["init_args"] = {key: value for key, value in data["init_args"].items() if key != "seed"}
    return {**config, "data": data}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def known_keys() -> list[str]:
    """List the keys that a configuration may have, over all data modules."""
    groups: list[tuple[str, type]] = [
        *(("data", kind) for kind in DATA),
        ("model", TransferClassifier),
        ("accumulation", GradientAccumulation),
        ("mixed_precision", MixedPrecision),
        ("ema", WeightAverage),
        ("checkpoint", LastCheckpoint),
        ("early_stopping", OptionalEarlyStopping),
        ("trainer", Trainer),
    ]
    keys = [
        f"{group}.{name}"
        for group, kind in groups
        for part in kind.__mro__[:-1]  # data modules pass what they do not name themselves on to their base
        if part.__module__.startswith("gn_transfer") or part is Trainer
        for name, parameter in inspect.signature(part).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    return ["seed_everything", *dict.fromkeys(keys), "samples", "ckpt_path", "dry_run", "lr_find"]


@contextmanager
def _own_argv(argv: list[str]) -> Iterator[None]:
    """Let Lightning read the prepared arguments from ``sys.argv``, and other processes of the training as well."""
    before = sys.argv
    sys.argv = [before[0] if before else "gn-transfer", *argv]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _quiet_warnings() -> Iterator[None]:
    """Silence what users can do nothing about."""
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",  # the number of workers is chosen, and printed
            ".*You're resuming from a checkpoint that ended before the epoch ended.*",  # our sampler resumes inside it
            ".*number of training batches.*smaller than the logging interval.*",
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*Experiment logs directory .* exists and is not empty.*",
            ".*callbacks used to create the checkpoint need to be provided.*",  # evaluation needs none of them
            ".*isinstance.treespec, LeafSpec.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
