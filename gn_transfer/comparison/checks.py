"""What a reader must know beside a result: why runs cannot be compared, and what else than the settings differs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from gn_transfer.comparison.grouping import Grouping, shown
from gn_transfer.config import ConfigError, did_you_mean
from gn_transfer.report.runs import MAIN_METRICS, PREDICTIONS, Run

FEW_SEEDS = 6
"""Below so many seeds a bootstrap interval is too narrow and no sign-flip test reaches 0.05."""


def choose_metric(runs: Sequence[Run], asked: str | None) -> tuple[str, str]:
    """Choose the one metric that all runs are compared by.

    The test figure where every run has it from the same kind of checkpoint; else that of the last validation, since
    the best of many validations flatters noisy curves.

    Args:
        runs: At least one.
        asked: The user's choice, or None.

    Returns:
        A key of metrics.json, and what to say about it.

    Raises:
        ConfigError: Runs of different tasks, or the user's choice is none, or some runs lack it.
    """
    tasks = sorted({run.main_metric for run in runs})
    if len(tasks) > 1:
        some = next(run.name for run in runs if run.main_metric == "miou")
        raise ConfigError(
            f"some runs classify images and others segment them ({some}); their figures cannot be compared. Name the "
            "folders of either."
        )
    name, word = tasks[0], MAIN_METRICS[tasks[0]]
    test = f"test/{name}"
    lacking = [run.name for run in runs if test not in run.metrics]
    kinds = sorted({str(run.metrics.get("test/checkpoint")) for run in runs})
    if asked is not None:
        known = [f"{evaluation}/{name}" for evaluation in PREDICTIONS]
        if asked not in known:
            raise ConfigError(f"--metric {asked} is not one to compare by; {did_you_mean(asked, known)}.")
        without = [run.name for run in runs if asked not in run.metrics]
        if without:
            raise ConfigError(f"--metric {asked}: {_some(without)} have no such figure; run gn-transfer test on them.")
    if asked == test or (asked is None and not lacking and len(kinds) == 1):
        return test, f"{word} on the test split, of {' and '.join(kinds)}"
    if asked == f"best/val/{name}":
        return asked, f"{word} on validation in each run's best epoch, which flatters noisy curves"
    if asked is not None:
        reason = "as asked"
    elif len(lacking) == len(runs):
        reason = "no run has been tested"
    elif lacking:
        reason = f"{len(lacking)} of {len(runs)} runs have not been tested"
    else:
        reason = f"the runs were tested with different checkpoints: {', '.join(kinds)}"
    return f"val/{name}", f"{word} on validation after the last epoch ({reason}); choices made on it flatter it"


def incomparable(runs: Sequence[Run], metric: str) -> list[str]:
    """Say why runs are not comparable.

    Args:
        runs: At least one.
        metric: What they are compared by.

    Returns:
        One sentence per reason; empty where there is none. Steps of unequal size may end up to one optimizer step
        apart.
    """
    reasons = _differences(runs, "img_size", lambda run: run.settings.get("img_size"))
    reasons += _differences(runs, "the length of the short side", _short_side)
    reasons += _differences(runs, "the number of classes", lambda run: run.metrics.get("classes"))
    for name in ("border", "ignore_index"):  # which pixels of a segmentation count
        reasons += _differences(runs, name, lambda run, name=name: run.settings.get(name))  # type: ignore[misc]
    samples = [run.metrics["samples_seen"] for run in runs]
    if max(samples) - min(samples) > max(run.metrics["effective_batch_size"] for run in runs):
        reasons += _differences(runs, "samples_seen", lambda run: run.metrics["samples_seen"])
    if metric.startswith("test/"):
        reasons += _differences(runs, "the list of test images", lambda run: run.metrics.get("test_split"))
        return reasons
    for seed, same in sorted(_by_seed(runs).items()):
        found = _differences(same, f"the list of validation images of seed {seed}", _digest("val_split"))
        if found:
            return [*reasons, *found]
    return reasons


def too_many_contrasts(contrasts: int, smallest_p: float) -> list[str]:
    """Say so where Holm's correction leaves no contrast a chance.

    Args:
        contrasts: How many there are.
        smallest_p: The smallest p-value that one of them can reach.

    Returns:
        One sentence, or none.
    """
    if contrasts < 2 or contrasts * smallest_p <= 0.05:
        return []
    return [
        f"With Holm's correction over {contrasts} contrasts and this number of seeds, no p-value can be below "
        f"{min(1.0, contrasts * smallest_p):.2g}: choose fewer contrasts before looking (--where), or run more seeds."
    ]


def confounds(grouping: Grouping, without_predictions: Sequence[str]) -> list[str]:
    """Say what differs beside the settings that tell the groups apart.

    Args:
        grouping: The groups.
        without_predictions: Names of the runs that hold no predictions for the metric.

    Returns:
        One sentence each.
    """
    runs = [run for group in grouping.groups.values() for run in group]
    return [
        *_weights(grouping),
        *dict.fromkeys(f"{note}." for run in runs for note in run.notes),
        *_tied(grouping),
        *_folders(runs),
        *_training_images(runs),
        *_unequal_samples(runs),
        *_environments(runs),
        *_seeds(grouping),
        *_intervals(without_predictions, len(runs)),
    ]


def _weights(grouping: Grouping) -> Iterable[str]:
    sources: dict[tuple[str, str], list[str]] = defaultdict(list)
    for runs in grouping.groups.values():
        for run in runs:
            source = str(run.metrics.get("weights", "unknown")), str(run.metrics.get("weights_pretrained_on") or "")
            norm = str(run.settings["norm"])
            if norm not in sources[source]:
                sources[source].append(norm)
    if len(sources) == 1:
        [only] = sources
        yield f"All runs start {_start(*only)}."
        return
    said = "; ".join(f"{', '.join(norms)} {_start(*source)}" for source, norms in sources.items())
    yield f"The runs start from different weights: {said}."
    if any(source != "from scratch" for source, _ in sources):
        yield "There is one pretraining per norm, so the result is about these weights, not about norms in general."
    if len({pretrained_on for _, pretrained_on in sources if pretrained_on}) > 1:
        yield "The weights were trained on different images, which alone can make a difference."


def _start(source: str, pretrained_on: str) -> str:
    return (
        source
        if source == "from scratch"
        else f"from {source}" + (f" (pretrained on {pretrained_on})" if pretrained_on else "")
    )


def _tied(grouping: Grouping) -> Iterable[str]:
    for name in grouping.tied:
        if name in ("pretrained", "in_chans"):
            continue
        values: dict[str, list[str]] = defaultdict(list)
        for group, runs in grouping.groups.items():
            values[", ".join(sorted({shown(run.settings.get(name)) for run in runs}))].append(grouping.label(group))
        said = [
            f"{value} for {labels[0] if len(labels) == 1 else f'{len(labels)} groups'}"
            for value, labels in values.items()
        ]
        yield f"{name} differs too: {'; '.join(said)}."


def _folders(runs: Sequence[Run]) -> Iterable[str]:
    folders = sorted({run.data_root for run in runs})
    if len(folders) > 1:
        yield f"The images lay in different folders: {_some(folders)}. Make sure that they are the same."


def _training_images(runs: Sequence[Run]) -> Iterable[str]:
    for seed, same in sorted(_by_seed(runs).items()):
        if len({run.metrics.get("train_split") for run in same}) > 1:
            yield f"Runs of the same seed were trained on different lists of images (seed {seed} is one such)."
            return


def _unequal_samples(runs: Sequence[Run]) -> Iterable[str]:
    samples = sorted({run.metrics["samples_seen"] for run in runs})
    if len(samples) > 1:
        yield f"The runs were trained on between {samples[0]:,} and {samples[-1]:,} training samples."


def _environments(runs: Sequence[Run]) -> Iterable[str]:
    for name, said in (("device", "hardware"), ("threads", "number of threads"), ("git_commit", "commit")):
        values = sorted({str(run.metrics.get(name)) for run in runs})
        if len(values) > 1:
            yield f"The {said} differs: {_some(values)}; images/s and memory are not comparable between them."
    versions: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for package, number in run.versions.items():
            versions[package].add(number)
    different = [f"{package} {' and '.join(sorted(found))}" for package, found in versions.items() if len(found) > 1]
    if different:
        yield f"Versions differ: {', '.join(different)}."


def _seeds(grouping: Grouping) -> Iterable[str]:
    few, twice = [], []
    for group, runs in grouping.groups.items():
        seeds = {run.seed for run in runs}
        if len(seeds) < FEW_SEEDS:
            few.append(f"{grouping.label(group)} ({len(seeds)})")
        if len(seeds) < len(runs):
            twice.append(grouping.label(group))
    if few:
        yield (
            f"Fewer than {FEW_SEEDS} seeds: {_some(few)}. Intervals of these are too narrow, and no exact paired test "
            "of them can reach 0.05."
        )
    if twice:
        yield f"Some seeds were run more than once; their runs are averaged first: {_some(twice)}."


def _intervals(without: Sequence[str], runs: int) -> Iterable[str]:
    if without:
        yield (
            f"{len(without)} of {runs} runs hold no predictions per image for this metric; their intervals are "
            f"over seeds alone: {_some(without)}."
        )


def _differences(runs: Sequence[Run], name: str, value_of: Callable[[Run], object]) -> list[str]:
    by_value: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        by_value[str(value_of(run))].append(run.name)
    if len(by_value) == 1:
        return []
    rarest_last = sorted(by_value.items(), key=lambda item: -len(item[1]))
    return [f"{name} differs: " + "; ".join(f"{value} in {_some(names)}" for value, names in rarest_last)]


def _short_side(run: Run) -> object:
    """The size at which a segmentation is evaluated; None of a classification."""
    side = run.settings.get("short_side")
    return run.settings.get("img_size") if side == "null" else side


def _digest(name: str) -> Callable[[Run], object]:
    return lambda run: run.metrics.get(name)


def _by_seed(runs: Sequence[Run]) -> dict[int, list[Run]]:
    by_seed: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        by_seed[run.seed].append(run)
    return by_seed


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
