"""Which trials a study has, as far as its results so far decide it: choices first, final runs, then the test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

from gn_transfer.config import ConfigError
from gn_transfer.study.definition import Arm, Selection, Study
from gn_transfer.study.trials import Configuration, Trial, check_count, configurations, make_trial

State = Literal["waiting", "running", "complete", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        state: Where it stands.
        value: The study's metric on validation at the end (of a test: on test).
        loss: The loss beside it.
        seconds: How long it took.
        reason: Why it failed.
    """

    state: State
    value: float = float("nan")
    loss: float = float("nan")
    seconds: float = 0.0
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ("complete", "failed")


@dataclass(frozen=True)
class Choice:
    """A value chosen on validation.

    Attributes:
        group: What it was chosen for, in words.
        key: The key.
        value: The value.
        metric: What it was chosen by.
        scores: Mean of the metric of each candidate; None where a run of it failed.
        at_edge: It is the first or last candidate, and the candidates may grow no more.
    """

    group: str
    key: str
    value: float
    metric: str
    scores: Mapping[float, float | None]
    at_edge: bool

    def __str__(self) -> str:
        tried = ", ".join(
            f"{value:g} {'failed' if mean is None else f'{mean:.1%}'}" for value, mean in self.scores.items()
        )
        edge = "; at the edge of what was tried: the best may lie beyond, so give more values" if self.at_edge else ""
        return f"{self.group}: {self.key} {self.value:g}, chosen by mean val/{self.metric} ({tried}){edge}"


@dataclass
class Planned:
    """Trials that are known so far.

    Attributes:
        trials: In the order in which they are to run.
        choices: Made so far.
        problems: Groups for which nothing could be chosen.
        open: Choices that are not made yet.
        to_come: About how many trials will follow that are not known yet.
        tests_to_come: Those of them that are tests.
    """

    trials: list[Trial] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    open: int = 0
    to_come: int = 0
    tests_to_come: int = 0


def plan_trials(study: Study, outcomes: Mapping[str, Outcome]) -> Planned:
    """List the trials of a study as far as they are known; a pure function, so that all machines list the same.

    Args:
        study: The study.
        outcomes: What became of trials so far, by name.

    Returns:
        Trials, in the order in which they are to run: seed by seed, so that early results cover all configurations.

    Raises:
        ConfigError: Nothing to run, far too much, or two trials of one name.
    """
    planned = Planned()
    finals: list[Configuration] = []
    for arm in study.arms:
        found = configurations(arm, study.settings)
        candidates = len(arm.select.values) * len(arm.select.seeds) if arm.select is not None else 0
        check_count(len(found) * (candidates + len(study.seeds)), arm)
        finals += found if arm.select is None else _select(study, arm, arm.select, found, outcomes, planned)
    last = [make_trial(study, configuration, "final", seed) for seed in study.seeds for configuration in finals]
    planned.trials += last
    if not planned.trials:
        raise ConfigError(f"the study {study.name} has no trials; give it a grid, cases or arms.")
    _check_names(planned.trials)
    if study.test != "never":
        done = [trial for trial in last if outcomes.get(trial.name, Outcome("waiting")).state == "complete"]
        ended = all(trial.name in outcomes and outcomes[trial.name].ended for trial in planned.trials)
        if ended and not planned.open:  # all choices are made: now, and only now, test is opened
            planned.trials += [replace(trial, stage="test", name=f"test-{trial.name}") for trial in done]
        else:
            planned.tests_to_come = len(last) + planned.to_come
            planned.to_come += planned.tests_to_come
    return planned


def foresee(study: Study, outcomes: Mapping[str, Outcome] | None = None) -> Planned:
    """Plan a study to its end, as if each choice fell on the middle of its candidates: to count, and to estimate time.

    Args:
        study: The study.
        outcomes: What became of trials that have ended already, by name.

    Returns:
        All trials that it will have, if no candidates have to be added.
    """
    middles = {arm.name: arm.select for arm in study.arms if arm.select is not None}
    outcomes = {name: outcome for name, outcome in (outcomes or {}).items() if outcome.ended}
    while True:
        planned = plan_trials(study, outcomes)
        fresh = [trial for trial in planned.trials if trial.name not in outcomes]
        if not fresh:
            return planned
        for trial in fresh:
            select = middles.get(trial.arm)
            middle = select is not None and trial.overrides[select.key] == select.values[len(select.values) // 2]
            outcomes[trial.name] = Outcome("complete", value=float(middle), loss=0.0)


def _select(
    study: Study,
    arm: Arm,
    select: Selection,
    found: Sequence[Configuration],
    outcomes: Mapping[str, Outcome],
    planned: Planned,
) -> list[Configuration]:
    """Add the candidates of an arm to the plan, and return its configurations whose value is chosen."""
    groups: dict[str, list[Configuration]] = {}
    for configuration in found:
        if select.key in configuration.values:
            raise ConfigError(f"{select.key} is both set and chosen by select; leave it out of set, grid and cases.")
        known = {**study.settings, **configuration.values}
        shared = configuration.varying if select.per is None else {key: known.get(key) for key in select.per}
        label = [arm.name, configuration.case if select.per is None else "", *_words(shared)]
        groups.setdefault(" ".join(filter(None, label)) or study.name, []).append(configuration)
    chosen = []
    per_seed: dict[int, list[Trial]] = {seed: [] for seed in select.seeds}
    for group, members in groups.items():
        values = list(select.values)
        for extensions_left in range(select.extend, -1, -1):
            trials = {
                value: [make_trial(study, members[0].with_value(select.key, value), "select", s) for s in select.seeds]
                for value in values
            }
            scores = {value: _score(some, outcomes) for value, some in trials.items()}
            if any(score == "open" for score in scores.values()):
                planned.open += 1
                planned.to_come += len(members) * len(study.seeds)
                break
            means = {value: score for value, score in scores.items() if isinstance(score, tuple)}
            if not means:
                planned.problems.append(
                    f"{group}: every {select.key} failed, so nothing was chosen and nothing follows"
                )
                break
            best = max(means, key=lambda value: (means[value], -value))
            at_edge = best in (values[0], values[-1])
            if at_edge and extensions_left:
                values = extended(values, best)
                continue
            shown = {value: means[value][0] if value in means else None for value in values}
            planned.choices.append(Choice(group, select.key, best, study.metric, shown, at_edge))
            chosen += [member.with_value(select.key, best) for member in members]
            break
        for some in trials.values():
            for seed, trial in zip(select.seeds, some, strict=True):
                per_seed[seed].append(trial)
    planned.trials += [trial for some in per_seed.values() for trial in some]
    return chosen


def extended(values: Sequence[float], best: float) -> list[float]:
    """Grow candidates beyond their end by the factor between the last two there.

    Example:
        >>> extended([0.001, 0.004], 0.004), extended([0.001, 0.004], 0.001)
        ([0.001, 0.004, 0.016], [0.00025, 0.001, 0.004])
    """
    if best == values[-1]:
        return [*values, float(f"{values[-1] * values[-1] / values[-2]:.3g}")]
    return [float(f"{values[0] * values[0] / values[1]:.3g}"), *values]


def _score(trials: Sequence[Trial], outcomes: Mapping[str, Outcome]) -> tuple[float, float] | Literal["open", "failed"]:
    """Average metric and negative loss over seeds; a candidate that fails once is none."""
    found = [outcomes.get(trial.name, Outcome("waiting")) for trial in trials]
    if not all(outcome.ended for outcome in found):
        return "open"
    if any(outcome.state == "failed" for outcome in found):
        return "failed"
    return fmean(outcome.value for outcome in found), -fmean(outcome.loss for outcome in found)


def _words(values: Mapping[str, object]) -> list[str]:
    return [f"{key.rpartition('.')[2]}={value}" for key, value in values.items()]


def _check_names(trials: Sequence[Trial]) -> None:
    seen: dict[str, Trial] = {}
    for trial in trials:
        other = seen.setdefault(trial.name, trial)
        if other is not trial:
            raise ConfigError(
                f"two trials are called {trial.name}: {json.dumps(trial.identity())} and "
                f"{json.dumps(other.identity())}; name the cases so that they differ, or take values out that come to "
                "the same."
            )
