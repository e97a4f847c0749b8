"""The program ``gn-transfer``: finds the command, imports what it needs, turns the user's errors into exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gn_transfer import __version__
from gn_transfer.config import ConfigError, builtin_configs, did_you_mean, printable

COMMANDS = {
    "fit": "train on a folder of images, one folder per class: gn-transfer fit PHOTOS",
    "validate": "evaluate a checkpoint on the validation split: gn-transfer validate CKPT",
    "test": "evaluate a checkpoint on the test split, at the very end: gn-transfer test CKPT",
    "sweep": "run a study of many runs: gn-transfer sweep --config sweep_quickstart.yaml",
    "data": "check, cache or show images: gn-transfer data check PHOTOS",
    "export": "write a checkpoint as a bundle for inference: gn-transfer export CKPT --output BUNDLE",
    "predict": "classify images with a bundle: gn-transfer predict BUNDLE IMAGES",
    "demo": "show a bundle in the browser: gn-transfer demo BUNDLE",
    "report": "write one run as a page: gn-transfer report RUN",
    "compare": "compare runs in tables and on a page: gn-transfer compare RUNS... --output DIR",
    "doctor": "tell what batch norm does to a model at a batch size: gn-transfer doctor CKPT --batch_size 1",
    "reestimate": "repair the running statistics of a checkpoint: gn-transfer reestimate CKPT",
    "backbones": "list models with pretrained weights, or download these: gn-transfer backbones --norm gn_ws",
}

_LOADS_TORCH = frozenset({"fit", "validate", "test", "sweep", "data", "export", "doctor", "reestimate", "backbones"})

_HELP = """\
usage: gn-transfer COMMAND [options]

Fine-tune a timm model on your own images at batch size 1-4. One option, --model.norm, chooses between BatchNorm (bn)
and GroupNorm + Weight Standardization (gn_ws).

commands:
{commands}

built-in configs, for --config:
  {configs}

gn-transfer COMMAND --help lists the options of a command. gn-transfer --version prints the version.
Exit codes: 0 done, 2 a mistake in the input (one message), 3 done except for some inputs (listed), 1 a fault of the
program, 130 interrupted.
"""


def help_text() -> str:
    """Compose the help of the whole command; imports nothing heavy."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {command:<{width}}  {text}" for command, text in COMMANDS.items())
    return _HELP.format(commands=commands, configs="  ".join(builtin_configs()) or "(none)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``None`` takes those of the process.

    Returns:
        Exit code: 0 done, 2 the user's mistake, 3 some inputs failed, 130 interrupted. A fault of the program raises.
    """
    for name in ("stdout", "stderr"):  # Python has none where the caller has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - until the process ends
        with suppress(AttributeError, OSError, ValueError):  # a notebook's, or a test's
            getattr(sys, name).reconfigure(errors="backslashreplace")  # names of files may be bytes that are no text
    if Path("matplotlibrc").is_file():  # it would be obeyed, whoever wrote it
        import matplotlib

        matplotlib.rcdefaults()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if arguments else 2
    command, *rest = arguments
    if command in ("-V", "--version"):
        print(f"gn-transfer {__version__}")
        return 0
    try:
        if command not in COMMANDS:
            raise ConfigError(
                f"{command!r} is not a command; {did_you_mean(command, COMMANDS)}. See gn-transfer --help."
            )
        asked = {"-h", "--help"} & set(rest[:1] if command == "data" else rest)
        if command in ("fit", "validate", "test", "data") and (asked or [command, *rest] == ["data"]):
            from gn_transfer.commands.short_help import short_help

            print(short_help(command))
            return 0 if asked else 2
        if command in _LOADS_TORCH and sys.stderr.isatty():  # imports take seconds; the terminal must not stay blank
            print(f"gn-transfer {__version__} {command}: loading", file=sys.stderr, flush=True)
        if command in ("validate", "test"):
            from gn_transfer.commands import evaluate

            return evaluate.run(command, rest)
        return int(importlib.import_module(f"gn_transfer.commands.{command}").run(rest))
    except SystemExit as leaving:  # argparse, after printing help
        return int(leaving.code or 0)
    except ConfigError as error:
        print(f"gn-transfer: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("gn_transfer"):
            raise
        print(
            f"gn-transfer: error: {command} needs {error.name}, which is not installed; install gn-transfer "
            "with what it depends on (predict and demo need less).",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("gn-transfer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads our output has seen enough
        return 0
    except RuntimeError as error:
        if not str(error).startswith("Symlink loop"):  # what Python before 3.13 makes of a link in a circle
            raise
        print(f"gn-transfer: error: {printable(str(error))}; remove it.", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None or error.strerror is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"gn-transfer: error: {printable(place)}{error.strerror}.", file=sys.stderr)
        return 2
    finally:
        _flush()


def _flush() -> None:
    """Write what is left of the output; a reader that is gone must not make Python's exit fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
