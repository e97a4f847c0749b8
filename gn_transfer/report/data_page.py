"""The page of a data set: labels that are likely wrong, copies, leaks between splits, files that are not sound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gn_transfer.report.html import environment
from gn_transfer.report.images import find_image, thumbnail
from gn_transfer.report.sentences import percent
from gn_transfer.report.wrong_labels import WrongLabel

if TYPE_CHECKING:
    from gn_transfer.data.check import CheckResult
    from gn_transfer.data.duplicates import Inspected

MOST = 60
"""Entries of a section that the page shows."""

_MOST_TOGETHER = 6


class _Tile(NamedTuple):
    """An image and the lines below it; the first is in bold type."""

    address: str | None
    path: str
    lines: list[str]


class _Section(NamedTuple):
    """Groups of images that belong together, under a heading."""

    heading: str
    text: str
    groups: list[list[_Tile]]
    more: int


def render_data_page(
    title: str, root: Path, result: CheckResult, wrong: Sequence[WrongLabel], facts: Sequence[tuple[str, str]]
) -> str:
    """Compose the page of a check as HTML.

    Args:
        title: Its heading.
        root: What the paths of the images are relative to.
        result: What the check found.
        wrong: The labels that are likely wrong.
        facts: Rows of the table that the command prints.
    """
    answer = [
        *result.problems,
        *result.warnings,
        *([] if result.problems or result.warnings else ["Nothing stands in the way of a training."]),
    ]
    sections = [section for section in _sections(root, result, wrong) if section.groups]
    return (
        environment()
        .get_template("data_check.html.j2")
        .render(title=title, answer=answer, sections=sections, facts=facts, root=root, version=version("gn-transfer"))
    )


def _sections(root: Path, result: CheckResult, wrong: Sequence[WrongLabel]) -> Iterator[_Section]:
    def tile(file: Inspected, *lines: str) -> _Tile:
        return _Tile(thumbnail(find_image(file.path, [root])), file.path, [file.split, *lines])

    def section(heading: str, text: str, groups: list[list[_Tile]], found: int) -> _Section:
        return _Section(heading, text, groups, found - len(groups))

    def together(group: Sequence[Inspected]) -> list[_Tile]:
        tiles = [tile(file) for file in group[:_MOST_TOGETHER]]
        if more := len(group) - len(tiles):
            tiles[-1].lines.append(f"and {more:,} more")
        return tiles

    yield section(
        "Likely wrong labels",
        "Runs that were not trained on these images gave another class with the probability that they usually give to "
        "images of that class. The most certain ones come first. Look at each: the models may be wrong.",
        [
            [
                _Tile(
                    thumbnail(find_image(one.path, [root])),
                    one.path,
                    [
                        f"labeled {one.label} ({percent(one.prob_label)})",
                        f"likely {one.suggested} ({percent(one.prob_suggested)})",
                        f"{one.agreeing} of {one.runs} runs",
                    ],
                )
            ]
            for one in wrong[:MOST]
        ],
        len(wrong),
    )
    leaks = result.leaks
    yield section(
        "The same image in two splits",
        "Exactly or nearly: the accuracy measured there is too high. Remove one of the two.",
        [together(group) for group in leaks[:MOST]],
        len(leaks),
    )
    leaking = {tuple(file.path for file in group) for group in leaks}
    same = [group for group in result.duplicates if tuple(file.path for file in group) not in leaking]
    yield section(
        "The same pixels",
        "Files whose decoded pixels are equal.",
        [together(group) for group in same[:MOST]],
        len(same),
    )
    near = [pair for pair in result.near_duplicates if (pair[0].path, pair[1].path) not in leaking]
    yield section(
        "Near-duplicates",
        "Pairs that show the same image in another size or quality, or with a watermark.",
        [[tile(one), tile(other, f"{apart:.1f} of 255 grey levels apart")] for one, other, apart in near[:MOST]],
        len(near),
    )
    suspicious = result.suspicious
    yield section(
        "Suspicious files",
        "They can be decoded, but are not what they seem.",
        [[tile(file, file.warning)] for file in suspicious[:MOST]],
        len(suspicious),
    )
    unreadable = result.unreadable
    yield section(
        "Files that cannot be decoded",
        "Repair or remove them.",
        [[tile(file, file.error)] for file in unreadable[:MOST]],
        len(unreadable),
    )
