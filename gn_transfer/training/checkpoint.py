"""The checkpoint format: plain values and tensors, read without running code, enough to rebuild the model."""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, ValidationInfo, field_validator

from gn_transfer.backbones.model_config import ModelConfig
from gn_transfer.config import ConfigError, DecoderName, Norm, is_out_of_memory, shortened
from gn_transfer.layers import group_counts

if TYPE_CHECKING:
    from gn_transfer.training.backbone_module import BackboneModule

CHECKPOINT_VERSION = 2
"""Version of what stands under ``gn_transfer`` in a checkpoint. A newer one is refused."""


class _Architecture(BaseModel):
    """``architecture`` of a checkpoint: what :func:`describe_task` writes."""

    model_config = ConfigDict(strict=True)

    backbone: str
    architecture: str
    norm: Norm
    num_groups: int | None
    group_size: int | None
    groups: dict[str, int] = {}
    decoder: DecoderName | None = None
    decoder_norm: Norm | None = None
    head: str
    num_classes: int
    in_chans: Literal[1, 3]
    mean: list[Annotated[float, Field(allow_inf_nan=False)]]
    std: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]

    @field_validator("mean", "std")
    @classmethod
    def _has_a_value_per_channel(cls, values: list[float], info: ValidationInfo) -> list[float]:
        if len(values) != info.data.get("in_chans", len(values)):
            raise ValueError("one value for each channel")
        return values


class _Report(BaseModel):
    """``transfer_report``: where the weights come from."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, str | list[str] | dict[str, float]] = Field(init=False)

    source: str


_Group = dict[str, JsonValue]


class _DataConfig(BaseModel):
    """``config.data``: the data module."""

    model_config = ConfigDict(strict=True)

    class_path: str = ""
    init_args: dict[str, JsonValue] = {}


class _Config(BaseModel):
    """``config``: the keys of the run, by groups."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    seed_everything: int = 0
    samples: int | None = None
    data: _DataConfig = _DataConfig()
    model: _Group = {}
    optimizer: _Group = {}
    regularization: _Group = {}
    segmentation: _Group = {}
    mixed_precision: _Group = {}
    accumulation: _Group = {}
    batch_norm: _Group = {}
    freezing: _Group = {}
    ema: _Group = {}
    checkpoint: _Group = {}
    early_stopping: _Group = {}
    trainer: _Group = {}


class _Description(BaseModel):
    """What stands under ``gn_transfer`` in a checkpoint, as far as a model is built from it."""

    model_config = ConfigDict(strict=True)

    classes: Annotated[list[str], Field(min_length=2)]
    architecture: _Architecture
    transfer_report: _Report
    config: _Config = _Config()
    split: dict[str, dict[str, int]] = {}
    batch_size: Annotated[int, Field(ge=1)] = 1
    config_name: Annotated[str, Field(pattern=r"^[^\x00]*$")] = ""
    weights: str = ""


Task = TypeVar("Task", bound="BackboneModule")


class CorruptCheckpointError(ConfigError):
    """The file holds something else than what was written: no later attempt will read it."""


def read_checkpoint(path: str | Path, argument: str = "--ckpt_path") -> dict[str, Any]:
    """Read a checkpoint of ours from a local file, without running any code in it.

    Args:
        path: Local path.
        argument: Option or command that the user gave the path to, for messages.

    Returns:
        The checkpoint; its tensors on the CPU.

    Raises:
        ConfigError: No such file, one that cannot be read now, not a checkpoint of gn_transfer, or of another format
            version.
        CorruptCheckpointError: It is no whole file of torch.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"{argument} {path}: no such file; give a checkpoint, such as checkpoints/pets_gnws/RUN/best.ckpt, or "
            "`last` for the newest run of this config."
        )
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare checksums
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("compressed, which torch does not write")  # a small file could hold terabytes
            damaged = archive.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a corrupt file leads it to
        of_content = isinstance(error, OSError) and error.errno in (None, errno.EINVAL)  # zipfile's, of what is corrupt
        if is_out_of_memory(error) or (isinstance(error, OSError) and not of_content):
            reason = getattr(error, "strerror", None) or "there is not enough memory"
            raise ConfigError(f"{argument} {path} cannot be read now: {reason}. Mend that, and try again.") from error
        raise CorruptCheckpointError(
            f"{argument} {path} cannot be read as a checkpoint ({type(error).__name__}): it is none, it is corrupt, or "
            "it holds more than plain values and tensors. Use another checkpoint of the run, such as best.ckpt."
        ) from error
    if damaged is not None:
        raise CorruptCheckpointError(
            f"{argument} {path} is corrupt: the checksum of {damaged.partition('/')[2]} in it is wrong. Use another "
            "checkpoint of the run, such as best.ckpt."
        )
    if not isinstance(content, dict) or not isinstance(content.get("gn_transfer"), dict):
        raise ConfigError(
            f"{argument} {path} is not a checkpoint of gn-transfer; to start from other weights set model.pretrained."
        )
    found = content["gn_transfer"].get("version", CHECKPOINT_VERSION)
    if not isinstance(found, int):
        raise ConfigError(
            f"{argument} {path} has checkpoint format {shortened(found)}, which is no number; it is corrupt."
        )
    if found != CHECKPOINT_VERSION:
        raise ConfigError(
            f"{argument} {path} has checkpoint format {found}, this gn-transfer reads format {CHECKPOINT_VERSION}; "
            f"{'update gn-transfer' if found > CHECKPOINT_VERSION else 'use the version that wrote it'}."
        )
    check_description(content, f"{argument} {path}")
    checkpoint: dict[str, Any] = content
    return checkpoint


def check_description(content: Mapping[str, Any], where: str) -> None:
    """Refuse a description that cannot have been written by :func:`describe_task`.

    Args:
        content: ``gn_transfer`` and ``state_dict``, as in a checkpoint.
        where: The file, for messages.

    Raises:
        ConfigError: With what is missing or of a wrong type.
    """
    weights = content.get("state_dict")
    wrong: list[str] = []
    try:
        _Description.model_validate(content["gn_transfer"])
    except ValidationError as error:
        places = [problem["loc"] for problem in error.errors()]
        wrong += [".".join(map(str, loc[: 2 if loc[0] in ("architecture", "config") else 1])) for loc in places]
    wrong += [key for key in ("epoch", "global_step") if not isinstance(content.get(key, 0), int)]
    if not isinstance(weights, Mapping) or not all(_is_dense(value) for value in weights.values()):
        wrong.append("state_dict")
    if wrong:
        named = ", ".join(dict.fromkeys(wrong))
        raise ConfigError(
            f"{where} is not a whole checkpoint of gn-transfer: {named} missing or of a wrong type. Use another "
            "checkpoint of the run, such as best.ckpt."
        )


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def describe_task(task: BackboneModule, content: dict[str, Any]) -> None:
    """Add to a checkpoint what is needed to rebuild the model: plain values only.

    Args:
        task: The module, built.
        content: The checkpoint, changed in place.
    """
    assert task.report is not None
    assert task.model is not None
    config = task.model_config
    content.setdefault("gn_transfer", {}).update(
        version=CHECKPOINT_VERSION,
        written_by=version("gn-transfer"),
        classes=list(task.classes),
        architecture={
            "backbone": config.backbone,
            "architecture": task.report.architecture,
            "norm": config.norm,
            "num_groups": task.num_groups,
            "group_size": config.group_size,
            **({"groups": group_counts(task.model)} if config.norm.startswith("gn") or config.decoder else {}),
            **({"decoder": config.decoder, "decoder_norm": config.resolved_decoder_norm} if config.decoder else {}),
            "head": task.head,
            "num_classes": len(task.classes),
            "in_chans": config.resolved_in_chans,
            "mean": (task.mean.flatten() / 255.0).tolist(),
            "std": (task.std.flatten() / 255.0).tolist(),
        },
        transfer_report=task.report.as_dict(),
        **task.run_config,
    )


def rebuild_task(kind: type[Task], content: Mapping[str, Any], path: Path) -> Task:
    """Build the module of a checkpoint and load its weights.

    Args:
        kind: Class of the module.
        content: The checkpoint.
        path: Its path, for messages.

    Returns:
        The module in float32, on the CPU.

    Raises:
        ConfigError: Weights that do not fit the model, or are not finite.
    """
    stored = content["gn_transfer"]
    try:
        architecture = stored["architecture"]
        # The architecture decides; what a run says about its own memory format or compilation is not needed here.
        known = {field.name for field in fields(ModelConfig)} & architecture.keys()
        config = ModelConfig(**{key: architecture[key] for key in known})
        if config.norm == "bn_sync":  # computes what bn computes, without CUDA
            config.norm = "bn"
        task = kind(model=config)
        task.restore(stored)
        task.build(stored["classes"])
        task.load_state_dict(content["state_dict"])
    except (ConfigError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} does not fit this gn-transfer ({error}); use the version that wrote it, "
            f"{stored.get('written_by', 'see its run.log')}."
        ) from error
    for name, tensor in task.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{path} holds numbers that are not finite, in {name}; use another checkpoint.")
    return task.float()


def check_classes(stored: Sequence[str], found: Sequence[str]) -> None:
    """Refuse data of other classes than the checkpoint's.

    Args:
        stored: Classes of the checkpoint.
        found: Classes of the data.

    Raises:
        ConfigError: They differ.
    """
    if list(stored) != list(found):
        raise ConfigError(
            f"the checkpoint knows {len(stored)} classes ({_shortened(stored)}), the data has {len(found)} "
            f"({_shortened(found)}); point data.root at the data it was trained on."
        )


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
