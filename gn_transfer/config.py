"""What every part of the package shares: the norms, the user's errors, the built-in configs. No torch here."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

Norm = Literal["bn", "bn_frozen", "bn_sync", "gn", "gn_ws", "bn_ws", "ln", "in", "none"]
"""The ``norm`` option: which normalization the model has, and whether its convolutions are weight-standardized."""

NORMS: tuple[Norm, ...] = get_args(Norm)

DecoderName = Literal["unet", "fpn", "deeplabv3plus", "upernet"]
"""The ``model.decoder`` option: what turns the feature maps of a backbone into a segmentation."""

STRIDE = 32
"""Sides of the images of a segmentation are multiples of it: the last feature map of a backbone is so much smaller."""


class ConfigError(ValueError):
    """The user's mistake or a missing input: the message says what is wrong, the value got and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def shortened(value: object) -> str:
    """Write any value for a message, however large it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a {type(value).__name__}"


def printable(text: str) -> str:
    """Write what a terminal would obey, and bytes that are no text, as escapes; line breaks and tabs stay.

    Example:
        >>> printable("two\\x1b[31m.jpg")
        'two\\\\x1b[31m.jpg'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def markdown_text(text: str) -> str:
    """Write a name of someone else for a line or a cell of Markdown: no markup, link, image or further cell.

    Example:
        >>> markdown_text("a|b ![x](http://y) <img>")
        'a\\\\|b ![x]\\\\(http://y) &lt;img>'
    """
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|").replace("](", "]\\(")


def code_span(text: str) -> str:
    """Write a name of someone else as code in a line of Markdown.

    Example:
        >>> code_span("a` ![x](http://y)")
        "`a' ![x](http://y)`"
    """
    plain = " ".join(text.split()).replace("`", "'")
    return f"`{plain}`"


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Name the allowed values, the likeliest first.

    Args:
        value: What the user wrote.
        allowed: What could have been written.

    Returns:
        ``"did you mean 'gn_ws'? Allowed: bn, gn, gn_ws"`` or, where nothing is near, only the list.

    Example:
        >>> did_you_mean("gnws", ["bn", "gn_ws"])
        "did you mean 'gn_ws'? Allowed: bn, gn_ws"
    """
    names = list(allowed)
    lower = {name.lower(): name for name in names}
    near = [lower[name] for name in difflib.get_close_matches(value.lower(), lower, n=1)]
    return f"did you mean {near[0]!r}? Allowed: {', '.join(names)}" if near else f"allowed: {', '.join(names)}"


def builtin_configs() -> dict[str, Path]:
    """Find the recipes that ship with the package.

    Returns:
        File name (``pets_gnws.yaml``) to path; from the wheel, or from ``configs/`` of a source checkout.
    """
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return {path.name: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def find_config(name: str) -> Path:
    """Resolve ``--config``: a path, or the bare name of a built-in config with or without ``.yaml``.

    Args:
        name: What stood behind ``--config``.

    Returns:
        Path of an existing file; a path wins over a built-in name.

    Raises:
        ConfigError: Neither a file nor a built-in config.
    """
    path = Path(name)
    if path.is_file():
        return path
    configs = builtin_configs()
    for candidate in (name, f"{name}.yaml"):
        if candidate in configs:
            return configs[candidate]
    raise ConfigError(f"--config {name}: no such file and no built-in config; {did_you_mean(name, configs)}.")


def check_range(
    key: str, value: float, *, low: float, high: float = math.inf, open_low: bool = False, open_high: bool = True
) -> None:
    """Refuse a number outside an interval.

    Args:
        key: Configuration key of the number, for the message.
        value: The number.
        low: Lower end of the interval.
        high: Upper end.
        open_low: The lower end itself is not allowed.
        open_high: The upper end itself is not allowed.

    Raises:
        ConfigError: The number is outside the interval or NaN.
    """
    below = value <= low if open_low else value < low
    above = value >= high if open_high else value > high
    if below or above or math.isnan(value):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ConfigError(f"{key}={value} is out of range; use a number in {interval}.")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that there is no memory left, on a GPU or on the machine."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )
