"""Two groups image by image: the classes in which they differ, and the images on which they disagree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from gn_transfer.comparison.comparison import Comparison, Group
from gn_transfer.report.images import find_image
from gn_transfer.report.predictions import SplitPredictions


@dataclass(frozen=True)
class Opinion:
    """What the runs of a group say of an image.

    Attributes:
        score: Mean score of the image over the runs: the share that were right, or the mean IoU.
        text: The same in a few words.
    """

    score: float
    text: str


@dataclass(frozen=True)
class Disagreement:
    """An image on which two groups differ.

    Attributes:
        path: Relative to the data's root.
        target: Its class; empty of a segmentation.
        first: What the first group says.
        second: What the second group says.
        file: Path of the image; None where it is not there any more.
    """

    path: str
    target: str
    first: Opinion
    second: Opinion
    file: Path | None


@dataclass(frozen=True)
class ClassDifference:
    """Two groups, class by class.

    Attributes:
        first: The group that is measured.
        second: What it is measured against.
        difference: Accuracy, or IoU, of the first less that of the second, by class.
        images: How many images both were evaluated on.
        disagreements: Those on which they differ most, the first group's gains before its losses.
    """

    first: Group
    second: Group
    difference: dict[str, float]
    images: int
    disagreements: list[Disagreement]


def choose_pair(comparison: Comparison) -> tuple[Group, Group] | None:
    """Choose the two groups worth a close look: of the contrasts the one with the greatest difference, else the best
    and the worst group.

    Args:
        comparison: The comparison.

    Returns:
        The better-placed group and what it is measured against; None with a single group.
    """
    if comparison.contrasts:
        widest = max(comparison.contrasts, key=lambda contrast: abs(contrast.difference))
        return widest.group, widest.baseline
    if len(comparison.groups) < 2:
        return None
    ordered = sorted(comparison.groups, key=lambda group: group.mean)
    return ordered[-1], ordered[0]


def class_difference(
    first: Group, second: Group, predictions: Mapping[Path, SplitPredictions], most: int = 8
) -> ClassDifference | None:
    """Compare two groups image by image.

    Args:
        first: The group that is measured.
        second: What it is measured against.
        predictions: Of each run that has them.
        most: How many images to show for either side.

    Returns:
        None where they have no image in common.
    """
    ours, theirs = _opinions(first, predictions), _opinions(second, predictions)
    common = [key for key in ours if key in theirs]
    if not common:
        return None
    paths = {path for path, _ in common}
    of_first, of_second = (_by_class(group, predictions, paths) for group in (first, second))
    difference = {name: value - of_second[name] for name, value in of_first.items() if name in of_second}
    ordered = sorted(common, key=lambda key: (theirs[key].score - ours[key].score, key))
    gains = [key for key in ordered[:most] if ours[key].score > theirs[key].score]
    losses = [key for key in ordered[::-1][:most] if ours[key].score < theirs[key].score]
    roots = [Path(run.data_root) for group in (first, second) for run in group.runs[:1]]
    shown = [
        Disagreement(path, target, ours[path, target], theirs[path, target], find_image(path, roots))
        for path, target in [*gains, *losses]
    ]
    return ClassDifference(first, second, difference, len(common), shown)


def _by_class(group: Group, predictions: Mapping[Path, SplitPredictions], paths: Set[str]) -> dict[str, float]:
    """Average the metric of every class on some images over the runs of a group that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for run in group.runs:
        if run.folder in predictions:
            for name, value in predictions[run.folder].by_class(paths).items():
                values[name].append(value)
    return {name: fmean(some) for name, some in values.items()}


def _opinions(group: Group, predictions: Mapping[Path, SplitPredictions]) -> dict[tuple[str, str], Opinion]:
    found: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for run in group.runs:
        if run.folder in predictions:
            for path, target, score, said in predictions[run.folder].opinions():
                found[path, target].append((score, said))
    return {key: Opinion(fmean(score for score, _ in some), _text(key[1], some)) for key, some in found.items()}


def _text(target: str, opinions: Sequence[tuple[float, str]]) -> str:
    """Say how many runs were right and what most of them said, or how well the pixels were found."""
    if not target:
        return f"IoU {100 * fmean(score for score, _ in opinions):.0f} %"
    right = sum(said == target for _, said in opinions)
    [(most, _)] = Counter(said for _, said in opinions).most_common(1)
    return f"{right}/{len(opinions)}" + (f", {most}" if most != target else "")
