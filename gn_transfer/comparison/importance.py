"""How much each setting matters for the result: shares of the variance of the metric."""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import create_trial

from gn_transfer.comparison.comparison import Comparison
from gn_transfer.comparison.grouping import shown
from gn_transfer.report.runs import Run, Setting

FEWEST_RUNS = 8
"""With fewer runs an importance would be guesswork."""

INTERACTIONS = "together"
"""Name of the share that settings have together, beyond the sum of their own."""

REST = "rest"
"""Name of the share that neither settings nor the seed account for."""


@dataclass(frozen=True)
class Importance:
    """Importances among some runs.

    Attributes:
        heading: Which runs.
        runs: How many.
        shares: Share of the variance by setting, the greatest first; they add up to 1.
        note: How they were computed.
    """

    heading: str
    runs: int
    shares: dict[str, float]
    note: str


def importances(comparison: Comparison) -> list[Importance]:
    """Compute the importances over all runs, and once more for each setting that applies to some runs only.

    A setting that does not apply to a run (``num_groups`` without GroupNorm) has no value there, so it cannot be
    judged over all runs; it is judged among those to which it applies. The seed is judged too: what matters no more
    than the seed is noise.

    Where every combination of the settings was run equally often (a crossed study), the variance is decomposed exactly
    (ANOVA). Elsewhere, as after a search, a random forest stands in for the missing combinations (fANOVA).

    Args:
        comparison: The comparison.

    Returns:
        One entry per set of runs; empty where there are too few or they all reach the same.
    """
    keys, runs = comparison.grouping.keys, comparison.runs
    conditional = [key for key in keys if any(run.settings.get(key) is None for run in runs)]
    chosen = [("all runs", runs, [key for key in keys if key not in conditional])]
    for key in conditional:
        some = [run for run in runs if run.settings.get(key) is not None]
        apply = [name for name in keys if all(run.settings.get(name) is not None for run in some)]
        chosen.append((f"where {key} applies", some, apply))
    found = [_evaluate(heading, some, names, comparison.metric) for heading, some, names in chosen]
    omitted = (
        f" Not judged over all runs, since they do not apply to all: {', '.join(conditional)}." if conditional else ""
    )
    return [replace(part, note=part.note + omitted) for part in found if part is not None]


def _evaluate(heading: str, runs: Sequence[Run], keys: Sequence[str], metric: str) -> Importance | None:
    columns: dict[str, list[Setting]] = {key: [run.settings[key] for run in runs] for key in keys}
    columns = {key: values for key, values in columns.items() if len(set(values)) > 1}
    seeds = [run.seed for run in runs]
    scores = [float(run.metrics[metric]) for run in runs]
    if len(runs) < FEWEST_RUNS or not (columns or len(set(seeds)) > 1) or max(scores) == min(scores):
        return None
    shares = anova(columns, seeds, scores)
    if shares is not None:
        note = (
            "Every combination of the settings was run equally often, so the variance of the metric is decomposed "
            f"exactly (ANOVA): the share of each setting by itself, of all settings together beyond that "
            f"({INTERACTIONS}), of the seed, and the {REST}."
        )
        return Importance(heading, len(runs), shares, note)
    shares = fanova({**columns, "seed": [f"seed {seed}" for seed in seeds]}, scores)
    note = (
        "Not every combination of the settings was run equally often, so a random forest predicts the missing ones "
        "(Optuna's fANOVA): the share of the variance that each setting has by itself."
    )
    return None if shares is None else Importance(heading, len(runs), shares, note)


def anova(
    columns: Mapping[str, Sequence[Setting]], seeds: Sequence[int], scores: Sequence[float]
) -> dict[str, float] | None:
    r"""Decompose the variance of a crossed study.

    .. math:: SS_k = \sum_i (\bar{y}_{k(i)} - \bar{y})^2, \qquad \sum_k SS_k + SS_{together} + SS_{seed} + SS_{rest} =
    SS

    with the mean over all runs of a setting's level. Source: Fisher 1925, "Statistical Methods for Research Workers".

    Args:
        columns: Value of each setting in each run.
        seeds: Seed of each run.
        scores: Metric of each run.

    Returns:
        Share of the variance by setting, :data:`INTERACTIONS`, ``seed`` and :data:`REST`, the greatest first; None
        where the study is not crossed.

    Example:
        y = 10 a + b, without any noise:

        >>> shares = anova({"a": [0, 0, 1, 1], "b": [0, 1, 0, 1]}, [0] * 4, [0.0, 1.0, 10.0, 11.0])
        >>> {name: round(share, 3) for name, share in shares.items()}
        {'a': 0.99, 'b': 0.01, 'together': 0.0, 'rest': 0.0}
    """
    combinations = list(zip(*columns.values(), strict=True)) if columns else [()] * len(scores)
    full = math.prod(len(set(values)) for values in columns.values())
    counts = Counter(combinations)
    if len(counts) != full or len(set(counts.values())) > 1:
        return None
    y = np.asarray(scores, dtype=np.float64)
    centred = y - y.mean()
    total = float((centred**2).sum())

    def sum_of_squares(levels: Sequence[object]) -> float:
        places = defaultdict(list)
        for place, level in enumerate(levels):
            places[level].append(place)
        return float(sum(len(some) * centred[some].mean() ** 2 for some in places.values()))

    shares = {key: sum_of_squares(values) / total for key, values in columns.items()}
    between = sum_of_squares(combinations) / total
    rest = 1.0 - between
    if len(columns) > 1:
        shares[INTERACTIONS] = between - sum(shares.values())
    per_seed = Counter(zip(combinations, seeds, strict=True))
    if len(set(seeds)) > 1 and len(per_seed) == full * len(set(seeds)) and len(set(per_seed.values())) == 1:
        shares["seed"] = sum_of_squares(seeds) / total
        rest -= shares["seed"]
    shares[REST] = rest
    clean = {name: max(0.0, share) for name, share in shares.items()}  # rounding
    return dict(sorted(clean.items(), key=lambda item: -item[1]))


def fanova(columns: Mapping[str, Sequence[Setting]], scores: Sequence[float]) -> dict[str, float] | None:
    """Decompose the variance of a random forest that was fitted to the runs (Hutter et al. 2014).

    Args:
        columns: Value of each setting in each run.
        scores: Metric of each run.

    Returns:
        Share of the variance by setting, the greatest first; None where it cannot be computed.
    """
    columns = {key: values for key, values in columns.items() if len(set(values)) > 1}
    spaces = {key: _space(values) for key, values in columns.items()}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize")
        for place, score in enumerate(scores):
            values = {key: _coded(columns[key][place], spaces[key]) for key in columns}
            study.add_trial(create_trial(params=values, distributions=spaces, value=score))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = FanovaImportanceEvaluator(n_trees=32, seed=0)
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return shares if all(map(math.isfinite, shares.values())) else None


def _space(values: Sequence[Setting]) -> BaseDistribution:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return CategoricalDistribution(sorted({shown(value) for value in values}))
    return FloatDistribution(min(numbers), max(numbers), log=min(numbers) > 0)


def _coded(value: Setting, space: BaseDistribution) -> str | float:
    return shown(value) if isinstance(space, CategoricalDistribution) else float(value or 0.0)
