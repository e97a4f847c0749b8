"""Where a run lies and how TensorBoard shows it: names of runs, flat hyper-parameters, metrics with them."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich import get_console
from rich.console import Console
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams as hparams_summary

HPARAMS_FIRST = ("norm", "batch_size", "num_groups", "lr", "seed")
"""The hyper-parameters that the HPARAMS tab shows first; the others are a click away."""

HPARAM_METRICS = ("val/acc1", "val/acc_per_class", "val/loss", "train/loss", "train/images_per_sec")
"""The metrics of the HPARAMS tab, the same in every run: runs with other keys vanish from it."""


@dataclass(frozen=True)
class RunFolder:
    """The two folders of a run, of the same name.

    Attributes:
        name: ``<config>/<norm>-bs<batch>-seed<seed>[-k]``.
        root: What ``runs/`` and ``checkpoints/`` lie in.
    """

    name: str
    root: Path = Path()

    @property
    def logs(self) -> Path:
        """TensorBoard events, config.yaml, metrics.json, run.log."""
        return self.root / "runs" / self.name

    @property
    def checkpoints(self) -> Path:
        """best.ckpt and last.ckpt."""
        return self.root / "checkpoints" / self.name


def claim_run(root: Path, config: str, norm: str, batch_size: int, seed: int) -> RunFolder:
    """Create the folder of a new run; safe when several runs start at once.

    Args:
        root: What ``runs/`` and ``checkpoints/`` lie in.
        config: Name of the config, without its suffix.
        norm: The switch.
        batch_size: ``data.batch_size``.
        seed: ``seed_everything``.

    Returns:
        A folder that did not exist before: the first free of ``...``, ``...-2``, ``...-3``.
    """
    base = f"{config}/{norm}-bs{batch_size}-seed{seed}"
    number = 1
    while True:
        run = RunFolder(base if number == 1 else f"{base}-{number}", root)
        if not run.checkpoints.exists():
            try:
                run.logs.mkdir(parents=True)
            except FileExistsError:
                pass
            else:
                return run
        number += 1


def find_last(root: Path, config: str) -> Path | None:
    """Find the newest ``last.ckpt`` of a config's runs.

    Args:
        root: What ``checkpoints/`` lies in.
        config: Name of the config, without its suffix; ``*`` for any.

    Returns:
        Its path, or ``None`` where no run has one.
    """
    found = (root / "checkpoints").glob(f"{config}/*/last.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def run_of_checkpoint(checkpoint: Path) -> RunFolder | None:
    """Find the run that a checkpoint belongs to by the place where it lies.

    Args:
        checkpoint: Path of a .ckpt file.

    Returns:
        The run, or ``None`` where the file has been moved out of ``checkpoints/<config>/<run>/``.
    """
    for path in (checkpoint.absolute(), checkpoint.resolve()):  # checkpoints/ may be a link elsewhere
        folder = path.parent
        run = RunFolder(f"{folder.parent.name}/{folder.name}", folder.parent.parent.parent)
        if folder.parent.parent.name == "checkpoints" and run.logs.is_dir():
            return run
    return None


def flat_hparams(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Flatten a configuration for the HPARAMS tab: the same keys in every run, no value missing.

    Args:
        config: The resolved configuration, nested.

    Returns:
        Dotted keys without their section where that is plain (``norm``, ``lr``), in a fixed order; ``None`` is
        written ``"none"``, since TensorBoard drops runs with missing values.
    """
    model, data = config["model"], config["data"]["init_args"]
    trainer = config.get("trainer", {})
    values: dict[str, Any] = {
        "norm": model["norm"],
        "backbone": model["backbone"],
        "num_groups": model["num_groups"],
        "group_size": str(model["group_size"]),
        "pretrained": str(model["pretrained"]),
        "batch_size": data["batch_size"],
        "effective_batch_size": config["accumulation"]["effective_batch_size"] or data["batch_size"],
        "img_size": data["img_size"],
        "recipe": data.get("recipe"),
        "shots_per_class": str(data.get("shots_per_class")),
        "optimizer": model["optimizer"],
        "lr": float(model["lr"]),
        "head_lr": float(model["lr"] if model["head_lr"] is None else model["head_lr"]),
        "weight_decay": float(model["weight_decay"]),
        "label_smoothing": float(model["label_smoothing"]),
        "mixup": float(model["mixup"]),
        "cutmix": float(model["cutmix"]),
        "bn_momentum": str(model["bn_momentum"]),
        "reestimate_bn": model["reestimate_bn"],
        "bn_evaluation": model["bn_evaluation"],
        "max_epochs": trainer.get("max_epochs"),
        "precision": config["mixed_precision"]["mode"],
        "seed": config["seed_everything"],
    }
    return {key: "none" if value in (None, "None") else value for key, value in values.items()}


class RunLogger(TensorBoardLogger):
    """TensorBoard in a run's folder, with hyper-parameters that fill the HPARAMS tab.

    The tab's rows are announced at the start, so that a killed run shows too; its metrics are the run's own scalars.

    Args:
        run: The run.
        hparams: See :func:`flat_hparams`.
    """

    def __init__(self, run: RunFolder, hparams: Mapping[str, bool | int | float | str]) -> None:
        super().__init__(save_dir=run.logs, name="", version="", default_hp_metric=False)
        self._flat = dict(hparams)

    def save(self) -> None:
        """Write nothing but events: the configuration lies in ``config.yaml`` already."""
        self.experiment.flush()

    def announce(self) -> None:
        """Write the run's row of the HPARAMS tab, without values of its metrics."""
        experiment, session_start, _ = _summaries(self._flat)
        writer = self.experiment._get_file_writer()
        writer.add_summary(experiment)
        writer.add_summary(session_start)
        self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Mark the row as finished and close the file."""
        _, _, session_end = _summaries(self._flat)
        self.experiment._get_file_writer().add_summary(session_end)
        super().finalize(status)


class RunLog:
    """What the program says, on the terminal and in the run's ``run.log``.

    Args:
        console: The terminal; ``None`` takes rich's own, so that lines go above a progress bar, not through it.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or get_console()
        self._buffer: TextIO = io.StringIO()
        self._copy = Console(file=self._buffer, width=120, color_system=None)

    def print(self, *renderables: Any) -> None:
        """Print rich renderables or text; markup in square brackets is not interpreted."""
        self.console.print(*renderables, markup=False, highlight=False)
        self._copy.print(*renderables, markup=False, highlight=False)
        self._buffer.flush()

    def attach(self, path: Path) -> None:
        """Go on in a file, beginning with what has been said so far; an existing file is continued."""
        said = self._buffer.getvalue() if isinstance(self._buffer, io.StringIO) else ""
        self._buffer = path.open("a", encoding="utf-8")
        self._buffer.write(said)
        self._buffer.flush()
        self._copy = Console(file=self._buffer, width=120, color_system=None)

    def close(self) -> None:
        """Close the file."""
        self._buffer.close()


def _summaries(flat: dict[str, Any]) -> tuple[Any, Any, Any]:
    experiment, start, end = hparams_summary(flat, dict.fromkeys(HPARAM_METRICS, 0.0))  # type: ignore[no-untyped-call]
    # TensorBoard shows only the first few axes, and takes those first of which it is told that they differ.
    stored = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(stored.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in HPARAMS_FIRST
    stored.content = content.SerializeToString()
    return experiment, start, end


def environment() -> dict[str, Any]:
    """Say what the figures of a run were obtained with: versions, git commit, device, threads."""
    names = ("gn-transfer", "torch", "torchvision", "lightning", "timm", "albumentations", "torchmetrics")
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    )
    return {
        "versions": {name: version(name) for name in names},
        "git_commit": _git_commit(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _git_commit() -> str | None:
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():  # installed: a repository around the environment would not be ours
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
