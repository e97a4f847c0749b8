"""The result of a comparison in plain sentences: what to read first."""

from __future__ import annotations

import math

from gn_transfer.comparison.comparison import Comparison, Contrast, Group

MOST_CONTRASTS = 6
"""Contrasts that get a sentence of their own, those with the largest differences."""


def answer(comparison: Comparison) -> list[str]:
    """Say the result in sentences with their numbers.

    Args:
        comparison: The comparison.

    Returns:
        First the best group, and whether the second is clearly below it, then a sentence for each of the largest
        contrasts, then what the number of seeds allows.
    """
    groups = sorted(comparison.groups, key=lambda group: -group.mean)
    best = groups[0]
    if len(groups) == 1:
        return [f"{best.label} reaches {_reached(best)} ({comparison.metric}, {_seeds(best.n)})."]
    lines = [f"Best: {best.label} with {_reached(best)} ({comparison.metric}, {_seeds(best.n)})."]
    second = comparison.runner_up
    if second is not None and not (second.is_clear and second.difference < 0):
        lines = [
            f"No clear winner: {best.label} with {_reached(best)} against {second.group.label} with "
            f"{_reached(second.group)} ({_points(-second.difference)} points, {_of_difference(second, -1)}; "
            f"{comparison.metric}, {_seeds(second.test.pairs)})."
        ]
    lines += _no_better_than_guessing(comparison, groups)
    contrasts = sorted(comparison.contrasts, key=lambda contrast: -abs(contrast.difference))
    if not contrasts:
        return [*lines, f"Worst: {groups[-1].label} with {_reached(groups[-1])}."]
    lines += [_sentence(contrast) for contrast in contrasts[:MOST_CONTRASTS]]
    if more := len(contrasts[MOST_CONTRASTS:]):
        lines.append("One more contrast is in the table." if more == 1 else f"{more} more contrasts are in the table.")
    powerless = [contrast for contrast in contrasts if contrast.test.smallest_p > 0.05]
    if powerless:
        fewest = min(contrast.test.pairs for contrast in powerless)
        smallest = max(contrast.test.smallest_p for contrast in powerless)
        needed = math.ceil(math.log2(2 * len(contrasts) / 0.05))  # the smallest p of n pairs is 2 / 2^n
        lines.append(
            f"With {_seeds(fewest)} the exact paired test cannot give a p-value below {smallest:.2g}, whatever the "
            f"runs reach, and intervals of so few seeds are too narrow. With {_seeds(needed)} it can reach 0.05"
            + (f" for all {len(contrasts)} contrasts." if len(contrasts) > 1 else ".")
        )
    return lines


def _no_better_than_guessing(comparison: Comparison, groups: list[Group]) -> list[str]:
    """Name the groups that are not clearly above a model that always names the most frequent class."""
    guess = comparison.guess
    if guess is None:
        return []
    some = [group.label for group in groups if (group.mean if group.low is None else group.low) <= guess]
    if not some:
        return []
    return [
        f"{', '.join(some)} {'is' if len(some) == 1 else 'are'} not clearly better than always naming the most "
        f"frequent class ({100 * guess:.1f} %)."
    ]


def _sentence(contrast: Contrast) -> str:
    points = abs(100 * contrast.difference)
    direction = (
        f"{points:.1f} points {'above' if contrast.difference > 0 else 'below'}" if points >= 0.05 else "level with"
    )
    interval = _of_difference(contrast)
    test = "" if contrast.test.smallest_p > 0.05 else f", p {contrast.test.p:.2g}, after Holm {contrast.p_holm:.2g}"
    shown = "" if contrast.is_clear else " This is no clear difference."
    seeds = contrast.seeds
    ours, theirs = (100 * sum(group.by_seed[seed] for seed in seeds) / len(seeds) for group in contrast.sides)
    fewer = len(seeds) < max(group.n for group in contrast.sides)
    over = f" over the {_seeds(len(seeds))} that both have" if fewer else ""
    return (
        f"{contrast.group.label} is {direction} {contrast.against}: "
        f"{ours:.1f} % against {theirs:.1f} %{over} ({interval}{test}).{shown}"
    )


def _of_difference(contrast: Contrast, sign: int = 1) -> str:
    """Say the interval of a difference, or with the other sign."""
    if contrast.low is None or contrast.high is None:
        return "no interval from a single pair without predictions"
    low, high = sorted((sign * contrast.low, sign * contrast.high))
    return f"95 % interval {_points(low)} to {_points(high)}"


def _points(difference: float) -> str:
    return f"{100 * difference + 0.0:+.1f}"


def _reached(group: Group) -> str:
    interval = "" if group.low is None or group.high is None else f" [{100 * group.low:.1f}, {100 * group.high:.1f}]"
    return f"{100 * group.mean:.1f} %{interval}"


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"
