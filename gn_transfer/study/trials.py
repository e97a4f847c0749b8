"""The trials of a study: what its arms, grids, cases and conditions come to, each with a name that is its own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from gn_transfer.config import ConfigError
from gn_transfer.study.definition import LOCAL_KEYS, Arm, Study, Values

Stage = Literal["select", "final", "test"]

_MOST_TRIALS = 100_000

_SHORT = {"data.batch_size": "bs", "model.norm": "", "model.num_groups": "groups", "model.group_size": "group_size"}


@dataclass(frozen=True)
class Configuration:
    """A trial less its seed.

    Attributes:
        arm: Name of its arm.
        case: Name of its case, empty without cases.
        varying: Values of the crossed keys, and of the chosen one.
        values: All values, those included.
    """

    arm: str
    case: str
    varying: Values
    values: Values

    def with_value(self, key: str, value: Any) -> Configuration:
        """Give the configuration with one more varying key."""
        return Configuration(self.arm, self.case, {**self.varying, key: value}, {**self.values, key: value})


@dataclass(frozen=True)
class Trial:
    """One run of a study, or the test of one.

    Attributes:
        stage: ``select`` chooses a value, ``final`` is reported, ``test`` opens the test split for a final one.
        arm: Name of its arm.
        case: Name of its case.
        name: Its own in the study; name of its folder.
        overrides: Values over the base configuration, the seed and the budget included.
    """

    stage: Stage
    arm: str
    case: str
    name: str
    overrides: Values

    @property
    def run(self) -> str:
        """Name of the run's folder: for a test, the folder of what is tested."""
        return self.name.removeprefix("test-") if self.stage == "test" else self.name

    def identity(self) -> dict[str, Any]:
        """Give the values that decide what the run reaches."""
        return {key: value for key, value in sorted(self.overrides.items()) if key not in LOCAL_KEYS}

    def arguments(self) -> list[str]:
        """Write the overrides as the command line takes them; the data module first, whose keys follow."""
        ordered = sorted(self.overrides.items(), key=lambda item: item[0] != "data")
        return [word for key, value in ordered for word in (f"--{key}", as_argument(value))]


def short_key(key: str) -> str:
    """Give what stands for a key in the names of trials."""
    return _SHORT.get(key, key.rpartition(".")[2])


def as_argument(value: Any) -> str:
    """Write a value for the command line.

    Example:
        >>> as_argument(None), as_argument(True), as_argument(1e-05), as_argument([1, 2]), as_argument("bn")
        ('null', 'true', '1e-05', '[1, 2]', 'bn')
    """
    return value if isinstance(value, str) else json.dumps(value)


def configurations(arm: Arm, settings: Values) -> list[Configuration]:
    """Cross the grid of an arm with its cases, leaving out keys where they mean nothing.

    Args:
        arm: The arm.
        settings: The base configuration, for conditions on keys that no trial sets.

    Returns:
        In the order of the file, none twice.

    Raises:
        ConfigError: See :func:`check_count`.

    Example:
        Groups mean something to GN alone: 1 + 2 configurations, not 4.

        >>> grid = {"model.norm": ("bn", "gn"), "model.num_groups": (2, 4)}
        >>> arm = Arm(grid=grid, where={"model.num_groups": {"model.norm": ("gn",)}})
        >>> [dict(one.varying) for one in configurations(arm, {})]  # doctest: +NORMALIZE_WHITESPACE
        [{'model.norm': 'bn'}, {'model.norm': 'gn', 'model.num_groups': 2},
         {'model.norm': 'gn', 'model.num_groups': 4}]
    """
    found: dict[tuple[str, str], Configuration] = {}
    for case, values in (arm.cases or {"": {}}).items():
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        fixed = {**arm.fixed, **{key: value for key, value in values.items() if key not in lists}}
        crossed = {key: some for key, some in {**arm.grid, **lists}.items() if key not in values or key in lists}
        check_count(math.prod(map(len, crossed.values())), arm)
        for point in product(*crossed.values()):
            varying = dict(_meaningful(dict(zip(crossed, point, strict=True)), fixed, arm.where, settings))
            configuration = Configuration(arm.name, case, varying, {**fixed, **varying})
            found.setdefault((case, json.dumps(varying, sort_keys=True)), configuration)
    return list(found.values())


def check_count(trials: int, arm: Arm) -> None:
    """Refuse a grid that was not meant: nobody waits for so many trials, and their list alone fills the memory.

    Raises:
        ConfigError: An arm has more trials than :data:`_MOST_TRIALS`.
    """
    if trials > _MOST_TRIALS:
        name = f"the arm {arm.name}" if arm.name else "the study"
        raise ConfigError(
            f"{name} has {trials:,} trials, and at most {_MOST_TRIALS:,} can be run; give fewer values or seeds."
        )


def _meaningful(
    point: Values, fixed: Values, where: Mapping[str, Mapping[str, tuple[Any, ...]]], settings: Values
) -> Iterator[tuple[str, Any]]:
    known = {**settings, **fixed, **point}
    for key, value in point.items():
        condition = where.get(key, {})
        if all(known.get(other) in allowed for other, allowed in condition.items()):
            yield key, value


def make_trial(study: Study, configuration: Configuration, stage: Stage, seed: int) -> Trial:
    """Give a configuration a seed, a budget and a name.

    Args:
        study: The study.
        configuration: The trial less its seed.
        stage: What it is for.
        seed: Its seed.

    Returns:
        The trial.
    """
    budget = {} if study.samples is None else {"samples": study.samples}
    parts = [stage if stage != "final" else "", configuration.arm, configuration.case]
    for key in sorted(configuration.varying, key=lambda key: (key != "model.norm", key != "data.batch_size", key)):
        value = configuration.varying[key]
        parts.append(f"{short_key(key)}{value:g}" if isinstance(value, float) else f"{short_key(key)}{value}")
    name = "-".join(re.sub(r"[^\w.+=]+", "_", part) for part in [*parts, f"seed{seed}"] if part)
    return Trial(
        stage,
        configuration.arm,
        configuration.case,
        name,
        {**configuration.values, **budget, "seed_everything": seed},
    )


def arguments_of(study: Study, trial: Trial, *, defaults: Sequence[str] = ()) -> list[str]:
    """Give the options of ``fit`` for a trial.

    Args:
        study: Its study.
        trial: The trial.
        defaults: Options that those of the trial overrule.
    """
    trusted = ["--allow_class_path"] if study.allow_class_path else []
    return ["--config", str(study.base), *defaults, *trial.arguments(), *trusted]
