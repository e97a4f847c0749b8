"""What ``sweep`` does before the first trial: check the study's keys and values, and estimate its time."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from rich.console import Console
from rich.table import Table

from gn_transfer.backbones import resolve_pretrained
from gn_transfer.commands.class_paths import check_file_values
from gn_transfer.commands.fit import fit
from gn_transfer.commands.training_cli import parsed
from gn_transfer.commands.training_keys import known_keys
from gn_transfer.config import ConfigError, did_you_mean
from gn_transfer.data import Folder
from gn_transfer.data.workers import core_count
from gn_transfer.report.runs import short_name
from gn_transfer.study.definition import Study
from gn_transfer.study.runner import share_threads
from gn_transfer.study.trials import Trial, arguments_of
from gn_transfer.training.plan import Plan
from gn_transfer.training.progress import duration
from gn_transfer.training.run_log import RunLog

_WEIGHTS_FOLLOW = ("model.backbone", "model.norm", "model.pretrained", "model.conversion")


def quiet_log() -> RunLog:
    """A log that prints nothing on the terminal."""
    return RunLog(Console(file=io.StringIO(), width=120))


def check_classes(study: Study, typed: Collection[str]) -> None:
    """Refuse a study file that names classes; see :mod:`gn_transfer.commands.class_paths`.

    Args:
        study: The study.
        typed: Keys whose values stand on the command line.

    Raises:
        ConfigError: With the key and the class.
    """
    for arm in study.arms:
        values = [*arm.fixed.items(), *(pair for case in arm.cases.values() for pair in case.items())]
        values += [(key, value) for key, some in arm.grid.items() for value in some]
        for key, value in values:
            group, dot, name = key.partition(".")
            if key not in typed:
                content = {group: {name: value}} if dot else {group: value}
                check_file_values(content, study.name, study.base.parent, allow_class_path=study.allow_class_path)


def check_keys(study: Study) -> None:
    """Refuse keys that no configuration has.

    Raises:
        ConfigError: With the key and what is near.
    """
    known = ["data", *known_keys()]
    named: set[str] = set()
    for arm in study.arms:
        named |= {*arm.fixed, *arm.grid, *arm.where}
        named |= {key for values in arm.cases.values() for key in values}
        named |= {key for condition in arm.where.values() for key in condition}
        if arm.select is not None:
            named |= {arm.select.key, *(arm.select.per or ())}
    shorts = sorted({short_name(name) for name in known})
    for key in study.baseline:
        if (short := short_name(key)) not in shorts:
            raise ConfigError(f"{study.name}: baseline {key} is not a key; {did_you_mean(short, shorts)}.")
    for key in sorted(named):
        if key in ("seed_everything", "samples"):
            raise ConfigError(
                f"{study.name}: {key} is not set by set, grid or cases; use {key.split('_')[0]}s of the study."
            )
        if key not in known:
            section = [name for name in known if name.split(".")[0] == key.split(".")[0]]
            raise ConfigError(f"{study.name}: {key} is not a key; {did_you_mean(key, section or known)}.")


def print_plan(
    console: Console, study: Study, trials: Sequence[Trial], workers: int, ended: Collection[str] = ()
) -> None:
    """Print the trials and how long they will take.

    Args:
        console: The terminal.
        study: The study.
        trials: All that it will have.
        workers: Processes that share them.
        ended: Names of those that an earlier call has run.
    """
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        if trial.stage != "test":
            groups.setdefault((trial.stage, trial.name.rpartition("-seed")[0]), []).append(trial)
    table = Table("stage", "trials", "seeds", "each", box=None, pad_edge=False)
    table.columns[1].overflow = "fold"
    total, plans = 0.0, dict[str, Plan]()
    with share_threads(core_count() // workers) as threads:
        torch.set_num_threads(threads)  # a trial is timed with the threads that it will have
        for (stage, name), some in groups.items():
            each = _plan(study, some[0], plans).seconds
            total += each * sum(trial.name not in ended for trial in some)
            seeds = " ".join(str(trial.overrides["seed_everything"]) for trial in some)
            table.add_row(stage, name, seeds, duration(each))
    console.print(table)
    for line in _common(list(plans.values())):
        console.print(line, soft_wrap=True, markup=False)
    stages = Counter(trial.stage for trial in trials)
    done = f"; {len(ended):,} have ended already" if ended else ""
    console.print(
        f"{len(trials)} trials ({', '.join(f'{count} {stage}' for stage, count in stages.items())}){done}; about "
        f"{duration(total / workers)} of training steps with {workers} worker{'s' * (workers > 1)}; start, validation "
        "and test come on top, some seconds for each trial. Measured now: a busy machine is slower."
    )
    for block in study.arms:
        if (select := block.select) is not None:
            console.print(
                f"{block.name or study.name}: {select.key} is chosen on validation from "
                f"{', '.join(f'{value:g}' for value in select.values)}; each time the best is the first or the "
                f"last, one more is tried (up to {select.extend}). Final trials are shown with the middle one."
            )


def _common(plans: Sequence[Plan]) -> list[str]:
    """Say what the plans of all trials have in common, and the warnings of any."""
    shown = ("images", "weights", "batch", "steps")
    rows = [{name: text for name, text in plan.rows if name in shown} for plan in plans]
    lines = [f"{name:<8} {rows[0][name]}" for name in shown if len({row.get(name) for row in rows}) == 1]
    different = [name for name in shown if len({row.get(name) for row in rows}) > 1]
    lines += [f"{name:<8} {text}" for name in different for text in dict.fromkeys(row[name] for row in rows)]
    return lines + [f"warning: {warning}" for warning in dict.fromkeys(w for plan in plans for w in plan.warnings)]


def _plan(study: Study, trial: Trial, plans: dict[str, Plan]) -> Plan:
    """Plan a trial and measure its time, once for all that differ in seed or learning rate only."""
    skipped = ("seed_everything", "optimizer.lr", "optimizer.head_lr")
    key = str({name: value for name, value in trial.identity().items() if name not in skipped})
    if key not in plans:
        with parsed("fit", [*arguments_of(study, trial), "--dry_run"], quiet_log(), typed=study.typed_classes) as cli:
            plans[key] = fit(cli)
    return plans[key]


def check_values(study: Study, trials: Sequence[Trial]) -> None:
    """Read the configurations of enough trials to have seen each value of each key, and each case.

    Args:
        study: The study.
        trials: Its trials.

    Raises:
        ConfigError: A value that is not allowed, or no weights for a model and its norm, with the trial that has it.
    """
    finals = [trial.identity() for trial in trials if trial.stage == "final"]
    for key, value in study.baseline.items():
        had = {
            str(found) for identity in finals for name, found in identity.items() if short_name(name) == short_name(key)
        }
        if not had:
            raise ConfigError(
                f"{study.name}: baseline {key}={value}: the trials do not differ in {key}; name a key of grid or cases."
            )
        if str(value) not in had:
            raise ConfigError(
                f"{study.name}: baseline {key}={value}: no trial has it; {did_you_mean(str(value), sorted(had))}."
            )
    seen: set[tuple[str, ...]] = set()
    for trial in trials:
        pairs: set[tuple[str, ...]] = {
            (key, str(value)) for key, value in trial.identity().items() if key != "seed_everything"
        }
        pairs |= {(trial.arm, trial.case), tuple(str(trial.overrides.get(key)) for key in _WEIGHTS_FOLLOW)}
        if pairs <= seen:
            continue
        seen |= pairs
        try:
            with parsed("fit", arguments_of(study, trial), builds=False, typed=study.typed_classes) as cli:
                section = cli.parser.instantiate_classes(cli.config).fit
                section.batch_norm.check(section.model)
                model = section.model
                resolve_pretrained(model.backbone, model.norm, model.pretrained, model.conversion)
                if type(section.data) is Folder:
                    section.data.list_fit()
        except ConfigError as error:
            raise ConfigError(f"{study.name}: trial {trial.name}: {error}") from error
