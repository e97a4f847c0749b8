"""Many runs side by side: tables with honest intervals and tests, figures, one page. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from gn_transfer.comparison.comparison import Comparison, Contrast, Group, compare
from gn_transfer.config import ConfigError
from gn_transfer.files import refuse_link

__all__ = ["Comparison", "Contrast", "Group", "compare", "write_report"]


def write_report(comparison: Comparison, output: Path) -> None:
    """Write a comparison as a page, tables and figures.

    Args:
        comparison: What :func:`compare` found.
        output: Folder for ``index.html``, ``table.md``, ``table.csv``, ``rows.csv``, ``report.json`` and ``figures/``;
            created where it is not there, an earlier report is replaced.

    Raises:
        ConfigError: ``output`` cannot be written to, or holds something that is no report.
    """
    from gn_transfer.comparison.page import write_files
    from gn_transfer.report.html import is_page

    try:
        if output.is_dir() and not is_page(output / "index.html"):
            # Figures come first, so a report that was interrupted has nothing else.
            others = sorted(path.name for path in output.iterdir() if path.name != "figures" and path.suffix != ".part")
            if others:
                raise ConfigError(
                    f"--output {output} exists and holds something that is no report ({', '.join(others[:3])}), which "
                    "could be lost; name a new folder."
                )
        refuse_link(output / "figures")
        (output / "figures").mkdir(parents=True, exist_ok=True)
        write_files(comparison, output)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written to ({error.strerror}); give another folder.") from error
