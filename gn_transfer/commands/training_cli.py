"""The command line of training and evaluation: which keys there are, and what they are turned into."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, instantiate_class
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gn_transfer.backbones.model_config import DEFAULT_DECODER, ModelConfig
from gn_transfer.commands.arguments import Arguments
from gn_transfer.commands.class_paths import only_known_classes
from gn_transfer.commands.parsing import explain, explain_fault
from gn_transfer.commands.quiet import quiet_warnings, quiet_writer
from gn_transfer.commands.training_keys import CALLBACKS, CONFIGS, DATA, known_keys
from gn_transfer.commands.value_checks import check_data_keys, check_parsed_values, read_whole_numbers_first
from gn_transfer.config import ConfigError, shortened
from gn_transfer.data import ImageDataModule, SegmentationDataModule
from gn_transfer.data.workers import core_count
from gn_transfer.training.classification import RegularizationConfig, TransferClassifier
from gn_transfer.training.precision import MixedPrecisionConfig, device_type
from gn_transfer.training.run_log import RunLog
from gn_transfer.training.segmentation import SegmentationConfig, TransferSegmenter
from gn_transfer.training.task import TransferTask
from gn_transfer.training.train import TRAINER_DEFAULTS, create_trainer

# What decides the course of a training: a resumed run must not change it. The number of epochs may grow.
_FIXED_ON_RESUME = ("seed_everything", "data", *CONFIGS, "accumulation", "batch_norm", "freezing", "ema")
_FREE_ON_RESUME = {
    "data.init_args.root",
    "data.init_args.num_workers",
    "data.init_args.download",
    "data.init_args.cache",
    "data.init_args.cache_dir",
    "data.init_args.recipe",
    "data.init_args.min_crop_scale",
    "data.init_args.augmentation",
    "accumulation.cache_weights",
    "accumulation.cuda_graphs",
    "model.compile",
    "model.channels_last",
    "model.pretrained",
}
_AUGMENTATION = ("recipe", "min_crop_scale", "augmentation")
_OF_THIS_CALL = ("ckpt_path", "dry_run", "config", "memory_limit")


class TrainingCLI(LightningCLI):
    """LightningCLI with our keys, in the order in which data flows; it parses and builds, and runs nothing.

    Args:
        arguments: The prepared arguments.
        log: Where the lines of the run go; None prints them.
        builds: Build module and data; False only checks the configuration.

    Attributes:
        task: The module; the data decide which.
        datamodule: The data.
        augmentation_changes: How a resumed run augments otherwise than its checkpoint.
    """

    def __init__(self, arguments: Arguments, log: RunLog | None = None, *, builds: bool = True) -> None:
        self.arguments = arguments
        self.log = log or RunLog()
        self.augmentation_changes: list[str] = []
        self._builds = builds
        strict = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            TransferClassifier,
            ImageDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={**strict, **{command: dict(strict) for command in self.subcommands()}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands of Lightning that we serve, with the arguments that are ours to fill."""
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
        parser.add_lightning_class_args(ImageDataModule, "data", subclass_mode=True)
        for group, kind in CONFIGS.items():
            parser.add_class_arguments(kind, group, fail_untyped=True)
        for group, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, group)
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})
        read_whole_numbers_first(parser)
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.add_argument(
            "--samples",
            type=int | None,
            default=None,
            help="Images to train on, with repetitions, in place of trainer.max_epochs: below one epoch so many, in "
            "whole batches; else the nearest number of epochs.",
        )
        parser.add_argument(
            "--memory_limit",
            type=float | None,
            default=None,
            help="GiB that the training may take, for data.batch_size=auto; null takes what is free.",
        )
        parser.add_argument("--dry_run", action="store_true", help="Print the plan and stop.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse what no key accepts."""
        try:
            super().parse_arguments(parser, args)
        except OverflowError as error:
            longest = max(self.arguments.argv, key=len)
            raise ConfigError(f"{shortened(longest)}: a number is too large; use one below 1e308.") from error
        values = self.config[str(self.config.subcommand)].as_dict()
        check_data_keys(self.arguments.argv, str(values["data"]["class_path"]).rpartition(".")[2])
        check_parsed_values(values)

    def _parse_ckpt_path(self) -> None:
        """Do not let a checkpoint overrule the command line in silence, as Lightning would; see _check_resume."""

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot be, before anything is built."""
        if not self.arguments.names_images:
            raise ConfigError(
                "no images are named: give their folder, gn-transfer fit PHOTOS (one folder per class in it), or a "
                "configuration, such as --config sample_gnws.yaml for the sample that comes with the package."
            )
        trainer = self.section.trainer
        for key, unset, ours in (
            ("precision", None, "mixed_precision.mode"),
            ("accumulate_grad_batches", 1, "accumulation.effective_batch_size (images per optimizer step)"),
            ("gradient_clip_val", None, "optimizer.clip_norm"),
            ("sync_batchnorm", False, "model.norm=bn_sync"),
        ):
            if trainer[key] != unset:
                raise ConfigError(f"trainer.{key}={trainer[key]}: set {ours} instead.")
        if self.arguments.stored is not None:
            self._check_resume(self.arguments.stored)
        workers = self.section.data.init_args.get("num_workers")
        if device_type(str(trainer.accelerator)) == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            # Compute threads and data workers share the cores: a busy neighbour slows each step several times.
            torch.set_num_threads(max(1, core_count() - (workers or 0)))

    def _check_resume(self, stored: Mapping[str, Any]) -> None:
        """Compare the configuration in force with the checkpoint's."""
        theirs, ours = _flatten(stored["config"]), _flatten(self.plain_config())
        keys = _FIXED_ON_RESUME if self.subcommand == "fit" else ("model.backbone", "model.norm", "model.num_groups")
        free = set(_FREE_ON_RESUME)
        over_batch = ModelConfig(**self.section.model.as_dict()).norm_over_batch
        if ours["accumulation.effective_batch_size"] and over_batch is None:
            free.add("data.init_args.batch_size")  # the same optimizer steps
        shared = [key for key in ours if key.startswith(keys) and key not in free and key in theirs]
        different = [key for key in shared if theirs[key] != ours[key]]
        if different:
            listed = "; ".join(f"{key} is {theirs[key]} in the checkpoint and {ours[key]} here" for key in different)
            raise ConfigError(
                f"--ckpt_path {self.arguments.checkpoint} belongs to another run: {listed}. To continue that run leave "
                "these options out; to start a new run from its weights set model.pretrained to the checkpoint instead."
            )
        self.augmentation_changes = [
            f"{name} {theirs.get(f'data.init_args.{name}')} -> {ours[f'data.init_args.{name}']}"
            for name in _AUGMENTATION
            if theirs.get(f"data.init_args.{name}") != ours.get(f"data.init_args.{name}")
        ]

    def instantiate_classes(self) -> None:
        """Build module and data; the Trainer comes with :meth:`build_trainer`."""
        try:
            config = self.parser.instantiate_classes(self.config) if self._builds else self.config
        except ValueError:  # jsonargparse hides a mistake in a class's own keys below a text about types
            instantiate_class((), self.section.data.as_dict())
            for key in ("logger", "callbacks"):
                for value in (v for v in _as_list(self.section.trainer[key]) if isinstance(v, Namespace)):
                    try:
                        instantiate_class((), value.as_dict())
                    except Exception as error:  # whatever a logger or a callback raises when it is made
                        raise ConfigError(f"trainer.{key}: {value.class_path} cannot be made: {error}") from error
            raise
        self.config_init = config
        section = config[str(self.subcommand)]
        self.mixed_precision: MixedPrecisionConfig = section.mixed_precision
        if self._builds:
            self.datamodule = section.data
            self.task = self._create_task(section)
            batch_norm = self.callback("batch_norm")
            batch_norm.check(self.task.model_config)
            self.datamodule.evaluate_in_training_batches = batch_norm.evaluation == "batch"

    def _create_task(self, section: Namespace) -> TransferTask:
        """Create the module of the task that the data are for; keys of the other task are refused."""
        segments = self._segments()
        other, default = (
            ("regularization", RegularizationConfig()) if segments else ("segmentation", SegmentationConfig())
        )
        if section[other] != default:
            raise ConfigError(
                f"{other}.* are keys of {'classification' if segments else 'segmentation'}, and "
                f"{type(self.datamodule).__name__} holds {'images with masks' if segments else 'images by class'}; "
                "leave them out."
            )
        if segments:
            return TransferSegmenter(section.model, section.optimizer, section.segmentation)
        return TransferClassifier(section.model, section.optimizer, section.regularization)

    def refuse_dry_run(self, command: str) -> None:
        """Refuse ``--dry_run`` of a command that takes the options of training, and plans nothing.

        Raises:
            ConfigError: It is given.
        """
        if self.section.dry_run:
            raise ConfigError(f"{command} has no --dry_run; leave it out, or plan a training with gn-transfer fit.")

    def _segments(self) -> bool:
        """Whether the data that are configured are images with masks."""
        module, _, name = str(self.section.data.class_path).rpartition(".")
        return issubclass(getattr(importlib.import_module(module), name), SegmentationDataModule)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing; see ``commands/fit.py`` and ``commands/evaluate.py``."""

    def callback(self, group: str) -> Any:
        """The callback that a group of keys configures."""
        return self.config_init[str(self.subcommand)][group]

    @property
    def section(self) -> Namespace:
        """The parsed values of this command."""
        section: Namespace = self.config[str(self.subcommand)]
        return section

    @property
    def loggers(self) -> list[Logger] | None:
        """Loggers beside TensorBoard; None where ``trainer.logger`` is false."""
        logger = self.config_init[str(self.subcommand)].trainer.logger
        if logger is False:
            return None
        return [] if logger in (None, True) else _as_list(logger)

    def plain_config(self) -> dict[str, Any]:
        """Give the configuration as plain values, without what only this call needs."""
        dumped = yaml.safe_load(self._parser(self.subcommand).dump(self.section, skip_none=False, format="yaml"))
        plain: dict[str, Any] = {key: value for key, value in dumped.items() if key not in _OF_THIS_CALL}
        # The data's seed is linked to seed_everything, and refused when it is given.
        plain["data"]["init_args"].pop("seed", None)
        if self._segments():
            plain["model"]["decoder"] = plain["model"]["decoder"] or DEFAULT_DECODER
        plain.pop("regularization" if self._segments() else "segmentation", None)
        return plain

    def build_trainer(self, *, figures: bool = True) -> Trainer:
        """Build the Trainer with the callbacks that the keys configure.

        Args:
            figures: Log images and figures to TensorBoard.
        """
        fits = self.subcommand == "fit"
        trainer = dict(self.config_init[str(self.subcommand)].trainer)
        interactive = sys.stdout.isatty() and trainer["enable_progress_bar"] is not False
        groups = CALLBACKS if fits else ("accumulation", "batch_norm")
        given = [*_as_list(trainer.pop("callbacks")), *(self.callback(group) for group in groups)]
        ours = ("precision", "logger", "enable_progress_bar")
        try:
            return create_trainer(
                mode=self.mixed_precision,
                callbacks=given,
                interactive=interactive,
                figures=figures,
                evaluates=not fits,
                **{key: value for key, value in trainer.items() if key not in ours},
            )
        except ConfigError:
            raise
        except Exception as error:  # Lightning checks its own arguments with errors of many classes
            raise MisconfigurationException(str(error)) from error


@contextmanager
def parsed(
    command: str,
    arguments: Sequence[str],
    log: RunLog | None = None,
    *,
    builds: bool = True,
    typed: Collection[str] | None = None,
) -> Iterator[TrainingCLI]:
    """Parse the command line of ``fit``, ``validate`` or ``test``; the block runs what was parsed.

    Args:
        command: The command.
        arguments: The words behind it.
        log: Where the lines of the run go.
        builds: Build module and data; False only checks the configuration.
        typed: Classes that the user named, where the words come from a study's file; None takes those in the words.

    Yields:
        What was parsed.

    Raises:
        ConfigError: The user's mistake.
        KeyboardInterrupt: Interrupted, after the checkpoint was saved.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    prepared = Arguments(command, arguments, typed=typed)
    with prepared.files() as argv, quiet_warnings(), quiet_writer(), _own_argv(argv):
        try:
            with nullcontext() if prepared.allow_class_path else only_known_classes(prepared.typed_classes):
                cli = TrainingCLI(prepared, log, builds=builds)
            yield cli
        except ArgumentError as error:
            raise ConfigError(explain(str(error), known_keys(), [kind.__name__ for kind in DATA])) from error
        except MisconfigurationException as error:
            raise ConfigError(f"trainer: {error} Correct the keys of trainer, or leave them out.") from error
        except SystemExit as error:
            # Lightning turns Ctrl-C into exit code 1, SIGTERM into none; jsonargparse leaves with 0 after help.
            if error.code in (0, None) and not isinstance(error, SIGTERMException):
                raise
            raise KeyboardInterrupt from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ConfigError(
                    f"the disk is full: {error}; free some room and continue with --ckpt_path last."
                ) from error
            raise
        except (RuntimeError, MemoryError) as error:
            if explained := explain_fault(error):
                raise ConfigError(explained) from error
            raise


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@contextmanager
def _own_argv(argv: list[str]) -> Iterator[None]:
    """Let Lightning read the prepared arguments from ``sys.argv``, and other processes of the training as well."""
    before = sys.argv
    sys.argv = [before[0] if before else "gn-transfer", *argv]
    try:
        yield
    finally:
        sys.argv = before
