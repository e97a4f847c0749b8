"""What a study file says, checked: arms of trials over configuration keys, seeds, budget, choice of a key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import yaml

from gn_transfer.config import ConfigError, did_you_mean, find_config
from gn_transfer.yaml_files import read_yaml

Values: TypeAlias = Mapping[str, Any]
"""Dotted configuration keys and a value each: ``{"model.norm": "bn"}``."""

Tested = Literal["last", "best", "never"]
Kept = Literal["last", "none"]

_MOST_SEEDS = 10_000

FIRST_SELECTION_SEED = 1000
"""Runs on which choices are made have seeds from here on, unless they are named."""

_BLOCK = ("set", "grid", "where", "cases", "select")
_TOP = ("title", "base", "samples", "seeds", "test", "keep", "baseline", "notes", "arms", *_BLOCK)
_SELECT = ("key", "values", "per", "seeds", "extend")


LOCAL_KEYS = frozenset(
    {
        "data.root",
        "data.download",
        "data.cache",
        "data.cache_dir",
        "data.num_workers",
        "trainer.default_root_dir",
        "trainer.enable_progress_bar",
        "checkpoint.every_minutes",
    }
)
"""Keys that differ between machines, and decide nothing that a run reaches."""


@dataclass(frozen=True)
class Selection:
    """A key whose value is chosen on validation before the final runs.

    Attributes:
        key: The key, usually ``optimizer.lr``.
        values: Its candidates, in rising order.
        seeds: Seeds that each candidate is averaged over.
        per: Keys whose values share a choice, tried on the first of their configurations; None: each configuration
            chooses.
        extend: How often the candidates may grow by a factor where the best is the first or the last.
    """

    key: str
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    per: tuple[str, ...] | None
    extend: int


@dataclass(frozen=True)
class Arm:
    """Runs that are compared with one another.

    Attributes:
        name: Empty where the study has one arm only.
        fixed: Values of every trial.
        grid: Values that are crossed.
        where: For a key, the values of other keys in whose company it means something.
        cases: Named sets of values, each crossed with the grid; a list in one is crossed, too.
        select: What is chosen on validation first.
    """

    name: str = ""
    fixed: Values = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    where: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    cases: Mapping[str, Values] = field(default_factory=dict)
    select: Selection | None = None


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        name: Folder of its runs.
        title: For the report.
        base: Path of the configuration that every trial starts from.
        settings: What that holds, with dotted keys.
        samples: Images that each trial trains on, with repetitions; None: as the base says.
        seeds: Of the final runs.
        test: Which checkpoint of the final runs is tested, when all are done.
        keep: Which checkpoints stay.
        baseline: What the report compares with.
        notes: For the report.
        arms: At least one.
        allow_class_path: Its files may name any class.
        typed_classes: Classes that the user named on the command line.
    """

    name: str
    title: str
    base: Path
    settings: Values
    samples: int | None
    seeds: tuple[int, ...]
    test: Tested
    keep: Kept
    baseline: Mapping[str, str]
    notes: tuple[str, ...]
    arms: tuple[Arm, ...]
    allow_class_path: bool = False
    typed_classes: frozenset[str] = frozenset()

    @property
    def metric(self) -> str:
        """Metric that choices are made by: ``acc1``, of segmentations ``miou``."""
        data = self.arms[0].fixed.get("data", self.settings.get("data"))
        return "miou" if "Segmentation" in str(data) else "acc1"  # their data modules are named so

    def shared_settings(self) -> dict[str, Any]:
        """Give what all trials start from and all machines have to agree on."""
        return {key: value for key, value in self.settings.items() if key not in LOCAL_KEYS}


def read_study(
    path: Path, *, name: str | None = None, overrides: Values | None = None, allow_class_path: bool = False
) -> Study:
    """Read a study file.

    Args:
        path: YAML file; its ``base`` is the name of a built-in configuration or a path from the file's folder.
        name: Name of the study; None takes the file's.
        overrides: What the command line says: study keys (``samples``) replace those of the file, configuration keys
            hold in every trial and end a grid over them.
        allow_class_path: See :class:`Study`.

    Returns:
        The study.

    Raises:
        ConfigError: Unreadable, an unknown key, an empty grid, ...
    """
    if name is not None and not re.fullmatch(r"\w[\w.+-]*", name):
        raise ConfigError(f"--name {name}: a study names a folder; use letters, digits, and . _ + - between them.")
    content = _read_yaml(path)
    overrides = dict(overrides or {})
    content |= {key: overrides.pop(key) for key in list(overrides) if key in ("samples", "seeds", "test", "keep")}
    if "model" in content or "data" in content:
        raise ConfigError(
            f"{path} configures one run: gn-transfer fit --config {path.name}. It can be the base of a study."
        )
    _known(content, _TOP, f"{path}")
    if not isinstance(content.get("base"), str):
        raise ConfigError(f"{path}: say which configuration every run starts from, base: pets_gnws.yaml.")
    beside = path.parent / content["base"]
    base = beside if beside.is_file() else find_config(content["base"])
    seeds = _seeds(content.get("seeds", 1), f"{path}: seeds")
    samples = content.get("samples")
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise ConfigError(f"{path}: samples={samples} is not a number of images; use 1 or more, or leave it out.")
    shared = {key: content[key] for key in _BLOCK if content.get(key) is not None}
    arms = content.get("arms")
    if not any(content.get(key) for key in ("grid", "cases", "arms", "select")):
        raise ConfigError(f"{path} varies nothing: its grid is empty; give grid, cases, arms or select some values.")
    blocks = {"": {}} if arms is None else _mapping(arms, f"{path}: arms")
    return Study(
        name=name or path.stem,
        title=str(content.get("title", path.stem)),
        base=base,
        settings=flatten(_read_yaml(base)),
        samples=samples,
        seeds=seeds,
        test=_one_of(content.get("test") or "never", get_args(Tested), f"{path}: test"),
        keep=_one_of(content.get("keep") or "none", get_args(Kept), f"{path}: keep"),
        baseline={
            str(key): str(value) for key, value in _mapping(content.get("baseline"), f"{path}: baseline").items()
        },
        notes=_notes(content.get("notes") or (), f"{path}: notes"),
        arms=tuple(
            _arm(str(arm), shared, _mapping(block, f"{path}: arms.{arm}"), seeds, overrides, f"{path}")
            for arm, block in blocks.items()
        ),
        allow_class_path=allow_class_path,
    )


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write a nested configuration with dotted keys; ``data.class_path`` becomes ``data``.

    Example:
        >>> flatten({"model": {"norm": "bn"}, "data": {"class_path": "Pets", "init_args": {"root": "data"}}})
        {'model.norm': 'bn', 'data': 'Pets', 'data.root': 'data'}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if key == "class_path":
            flat[prefix.rstrip(".")] = value
        elif isinstance(value, Mapping):
            flat |= flatten(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _arm(
    name: str, shared: Mapping[str, Any], own: Mapping[str, Any], seeds: tuple[int, ...], overrides: Values, where: str
) -> Arm:
    place = f"{where}: arms.{name}" if name else where
    _known(own, _BLOCK, place)
    block = {
        key: _mapping(shared.get(key), f"{where}: {key}") | _mapping(own.get(key), f"{place}.{key}")
        for key in ("set", "grid", "where")
    }
    cases = _mapping(own.get("cases", shared.get("cases")), f"{place}: cases")
    select = own.get("select", shared.get("select"))
    arm = Arm(
        name,
        block["set"],
        {key: _crossed(values, f"{place}: grid.{key}") for key, values in block["grid"].items()},
        {
            key: {other: _tuple(values) for other, values in _mapping(condition, f"{place}: where.{key}").items()}
            for key, condition in block["where"].items()
        },
        {str(case): _mapping(values, f"{place}: cases.{case}") for case, values in cases.items()},
        None if select is None else _selection(_mapping(select, f"{place}: select"), seeds, f"{place}: select"),
    )
    return _overridden(arm, overrides)


def _overridden(arm: Arm, overrides: Values) -> Arm:
    """Let the command line have the last word on a key, wherever the file names it."""
    return replace(
        arm,
        fixed={**arm.fixed, **overrides},
        grid={key: values for key, values in arm.grid.items() if key not in overrides},
        cases={
            case: {key: value for key, value in values.items() if key not in overrides}
            for case, values in arm.cases.items()
        },
        select=None if arm.select is not None and arm.select.key in overrides else arm.select,
    )


def _selection(content: Mapping[str, Any], seeds: tuple[int, ...], place: str) -> Selection:
    _known(content, _SELECT, place)
    values = _crossed(content.get("values"), f"{place}.values")
    if not all(isinstance(value, (int, float)) and value > 0 for value in values) or len(values) < 2:
        raise ConfigError(f"{place}.values={list(values)}: give two or more numbers above 0.")
    wanted = content.get("seeds", 3)
    if isinstance(wanted, int) and wanted <= _MOST_SEEDS:  # the same when seeds are added to the final runs
        wanted = [FIRST_SELECTION_SEED + number for number in range(wanted)]
    if shared := set(found := _seeds(wanted, f"{place}.seeds")) & set(seeds):
        raise ConfigError(
            f"{place}.seeds={list(found)}: final runs have {sorted(shared)} too, and would be chosen on themselves; "
            "take others, or say only how many."
        )
    per = content.get("per")
    extend = content.get("extend", 2)
    if not isinstance(extend, int) or extend < 0:
        raise ConfigError(f"{place}.extend={extend}: use 0 or more.")
    return Selection(
        key=str(content.get("key", "optimizer.lr")),
        values=tuple(sorted(float(value) for value in values)),
        seeds=found,
        per=None if per is None else tuple(str(key) for key in _tuple(per)),
        extend=extend,
    )


def _seeds(value: Any, place: str) -> tuple[int, ...]:
    counted = isinstance(value, int) and not isinstance(value, bool) and value <= _MOST_SEEDS
    seeds = tuple(range(value)) if counted else value
    if (
        not isinstance(seeds, (list, tuple))
        or not seeds
        or not all(isinstance(seed, int) and seed >= 0 for seed in seeds)
    ):
        raise ConfigError(f"{place}={value}: give how many (8) or which ([0, 1, 2]), at least one.")
    return tuple(dict.fromkeys(seeds))


def _notes(value: Any, place: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{place}={value} is no list of sentences; write each behind a dash.")
    return tuple(map(str, value))


def _crossed(values: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(values, (list, tuple)) or not values:
        raise ConfigError(f"{place}={values} is empty or no list; give its values, [1, 4, 16].")
    return tuple(values)


def _tuple(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, (list, tuple)) else (values,)


def _one_of(value: Any, allowed: Iterable[str], place: str) -> Any:
    if value not in (names := list(allowed)):
        raise ConfigError(f"{place}={value} is not allowed; {did_you_mean(str(value), names)}.")
    return value


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place}={value} is no mapping of keys to values; write, for example, {{norm: bn}}.")
    return {str(key): item for key, item in value.items()}


def _known(content: Mapping[str, Any], allowed: Iterable[str], place: str) -> None:
    for key in content:
        if key not in (names := list(allowed)):
            raise ConfigError(f"{place}: {key} is not a key of a study; {did_you_mean(key, names)}.")


def parse_value(text: str) -> Any:
    """Read a value as a configuration file would: ``1e-3`` is a number, too.

    Example:
        >>> parse_value("1e-3"), parse_value("null"), parse_value("[1, 4]"), parse_value("gn_ws")
        (0.001, None, [1, 4], 'gn_ws')
    """
    return _numbers(yaml.safe_load(text))


def _numbers(value: Any) -> Any:
    """Take ``1e-3`` for a number, as YAML 1.2 does and PyYAML does not."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as YAML ({error}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no keys; see configs/sweep_quickstart.yaml for a study.")
    return dict(_numbers(content))
