"""Figures of a page as SVG that takes its ink from the page, with texts that appear under the pointer."""

from __future__ import annotations

import io
import re
from typing import Any, NamedTuple

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.text import Text

INK = "#0a0b0c"
"""Becomes the color of the page's text."""

COLORS = ("#2f7ed8", "#e0702f", "#2ca36b", "#c0529d", "#8f7ae0", "#a98a1c", "#d1495b", "#3c9fb0", "#8a8a8a")
"""Of medium lightness: readable on white and on near-black."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.18,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
"""Settings of matplotlib for figures of a page."""

_HOVER = "hover:"
_ON_LINES = "onlines"


class PageFigure(NamedTuple):
    """A figure of the page.

    Attributes:
        name: Name of its file.
        heading: Its heading.
        svg: The drawing.
        caption: What is seen in it.
    """

    name: str
    heading: str
    svg: str
    caption: str


def hover(artist: Artist, text: str) -> None:
    """Let a text appear when the pointer rests on a part of a figure."""
    artist.set_gid(_HOVER + text)


def on_lines(artist: Artist) -> None:
    """Give a text that lines run behind a rim of the page's color."""
    artist.set_gid(_ON_LINES)


def as_svg(figure: Figure, name: str) -> str:
    """Write a figure as an ``<svg>`` element that fills its place, without random parts.

    Args:
        figure: The figure, made under :data:`STYLE`.
        name: Its name on the page, where it is unique.
    """
    for text in figure.findobj(Text):
        if not text.get_text().startswith("$\\mathdefault"):  # a number of an axis; in a name, a dollar is a dollar
            text.set_parse_math(False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = svg.replace(f'id="{_ON_LINES}"', f'class="{_ON_LINES}"')
    svg = re.sub(rf'<g id="{_HOVER}([^"]*)">', r'<g class="hover"><title>\1</title>', svg)
    svg = re.sub(r"\bid=\"([\w.]+)\"", rf'id="{name}-\1"', svg)  # ids are shared by all figures of a page
    svg = re.sub(r"(url\(#|xlink:href=\"#)", rf"\1{name}-", svg)
    width = float(re.search(r'<svg [^>]*? width="([\d.]+)pt"', svg)[1])  # type: ignore[index]
    limits = f'style="min-width: {0.6 * width:.0f}pt; max-width: {width:.0f}pt"'  # between, texts can be read
    return re.sub(r'(<svg [^>]*?) width="[\d.]+pt"', rf"\1 {limits}", svg, count=1)
