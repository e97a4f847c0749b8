"""The verb ``export``: from a checkpoint to a bundle that is proved to compute what was trained."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save

from gn_transfer import data as data_modules
from gn_transfer.bundle import (
    CARD,
    FORMAT,
    FORMAT_VERSION,
    GRAPH,
    METADATA,
    WEIGHTS,
    Bundle,
    load_bundle,
    metadata_sha256,
    sha256,
)
from gn_transfer.callbacks import read_checkpoint
from gn_transfer.classifier import CHECKPOINT_VERSION, TransferClassifier
from gn_transfer.config import ConfigError
from gn_transfer.data.base import PictureData
from gn_transfer.data.preprocess import CROP_FRACTION
from gn_transfer.files import whole_folder, write_json
from gn_transfer.inference_graph import OPSET, InferenceNet, write_onnx, write_pt2
from gn_transfer.loggers import environment, run_of_checkpoint
from gn_transfer.messages import Parser
from gn_transfer.model_card import confused_pairs, model_card

ARCHIVE = "model.pt2"

TOLERANCE = 1e-4
"""Greatest difference of a logit, absolute, or relative to the greatest logit where that exceeds 1."""


@dataclass(frozen=True)
class Parity:
    """How far a bundle is from its checkpoint, over the validation pictures of the run.

    Attributes:
        pictures: How many were compared.
        max_difference: Greatest absolute difference of a logit.
        max_logit: Greatest absolute logit of the checkpoint.
        tolerance: What :attr:`max_difference` may be.
        same_class: Pictures with the same top class.
        decided: Pictures whose two best logits are more than twice the tolerance apart.
        decided_same_class: Those among them with the same top class.
        accuracy_checkpoint: Share of right top classes, of the checkpoint in torch.
        accuracy_bundle: Share of right top classes, of the bundle.
    """

    pictures: int
    max_difference: float
    max_logit: float
    tolerance: float
    same_class: int
    decided: int
    decided_same_class: int
    accuracy_checkpoint: float
    accuracy_bundle: float

    @property
    def holds(self) -> bool:
        """Whether the bundle computes what was trained."""
        return self.max_difference <= self.tolerance and self.decided_same_class == self.decided

    def summary(self) -> str:
        """Say it in a line."""
        return (
            f"{self.pictures} validation pictures: logits differ by at most {self.max_difference:.1e} (allowed "
            f"{self.tolerance:.1e}), top class equal on {self.same_class}, accuracy {self.accuracy_bundle:.4f} "
            f"(checkpoint {self.accuracy_checkpoint:.4f})"
        )


def measure_parity(
    checkpoint_logits: npt.NDArray[np.float32], bundle_logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]
) -> Parity:
    """Compare two sets of logits.

    Args:
        checkpoint_logits: Of the checkpoint in torch, shape ``(N, classes)``.
        bundle_logits: Of the bundle, likewise.
        targets: True classes, shape ``(N,)``.

    Returns:
        The comparison; a bundle whose logits are not finite differs by infinity.

    Example:
        >>> two = np.array([[1.0, 3.0], [2.0, 0.5]], np.float32)
        >>> parity = measure_parity(two, two + 1e-5, np.array([1, 1]))
        >>> parity.holds, parity.same_class, parity.accuracy_bundle
        (True, 2, 0.5)
    """
    difference = float(np.abs(checkpoint_logits - bundle_logits).max())
    largest = float(np.abs(checkpoint_logits).max())
    tolerance = TOLERANCE * max(1.0, largest)
    second, first = np.sort(checkpoint_logits, axis=1)[:, -2:].T
    decided = first - second > 2 * tolerance
    ours, theirs = bundle_logits.argmax(1), checkpoint_logits.argmax(1)
    return Parity(
        pictures=len(targets),
        max_difference=difference if np.isfinite(difference) else float("inf"),
        max_logit=largest,
        tolerance=tolerance,
        same_class=int((ours == theirs).sum()),
        decided=int(decided.sum()),
        decided_same_class=int((ours == theirs)[decided].sum()),
        accuracy_checkpoint=float((theirs == targets).mean()),
        accuracy_bundle=float((ours == targets).mean()),
    )


def run(arguments: Sequence[str]) -> int:
    """Run ``gn-transfer export``.

    Args:
        arguments: What stands behind the verb.

    Returns:
        Exit code.

    Raises:
        ConfigError: The user's mistake.
        ParityError: The bundle does not compute what was trained; none is left.
    """
    parser = Parser(
        prog="gn-transfer export",
        description="Write a checkpoint as a bundle for inference: an ONNX graph, safetensors weights, JSON and a "
        "model card in one folder. The bundle is compared with the checkpoint on the run's validation pictures; "
        "where they differ, no bundle is left.",
    )
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CKPT", type=Path, help="a .ckpt file, or a run's folder: then its best.ckpt"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        required=True,
        help="folder to write; an older bundle there is replaced, anything else is refused",
    )
    parser.add_argument(
        "--format",
        choices=["onnx", "pt2"],
        default="onnx",
        help="pt2 adds model.pt2, an archive of torch.export, which predict never opens",
    )
    parser.add_argument(
        "--data.root", dest="root", metavar="PATH", help="where the run's pictures lie now, if they were moved"
    )
    options = parser.parse_args(arguments)
    path = find_checkpoint(options.checkpoint)
    try:
        parity = export_bundle(path, options.output, data_root=options.root, archive=options.format == "pt2", say=print)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST):
            raise
        raise ConfigError(f"--output {options.output} cannot be written: {error}; name another folder.") from error
    size = sum(file.stat().st_size for file in options.output.iterdir()) / 2**20
    print(f"parity      {parity.summary()}")
    print(
        f"bundle      {options.output} ({size:.1f} MiB): {', '.join(sorted(p.name for p in options.output.iterdir()))}"
    )
    print(f"next        gn-transfer predict {options.output} PICTURES")
    return 0


class ParityError(RuntimeError):
    """A bundle does not compute what was trained: a fault of the program, or of the libraries it exports with."""


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that is meant.

    Args:
        path: A .ckpt file, a folder ``checkpoints/CONFIG/RUN`` or ``runs/CONFIG/RUN``.

    Returns:
        The file; of a folder best.ckpt, or last.ckpt where no epoch was validated.

    Raises:
        ConfigError: There is none.
    """
    if path.is_file():
        return path
    folders = [path]
    if path.resolve().parent.parent.name == "runs":
        run = path.resolve()
        folders.append(run.parent.parent.parent / "checkpoints" / run.parent.name / run.name)
    for folder in folders:
        for name in ("best.ckpt", "last.ckpt"):
            if (folder / name).is_file():
                return folder / name
    what = "has no best.ckpt or last.ckpt" if path.is_dir() else "no such file or folder"
    raise ConfigError(f"{path}: {what}; give a checkpoint, such as checkpoints/pets_gnws/RUN/best.ckpt, or its folder.")


def export_bundle(
    checkpoint: Path, output: Path, *, data_root: str | None = None, archive: bool = False, say: Any = lambda line: None
) -> Parity:
    """Write a checkpoint as a bundle and prove that it computes the same.

    Args:
        checkpoint: A .ckpt file of ours.
        output: Folder to write; an older bundle there is replaced.
        data_root: Where the run's pictures lie; None takes the path that the checkpoint knows.
        archive: Write model.pt2 as well.
        say: Prints a line of progress.

    Returns:
        The comparison with the checkpoint, which holds.

    Raises:
        ConfigError: A checkpoint, pictures or an output folder that do not fit.
        ParityError: The bundle does not compute what was trained; none is left.
    """
    check_output(output)
    content = read_checkpoint(checkpoint, argument="export")
    stored = _complete(content["gn_transfer"], checkpoint)
    config = stored["config"]
    data = validation_data(config, stored["classes"], data_root)
    model = rebuild_model(content, checkpoint)
    img_size = int(config["data"]["init_args"]["img_size"])
    architecture = stored["architecture"]

    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output) as folder:
        say(
            f"checkpoint  {checkpoint}: {architecture['architecture']}, norm {architecture['norm']}, {img_size} px, "
            f"{len(stored['classes'])} classes"
        )
        assert model.net is not None
        net = InferenceNet(model.net, architecture["mean"], architecture["std"])
        write_onnx(net, img_size, folder / GRAPH)
        if archive:
            write_pt2(net, img_size, folder / ARCHIVE)
        weights = {name: tensor.contiguous() for name, tensor in model.net.state_dict().items()}
        (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))  # save_file would make it private

        metadata: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "classes": stored["classes"],
            "img_size": img_size,
            "crop_fraction": CROP_FRACTION,
            "preprocessing": "RGB, upright; the centre square of crop_fraction of the short side; resized to img_size "
            "(averaged over areas where it shrinks, bilinear where it grows); then (x / 255 - mean) / std, which the "
            "graph does itself",
            "mean": architecture["mean"],
            "std": architecture["std"],
            "inputs": {"images": f"uint8 (batch, {img_size}, {img_size}, 3), RGB"},
            "outputs": dict.fromkeys(("logits", "probs"), f"float32 (batch, {len(stored['classes'])})"),
            "opset": OPSET,
            "norm": architecture["norm"],
            "backbone": architecture["backbone"],
            "architecture": architecture,
            "weights": stored.get("weights", "as trained"),
            "metrics": metrics_of(checkpoint),
            "provenance": provenance(content, checkpoint),
            "versions": {**environment()["versions"], **{name: version(name) for name in ("onnx", "onnxruntime")}},
        }
        _seal(folder, metadata)  # the comparison goes the user's way, through a bundle that loads
        parity = _compare(model, load_bundle(folder), data, metadata)
        metadata["validation"]["same_pictures_as_the_run"] = same = _same_split(checkpoint, data)
        if same is False:
            say(
                "warning     the validation pictures are not those of the run (see its split.json); some may have been "
                "trained on, so that accuracies here may be too high"
            )
        if not parity.holds:
            raise ParityError(f"the bundle differs from {checkpoint}: {parity.summary()}. No bundle was written.")
        (folder / CARD).write_text(model_card(metadata), encoding="utf-8")
        _seal(folder, metadata)
    return parity


def check_output(output: Path) -> None:
    """Refuse to write over anything but a bundle.

    Args:
        output: The folder to write.

    Raises:
        ConfigError: A file, or a folder that holds something else than one bundle.
    """
    if not output.exists() and not output.is_symlink():
        return
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if output.is_dir() and not found:
        return
    try:
        known = json.loads((output / METADATA).read_text(encoding="utf-8"))
        extra = sorted(found - {METADATA, *known["files"]}) if known["format"] == FORMAT else sorted(found)
    except (OSError, ValueError, KeyError, TypeError):
        extra = sorted(found) or [output.name]
    if extra:
        raise ConfigError(
            f"--output {output} exists and holds something that is no bundle ({', '.join(extra[:3])}), which would be "
            "lost; name a new folder."
        )


def validation_data(config: Mapping[str, Any], classes: Sequence[str], root: str | None) -> PictureData:
    """Set up the validation split of a run as the run had it.

    Args:
        config: The run's configuration.
        classes: The checkpoint's classes.
        root: Where the pictures lie; None takes the configuration's path.

    Returns:
        The data, set up for validation.

    Raises:
        ConfigError: The pictures are gone, have other classes, or come from a data module that is not ours.
    """
    class_path, arguments = config["data"]["class_path"], dict(config["data"]["init_args"])
    package, _, name = class_path.rpartition(".")
    kind = getattr(data_modules, name, None) if name in data_modules.__all__ else None
    if package not in ("", "gn_transfer.data") or not (isinstance(kind, type) and issubclass(kind, PictureData)):
        raise ConfigError(f"the run was trained on {class_path}, and export runs only data modules of gn_transfer.")
    arguments["seed"] = config["seed_everything"]
    if root is not None:
        arguments["root"] = root
    if "download" in arguments:
        arguments["download"] = False
    try:
        data: PictureData = kind(**arguments)
        data.prepare_data()
        data.setup("validate")
    except ConfigError as error:
        raise ConfigError(
            f"the run's validation pictures cannot be used: {error} A bundle is written only after it was compared "
            "with its checkpoint on them: give --data.root PATH, where they lie now."
        ) from error
    if data.classes != list(classes):
        raise ConfigError(
            f"the checkpoint knows {len(classes)} classes ({', '.join(classes[:4])}, ...), the pictures in "
            f"{arguments['root']} have {len(data.classes)} ({', '.join(data.classes[:4])}, ...); give --data.root PATH "
            "of the data it was trained on."
        )
    return data


def rebuild_model(content: Mapping[str, Any], checkpoint: Path) -> TransferClassifier:
    """Build the net of a checkpoint and fill it.

    Args:
        content: The checkpoint.
        checkpoint: Its path, for messages.

    Returns:
        The model in float32, for evaluation on the CPU.

    Raises:
        ConfigError: Weights that do not fit the net, or are not finite.
    """
    stored = content["gn_transfer"]
    try:
        arguments = dict(stored["config"]["model"])
        if arguments["norm"] == "bn_sync":  # computes what bn computes, without CUDA
            arguments["norm"] = "bn"
        if arguments.get("bn_evaluation") == "batch":
            raise ConfigError(
                f"{checkpoint} was evaluated with the statistics of each batch (model.bn_evaluation=batch), and a "
                "bundle looks at one picture at a time; train with running."
            )
        model = TransferClassifier(**arguments)
        model.restore(stored)
        model.build(stored["classes"])
        model.load_state_dict(content["state_dict"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{checkpoint} does not fit this gn-transfer ({error}); use the version that wrote it, "
            f"{content.get('gn_transfer_version', 'see its run.log')}."
        ) from error
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{checkpoint} holds numbers that are not finite, in {name}; use another checkpoint.")
    return model.float().eval()


def metrics_of(checkpoint: Path) -> dict[str, float]:
    """Take a checkpoint's figures from its run's metrics.json.

    Args:
        checkpoint: Path of a .ckpt file.

    Returns:
        ``val/*`` of that checkpoint, and ``test/*`` where that very checkpoint was tested; empty where the
        checkpoint has left its run.
    """
    run_folder = run_of_checkpoint(checkpoint)
    record = _read_json(None if run_folder is None else run_folder.logs / "metrics.json")
    prefix = "best/" if checkpoint.name == "best.ckpt" else ""
    found = {name.removeprefix("best/"): value for name, value in record.items() if name.startswith(f"{prefix}val/")}
    if record.get("test/checkpoint") == checkpoint.name:
        found |= {
            name: value for name, value in record.items() if name.startswith("test/") and name != "test/checkpoint"
        }
    return found


def provenance(content: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Say where a bundle comes from, without paths of the machine it was trained on.

    Args:
        content: The checkpoint.
        checkpoint: Its path.

    Returns:
        Plain values: run, checkpoint, configuration, transfer report, and with what it was trained.
    """
    stored = content["gn_transfer"]
    run_folder = run_of_checkpoint(checkpoint)
    record = _read_json(None if run_folder is None else run_folder.logs / "metrics.json")
    config = {key: stored["config"].get(key) for key in ("seed_everything", "data", "model", "accumulation")}
    arguments = {key: value for key, value in config["data"]["init_args"].items() if key != "root"}
    model = {**config["model"], "pretrained": _without_folder(config["model"]["pretrained"])}
    report = {**stored["transfer_report"], "source": _without_folder(stored["transfer_report"]["source"])}
    trained_with = ("versions", "git_commit", "device", "samples_seen", "wall_time_s")
    return {
        "run": f"{stored['config_name']}/{checkpoint.resolve().parent.name}",
        "checkpoint": checkpoint.name,
        "epoch": content["epoch"] + 1,
        "optimizer_steps": content["global_step"],
        "config": {**config, "data": {**config["data"], "init_args": arguments}, "model": model},
        "transfer_report": report,
        "trained_with": {key: record[key] for key in trained_with if key in record},
    }


def _complete(stored: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    if stored["version"] > CHECKPOINT_VERSION:
        raise ConfigError(
            f"{checkpoint} was written by a newer gn-transfer (format {stored['version']}, this one reads up to "
            f"{CHECKPOINT_VERSION}); update gn-transfer."
        )
    missing = [
        key for key in ("classes", "architecture", "transfer_report", "config", "config_name") if key not in stored
    ]
    if missing:
        raise ConfigError(
            f"{checkpoint} lacks {', '.join(missing)}, which export needs: it was not written by gn-transfer fit, or "
            "by an older one. Continue its run for an epoch with gn-transfer fit --ckpt_path, and export the result."
        )
    return stored


def _compare(model: TransferClassifier, bundle: Bundle, data: PictureData, metadata: dict[str, Any]) -> Parity:
    """Compare on the validation pictures, from the files on: decoding and preprocessing are compared as well."""
    pictures = data.val_dataset.pictures
    with torch.inference_mode():
        ours = np.concatenate([model(images).numpy() for images, _ in data.val_dataloader()])
    if not np.isfinite(ours).all():
        raise ConfigError("the checkpoint's logits are not finite on its validation pictures; use another checkpoint.")
    paths = [data.val_dataset.root / picture.path for picture in pictures]
    theirs = np.stack([prediction.logits for prediction in bundle.predict(paths)])
    targets = np.array([picture.target for picture in pictures])
    parity = measure_parity(ours, theirs, targets)
    metadata["parity"] = asdict(parity)
    metadata["validation"] = {
        "pictures": dict(
            zip(bundle.classes, np.bincount(targets, minlength=len(bundle.classes)).tolist(), strict=True)
        ),
        "confused": confused_pairs(targets, theirs.argmax(1), bundle.classes),
    }
    return parity


def _same_split(checkpoint: Path, data: PictureData) -> bool | None:
    """Say whether the validation pictures are the run's; None where its split.json is gone."""
    run_folder = run_of_checkpoint(checkpoint)
    recorded = _read_json(None if run_folder is None else run_folder.logs / "split.json").get("val")
    return None if recorded is None else sorted(recorded) == sorted(data.split()["val"])


def _seal(folder: Path, metadata: dict[str, Any]) -> None:
    """Write bundle.json over the files that are there."""
    metadata["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != METADATA}
    metadata["sha256"] = metadata_sha256(metadata)
    write_json(folder / METADATA, metadata)


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _without_folder(source: str | None) -> str | None:
    return source if source is None or ":" in source or "/" not in source else Path(source).name
