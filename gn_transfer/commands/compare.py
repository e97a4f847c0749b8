"""The command ``compare``: runs side by side. Imports no torch."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from gn_transfer.commands.parsing import Parser
from gn_transfer.config import ConfigError, printable
from gn_transfer.files import spreadsheet_cell


def run(arguments: Sequence[str]) -> int:
    """Run ``gn-transfer compare``.

    Args:
        arguments: The words behind the command.

    Returns:
        Exit code: 0, or 3 where some runs could not be used.

    Raises:
        ConfigError: The user's mistake.
    """
    options = create_parser().parse_args(arguments)

    from gn_transfer.comparison import compare, write_report
    from gn_transfer.comparison.tables import as_dict, as_text, group_records
    from gn_transfer.report.runs import read_study

    title, notes = read_study(options.runs) or ("Comparison of runs", [])

    report = compare(
        options.runs,
        baseline=None if options.baseline is None else parse_settings("--baseline", options.baseline),
        where=None if options.where is None else parse_settings("--where", options.where),
        metric=options.metric,
        title=options.title or title,
        notes=notes,
        force=options.force,
    )
    if options.format == "json":
        print(json.dumps(as_dict(report), indent=2))
    elif options.format == "csv":
        rows = group_records(report)
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows(map(spreadsheet_cell, row) for row in (rows[0], *(row.values() for row in rows)))
    else:
        print(as_text(report, shutil.get_terminal_size().columns if sys.stdout.isatty() else None), end="")
    if options.output is not None:
        write_report(report, options.output)
        print(f"page       {options.output / 'index.html'}", file=sys.stderr)
    if report.problems:
        print(f"{len(report.problems)} of {len(report.problems) + len(report.runs)} runs left out:", file=sys.stderr)
        for problem in report.problems:
            print(printable(f"  {problem.folder}: {problem.reason}"), file=sys.stderr)
    return report.exit_code


def create_parser() -> Parser:
    """Create the parser of the command."""
    parser = Parser(
        prog="gn-transfer compare",
        description="Compare finished runs: groups by what differs, intervals, exact paired tests, figures, one page.",
    )
    parser.add_argument("runs", metavar="RUNS", nargs="+", type=Path, help="run folders, or folders that hold some")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write index.html, tables, report.json and figures there"
    )
    parser.add_argument(
        "--format", choices=["table", "json", "csv"], default="table", help="what goes to standard output"
    )
    parser.add_argument(
        "--baseline",
        metavar="KEY=VALUE[,...]",
        help="what the others are tested against, paired by seed (default norm=bn where the norm differs)",
    )
    parser.add_argument("--where", metavar="KEY=VALUE[|VALUE...][,...]", help="compare only runs with these settings")
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="test/acc1, val/acc1 or best/val/acc1, miou of segmentations (default: test where all runs have it)",
    )
    parser.add_argument("--title", help="heading of the page (default: that of the study)")
    parser.add_argument("--force", action="store_true", help="compare what is not comparable, and say so on the page")
    return parser


def parse_settings(option: str, text: str) -> dict[str, str]:
    """Read ``--baseline`` or ``--where``.

    Args:
        option: Its name, for the message.
        text: ``KEY=VALUE``, several with commas between.

    Returns:
        Values by key.

    Raises:
        ConfigError: It is not of this form.

    Example:
        >>> parse_settings("--baseline", "norm=bn,batch_size=1")
        {'norm': 'bn', 'batch_size': '1'}
    """
    found = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise ConfigError(f"{option} {text} is not understood; write KEY=VALUE, for example norm=bn.")
        found[key.strip()] = value.strip()
    return found
