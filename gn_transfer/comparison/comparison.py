"""The comparison of runs in numbers: groups, contrasts against a baseline, and what to know beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gn_transfer.comparison.checks import choose_metric, confounds, incomparable, too_many_contrasts
from gn_transfer.comparison.grouping import Grouping, find_baselines, group_runs, label, select, shown
from gn_transfer.comparison.statistics import (
    Array,
    PairedTest,
    holm,
    interval,
    sign_flip_test,
)
from gn_transfer.config import ConfigError
from gn_transfer.report.predictions import RESAMPLES, SplitPredictions, weight_blocks
from gn_transfer.report.runs import Problem, Run, Setting, final_runs, find_run_folders, read_runs, short_name


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        settings: What tells the group apart.
        label_settings: Those of them that the label names.
        label: The same in words.
        runs: Its runs.
        by_seed: The metric of each seed, as a fraction; runs of the same seed are averaged.
        low: Lower end of the 95 % interval of the mean; None for one seed without predictions.
        high: Upper end.
    """

    settings: dict[str, Setting]
    label_settings: dict[str, Setting]
    label: str
    runs: list[Run]
    by_seed: dict[int, float]
    low: float | None
    high: float | None

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """Mean of the metric over seeds."""
        return float(np.mean(list(self.by_seed.values())))

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds; None for one."""
        return float(np.std(list(self.by_seed.values()), ddof=1)) if self.n > 1 else None

    def average(self, name: str) -> float:
        """Average another figure of metrics.json over the runs that have it."""
        values = [run.metrics[name] for run in self.runs if isinstance(run.metrics.get(name), int | float)]
        return float(np.mean(values)) if values else float("nan")


@dataclass(frozen=True)
class Contrast:
    """A group against its baseline, paired by seed.

    Attributes:
        group: The group.
        baseline: What it is measured against.
        difference: Mean difference of the metric over the seeds that both have.
        low: Lower end of its 95 % interval; None for one pair of runs without predictions, of which none can be known.
        high: Upper end.
        test: The paired test.
        p_holm: Its p-value after Holm's correction over all contrasts of the report.
    """

    group: Group
    baseline: Group
    difference: float
    low: float | None
    high: float | None
    test: PairedTest
    p_holm: float

    @property
    def sides(self) -> tuple[Group, Group]:
        """The group and its baseline."""
        return self.group, self.baseline

    @property
    def seeds(self) -> list[int]:
        """The seeds that both have."""
        return [seed for seed in self.group.by_seed if seed in self.baseline.by_seed]

    @property
    def is_clear(self) -> bool:
        """Whether the interval is on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def against(self) -> str:
        """The baseline in words: only that in which it differs from the group."""
        ours, theirs = self.group.settings, self.baseline.settings
        return label({key: value for key, value in theirs.items() if value is not None and value != ours[key]})


@dataclass(frozen=True)
class Comparison:
    """A comparison.

    Attributes:
        title: Its heading.
        metric: The key of metrics.json that runs are compared by.
        metric_note: What to say about it.
        groups: The groups, in order.
        contrasts: Against the baseline; empty without one.
        grouping: How the runs were grouped.
        forced: Why the runs are not comparable, where that was overruled.
        notes: The caller's, then what differs beside the settings.
        problems: Folders that could not be used.
        predictions: Of each run that has them.
        runner_up: The second best group against the best; None without a second, or without a common seed.
    """

    title: str
    metric: str
    metric_note: str
    groups: list[Group]
    contrasts: list[Contrast]
    grouping: Grouping
    forced: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    predictions: dict[Path, SplitPredictions] = field(default_factory=dict)
    runner_up: Contrast | None = None

    @property
    def runs(self) -> list[Run]:
        """All runs that are compared."""
        return [run for group in self.groups for run in group.runs]

    @property
    def guess(self) -> float | None:
        """The metric of always naming the most frequent class; None where no run stored predictions."""
        return next((found.guess for found in self.predictions.values()), None)

    @property
    def exit_code(self) -> int:
        """3 where some folders could not be used, else 0."""
        return 3 if self.problems else 0

    def remarks(self) -> list[str]:
        """List all that stands beside the tables, one line each."""
        lines = [f"Compared by {self.metric}: {self.metric_note}."]
        lines += [f"NOT COMPARABLE, compared all the same (--force): {reason}" for reason in self.forced]
        lines += [f"note: {note}" for note in self.notes]
        return lines


def compare(
    sources: Sequence[Path],
    *,
    baseline: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    metric: str | None = None,
    title: str = "Comparison of runs",
    notes: Sequence[str] = (),
    force: bool = False,
) -> Comparison:
    """Compare runs; nothing is written.

    Args:
        sources: Run folders, or folders that hold some.
        baseline: What the others are measured against, such as ``{"norm": "bn"}``; None takes that where the runs
            differ in the norm and some have ``bn``.
        where: Compare only runs with these settings, such as ``{"batch_size": "1"}``.
        metric: ``test/``, ``val/`` or ``best/val/`` with ``acc1``, of segmentations ``miou``; None chooses one that all
            runs have.
        title: Heading of the report.
        notes: What the caller has to say beside the result.
        force: Compare what is not comparable, and say so.

    Returns:
        The report.

    Raises:
        ConfigError: No run can be used, they are not comparable, or the baseline or metric is not there.
    """
    runs, problems = read_runs(find_run_folders(sources))
    if not runs:
        listed = "; ".join(f"{problem.folder}: {problem.reason}" for problem in problems[:5])
        raise ConfigError(f"none of {len(problems)} runs can be compared. {listed}.")
    runs, trials = _without_trials(runs)
    runs = select(runs, where or {})
    metric, metric_note = choose_metric(runs, metric)
    reasons = incomparable(runs, metric)
    if reasons and not force:
        raise ConfigError(
            f"these runs cannot be compared: {'. '.join(reasons)}. Name the folders of runs that agree, or choose them "
            "with --where, or add --force, which says so beside the result."
        )
    grouping = group_runs(runs)
    predictions = {run.folder: found for run in runs if (found := run.predictions(metric)) is not None}
    resampled = _resample(runs, metric, predictions)
    groups = {key: _summarize(grouping, key, metric, resampled, predictions) for key in grouping.groups}
    if baseline is None and "norm" in grouping.keys and any(run.settings["norm"] == "bn" for run in runs):
        baseline = {"norm": "bn"}
    pairs = find_baselines(grouping, baseline) if baseline else {}
    sides = [(groups[one], groups[other]) for one, other in pairs.items()]
    contrasts = _contrasts(sides, resampled, predictions)
    least = min((contrast.test.smallest_p for contrast in contrasts), default=1.0)
    without = [run.name for run in runs if run.folder not in predictions]
    best, *others = sorted(groups.values(), key=lambda group: -group.mean)
    runner_up = _contrasts([(others[0], best)], resampled, predictions) if others else []
    return Comparison(
        title=title,
        metric=metric,
        metric_note=metric_note,
        groups=list(groups.values()),
        contrasts=contrasts,
        grouping=grouping,
        forced=reasons,
        notes=[
            *notes,
            *trials,
            *_without_contrast(grouping, pairs, baseline or {}),
            *_without_common_seed(sides),
            *too_many_contrasts(len(contrasts), least),
            *confounds(grouping, without),
        ],
        problems=problems,
        predictions=predictions,
        runner_up=runner_up[0] if runner_up else None,
    )


def _without_trials(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Leave the runs out on which a study made its choices, and those that it no longer counts since it chose again."""
    kept = [run for run in runs if run.metrics.get("stage") != "select"]
    if not kept:
        return runs, []
    chosen = [run for run in kept if run.metrics.get("stage") != "final" or run.folder.name in final_runs(run.folder)]
    notes = []
    if len(kept) < len(runs):
        notes = [f"{len(runs) - len(kept)} runs on which a study made its choices are left out."]
    if chosen and len(chosen) < len(kept):
        notes += [f"{len(kept) - len(chosen)} runs with values that their study no longer chooses are left out."]
    return chosen or kept, notes


def _without_contrast(
    grouping: Grouping, pairs: Mapping[tuple[Setting, ...], tuple[Setting, ...]], baseline: Mapping[str, str]
) -> list[str]:
    """Name the groups that have no counterpart."""
    wanted = {grouping.keys.index(short_name(key)): value for key, value in baseline.items()}
    lonely = [
        grouping.label(group)
        for group in grouping.groups
        if wanted and group not in pairs and any(shown(group[place]) != value for place, value in wanted.items())
    ]
    if not lonely:
        return []
    asked = ", ".join(f"{key}={value}" for key, value in baseline.items())
    return [
        f"Without a contrast, since no single group with {asked} has otherwise the same settings: {'; '.join(lonely)}. "
        "--where and --baseline choose others."
    ]


def _without_common_seed(sides: Sequence[tuple[Group, Group]]) -> list[str]:
    """Name the groups that share no seed with what they would be measured against."""
    return [
        f"Without a contrast, since they share no seed: {group.label} (seeds {', '.join(map(str, group.by_seed))}) and "
        f"{baseline.label} (seeds {', '.join(map(str, baseline.by_seed))}). Their splits differ, too."
        for group, baseline in sides
        if not set(group.by_seed) & set(baseline.by_seed)
    ]


def _resample(runs: Sequence[Run], metric: str, predictions: Mapping[Path, SplitPredictions]) -> dict[Path, Array]:
    """Give each run's metric on every sample of images; without predictions its value repeated.

    Runs that were evaluated on the same images get the same samples, so that differences between them are paired by
    image.
    """
    on: dict[str, list[Run]] = defaultdict(list)
    resampled = {run.folder: np.full(RESAMPLES, float(run.metrics[metric])) for run in runs}
    for run in runs:
        if run.folder in predictions:
            on[predictions[run.folder].digest].append(run)
    for number, (_, some) in enumerate(sorted(on.items())):
        parts: dict[Path, list[Array]] = {run.folder: [] for run in some}
        for weights_RP in weight_blocks(len(predictions[some[0].folder].paths), number):
            for folder, measured in parts.items():
                measured.append(predictions[folder].measure(weights_RP))
        resampled |= {folder: np.concatenate(measured) for folder, measured in parts.items()}
    return resampled


def _summarize(
    grouping: Grouping,
    key: tuple[Setting, ...],
    metric: str,
    resampled: Mapping[Path, Array],
    predictions: Mapping[Path, SplitPredictions],
) -> Group:
    runs = grouping.groups[key]
    values: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        values[run.seed].append(float(run.metrics[metric]))
    by_seed = {seed: float(np.mean(some)) for seed, some in sorted(values.items())}
    ends: tuple[float | None, float | None] = (None, None)
    if len(by_seed) > 1 or any(run.folder in predictions for run in runs):
        ends = interval(list(_by_seed(runs, resampled).values()))
    settings = dict(zip(grouping.keys, key, strict=True))
    return Group(settings, grouping.label_settings(key), grouping.label(key), runs, by_seed, *ends)


def _contrasts(
    pairs: Sequence[tuple[Group, Group]], resampled: Mapping[Path, Array], predictions: Mapping[Path, SplitPredictions]
) -> list[Contrast]:
    found = []
    for group, baseline in pairs:
        seeds = [seed for seed in group.by_seed if seed in baseline.by_seed]
        if not seeds:
            continue
        differences = [group.by_seed[seed] - baseline.by_seed[seed] for seed in seeds]
        ours, theirs = _by_seed(group.runs, resampled), _by_seed(baseline.runs, resampled)
        low: float | None
        high: float | None
        low, high = interval([ours[seed] - theirs[seed] for seed in seeds])
        if len(seeds) == 1 and not any(run.folder in predictions for side in (group, baseline) for run in side.runs):
            low = high = None
        found.append((group, baseline, float(np.mean(differences)), low, high, sign_flip_test(differences)))
    adjusted = holm([test.p for *_, test in found])
    return [Contrast(*parts, p_holm) for parts, p_holm in zip(found, adjusted, strict=True)]


def _by_seed(runs: Sequence[Run], resampled: Mapping[Path, Array]) -> dict[int, Array]:
    parts: dict[int, list[Array]] = defaultdict(list)
    for run in runs:
        parts[run.seed].append(resampled[run.folder])
    return {seed: np.mean(some, axis=0) for seed, some in sorted(parts.items())}
