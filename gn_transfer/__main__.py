"""The command ``gn-transfer``: finds the verb, imports what it needs, turns the user's errors into exit code 2."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from gn_transfer import __version__
from gn_transfer.config import ConfigError, builtin_configs, did_you_mean

VERBS = {
    "fit": "train: gn-transfer fit --config pets_gnws.yaml",
    "validate": "evaluate a checkpoint on the validation split: gn-transfer validate --ckpt_path CKPT",
    "test": "evaluate a checkpoint on the test split, once all choices are made: gn-transfer test --ckpt_path CKPT",
    "sweep": "run a study of many runs: gn-transfer sweep --config sweep_quickstart.yaml",
    "data": "know the pictures before training: gn-transfer data check|sample|cache|show --config pets_gnws.yaml",
    "export": "write a checkpoint as a bundle for inference: gn-transfer export CKPT --output BUNDLE",
    "predict": "classify pictures with a bundle: gn-transfer predict BUNDLE PICTURES",
    "compare": "runs side by side, as tables and a page: gn-transfer compare RUNS... --output DIR",
    "backbones": "list the nets that have pretrained weights, or fetch these ahead: gn-transfer backbones --norm gn_ws",
}

_MODULES = {
    "data": "data_cli",
    "export": "export",
    "predict": "predict",
    "compare": "compare",
    "sweep": "sweep",
    "backbones": "catalogue",
}

_HELP = """\
usage: gn-transfer VERB [options]

Fine-tune a ResNet on your own pictures at batch size 1-4: GroupNorm + Weight Standardization (gn_ws) against
BatchNorm (bn) by one switch, --model.norm.

verbs:
{verbs}

built-in configs, for --config:
  {configs}

gn-transfer VERB --help lists the options of a verb. gn-transfer --version prints the version.
Exit codes: 0 done, 2 a mistake in the input (one message), 3 done but for some inputs (listed), 1 a fault of the
program, 130 interrupted.
"""


def help_text() -> str:
    """Compose the help of the whole command; imports nothing heavy."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return _HELP.format(verbs=verbs, configs="  ".join(builtin_configs()) or "(none)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``None`` takes those of the process.

    Returns:
        Exit code: 0 done, 2 the user's mistake, 3 some inputs failed, 130 interrupted. A fault of the program raises.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb in ("-V", "--version"):
        print(f"gn-transfer {__version__}")
        return 0
    try:
        if verb not in VERBS:
            raise ConfigError(f"{verb!r} is not a verb; {did_you_mean(verb, VERBS)}. See gn-transfer --help.")
        if verb in _MODULES:
            return int(importlib.import_module(f"gn_transfer.{_MODULES[verb]}").run(rest))
        from gn_transfer import cli

        return cli.run(verb, rest)
    except SystemExit as leaving:  # argparse, after printing help
        return int(leaving.code or 0)
    except ConfigError as error:
        print(f"gn-transfer: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("gn_transfer"):
            raise
        print(
            f"gn-transfer: error: {verb} needs {error.name}, which is not installed; install gn-transfer with what it "
            "depends on (without it, only predict works).",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("gn-transfer: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
