"""The result of a comparison in plain sentences: what to read first."""

from __future__ import annotations

from gn_transfer.comparison.comparison import Comparison, Contrast, Group

MOST_CONTRASTS = 6
"""Contrasts that get a sentence of their own, those with the largest differences."""


def answer(comparison: Comparison) -> list[str]:
    """Say the result in sentences with their numbers.

    Args:
        comparison: The comparison.

    Returns:
        First the best group, then a sentence for each of the largest contrasts, then what the number of seeds allows.
    """
    groups = sorted(comparison.groups, key=lambda group: -group.mean)
    best = groups[0]
    if len(groups) == 1:
        return [f"{best.label} reaches {_reached(best)} ({comparison.metric}, {_seeds(best.n)})."]
    lines = [f"Best: {best.label} with {_reached(best)} ({comparison.metric}, {_seeds(best.n)})."]
    contrasts = sorted(comparison.contrasts, key=lambda contrast: -abs(contrast.difference))
    if not contrasts:
        return [*lines, f"Worst: {groups[-1].label} with {_reached(groups[-1])}."]
    lines += [_sentence(contrast) for contrast in contrasts[:MOST_CONTRASTS]]
    if len(contrasts) > MOST_CONTRASTS:
        lines.append(f"The other {len(contrasts) - MOST_CONTRASTS} contrasts are in the table.")
    powerless = [contrast for contrast in contrasts if contrast.test.smallest_p > 0.05]
    if powerless:
        fewest = min(contrast.test.pairs for contrast in powerless)
        smallest = max(contrast.test.smallest_p for contrast in powerless)
        lines.append(
            f"With {_seeds(fewest)} the exact paired test cannot give a p-value below {smallest:.2g}, whatever the "
            "runs reach. Read the intervals, or run at least 6 seeds."
        )
    return lines


def _sentence(contrast: Contrast) -> str:
    points = abs(100 * contrast.difference)
    direction = (
        f"{points:.1f} points {'above' if contrast.difference > 0 else 'below'}" if points >= 0.05 else "level with"
    )
    interval = f"95 % interval {100 * contrast.low:+.1f} to {100 * contrast.high:+.1f}"
    test = "" if contrast.test.smallest_p > 0.05 else f", p {contrast.test.p:.2g}, after Holm {contrast.p_holm:.2g}"
    shown = "" if contrast.low > 0 or contrast.high < 0 else " This is no clear difference."
    return (
        f"{contrast.group.label} is {direction} {contrast.against}: "
        f"{100 * contrast.group.mean:.1f} % against {100 * contrast.baseline.mean:.1f} % ({interval}{test}).{shown}"
    )


def _reached(group: Group) -> str:
    interval = "" if group.low is None or group.high is None else f" [{100 * group.low:.1f}, {100 * group.high:.1f}]"
    return f"{100 * group.mean:.1f} %{interval}"


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"
