"""Which classes a file may name. Making an object of a class runs code, and files come from strangers.

What the user types is trusted. A configuration or study file may name the data modules of gn_transfer, and callbacks
and loggers of Lightning that take no function; ``--allow_class_path`` lifts that. A checkpoint names no class but a
data module, and gives plain values.

Files are looked at before the parser reads them, for a message that names the key. What counts is the guard around the
parser's import of classes: whatever way a name has found to it, no other class is imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse._typehints as typehints

from gn_transfer.commands.training_keys import CALLBACKS, CONFIGS, DATA
from gn_transfer.config import ConfigError, shortened
from gn_transfer.data import ImageDataModule
from gn_transfer.data.datamodule import check_named_root
from gn_transfer.yaml_files import parse_yaml, read_yaml

OF_LIGHTNING = {
    "lightning.pytorch.callbacks": (
        *("DeviceStatsMonitor", "EarlyStopping", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary"),
        *("OnExceptionCheckpoint", "RichModelSummary", "RichProgressBar", "TQDMProgressBar", "Timer"),
    ),
    "lightning.pytorch.loggers": ("CSVLogger", "CometLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"),
}
"""Callbacks and loggers that a file may name. None takes a function, which could be named by its import path."""

_DATA_NAMES = frozenset(
    f"{module}{kind.__name__}"
    for kind in DATA
    for module in ("", "gn_transfer.", "gn_transfer.data.", f"{kind.__module__}.")
)

ALLOWED = _DATA_NAMES | {
    name for module, names in OF_LIGHTNING.items() for name in (*names, *(f"{module}.{name}" for name in names))
}
"""Class names that a file may contain."""

_BASES = frozenset({"gn_transfer.ImageDataModule", f"{ImageDataModule.__module__}.ImageDataModule"})
"""What the parser imports by itself: the type of ``data``."""

_GROUPS = ("data", *CONFIGS, *CALLBACKS, "trainer")
_TYPED_ONLY = ("config", "ckpt_path", "dry_run")  # say what one call does
_OBJECTS = ("callbacks", "logger", "strategy", "plugins", "profiler", "accelerator")

_FROM_CHECKPOINT = (
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches", "limit_val_batches"),
    *("limit_test_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch", "log_every_n_steps"),
    *("num_sanity_val_steps", "deterministic", "benchmark", "accelerator", "enable_progress_bar"),
)
_ONE_PROCESS = {"devices": (1, "1", "auto"), "num_nodes": (1,), "strategy": ("auto",), "logger": (True, False)}
"""Values that start no other process and no logger by name. Of a checkpoint with another one, the first is taken."""


def read_config(path: Path, *, allow_class_path: bool = False) -> dict[str, Any]:
    """Read a configuration file, and refuse what no configuration of this program holds.

    Args:
        path: YAML file.
        allow_class_path: Let it name any class.

    Returns:
        Its content.

    Raises:
        ConfigError: It cannot be read, a group has no keys, or it names a class that is not in :data:`ALLOWED`.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read as YAML ({error}).") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"--config {path} holds no keys; see configs/sample_gnws.yaml for a configuration.")
    check_file_values(content, f"--config {path}", path.parent, allow_class_path=allow_class_path)
    return content


def check_file_values(content: Mapping[str, Any], where: str, folder: Path, *, allow_class_path: bool = False) -> None:
    """Refuse values of a file that would run a stranger's code.

    Args:
        content: Values by nested keys.
        where: The file, for messages.
        folder: Of the file, from which it may refer to others.
        allow_class_path: Let it name any class.

    Raises:
        ConfigError: See :func:`read_config`.
    """
    for key, value in content.items():
        if key in _TYPED_ONLY:
            raise ConfigError(f"{where}: {key} says what one call does; give it on the command line, --{key}.")
        if key in _GROUPS and not isinstance(value, Mapping) and not (key == "data" and isinstance(value, str)):
            raise ConfigError(
                f"{where}: {key} holds {shortened(value)}, and no keys; indent its keys below it, or remove it."
            )
    if not allow_class_path and (found := next(_not_allowed(content, (), folder), None)):
        raise ConfigError(
            f"{where}: {found}. A class or function can run any code, so a file may only name data modules of "
            "gn_transfer, and these of Lightning: "
            f"{', '.join(name for names in OF_LIGHTNING.values() for name in names)}. If you trust the file, add "
            "--allow_class_path."
        )


def typed_classes(words: Sequence[str]) -> frozenset[str]:
    """Find the classes that a command line names, in the values of ``data`` and of the objects of ``trainer``.

    Args:
        words: The words that the user typed.

    Example:
        >>> sorted(typed_classes(["--config", "Timer.yaml", "--trainer.callbacks+=my.Callback", "--data", "Pets"]))
        ['Pets', 'my.Callback']
    """
    found: set[str] = set()
    for option, behind in pairwise([*words, ""]):
        key, equals, value = option.partition("=")
        if key in ("--data", "--data.class_path") or re.match(rf"--trainer\.({'|'.join(_OBJECTS)})\b", key):
            value = value if equals else behind
            found.add(value)
            with suppress(ValueError):
                content = parse_yaml(value)
                found |= {str(name) for name in _class_paths(content)}
                found |= {item for item in content if isinstance(item, str)} if isinstance(content, list) else set()
    return frozenset(found)


@contextmanager
def only_known_classes(typed: Collection[str]) -> Iterator[None]:
    """Let the parser import no class that neither :data:`ALLOWED` nor the user names.

    Args:
        typed: Classes that the user typed.

    Raises:
        ConfigError: A file that the configuration refers to names another one.
    """
    imported: Callable[[str], Any] = vars(typehints)["import_object"]
    refused: list[str] = []

    def guarded(name: Any) -> Any:
        if isinstance(name, str) and "." in name and not _may_be_imported(name, typed):
            refused.append(name)
            raise ValueError(f"{name} may not be imported")
        return imported(name)

    vars(typehints)["import_object"] = guarded
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # whatever the parser makes of it
        error = raised
    finally:
        vars(typehints)["import_object"] = imported
    if refused:
        raise ConfigError(
            f"the configuration names the class {refused[0]}, which can run any code; if you trust the file that names "
            "it, add --allow_class_path."
        ) from error
    if error is not None:
        raise error


def _may_be_imported(name: str, typed: Collection[str]) -> bool:
    module, _, short = name.rpartition(".")
    # A short name is resolved among the classes that are loaded; no file may have another module loaded for it.
    return name in ALLOWED or name in _BASES or name in typed or (short in typed and module in sys.modules)


def config_of_checkpoint(
    stored: Mapping[str, Any], checkpoint: Path, *, root_is_typed: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Take the values that describe model, data and recipe from a checkpoint.

    Args:
        stored: Its configuration.
        checkpoint: Its path, for messages.
        root_is_typed: Whether the user says where the images lie.

    Returns:
        The configuration, and the keys that were left out although they were set.

    Raises:
        ConfigError: It names a class, or holds something else than values by key; or images would be written
            elsewhere than below the working folder.
    """
    groups = {group: stored[group] for group in _GROUPS if group in stored}
    taken = {key: _plain(stored[key], key, checkpoint) for key in ("seed_everything", "samples") if key in stored}
    left_out: list[str] = []
    for group, values in groups.items():
        if group == "trainer":
            taken[group] = {key: values[key] for key in _FROM_CHECKPOINT if key in values and _is_plain(values[key])}
            wanted = [key for key in _OBJECTS if values.get(key) and key not in (*taken[group], *_ONE_PROCESS)]
            for key, harmless in _ONE_PROCESS.items():
                if values.get(key) is not None:
                    taken[group][key] = values[key] if values[key] in harmless else harmless[0]
                    wanted += [] if values[key] in harmless else [key]
            left_out = [f"trainer.{key}" for key in wanted]
        elif group == "data":
            kind, arguments = str(values.get("class_path")), values.get("init_args", {})
            if kind not in _DATA_NAMES:
                raise ConfigError(
                    f"{checkpoint} names {shortened(kind)} for its data, which is no data module; refused."
                )
            taken[group] = {"class_path": kind, "init_args": _plain_values(arguments, group, checkpoint)}
            named = next(module for module in DATA if module.__name__ == kind.rpartition(".")[2])
            if not root_is_typed:
                check_named_root(named, arguments.get("root"))
        else:
            taken[group] = _plain_values(values, group, checkpoint)
    for key in ("cache_dir", "download"):  # where files are written is for this call to say
        if taken.get("data", {}).get("init_args", {}).pop(key, None):
            left_out.append(f"data.{key}")
    if found := next(_not_allowed(taken, (), checkpoint.parent), None):
        raise ConfigError(f"{checkpoint}: {found}; refused.")
    return taken, left_out


def _plain_values(values: Mapping[str, Any], group: str, checkpoint: Path) -> dict[str, Any]:
    return {str(key): _plain(value, f"{group}.{key}", checkpoint) for key, value in values.items()}


def _plain(value: Any, key: str, checkpoint: Path) -> Any:
    if _is_plain(value) or (isinstance(value, list) and all(map(_is_plain, value))):
        return value
    raise ConfigError(f"{checkpoint} holds {shortened(value)} for {key}, which is no plain value; refused.")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _not_allowed(value: Any, place: tuple[str, ...], folder: Path) -> Iterator[str]:
    """Describe what a file must not contain: class names, also inside texts, and references to further files."""
    key = ".".join(place)
    if place[-1:] == ("class_path",):
        if str(value) not in ALLOWED:
            yield f"{key} names {shortened(value)}"
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _not_allowed(item, (*place, *str(name).split(".")), folder)
    elif isinstance(value, list):
        for item in value:
            yield from _not_allowed(item, place, folder)
    elif isinstance(value, str):
        of_object = place[:1] == ("trainer",) and place[1:2] and place[1] in _OBJECTS
        named = place == ("data",) or (of_object and len(place) == 2)
        if named and value not in ALLOWED and not re.fullmatch(r"\w+", value):
            yield f"{key} names {shortened(value)}"
        elif _holds_class(value) or ((named or of_object) and (Path(value).is_file() or (folder / value).is_file())):
            yield f"{key} is {shortened(value)}"


def _holds_class(text: str) -> bool:
    """Say whether a text, read as YAML as the parser does it, names a class at any depth."""
    try:
        content = parse_yaml(text) if set(text) & set("{[:") else None
    except ValueError:
        return "class_path" in text
    if isinstance(content, str):  # in quotes inside quotes
        return content != text and _holds_class(content)
    return next(_class_paths(content), None) is not None or any(_holds_class(text) for text in _texts(content))


def _texts(value: Any) -> Iterator[str]:
    """Give the texts inside collections."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from [item] if isinstance(item, str) else _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from [item] if isinstance(item, str) else _texts(item)


def _class_paths(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if str(name).rpartition(".")[2] == "class_path":
                yield item
            yield from _class_paths(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _class_paths(item)
