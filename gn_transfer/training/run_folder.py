"""The folders of a run: ``runs/<config>/<run>`` and ``checkpoints/<config>/<run>``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
        """best.ckpt and last.ckpt."""
        return self.root / "checkpoints" / self.name


def claim_run(root: Path, config: str, norm: str, batch_size: int, seed: int) -> RunFolder:
    """Create the folder of a new run; safe when several runs start at once.

    Args:
        root: Folder that contains ``runs/`` and ``checkpoints/``.
        config: Name of the config, without its suffix.
        norm: The normalization.
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
        root: Folder that contains ``checkpoints/``.
        config: Name of the config, without its suffix; ``*`` for any.

    Returns:
        Its path, or ``None`` where no run has one.
    """
    found = (root / "checkpoints").glob(f"{config}/*/last.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def run_of_checkpoint(checkpoint: Path) -> RunFolder | None:
    """Find the run of a checkpoint by the path of the file.

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
