"""``gn-transfer data check``: are the images, the masks and the labels sound?"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import get_console
from rich.table import Table
from rich.text import Text

from gn_transfer.config import ConfigError, printable
from gn_transfer.data import Folder, ImageDataModule, Pets, SegmentationDataModule
from gn_transfer.data.check import CheckResult, check_images, list_all
from gn_transfer.data.dataset import LabeledImage
from gn_transfer.data.duplicates import Inspected
from gn_transfer.data.mask_check import MaskCheckResult, check_split_masks
from gn_transfer.data.masks import describe_shares
from gn_transfer.data.pets_counts import BREEDS, compare_counts
from gn_transfer.data.progress import progress_bar
from gn_transfer.data.workers import core_count
from gn_transfer.report.data_page import render_data_page
from gn_transfer.report.html import save_page
from gn_transfer.report.wrong_labels import WrongLabel, held_out_predictions, likely_wrong_labels
from gn_transfer.training.task import TransferTask

_SHOWN = 10


def check(data: ImageDataModule, task: TransferTask, options: argparse.Namespace) -> int:
    """Verify the images of all splits; see :func:`gn_transfer.data.check.check_images`."""
    splits, notes = list_all(data)
    masks = None
    classes = data.classes
    if isinstance(data, SegmentationDataModule):
        classes, splits = ["image"], {name: [one._replace(target=0) for one in some] for name, some in splits.items()}
        with progress_bar("decoding masks", sum(map(len, splits.values()))) as advance:
            masks = check_split_masks(data, splits, threads=core_count(), advance=advance)
    with progress_bar("decoding", sum(map(len, splits.values()))) as advance:
        report = check_images(
            Path(data.root),
            splits,
            classes,
            skips_bad=data.on_bad_image == "skip",
            threads=core_count(),
            advance=advance,
        )
    if masks is not None:
        report.problems.extend(masks.problems)
        report.warnings.extend(masks.warnings)
    if not report.problems:
        try:
            data.setup("fit")  # what it refuses would stop a training, too
        except ConfigError as error:
            report.problems.append(str(error))
    if isinstance(data, Pets) and masks is None:
        notes += _compare_with_official(report)
    wrong = [] if masks is not None else _check_labels(data, splits, report, notes)
    rows = _rows_of(report, notes, data, masks, wrong)
    if options.format == "json":
        found = {**report.as_dict(), **({} if masks is None else masks.as_dict())}
        labels = {"likely_wrong_labels": [asdict(one) for one in wrong]}
        text = json.dumps({**found, **labels, "notes": notes}, indent=2, ensure_ascii=False)
        print(re.sub("[\x7f-\x9f]", lambda control: f"\\u{ord(control[0]):04x}", text))  # a terminal would obey them
    else:
        console = get_console()
        console.print(_table(rows), width=None if console.is_terminal else 400, crop=False)
    if options.output is not None:
        page = options.output if options.output.suffix == ".html" else options.output / "index.html"
        title = f"Images in {Path(data.root).resolve().name}"
        save_page(page, render_data_page(title, Path(data.root), report, wrong, rows))
        print(f"page {page}", file=sys.stderr)
    return 2 if report.problems else 0


def _check_labels(
    data: ImageDataModule, splits: Mapping[str, Sequence[LabeledImage]], report: CheckResult, notes: list[str]
) -> list[WrongLabel]:
    """Find likely wrong labels by what runs in the working directory said of images that they held out."""
    evaluations = held_out_predictions(Path(data.root), Path())
    labels = {
        image.path: data.classes[image.target]
        for split, some in splits.items()
        for image in some
        if split != "unlisted"
    }
    held_out = {path for predictions in evaluations for path in predictions.paths} & labels.keys()
    if not held_out:
        notes.append("labels are not checked: no run below runs/ has stored predictions for these images")
        return []
    notes.append(
        f"labels: {len(held_out):,} of {len(labels):,} images were held out by a run below runs/; runs with other "
        "seeds hold out others"
    )
    wrong = likely_wrong_labels(evaluations, labels)
    if wrong:
        report.warnings.append(
            f"{len(wrong)} label{'s are' if len(wrong) != 1 else ' is'} likely wrong: models that held the images out "
            "contradict with confidence. Look at them."
        )
    return wrong


def _compare_with_official(report: CheckResult) -> list[str]:
    """Compare a Pets download, or some of its breeds, with the official counts; differences become warnings."""
    notes = []
    for split in ("trainval", "test"):
        counts = report.class_counts.get(split, {})
        known = {breed: count for breed, count in counts.items() if breed in BREEDS}
        if not known:
            continue
        differences = compare_counts(split, known)
        report.warnings.extend(differences)
        if not differences:
            breeds = "all 37 breeds" if len(known) == len(BREEDS) else f"{len(known)} of the 37 breeds"
            notes.append(f"{split}: {sum(known.values()):,} images of {breeds}, as officially published")
    return notes


def _rows_of(
    report: CheckResult,
    notes: Sequence[str],
    data: ImageDataModule,
    masks: MaskCheckResult | None,
    wrong: Sequence[WrongLabel],
) -> list[tuple[str, str]]:
    """Give what the check found as rows of a name and a text."""
    rows = [("data", f"{type(data).__name__} in {data.root}")]
    facts = report.as_dict()
    if isinstance(data, Folder):
        broken = f"; {len(report.unreadable):,} of the image files cannot be decoded" if report.unreadable else ""
        rows.append(("files", f"{data.count_files().describe()}{broken}"))
    for split, counts in report.class_counts.items():
        least, most = min(counts.values()), max(counts.values())
        spread = f"{least} per class" if least == most else f"{least} to {most} per class"
        cut = "; validation is cut from them" if split == "trainval" else ""
        said = f"{len(counts)} classes, {spread}" if masks is None else describe_shares(masks.pixels[split])
        rows.append((split, f"{sum(counts.values()):,} images, {said}{cut}"))
    rows += [
        (name, ", ".join(f"{key} {count:,}" for key, count in facts[name].items())) for name in ("formats", "modes")
    ]
    if facts["short_side"]:
        side = facts["short_side"]
        rows.append(("short side", f"{side['least']} to {side['greatest']} px, median {side['median']}"))
    rows += _listed("unreadable", [f"{_name(file)}: {file.error}" for file in report.unreadable])
    rows += _listed("bad masks", [] if masks is None else [f"{path}: {reason}" for path, reason in masks.bad])
    rows += _listed("suspicious", [f"{_name(file)}: {file.warning}" for file in report.suspicious])
    rows += _listed("same pixels", [" = ".join(map(_name, group)) for group in report.duplicates])
    rows += _listed(
        "near-duplicates",  # those of different splits first: they make a test too easy
        [
            f"{_name(one)} ~ {_name(other)}, {apart:.1f} of 255 grey levels apart"
            for one, other, apart in sorted(report.near_duplicates, key=lambda pair: pair[0].split == pair[1].split)
        ],
    )
    rows += _listed(
        "likely wrong",
        [
            f"{one.path}: labeled {one.label} ({one.prob_label:.1%}), likely {one.suggested} "
            f"({one.prob_suggested:.1%}), {one.agreeing} of {one.runs} runs"
            for one in wrong
        ],
    )
    for name, lines in (("note", notes), ("warning", report.warnings), ("problem", report.problems)):
        rows += [(name, line) for line in lines]
    ready = "ready to train; see the warning about two splits" if report.leaks else "ready to train"
    rows.append(("result", "not ready: see the problems" if report.problems else ready))
    return rows


def _table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # as they are: a name may hold brackets
    return table


def _name(file: Inspected) -> str:
    return f"{file.path} ({file.split})"


def _listed(name: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    """Put lines behind a name, the first ones of many."""
    rows = [(name if number == 0 else "", line) for number, line in enumerate(lines[:_SHOWN])]
    if len(lines) > _SHOWN:
        rows.append(("", f"... and {len(lines) - _SHOWN} more; --format json lists all"))
    return rows
