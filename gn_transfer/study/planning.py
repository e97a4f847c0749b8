"""Which cells a study has, as far as its results so far decide it: choices first, final runs, then the test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

from gn_transfer.config import ConfigError
from gn_transfer.study.cells import Cell, Combination, combinations, make_cell
from gn_transfer.study.definition import Arm, Selection, Study

State = Literal["waiting", "running", "complete", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        state: Where it stands.
        accuracy: Validation accuracy at the end (of a test: test accuracy).
        loss: The loss beside it.
        seconds: How long it took.
        reason: Why it failed.
    """

    state: State
    accuracy: float = float("nan")
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
        scores: Mean accuracy of each candidate; None where a run of it failed.
        at_edge: It is the first or last candidate, and the candidates may grow no more.
    """

    group: str
    key: str
    value: float
    scores: Mapping[float, float | None]
    at_edge: bool

    def __str__(self) -> str:
        tried = ", ".join(
            f"{value:g}: {'failed' if mean is None else f'{mean:.3f}'}" for value, mean in self.scores.items()
        )
        edge = "; at the edge of what was tried: the best may lie beyond" if self.at_edge else ""
        return f"{self.group}: {self.key} {self.value:g} ({tried}){edge}"


@dataclass
class Planned:
    """Cells that are known so far.

    Attributes:
        cells: In the order in which they are to run.
        choices: Made so far.
        problems: Groups for which nothing could be chosen.
        open: Choices that are not made yet.
        to_come: About how many cells will follow that are not known yet.
    """

    cells: list[Cell] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    open: int = 0
    to_come: int = 0


def plan_cells(study: Study, outcomes: Mapping[str, Outcome]) -> Planned:
    """List the cells of a study as far as they are known; a pure function, so that all machines list the same.

    Args:
        study: The study.
        outcomes: What became of cells so far, by name.

    Returns:
        Cells, in the order in which they are to run: seed by seed, so that early results cover all combinations.

    Raises:
        ConfigError: Nothing to run, or two cells of one name.
    """
    planned = Planned()
    finals: list[Combination] = []
    for arm in study.arms:
        found = combinations(arm, study.settings)
        finals += found if arm.select is None else _select(study, arm, arm.select, found, outcomes, planned)
    last = [make_cell(study, combination, "final", seed) for seed in study.seeds for combination in finals]
    planned.cells += last
    if not planned.cells:
        raise ConfigError(f"the study {study.name} has no cells; give it a grid, cases or arms.")
    _check_names(planned.cells)
    if study.test != "never":
        done = [cell for cell in last if outcomes.get(cell.name, Outcome("waiting")).state == "complete"]
        ended = all(cell.name in outcomes and outcomes[cell.name].ended for cell in planned.cells)
        if ended and not planned.open:  # all choices are made: now, and only now, test is opened
            planned.cells += [replace(cell, stage="test", name=f"test-{cell.name}") for cell in done]
        else:
            planned.to_come += len(last) + planned.to_come
    return planned


def foresee(study: Study) -> Planned:
    """Plan a study to its end, as if each choice fell on the middle of its candidates: to count, and to estimate time.

    Args:
        study: The study.

    Returns:
        All cells that it will have, if no candidates have to be added.
    """
    middles = {arm.name: arm.select for arm in study.arms if arm.select is not None}
    outcomes: dict[str, Outcome] = {}
    while True:
        planned = plan_cells(study, outcomes)
        fresh = [cell for cell in planned.cells if cell.name not in outcomes]
        if not fresh:
            return planned
        for cell in fresh:
            select = middles.get(cell.arm)
            middle = select is not None and cell.overrides[select.key] == select.values[len(select.values) // 2]
            outcomes[cell.name] = Outcome("complete", accuracy=float(middle), loss=0.0)


def _select(
    study: Study,
    arm: Arm,
    select: Selection,
    found: Sequence[Combination],
    outcomes: Mapping[str, Outcome],
    planned: Planned,
) -> list[Combination]:
    """Add the candidates of an arm to the plan, and return its combinations whose value is chosen."""
    groups: dict[str, list[Combination]] = {}
    for combination in found:
        if select.key in combination.values:
            raise ConfigError(f"{select.key} is both set and chosen by select; leave it out of set, grid and cases.")
        known = {**study.settings, **combination.values}
        shared = combination.varying if select.per is None else {key: known.get(key) for key in select.per}
        label = [arm.name, combination.case if select.per is None else "", *_words(shared)]
        groups.setdefault(" ".join(filter(None, label)) or study.name, []).append(combination)
    chosen = []
    per_seed: dict[int, list[Cell]] = {seed: [] for seed in select.seeds}
    for group, members in groups.items():
        values = list(select.values)
        for extensions_left in range(select.extend, -1, -1):
            cells = {
                value: [make_cell(study, members[0].with_value(select.key, value), "select", s) for s in select.seeds]
                for value in values
            }
            scores = {value: _score(some, outcomes) for value, some in cells.items()}
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
            planned.choices.append(Choice(group, select.key, best, shown, at_edge))
            chosen += [member.with_value(select.key, best) for member in members]
            break
        for some in cells.values():
            for seed, cell in zip(select.seeds, some, strict=True):
                per_seed[seed].append(cell)
    planned.cells += [cell for some in per_seed.values() for cell in some]
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


def _score(cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> tuple[float, float] | Literal["open", "failed"]:
    """Average accuracy and negative loss over seeds; a candidate that fails once is none."""
    found = [outcomes.get(cell.name, Outcome("waiting")) for cell in cells]
    if not all(outcome.ended for outcome in found):
        return "open"
    if any(outcome.state == "failed" for outcome in found):
        return "failed"
    return fmean(outcome.accuracy for outcome in found), -fmean(outcome.loss for outcome in found)


def _words(values: Mapping[str, object]) -> list[str]:
    return [f"{key.rpartition('.')[2]}={value}" for key, value in values.items()]


def _check_names(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.name, cell)
        if other is not cell:
            raise ConfigError(
                f"two cells are called {cell.name}: {json.dumps(cell.identity())} and {json.dumps(other.identity())}; "
                "name the cases so that they differ, or take values out that come to the same."
            )
