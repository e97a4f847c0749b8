"""Pages: their templates, and writing them without replacing what is not ours."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gn_transfer.config import ConfigError
from gn_transfer.files import write_text

_GENERATOR = 'content="gn-transfer '  # in the head of our pages


def environment(*folders: Path) -> Environment:
    """Create the environment of a page's template.

    Args:
        *folders: Where templates lie, beside those here.
    """
    return Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def save_page(output: Path, html: str) -> Path:
    """Write a page; only one of ours is replaced.

    Args:
        output: File to write.
        html: The page.

    Returns:
        The file.

    Raises:
        ConfigError: It cannot be written, or it is something else than a page of ours.
    """
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; name a file, such as {output / 'report.html'}.")
    try:
        if output.exists() and not is_page(output):
            raise ConfigError(f"--output {output} exists and is no page of gn-transfer; name another file.")
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, html)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written ({error.strerror}); name another file.") from error
    return output


def is_page(file: Path) -> bool:
    """Tell whether a file is a page of ours."""
    if not file.is_file():  # reading a pipe would never end
        return False
    with file.open(encoding="utf-8", errors="replace") as page:
        return _GENERATOR in page.read(999)
