"""Two groups image by image: the classes in which they differ, and the images on which they disagree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gn_transfer.comparison.comparison import Comparison, Group
from gn_transfer.report.images import find_image
from gn_transfer.report.runs import Predictions


@dataclass(frozen=True)
class Opinion:
    """What the runs of a group say of an image.

    Attributes:
        runs: Number of runs that were evaluated on it.
        right: How many were right.
        said: The class that most of them gave.
    """

    runs: int
    right: int
    said: str

    @property
    def share(self) -> float:
        """Share of the runs that were right."""
        return self.right / self.runs


@dataclass(frozen=True)
class Disagreement:
    """An image on which two groups differ.

    Attributes:
        path: Relative to the data's root.
        target: Its class.
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
        difference: Accuracy of the first less that of the second, by class.
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
    first: Group, second: Group, predictions: Mapping[Path, Predictions], most: int = 8
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
    by_class: dict[str, list[float]] = defaultdict(list)
    for key in common:
        by_class[key[1]].append(ours[key].share - theirs[key].share)
    difference = {name: sum(values) / len(values) for name, values in by_class.items()}
    ordered = sorted(common, key=lambda key: (theirs[key].share - ours[key].share, key))
    gains = [key for key in ordered[:most] if ours[key].share > theirs[key].share]
    losses = [key for key in ordered[::-1][:most] if ours[key].share < theirs[key].share]
    roots = [Path(run.data_root) for group in (first, second) for run in group.runs[:1]]
    shown = [
        Disagreement(path, target, ours[path, target], theirs[path, target], find_image(path, roots))
        for path, target in [*gains, *losses]
    ]
    return ClassDifference(first, second, difference, len(common), shown)


def _opinions(group: Group, predictions: Mapping[Path, Predictions]) -> dict[tuple[str, str], Opinion]:
    said: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for run in group.runs:
        stored = predictions.get(run.folder)
        if stored is not None:
            for path, target, predicted in zip(stored.paths, stored.targets, stored.predicted, strict=True):
                said[path, target][predicted] += 1
    return {
        (path, target): Opinion(counts.total(), counts[target], counts.most_common(1)[0][0])
        for (path, target), counts in said.items()
    }
