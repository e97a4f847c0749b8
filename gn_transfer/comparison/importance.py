"""How much each setting matters for the result: Optuna's evaluators over the runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import BaseImportanceEvaluator, FanovaImportanceEvaluator, PedAnovaImportanceEvaluator
from optuna.trial import create_trial

from gn_transfer.comparison.grouping import shown
from gn_transfer.comparison.report import Report
from gn_transfer.comparison.runs import Run, Setting

FEWEST_RUNS = 8
"""Below so many runs an importance would be guesswork."""


@dataclass(frozen=True)
class Importance:
    """Importances among some runs.

    Attributes:
        heading: Which runs.
        runs: How many.
        shares: Importance by setting, the greatest first; they add up to 1.
        note: How they were found.
    """

    heading: str
    runs: int
    shares: dict[str, float]
    note: str


def importances(report: Report) -> list[Importance]:
    """Find the importances over all runs, and once more for each setting that applies to some runs only.

    A setting that does not apply to a run (``num_groups`` without GroupNorm) has no value there, so it cannot be
    judged over all runs; it is among those to which it applies. The seed is judged too: what matters no more than the
    seed is noise.

    Args:
        report: The comparison.

    Returns:
        One entry per set of runs; empty where there are too few or they all reach the same.
    """
    keys, runs = report.grouping.keys, report.runs
    conditional = [key for key in keys if any(run.settings.get(key) is None for run in runs)]
    chosen = [("all runs", runs, [key for key in keys if key not in conditional])]
    for key in conditional:
        some = [run for run in runs if run.settings.get(key) is not None]
        apply = [name for name in keys if all(run.settings.get(name) is not None for run in some)]
        chosen.append((f"where {key} applies", some, apply))
    found = [_evaluate(heading, some, names, report.metric) for heading, some, names in chosen]
    said = f" Not applicable to all runs, so not judged over all: {', '.join(conditional)}." if conditional else ""
    return [replace(part, note=part.note + said) for part in found if part is not None]


def _evaluate(heading: str, runs: Sequence[Run], keys: Sequence[str], metric: str) -> Importance | None:
    columns: dict[str, list[Setting]] = {key: [run.settings[key] for run in runs] for key in keys}
    columns["seed"] = [f"seed {run.seed}" for run in runs]  # a name: seeds have no order
    columns = {key: values for key, values in columns.items() if len(set(values)) > 1}
    scores = [float(run.metrics[metric]) for run in runs]
    if len(runs) < FEWEST_RUNS or not columns or max(scores) == min(scores):
        return None
    spaces = {key: _space(values) for key, values in columns.items()}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize")
    finally:
        optuna.logging.set_verbosity(verbosity)
    for place, score in enumerate(scores):
        values = {key: _coded(columns[key][place], spaces[key]) for key in columns}
        study.add_trial(create_trial(params=values, distributions=spaces, value=score))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator: BaseImportanceEvaluator = FanovaImportanceEvaluator(n_trees=32, seed=0)
            name = "fANOVA: the share of the variance that a setting explains by itself"
        except ImportError:  # its forest is scikit-learn's
            evaluator = PedAnovaImportanceEvaluator()
            name = "PED-ANOVA: how much a setting decides who is among the best (fANOVA needs scikit-learn)"
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    if not all(map(math.isfinite, shares.values())):
        return None
    note = f"Optuna's {name}. What matters no more than the seed is noise."
    return Importance(heading, len(runs), shares, note)


def _space(values: Sequence[Setting]) -> BaseDistribution:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return CategoricalDistribution(sorted({shown(value) for value in values}))
    return FloatDistribution(min(numbers), max(numbers), log=min(numbers) > 0)


def _coded(value: Setting, space: BaseDistribution) -> str | float:
    return shown(value) if isinstance(space, CategoricalDistribution) else float(value or 0.0)
