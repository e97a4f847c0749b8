"""The command ``report``: one run as a page. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gn_transfer.commands.parsing import Parser
from gn_transfer.config import printable


def run(arguments: Sequence[str]) -> int:
    """Run ``gn-transfer report``.

    Args:
        arguments: The words behind the command.

    Returns:
        Exit code.

    Raises:
        ConfigError: The user's mistake.
    """
    options = create_parser().parse_args(arguments)

    from gn_transfer.report.page import choose_run_folder, write_page

    folder = choose_run_folder(options.run)
    if folder != options.run:
        print(f"run        {printable(str(folder))}")
    page = write_page(folder, options.output or folder / "report.html")
    print(f"page       {printable(str(page))}")
    return 0


def create_parser() -> Parser:
    """Create the parser of the command."""
    parser = Parser(
        prog="gn-transfer report",
        description="Write one run as a page: curves, accuracy by class, confusion matrix, calibration, errors, "
        "training images as the model saw them, plan and provenance.",
    )
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="a run's folder, runs/CONFIG/RUN; of a folder with several, the newest"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="HTML file to write (default: report.html in the run's folder)"
    )
    return parser
