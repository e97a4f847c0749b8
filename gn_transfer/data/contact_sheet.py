"""A contact sheet: images with their labels, as one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Line: TypeAlias = str | tuple[str, tuple[int, ...]]
"""A line of text; with a color (RGB) it stands behind a square of that color."""

_LINE = 15
_GAP = 6
_TILE = (96, 256)  # least and greatest side of a tile; smaller images are magnified by whole numbers


def contact_sheet(
    images: Sequence[tuple[npt.NDArray[np.uint8], Sequence[Line]]], columns: int = 6
) -> npt.NDArray[np.uint8]:
    """Lay images out in rows.

    Args:
        images: Square pixels, shape ``(side, side, 3)`` or ``(side, side, 1)``, and the lines below each.
        columns: Images in a row.

    Returns:
        Pixels, shape ``(H, W, 3)``.
    """
    side = images[0][0].shape[0]
    tile = min(_TILE[1], side * max(1, -(-_TILE[0] // side)))
    lines = max(len(caption) for _, caption in images)
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    cell_height, cell_width = tile + lines * _LINE + _GAP, tile + _GAP
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), _font()
    for place, (pixels, caption) in enumerate(images):
        top, left = _GAP + place // columns * cell_height, _GAP + place % columns * cell_width
        interpolation = cv2.INTER_AREA if side > tile else cv2.INTER_NEAREST
        shown = cv2.resize(
            np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels, (tile, tile), interpolation=interpolation
        )
        sheet.paste(Image.fromarray(np.asarray(shown, dtype=np.uint8)), (left, top))
        for number, line in enumerate(caption):
            text, indent = (line, 0) if isinstance(line, str) else (line[0], _LINE)
            y = top + tile + number * _LINE
            if not isinstance(line, str):
                pen.rectangle((left, y + 2, left + _LINE - 5, y + _LINE - 3), fill=line[1], outline="grey")
            while pen.textlength(text, font) > tile - indent and len(text) > 4:
                text = text[:-2].rstrip(".") + "."
            pen.text((left + indent, y), text, "black", font)
    return np.asarray(sheet)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with many alphabets where matplotlib brings one, else Pillow's own."""
    try:
        from matplotlib import font_manager
    except ModuleNotFoundError:  # installed for prediction alone
        return ImageFont.load_default(11)
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 11)
