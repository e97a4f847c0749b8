"""Many runs side by side: tables with honest intervals and tests, figures, one page. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gn_transfer.comparison.comparison import Comparison, Contrast, Group, compare
from gn_transfer.config import ConfigError

__all__ = ["Comparison", "Contrast", "Group", "compare", "write", "write_report"]


def write_report(
    runs: Sequence[Path],
    output: Path,
    *,
    baseline: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    metric: str | None = None,
    title: str = "Comparison of runs",
    notes: Sequence[str] = (),
    force: bool = False,
) -> Comparison:
    """Compare runs and write the report.

    Args:
        runs: Run folders, or folders that hold some.
        output: Folder for ``index.html``, ``table.md``, ``table.csv``, ``rows.csv``, ``report.json`` and ``figures/``;
            created where it is not there, files of the same name are replaced.
        baseline: See :func:`compare`.
        where: See :func:`compare`.
        metric: See :func:`compare`.
        title: Heading of the report.
        notes: What the caller has to say beside the result.
        force: Compare what is not comparable, and say so.

    Returns:
        The report; :func:`gn_transfer.comparison.tables.as_text` gives it as text, ``exit_code`` is 3 where some
        folders could not be used.

    Raises:
        ConfigError: See :func:`compare`; or ``output`` cannot be written to.
    """
    report = compare(runs, baseline=baseline, where=where, metric=metric, title=title, notes=notes, force=force)
    write(report, output)
    return report


def write(report: Comparison, output: Path) -> None:
    """Write a report; see :func:`write_report`.

    Args:
        report: The report.
        output: Folder, created where it is not there.

    Raises:
        ConfigError: It cannot be written to, or holds something that is no report.
    """
    from gn_transfer.comparison.page import write_files

    if output.is_dir() and not (output / "report.json").is_file():
        others = sorted(path.name for path in output.iterdir() if path.name != "figures")
        if others:
            raise ConfigError(
                f"--output {output} exists and holds something that is no report ({', '.join(others[:3])}), which "
                "could be lost; name a new folder."
            )
    try:
        (output / "figures").mkdir(parents=True, exist_ok=True)
        write_files(report, output)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written to ({error.strerror}); give another folder.") from error
