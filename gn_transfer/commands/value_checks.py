"""What the parser would let pass: null where a value is needed, numbers not finite or too large, keys of other data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from gn_transfer.commands.training_keys import CALLBACKS, CONFIGS, DATA, parameters_of
from gn_transfer.config import ConfigError, check_range, shortened

_LARGEST = 2**31 - 1
_LARGEST_SEED = 2**32 - 1  # numpy's

# Lightning takes these, and fails or does nothing later.
_TRAINER_LEAST = {
    "val_check_interval": 1e-9,
    "check_val_every_n_epoch": 1,
    "limit_train_batches": 1e-9,
    "log_every_n_steps": 1,
    "min_epochs": 0,
    "min_steps": 0,
    "num_sanity_val_steps": -1,
}


def check_parsed_values(section: Mapping[str, Any]) -> None:
    """Refuse values that are of the right type, and still no values.

    Args:
        section: The parsed configuration of a command.

    Raises:
        ConfigError: With the key, the value and what is allowed.
    """
    seed = section["seed_everything"]
    if not 0 <= seed <= _LARGEST_SEED:
        raise ConfigError(f"seed_everything={seed} is out of range; use a number in [0, {_LARGEST_SEED}].")
    kinds: dict[str, type] = {**CONFIGS, **CALLBACKS, "trainer": Trainer}
    for group, kind in kinds.items():
        _check_group(group, section[group], kind)
    trainer = section["trainer"]
    for name, least in _TRAINER_LEAST.items():
        # An interval can also be a time, as text; Lightning checks that.
        if isinstance(trainer[name], int | float) and trainer[name] < least:
            allowed = "more than 0" if 0 < least < 1 else f"{least:g} or more"
            raise ConfigError(f"trainer.{name}={trainer[name]} is out of range; use {allowed}.")
    if trainer["max_steps"] == 0 or (trainer["max_steps"] == -1 and trainer["max_epochs"] in (-1, None)):
        raise ConfigError(
            f"trainer.max_epochs={trainer['max_epochs']}, trainer.max_steps={trainer['max_steps']}: the training has "
            "no steps, or no end; give one of them a number of 1 or more."
        )
    data = section["data"]
    name = str(data["class_path"]).rpartition(".")[2]
    for kind in (kind for kind in DATA if kind.__name__ == name):
        _check_group("data", data.get("init_args") or {}, kind)
    for key in ("samples", "memory_limit"):
        _check_value(key, section.get(key))
    if (limit := section.get("memory_limit")) is not None:
        check_range("memory_limit", limit, low=0.0, open_low=True)
        if (data.get("init_args") or {}).get("batch_size") != "auto":
            raise ConfigError(f"memory_limit={limit:g} is for data.batch_size=auto; set that too, or leave it out.")


def check_data_keys(words: Sequence[str], data: str) -> None:
    """Refuse options of data modules other than the one that is used; the parser drops such a key if its value is {}.

    Args:
        words: The command line.
        data: Name of the class of the data module.

    Raises:
        ConfigError: An option ``--data.KEY`` that the class does not have.
    """
    keys = {kind.__name__: {name for _, name in parameters_of(kind)} for kind in DATA}
    for word in words:
        found = re.match(r"--data\.(?:init_args\.)?(\w+)", word)
        if found and found[1] not in {"class_path", "init_args", "help", *keys.get(data, {found[1]})}:
            others = [name for name, theirs in keys.items() if found[1] in theirs]
            raise ConfigError(
                f"data.{found[1]} is not a key of {data}" + (f", but of {', '.join(others)}." if others else ".")
            )


def read_whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Keep ``limit_train_batches=1`` one batch; as a float, 1.0, it would be the whole epoch.

    The parser takes the first type of a union that fits. Lightning writes ``Union[int, float, None]``, but Python keeps
    one object for all unions of the same types, in the order of whoever wrote one first, such as scikit-learn.

    Args:
        parser: Of one command, with all its keys.
    """
    for action in parser._actions:
        kinds = set(get_args(getattr(action, "_typehint", None)))
        if kinds - {NoneType} == {int, float}:
            vars(action)["_typehint"] = int | float | None if NoneType in kinds else int | float


def _check_group(group: str, values: Mapping[str, Any], kind: type) -> None:
    needed = set(_needed(kind))
    for name, value in values.items():
        if value is None and name in needed:
            raise ConfigError(f"{group}.{name}=null is not allowed; give a value, or leave it out for the default.")
        _check_value(f"{group}.{name}", value)


def _check_value(key: str, value: Any) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _LARGEST:
        raise ConfigError(f"{key}={shortened(value)} is out of range; use at most {_LARGEST}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value} is not a finite number.")
    if "\0" in str(value):
        raise ConfigError(f"{key}={value!r} has a zero byte in it; remove it.")


def _needed(kind: type) -> Iterator[str]:
    """Name the arguments of a class that may not be None."""
    for part, name in parameters_of(kind):
        hint = _hints(part).get(name, Any)
        if hint is not Any and NoneType not in get_args(hint):
            yield name


@cache
def _hints(part: type) -> dict[str, Any]:
    """Types of the arguments of a class."""
    return get_type_hints(part if hasattr(part, "__dataclass_fields__") else part.__init__)  # type: ignore[misc]
