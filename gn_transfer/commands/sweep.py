"""The command ``sweep``: plan a study, have workers run its trials, and write the report."""

from __future__ import annotations

import argparse
import re
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from gn_transfer.commands import evaluate
from gn_transfer.commands.class_paths import typed_classes
from gn_transfer.commands.fit import fit
from gn_transfer.commands.parsing import Parser
from gn_transfer.commands.study_checks import check_classes, check_keys, check_values, print_plan, quiet_log
from gn_transfer.commands.training_cli import parsed
from gn_transfer.config import ConfigError, find_config
from gn_transfer.data.workers import core_count
from gn_transfer.files import read_json, refuse_link, write_json
from gn_transfer.report.runs import STUDY
from gn_transfer.study.database import may_exist
from gn_transfer.study.definition import Study, parse_value, read_study
from gn_transfer.study.planning import Outcome, Planned, foresee
from gn_transfer.study.runner import StudyRunner
from gn_transfer.study.store import Store
from gn_transfer.study.trials import Trial, short_key
from gn_transfer.study.worker import StudyContext
from gn_transfer.training.run_folder import RunFolder


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: The words behind the command.

    Returns:
        Exit code: 0 done, 3 where trials failed.

    Raises:
        ConfigError: The user's mistake.
        KeyboardInterrupt: Interrupted; the same command goes on.
    """
    options, overrides = _parse(arguments)
    study = read_study(
        find_config(options.config),
        name=options.name,
        overrides=overrides,
        allow_class_path=options.allow_class_path,
    )
    study = replace(study, typed_classes=typed_classes(arguments))
    check_classes(study, overrides)
    check_keys(study)
    foreseen = foresee(study)
    check_values(study, foreseen.trials)
    console = Console(highlight=False)
    known = {**study.settings, **overrides}
    train = partial(train_trial, typed=study.typed_classes)
    context = StudyContext(study, Path(known.get("trainer.default_root_dir") or "."), train, test_trial)
    folder = context.root / "runs" / study.name
    url = options.storage or f"sqlite:///{folder / 'study.db'}"
    if options.dry_run:
        known_before = (folder / "study.db").is_file() if options.storage is None else may_exist(options.storage)
        outcomes = outcomes_so_far(url, study, foreseen.trials) if known_before else {}
        planned = foresee(study, outcomes)
        ended = {trial.name for trial in planned.trials if trial.name in outcomes and outcomes[trial.name].ended}
        print_plan(console, study, planned.trials, options.workers, ended)
        return 0
    for name in ("", STUDY, "report", "report/figures", *(() if options.storage else ("study.db", "study.db.lock"))):
        refuse_link(folder / name)
    store = Store(url, study.name)
    kept = context.root / "checkpoints" / study.name
    runs = chain(folder.glob("*/metrics.json"), kept.glob("*/*.ckpt"))
    if not store.knows_study() and (found := next(runs, None)):
        raise ConfigError(
            f"{found.parent} is of a run, and the database of the study {study.name} knows nothing of it; move "
            f"{found.parent.parent} away, or choose another --name."
        )
    store.begin(study.shared_settings())
    folder.mkdir(parents=True, exist_ok=True)
    if (told := read_json(folder / STUDY)).pop("final_runs", None):  # there may be others now
        write_json(folder / STUDY, told)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # batch systems ask in this way
    try:
        planned, outcomes = StudyRunner(store, url, context, options.workers, console).run(options.retry_failed)
    finally:
        signal.signal(signal.SIGTERM, before)
        store.close()
    return _conclude(console, context, planned, outcomes)


def outcomes_so_far(url: str, study: Study, trials: Sequence[Trial]) -> dict[str, Outcome]:
    """Read what became of the trials of a study.

    Raises:
        ConfigError: The study was begun with other settings, or a trial was.
    """
    store = Store(url, study.name)
    try:
        if not store.knows_study():
            return {}
        store.begin(study.shared_settings())
        store.check(trials)
        return store.outcomes()
    finally:
        store.close()


def train_trial(
    arguments: Sequence[str], run: RunFolder, facts: Mapping[str, Any], typed: Collection[str] = ()
) -> None:
    """Train one configuration in its own folder, without figures: the runs are looked at together."""
    with parsed("fit", arguments, quiet_log(), typed=typed) as cli:
        cli.arguments.config_name = run.name.partition("/")[0]
        fit(cli, run=run, facts=facts, figures=False)


def test_trial(arguments: Sequence[str]) -> None:
    """Test one checkpoint."""
    evaluate.run("test", arguments, quiet_log())


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    options, rest = create_parser().parse_known_args(arguments)
    if not 1 <= options.workers <= core_count():
        raise ConfigError(f"--workers {options.workers}: use 1 to {core_count()}, the cores of this machine.")
    return options, dict(_pairs(rest))


def create_parser() -> Parser:
    """Create the parser of the command."""
    parser = Parser(
        prog="gn-transfer sweep",
        description="Run a study over configuration keys. A killed study goes on with the same command.",
        epilog="Any other --KEY VALUE holds in every trial (--data.root PATH); --samples, --seeds, --test and "
        "--keep replace those of the file.",
    )
    parser.add_argument("--config", "-c", required=True, help="a study: a path, or the name of a built-in one")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the cores (default 1)")
    parser.add_argument("--storage", help="SQLAlchemy URL of the database (default runs/STUDY/study.db)")
    parser.add_argument("--name", help="name of the study and of its folder (default: the file's)")
    parser.add_argument("--retry_failed", action="store_true", help="run trials again that have failed")
    parser.add_argument(
        "--allow_class_path", action="store_true", help="let the file name any class; it can then run any code"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the trials and how long they will take, and stop")
    return parser


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("--"):
            raise ConfigError(f"sweep: {word!r} belongs to no option; write --KEY VALUE.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            found = next(remaining, None)
            if found is None:
                raise ConfigError(f"sweep: --{key} lacks its value.")
            value = found
        try:
            yield key, parse_value(value)
        except (yaml.YAMLError, ValueError):
            raise ConfigError(f"sweep: --{key} {value} is not a value that YAML can read; quote it.") from None


def _conclude(console: Console, context: StudyContext, planned: Planned, outcomes: Mapping[str, Outcome]) -> int:
    """Write the report over the final runs, and list what failed."""
    study = context.study
    folder = context.root / "runs" / study.name
    finals = [folder / t.name for t in planned.trials if t.stage == "final" and outcomes[t.name].state == "complete"]
    runs = [run for run in finals if run.is_dir()]
    known = {trial.name for trial in planned.trials}
    notes = [*study.notes, *map(str, planned.choices)]
    candidates = {_without_choices(name, planned) for name in known}
    others = [name for name in outcomes if name not in known and _without_choices(name, planned) in candidates]
    if opened := [name for name in others if name.startswith("test-") and outcomes[name].state == "complete"]:
        notes.append(
            f"The test images had been opened for {len(opened)} other runs before these were chosen ({opened[0]}), so "
            "the figures on test may be too high."
        )
    write_json(folder / STUDY, {"title": study.title, "notes": notes, "final_runs": [run.name for run in finals]})
    unusable = [(run, "its folder is not on this machine") for run in finals if run not in runs]
    reported = not finals
    if runs:
        try:
            report = write_report(runs, folder / "report", study.baseline, study.title, notes)
        except ConfigError as error:
            console.print(f"no report: {error}", soft_wrap=True, markup=False)
        else:
            from gn_transfer.comparison.tables import as_text

            width = console.width if console.is_terminal else None
            console.print(as_text(report, width), soft_wrap=True, markup=False)
            console.print(f"report     {folder / 'report'}", soft_wrap=True)
            unusable += [(problem.folder, problem.reason) for problem in report.problems]
            reported = True
    for run, reason in unusable:
        console.print(f"left out   {run}: {reason}", soft_wrap=True, markup=False)
    failed = [trial for trial in planned.trials if outcomes[trial.name].state == "failed"]
    for trial in failed:
        console.print(f"failed     {trial.name}: {outcomes[trial.name].reason}", markup=False)
    for problem in planned.problems:
        console.print(f"failed     {problem}", markup=False)
    if failed:
        console.print("--retry_failed runs failed trials again")
    return 3 if failed or planned.problems or unusable or not reported else 0


def _without_choices(name: str, planned: Planned) -> str:
    """Take the chosen values out of a trial's name, which then is that of all candidates."""
    for choice in planned.choices:
        name = re.sub(rf"-{re.escape(short_key(choice.key))}\d[\d.]*(e[+-]?\d+)?(?=-)", "", name)
    return name


def write_report(
    runs: Sequence[Path], output: Path, baseline: Mapping[str, str], title: str, notes: Sequence[str]
) -> Any:
    """Compare the final runs, without contrasts where the baseline is not among them.

    What that imports is imported only now. A study may vary what else would not be compared: the page says so.
    """
    from gn_transfer import comparison

    try:
        report = comparison.compare(runs, baseline=baseline or None, title=title, notes=notes, force=True)
    except ConfigError as error:
        if not baseline:
            raise
        notes = [*notes, f"No contrasts: {error}"]
        report = comparison.compare(runs, baseline={}, title=title, notes=notes, force=True)
    comparison.write_report(report, output)
    return report
