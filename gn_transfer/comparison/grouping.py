"""Which runs belong together: groups that differ in their settings, and the pairs of groups to contrast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gn_transfer.config import ConfigError, did_you_mean
from gn_transfer.report.runs import Run, Setting, short_name

_ALWAYS_NAMED = frozenset(
    ("norm", "batch_size", "effective_batch_size", "num_groups", "group_size", "backbone", "data", "arm", "lr")
)
_SHORT = {
    "batch_size": "batch",
    "effective_batch_size": "effective batch",
    "num_groups": "groups",
    "group_size": "channels per group",
    "decoder_norm": "decoder with",
}


@dataclass(frozen=True)
class Grouping:
    """Runs by what differs.

    Attributes:
        keys: The settings that tell groups apart, the norm and the batch first.
        groups: For each combination of their values its runs, sorted by the combination.
        tied: Settings that differ too but say nothing new, since those of ``keys`` determine them (such as a learning
            rate chosen for each norm).
        equal: The settings that are equal in all runs to which they apply.
    """

    keys: list[str]
    groups: dict[tuple[Setting, ...], list[Run]]
    tied: list[str] = field(default_factory=list)
    equal: dict[str, Setting] = field(default_factory=dict)

    def label(self, group: tuple[Setting, ...]) -> str:
        """Name a group by what tells it apart.

        Args:
            group: Its values of :attr:`keys`.

        Returns:
            Such as ``"gn_ws, batch 1"``; what does not apply is left out, and of the rarer keys what most groups have.
        """
        return label(self.label_settings(group))

    def label_settings(self, group: tuple[Setting, ...]) -> dict[str, Setting]:
        """Give the settings of a group that its label names."""
        named = dict(zip(self.keys, group, strict=True))
        return {key: value for key, value in named.items() if key in _ALWAYS_NAMED or value != self._usual(key)}

    def _usual(self, key: str) -> Setting:
        place = self.keys.index(key)
        value, count = Counter(group[place] for group in self.groups).most_common(1)[0]
        return value if count > len(self.groups) / 2 else None


def label(settings: Mapping[str, Setting]) -> str:
    """Name settings in one line.

    Example:
        >>> label({"norm": "gn_ws", "batch_size": 1, "num_groups": None})
        'gn_ws, batch 1'
    """
    named = {key: value for key, value in settings.items() if value is not None}
    words = [str(value) if key == "norm" else f"{_SHORT.get(key, key)} {shown(value)}" for key, value in named.items()]
    return ", ".join(words) or "all runs"


def shown(value: Setting) -> str:
    """Write a setting as the command line takes it; what does not apply is a dash."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None else str(value)


def group_runs(runs: Sequence[Run]) -> Grouping:
    """Group runs by what differs between them.

    Keys are taken in order, and only those that tell apart runs which the keys before them do not.

    Args:
        runs: At least one.

    Returns:
        The groups.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    differing = [name for name in names if len({run.settings.get(name) for run in runs} - {None}) > 1]
    keys: list[str] = []
    found = 1
    for name in differing:
        finer = len({_values(run, [*keys, name]) for run in runs})
        if finer > found:
            keys, found = [*keys, name], finer
    groups: dict[tuple[Setting, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_values(run, keys), []).append(run)
    present = {name: value for run in runs for name, value in run.settings.items() if value is not None}
    return Grouping(
        keys,
        dict(sorted(groups.items(), key=lambda item: [_sortable(value) for value in item[0]])),
        [name for name in differing if name not in keys and name != "arm"],  # the name of what differs in an arm
        {name: present[name] for name in names if name in present and name not in differing},
    )


def select(runs: Sequence[Run], where: Mapping[str, str]) -> list[Run]:
    """Keep the runs with some settings.

    Args:
        runs: At least one.
        where: Values by key; several values of a key with ``|`` between.

    Returns:
        The runs that have one of the values of every key.

    Raises:
        ConfigError: A key that no run has, or nothing is left.
    """
    wanted = {short_name(key): value.split("|") for key, value in where.items()}
    for key in wanted:
        known = list(dict.fromkeys(name for run in runs for name in run.settings))
        if key not in known:
            raise ConfigError(f"--where {key}: no run has this setting; {did_you_mean(key, known)}.")
    kept = [run for run in runs if all(shown(run.settings.get(key)) in values for key, values in wanted.items())]
    if not kept:
        for key, values in wanted.items():
            there = {shown(run.settings.get(key)) for run in runs}
            if not there.intersection(values):
                asked = f"{key}={'|'.join(values)}"
                raise ConfigError(f"--where {asked}: no run has this value; {did_you_mean(values[0], sorted(there))}.")
        asked = ", ".join(f"{key}={'|'.join(values)}" for key, values in wanted.items())
        raise ConfigError(f"--where {asked}: no run has all these values; ask for fewer of them.")
    return kept


def find_baselines(grouping: Grouping, baseline: Mapping[str, str]) -> dict[tuple[Setting, ...], tuple[Setting, ...]]:
    """Find for each group the one that it is measured against.

    It has the baseline's values and is has the same other settings (as far as settings apply to both); where the
    baseline names a single group, that serves all.

    Args:
        grouping: The groups.
        baseline: Values by key, such as ``{"norm": "bn"}``; long keys (``model.norm``) are understood too.

    Returns:
        Group to baseline; groups that have none are left out.

    Raises:
        ConfigError: A key that no group is told apart by, or a value that no group has.
    """
    wanted = {short_name(key): value for key, value in baseline.items()}
    for key, value in wanted.items():
        if key not in grouping.keys:
            raise ConfigError(
                f"--baseline {key}={value}: {key} does not tell the groups apart; "
                f"{did_you_mean(key, grouping.keys) if grouping.keys else 'the runs differ in no setting'}."
            )
        present = {shown(group[grouping.keys.index(key)]) for group in grouping.groups}
        if value not in present:
            raise ConfigError(
                f"--baseline {key}={value}: no run has this value; {did_you_mean(value, sorted(present))}."
            )
    places = {grouping.keys.index(key): value for key, value in wanted.items()}
    candidates = [
        group for group in grouping.groups if all(shown(group[place]) == value for place, value in places.items())
    ]
    if not candidates:
        asked = ", ".join(f"{key}={value}" for key, value in wanted.items())
        raise ConfigError(f"--baseline {asked}: no group has all these values; ask for fewer of them.")
    rest = [place for place in range(len(grouping.keys)) if place not in places]
    found = {}
    for group in grouping.groups:
        if group in candidates:
            continue
        matches = [other for other in candidates if all(_compatible(group[place], other[place]) for place in rest)]
        matches = matches or (candidates if len(candidates) == 1 else [])
        if len(matches) == 1:
            found[group] = matches[0]
    return found


def _compatible(first: Setting, second: Setting) -> bool:
    return first is None or second is None or first == second


def _values(run: Run, keys: Sequence[str]) -> tuple[Setting, ...]:
    return tuple(run.settings.get(key) for key in keys)


def _sortable(value: Setting) -> tuple[int, float, str]:
    if value is None:
        return 0, 0.0, ""
    return (1, float(value), "") if isinstance(value, int | float) else (2, 0.0, value)
