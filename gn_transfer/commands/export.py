"""The command ``export``: write a checkpoint as a bundle."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from gn_transfer.commands.parsing import Parser
from gn_transfer.config import ConfigError, check_range
from gn_transfer.inference.export import MAX_DROP, export_bundle
from gn_transfer.inference.export_source import find_checkpoint


def run(arguments: Sequence[str]) -> int:
    """Run ``gn-transfer export``.

    Args:
        arguments: The words behind the command.

    Returns:
        Exit code.

    Raises:
        ConfigError: The user's mistake.
        ParityError: The bundle does not compute what was trained; none is left.
    """
    options = create_parser().parse_args(arguments)
    if options.max_drop is not None:
        check_range("--max_drop", options.max_drop, low=0, high=100, open_high=False)
        if options.quantize is None:
            raise ConfigError("--max_drop says what --quantize int8 may cost; give both, or neither.")
    path = find_checkpoint(options.checkpoint)
    try:
        parity = export_bundle(
            path,
            options.output,
            data_root=options.root,
            precision=options.precision,
            int8=options.quantize == "int8",
            max_drop=MAX_DROP if options.max_drop is None else options.max_drop,
            push_to_hub=options.push_to_hub,
            say=print,
        )
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST):
            raise
        raise ConfigError(f"--output {options.output} cannot be written: {error}; name another folder.") from error
    size = sum(file.stat().st_size for file in options.output.iterdir()) / 2**20
    print(f"parity      {parity.summary()}")
    print(
        f"bundle      {options.output} ({size:.1f} MiB): {', '.join(sorted(p.name for p in options.output.iterdir()))}"
    )
    print(f"next        gn-transfer predict {options.output} IMAGES")
    return 0


def create_parser() -> Parser:
    """Create the parser of the command."""
    parser = Parser(
        prog="gn-transfer export",
        description="Write a checkpoint as a bundle for inference: an ONNX graph, safetensors weights, JSON and a "
        "model card in one folder. The bundle is compared with the checkpoint on the run's validation images; "
        "where they differ, no bundle is left.",
    )
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CKPT", type=Path, help="a .ckpt file, or a run's folder: then its best.ckpt"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        required=True,
        help="folder to write; an older bundle there is replaced, anything else is refused",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="USER/NAME",
        help="push the bundle to the Hugging Face hub too, as a repository that timm loads; log in first with hf auth "
        "login",
    )
    parser.add_argument(
        "--data.root", dest="root", metavar="PATH", help="where the run's images lie now, if they were moved"
    )
    parser.add_argument(
        "--precision",
        type=float,
        metavar="P",
        help="wanted share of right answers, such as 0.99: predict calls an image unknown where the model is less "
        "certain than that needs on the validation images",
    )
    parser.add_argument(
        "--quantize",
        choices=["int8"],
        help="compute with 8-bit integers: a smaller graph, for most models a faster one on a CPU; the ranges come "
        "from training images of the run",
    )
    parser.add_argument(
        "--max_drop",
        type=float,
        metavar="POINTS",
        help="refuse int8 where it loses more on the validation images, in points of accuracy or mIoU (default "
        f"{MAX_DROP:g})",
    )
    return parser
