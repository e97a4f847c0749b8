"""Write the reference of configuration keys and of commands from the code, before the documentation is built."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

from docstring_parser import parse

from gn_transfer.__main__ import COMMANDS
from gn_transfer.commands import backbones, compare, data, demo, doctor, export, predict, reestimate, report, sweep
from gn_transfer.commands.short_help import DATA_COMMANDS
from gn_transfer.commands.training_keys import CALLBACKS, CONFIGS, DATA
from gn_transfer.data import ImageDataModule, SegmentationDataModule

INTRODUCTION = """\
# Configuration reference

This page is generated from the code. Every key can stand in a YAML file or on the command line, as
`--model.norm gn_ws`. A value on the command line replaces that of the file. `gn-transfer fit --help` prints the same
texts, and the keys of Lightning's `trainer.*` as well.
"""


_ALONE = (
    ("seed_everything", 0, "One seed for weights, split, order and augmentation."),
    ("samples", None, "Images to train on, with repetitions, in place of `trainer.max_epochs`."),
    ("memory_limit", None, "GiB that the training may take, for `data.batch_size: auto`; null takes what is free."),
    ("allow_class_path", False, "Files may name any class, which can then run any code. Command line only."),
    ("dry_run", False, "Print the plan and stop. Command line only."),
)


def configuration() -> str:
    """Describe the keys, group by group."""
    parts = [INTRODUCTION, "## Without a group\n", "| key | default | meaning |\n|---|---|---|"]
    parts += [f"| `{name}` | `{written(default)}` | {meaning} |" for name, default, meaning in _ALONE]
    parts += ["\n## data\n", "`--data NAME` chooses the data module. Those of images by class have these keys:\n"]
    parts.append(table("data", ImageDataModule))
    parts.append(
        "Data modules of images with masks have them, too, except `data.min_crop_scale` and `data.shots_per_class`. "
        "They also have:\n"
    )
    parts.append(table("data", SegmentationDataModule))
    for kind in DATA:
        parts += [f"### {kind.__name__}\n", parse(kind.__doc__ or "").short_description or "", "", table("data", kind)]
    for group, kind in {**CONFIGS, **CALLBACKS}.items():
        parts += [f"## {group}\n", (parse(kind.__doc__ or "").short_description or "") + "\n", table(group, kind)]
    parts.append(
        "## Built-in configurations\n\nGive one of these names to `--config`.\n\n| name | what it is for |\n|---|---|"
    )
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        comment = path.read_text(encoding="utf-8").partition("\n#\n")[0]
        parts.append(f"| `{path.name}` | {' '.join(comment.replace('#', ' ').split())} |")
    return "\n".join(parts) + "\n"


def table(group: str, kind: type) -> str:
    """Write the parameters of a class as a table of keys."""
    texts = {
        found.arg_name: " ".join((found.description or "").split())
        for found in parse(kind.__doc__ or "").params
        if found.args[0] == "param"
    }
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD or name not in texts or name == "seed":
            continue
        default = "required" if parameter.default is parameter.empty else f"`{written(parameter.default)}`"
        rows.append(f"| `{group}.{name}` | {default} | {texts[name].replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else ""


def written(value: Any) -> str:
    """Write a default as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def commands() -> str:
    """Describe the commands by their own help."""
    parts = ["# Command reference\n", "This page is generated from the code.\n"]
    training = {"fit", "validate", "test"}
    parsers = {
        "sweep": [sweep.create_parser()],
        "data": [data.create_parser(name) for name in DATA_COMMANDS],
        "export": [export.create_parser()],
        "predict": [predict.create_parser()],
        "report": [report.create_parser()],
        "compare": [compare.create_parser()],
        "demo": [demo.create_parser()],
        "doctor": [doctor.create_parser()],
        "reestimate": [reestimate.create_parser()],
        "backbones": [backbones.create_parser()],
    }
    for name, text in COMMANDS.items():
        parts += [f"## {name}\n", f"{text[0].upper()}{text[1:].partition(': gn-transfer')[0]}.\n"]
        if name in training:
            parts.append(
                "`--config NAME` reads a file or a built-in configuration, `--ckpt_path PATH` a checkpoint (`last` is "
                "the newest of the configuration), `--KEY VALUE` sets a key of the [configuration](configuration.md), "
                "`--dry_run` prints the plan and stops. PATH in place of `--config` is "
                + (
                    "a folder of images, and `--name NAME` names the run's folder.\n"
                    if name == "fit"
                    else "a checkpoint, a run's folder, or the folder of images of a run.\n"
                )
            )
        if name == "data":
            parts.append(
                "`check`, `show`, `cache` also take `--config`, `--data` and the keys `data.*`, as `fit` does.\n"
            )
        for parser in parsers.get(name, []):
            parts.append(f"```text\n{help_of(parser)}```\n")
    parts.append(
        "## Exit codes\n\n| code | meaning |\n|---|---|\n| 0 | done |\n| 2 | a mistake in the input, with one message "
        "on standard error |\n| 3 | finished, but some inputs failed; they are listed |\n| 1 | a fault of the program "
        "|\n| 130 | interrupted, after saving what can be saved |\n"
    )
    return "\n".join(parts)


def help_of(parser: argparse.ArgumentParser) -> str:
    """Format a parser's help at a fixed width."""
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=100)  # type: ignore[assignment]
    return parser.format_help()


def write(app: Any) -> None:
    """Write both pages."""
    folder = Path(app.srcdir) / "reference"
    folder.mkdir(exist_ok=True)
    for name, text in (("configuration.md", configuration()), ("commands.md", commands())):
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}
