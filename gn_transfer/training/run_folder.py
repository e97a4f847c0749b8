"""The folders of a run: ``runs/<config>/<run>`` and ``checkpoints/<config>/<run>``."""

from __future__ import annotations

import glob
import shlex
from dataclasses import dataclass
from pathlib import Path

from gn_transfer.config import ConfigError
from gn_transfer.files import read_json, refuse_link

BEST = "best.ckpt"
"""The checkpoint of the validation with the highest metric."""

LAST = "last.ckpt"
"""File name of the newest checkpoint of a run."""

PREVIOUS = "previous.ckpt"
"""File name of the checkpoint before it, which is continued where the newest is corrupt."""


@dataclass(frozen=True)
class RunFolder:
    """The two folders of a run, of the same name.

    Attributes:
        name: ``<config>/<norm>-bs<batch>-seed<seed>[-k]``.
        root: Folder that contains ``runs/`` and ``checkpoints/``.
    """

    name: str
    root: Path = Path()

    @property
    def logs(self) -> Path:
        """TensorBoard events, config.yaml, metrics.json, run.log."""
        return self.root / "runs" / self.name

    @property
    def checkpoints(self) -> Path:
        """best.ckpt, last.ckpt, and the one before it, previous.ckpt."""
        return self.root / "checkpoints" / self.name


def refuse_links(run: RunFolder) -> None:
    """Refuse a run whose folders, or files in them, are links: going on would write through them.

    Raises:
        ConfigError: With the link.
    """
    for folder in (run.logs, run.checkpoints):
        for path in (folder.parent, folder, *(folder.iterdir() if folder.is_dir() else ())):
            refuse_link(path)


def claim_run(root: Path, config: str, norm: str, batch_size: int | str, seed: int) -> RunFolder:
    """Create the folder of a new run; safe when several runs start at once.

    Args:
        root: Folder that contains ``runs/`` and ``checkpoints/``.
        config: Name of the config, without its suffix.
        norm: The normalization.
        batch_size: ``data.batch_size``.
        seed: ``seed_everything``.

    Returns:
        A folder that did not exist before: the first free of ``...``, ``...-2``, ``...-3``.

    Raises:
        ConfigError: It cannot be made.
    """
    base = f"{config}/{norm}-bs{batch_size}-seed{seed}"
    number = 1
    while True:
        run = RunFolder(base if number == 1 else f"{base}-{number}", root)
        if not run.checkpoints.exists():
            try:
                run.logs.mkdir(parents=True)
                return run
            except OSError as error:
                if not run.logs.exists():  # a file or a broken link in its place, or no permission
                    raise ConfigError(
                        f"the folder of the run cannot be made: {run.logs}: {error.strerror}. Choose another place "
                        "with --trainer.default_root_dir, or remove what is in its way."
                    ) from error
        number += 1


def find_last(root: Path, config: str) -> Path | None:
    """Find the ``last.ckpt`` of a config's newest run, that is, of the one that was started or continued last.

    Args:
        root: Folder that contains ``runs/`` and ``checkpoints/``.
        config: Name of the config, without its suffix; ``*`` for any.

    Returns:
        Its path, or ``None`` where no run has one.

    Raises:
        ConfigError: The newest run stopped before its first checkpoint, so that an older one would be continued.
    """
    names = config if config == "*" else glob.escape(config)
    found = {path.parent for name in (LAST, PREVIOUS) for path in (root / "checkpoints").glob(f"{names}/*/{name}")}
    if not found:
        return None
    saved = max(found, key=lambda folder: max(path.stat().st_mtime for path in folder.glob("*.ckpt"))) / LAST
    started = [path for path in (root / "runs").glob(f"{names}/*/config.yaml") if not _is_trial_run(path.parent)]
    if not started:
        return saved
    newest = max(started, key=lambda path: path.stat().st_mtime).parent
    checkpoints = root / "checkpoints" / newest.relative_to(root / "runs")
    if checkpoints in found:
        return checkpoints / LAST
    raise ConfigError(
        f"--ckpt_path last: the newest run, {newest}, stopped before its first checkpoint. Start it again with "
        f"gn-transfer fit, or continue an older run: --ckpt_path {shlex.quote(str(saved))}"
    )


def _is_trial_run(logs: Path) -> bool:
    return read_json(logs / "metrics.json").get("status") == "fast_dev_run"


def run_of_checkpoint(checkpoint: Path) -> RunFolder | None:
    """Find the run of a checkpoint by the path of the file.

    Args:
        checkpoint: Path of a .ckpt file.

    Returns:
        The run, or ``None`` where the file has been moved out of ``checkpoints/<config>/<run>/``.

    Raises:
        ConfigError: See :func:`refuse_links`.
    """
    for path in (checkpoint.absolute(), checkpoint.resolve()):  # checkpoints/ may be a link elsewhere
        folder = path.parent
        run = RunFolder(f"{folder.parent.name}/{folder.name}", folder.parent.parent.parent)
        if folder.parent.parent.name == "checkpoints" and run.logs.is_dir():
            refuse_links(run)
            return run
    return None
