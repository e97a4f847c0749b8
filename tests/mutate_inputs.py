"""Commands with inputs that are changed by chance: what they end with, and what they leave.

    python tests/mutate_inputs.py --inputs 200 --workers 2

Options, configurations, studies, checkpoints, bundles, run folders, images and masks. A command may do what was asked
(exit code 0), refuse its input (2), or leave out a part of it (3). A fault is another exit code, a traceback, more than
60 seconds, a changed input, or a file that one of the payloads would make.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from forked import run_forked
from PIL import Image

TIMEOUT_SECONDS = 60
RUN = "folder/gn_ws-bs1-seed0"
LAST = f"checkpoints/{RUN}/last.ckpt"
LAST_BN = "checkpoints/folder/bn-bs2-seed0/last.ckpt"
SMALL = ["--data.img_size", "28", "--data.num_workers", "0", "--model.backbone", "cnn_mnist", "--model.in_chans", "3"]
SMALL += ["--model.pretrained", "null"]
PAYLOADS = [
    "{class_path: subprocess.Popen, init_args: {args: [touch, PWNED]}}",
    "!!python/object/apply:os.system [touch PWNED]",
    '{"class\\u005fpath": "subprocess.Popen", "init_args": {"args": ["touch", "PWNED"]}}',
    "__import__('os').system('touch PWNED')",
]
VALUES: list[Any] = [
    *("", "null", "nan", "inf", "-inf", "-1", "0", "1e30", "1e-30", "99999999999999999999", "true", "[]", "{}", "x"),
    *("[1, 2]", "{a: 1}", "..", "/", "/dev/null", "/dev/zero", "é\udcff", "a" * 5000, "=1+1", "auto", "bn", "0x10"),
    *("1,2", "-", "--help", "'", '"', "${HOME}", "%s", "\x1b[31m", "\n", "a/b", "~", "[" * 200, "1" * 400, *PAYLOADS),
]
PLAIN: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**70, -(2**70), 0.5, float("nan"), float("inf"), -1e30, [], {}, [None], {"a": 1}),
    *([[[[1]]]], "\0", *VALUES),
]


class Case(NamedTuple):
    """A command line, and what was changed for it.

    Attributes:
        words: The command.
        change: In words.
    """

    words: list[str]
    change: str


def prepare(root: Path) -> None:
    """Make images, masks, a run, its bundle and a study, below the working folder."""
    from gn_transfer.__main__ import main

    generator = np.random.default_rng(0)
    for name in ("apple", "pear"):
        (root / "photos" / name).mkdir(parents=True)
        for number, suffix in enumerate(("jpg", "png", "webp", "tiff", "jpg", "bmp")):
            pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "photos" / name / f"{number}.{suffix}")
    for folder in ("images", "masks"):
        (root / "pairs" / folder).mkdir(parents=True)
    for number in range(6):
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(
            f"{root}/pairs/images/{number}.png"
        )
        Image.fromarray(generator.integers(0, 3, (40, 36), dtype=np.uint8)).save(f"{root}/pairs/masks/{number}.png")
    (root / "pairs" / "classes.txt").write_text("ground\ncat\ndog\n")
    study = {"base": "folder.yaml", "samples": 8, "seeds": 2, "set": {"data.root": "photos", "data.num_workers": 0}}
    study["set"] |= {"data.img_size": 28, "model.backbone": "cnn_mnist", "model.in_chans": 3, "model.pretrained": None}
    study |= {"grid": {"model.norm": ["bn", "gn_ws"]}, "select": {"values": [0.1, 0.2], "seeds": 1}, "notes": ["a"]}
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    os.chdir(root)
    words = ["fit", "--config", "folder.yaml", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "1"]
    words += ["--data.val_fraction", "0.34", "--data.test_fraction", "0.34"]
    assert main(words) == 0
    assert main([*words, "--model.norm", "bn", "--data.batch_size", "2"]) == 0
    assert main(["test", LAST]) == 0
    assert main(["export", LAST, "--output", "bundle"]) == 0
    shutil.copy(f"runs/{RUN}/config.yaml", "own.yaml")


def options_of(help_text: str) -> list[str]:
    """List the options that take a value, by the help of their command."""
    found = re.findall(r"(--[a-z][\w.]*)[ =][A-Z{\[<\"']", help_text)
    return sorted({option for option in found if option not in ("--port", "--host", "--push_to_hub")}) or ["--config"]


COMMANDS: dict[str, list[str]] = {
    "fit": ["fit", "photos", *SMALL, "--dry_run"],
    "training": ["fit", "photos", *SMALL, "--trainer.max_epochs", "1"],
    "validate": ["validate", LAST],
    "test": ["test", LAST],
    "export": ["export", LAST, "--output", "written"],
    "predict": ["predict", "bundle", "photos"],
    "report": ["report", f"runs/{RUN}", "--output", "written.html"],
    "compare": ["compare", "runs", "--output", "written"],
    "data check": ["data", "check", "photos"],
    "data show": ["data", "show", "photos", "--output", "written.jpg"],
    "sweep": ["sweep", "--config", "study.yaml", "--dry_run"],
    "doctor": ["doctor", LAST_BN, "--batch_size", "1"],
    "reestimate": ["reestimate", LAST_BN],
    "backbones": ["backbones", "--norm", "gn_ws"],
}
OF_CONFIG = ["fit", "--config", "own.yaml", "--dry_run"]
CHECK_MASKS = ["data", "check", "pairs", "--data", "SegmentationFolder"]
FIT_MASKS = [
    "fit",
    "--config",
    "segmentation_folder.yaml",
    "--data.root",
    "pairs",
    "--data.img_size",
    "32",
    "--dry_run",
]
FIT_MASKS += ["--model.backbone", "resnetv2_18", "--data.num_workers", "0"]


def change_option(root: Path, rng: random.Random, options: dict[str, list[str]]) -> Case:
    """Give an option of some command a strange value."""
    command = rng.choice([*COMMANDS, *["fit"] * 4, *["training"] * 4])
    option, value = rng.choice(options[command]), rng.choice(VALUES)
    if rng.random() < 0.1:
        option = option[:-1] + rng.choice("xyz_.")
    words = (
        [*COMMANDS[command], f"{option}={value}"] if rng.random() < 0.5 else [*COMMANDS[command], option, str(value)]
    )
    return Case([word.replace("\0", "") for word in words], f"{option} {value[:40]!r}")


def change_leaf(content: Any, rng: random.Random) -> str:
    """Change one place of nested values, in place."""
    places: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        part = waiting.pop()
        keys = list(part) if isinstance(part, dict) else range(min(len(part), 8))
        places += [(part, key) for key in keys]
        waiting += [part[key] for key in keys if isinstance(part[key], dict | list)]
    part, key = rng.choice(places)
    kind = rng.choice(["set", "set", "set", "delete", "add", "wrap"])
    if kind == "set":
        part[key] = copy.deepcopy(rng.choice(PLAIN))
        return f"{key!s:.40} = {part[key]!r:.40}"
    if kind == "delete":
        del part[key]
    elif kind == "add" and isinstance(part, dict):
        part[rng.choice(["x", "class_path", "", "model", "0", "\0"])] = copy.deepcopy(rng.choice(PLAIN))
    else:
        part[key] = [part[key]]
    return f"{kind} {str(key)[:40]!r}"


def change_bytes(path: Path, rng: random.Random) -> str:
    """Damage a file, or put something else in its place."""
    kind = rng.choice(["flip", "flip", "flip", "cut", "insert", "zeros", "empty", "folder", "link", "pipe", "other"])
    content = bytearray(path.read_bytes())
    if kind == "flip":
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        content = content[: rng.randrange(len(content))]
    elif kind == "insert":
        place = rng.randrange(len(content))
        content[place:place] = rng.randbytes(rng.randint(1, 2000))
    elif kind == "zeros":
        place = rng.randrange(len(content))
        content[place : place + 200] = bytes(min(200, len(content) - place))
    elif kind == "empty":
        content = bytearray()
    elif kind == "other":
        content = bytearray(
            rng.choice([b"%!PS\n(x) print", b"<svg/>", b"PK\3\4", b"\x80\4K\1.", b"{}", b"\x1f\x8b\x08"])
        )
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(rng.choice([path.name, "/dev/zero", "gone"]))
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    return f"{kind} {path.name}"


def change_yaml(path: Path, rng: random.Random) -> str:
    """Change a YAML file: a value, its bytes, or its form."""
    if rng.random() < 0.15:
        return change_bytes(path, rng)
    content = yaml.safe_load(path.read_text())
    said = change_leaf(content, rng)
    text = yaml.safe_dump(content, allow_unicode=True)
    if rng.random() < 0.1:
        line = rng.choice(
            ["a: &a [*a]", "? {a: 1}\n: 2", rng.choice(PAYLOADS[1:2]), text.splitlines()[0], "\t", "---\na: 1"]
        )
        text, said = f"{text}{line}\n", f"{said}, and {line[:20]!r}"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return said


def change_config(root: Path, rng: random.Random, options: dict[str, list[str]]) -> Case:
    """Change the configuration of a run."""
    return Case(OF_CONFIG, change_yaml(root / "own.yaml", rng))


def change_study(root: Path, rng: random.Random, options: dict[str, list[str]]) -> Case:
    """Change a study."""
    return Case(COMMANDS["sweep"], change_yaml(root / "study.yaml", rng))


def change_checkpoint(root: Path, rng: random.Random, options: dict[str, list[str]]) -> Case:
    """Change what a checkpoint says, or its bytes."""
    import torch

    command = rng.choice(["validate", "test", "export", "fit", "doctor", "reestimate"])
    path = root / (LAST_BN if command in ("doctor", "reestimate") else LAST)
    if rng.random() < 0.3:
        said = change_bytes(path, rng)
    else:
        content = torch.load(path, weights_only=True)
        said = change_leaf(content["gn_transfer"] if rng.random() < 0.7 else content, rng)
        torch.save(content, path)
    words = ["fit", "--ckpt_path", LAST, "--dry_run"] if command == "fit" else COMMANDS[command]
    return Case(words, said)


def change_bundle(root: Path, rng: random.Random, options: dict[str, list[str]]) -> Case:
    """Change a bundle, half of the time with checksums that fit."""
    from gn_transfer.inference.bundle_files import METADATA, seal

    folder = root / "bundle"
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    if path.name == METADATA and rng.random() < 0.8:
        content = json.loads(path.read_text())
        said = change_leaf(content, rng)
        path.write_text(json.dumps(content))
    else:
        said = change_bytes(path, rng)
    if rng.random() < 0.5 and path.is_file() and not path.is_symlink():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            seal(folder, json.loads((folder / METADATA).read_text()))
            said += ", sealed"
    return Case(COMMANDS["predict"], said)


def change_run(root: Path, rng: random.Random, options: dict[str, list[str]]) -> Case:
    """Change a file of a run's folder."""
    path = rng.choice(sorted(path for path in (root / "runs" / RUN).iterdir() if path.is_file()))
    if path.suffix == ".json" and rng.random() < 0.7:
        content = json.loads(path.read_text())
        said = f"{path.name}: {change_leaf(content, rng)}"
        path.write_text(json.dumps(content))
    elif path.suffix == ".csv" and rng.random() < 0.7:
        rows = [line.split(",") for line in path.read_text().splitlines()]
        row = rng.choice(rows)
        place, value = rng.randrange(len(row)), str(rng.choice(VALUES))
        row[place] = value
        path.write_text("\n".join(",".join(row) for row in rows), errors="surrogateescape")
        said = f"{path.name}: {value[:40]!r}"
    else:
        said = change_bytes(path, rng)
    return Case(COMMANDS[rng.choice(["report", "compare"])], said)


def change_image(root: Path, rng: random.Random, options: dict[str, list[str]]) -> Case:
    """Damage an image, or what stands beside it."""
    said = change_bytes(rng.choice(sorted((root / "photos").glob("*/*"))), rng)
    if rng.random() < 0.1:
        name = rng.choice(
            ["con.jpg", "a\nb.jpg", "=x.jpg", "é\udcff.jpg", "x" * 200 + ".jpg", ".hidden.jpg", "x.JPG.exe"]
        )
        (root / "photos" / "apple" / name).write_bytes(b"no image")
    return Case(COMMANDS[rng.choice(["predict", "data check", "data show", "fit"])], said)


def change_mask(root: Path, rng: random.Random, options: dict[str, list[str]]) -> Case:
    """Damage a mask, an image with a mask, or the names of the classes."""
    paths = [*sorted((root / "pairs" / "masks").iterdir()), root / "pairs" / "classes.txt"]
    said = change_bytes(rng.choice([*paths, root / "pairs" / "images" / "0.png"]), rng)
    return Case(rng.choice([CHECK_MASKS, FIT_MASKS]), said)


KINDS: dict[str, tuple[int, Callable[[Path, random.Random, dict[str, list[str]]], Case]]] = {
    "option": (30, change_option),
    "configuration": (15, change_config),
    "study": (10, change_study),
    "checkpoint": (12, change_checkpoint),
    "bundle": (10, change_bundle),
    "run folder": (10, change_run),
    "image": (8, change_image),
    "mask": (5, change_mask),
}
"""How many of a hundred inputs are of a kind, and what makes one."""


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the files that no command may change."""
    inputs = [*(root / name for name in ("photos", "pairs", "bundle", "own.yaml", "study.yaml"))]
    files = [path for each in inputs for path in (each.rglob("*") if each.is_dir() else [each])]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in files if not path.is_dir()}


def run_case(original: Path, make: Callable[[Path], Case]) -> tuple[str, Case, float]:
    """Change a copy of the inputs and run the command; give how it ended, the case and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        root, output = Path(folder) / "work", Path(folder) / "output"
        shutil.copytree(original, root)
        case = make(root)
        before, began = listing(root), time.monotonic()

        def command() -> int:
            from gn_transfer.__main__ import main

            os.chdir(root)
            resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
            os.environ.update(HOME=folder, XDG_CACHE_HOME=f"{folder}/cache")
            return main(case.words)

        code = run_forked(command, TIMEOUT_SECONDS, output)
        seconds, said = time.monotonic() - began, output.read_text(errors="replace")
        fault = ""
        if code is None:
            fault = f"took more than {TIMEOUT_SECONDS} s"
        elif "Traceback (most recent call last)" in said or code not in (0, 2, 3):
            fault = f"exit code {code}: {said.strip()[-1500:]}"
        elif list(Path(folder).rglob("PWNED")):
            fault = "a payload ran"
        elif listing(root) != before:
            fault = "an input was changed"
        elif code == 2 and len(said.strip().splitlines()) == 0:
            fault = "exit code 2 without a message"
        return fault or str(code), case, seconds


def try_input(
    number: int, seed: int, kinds: Sequence[str], original: Path, options: dict[str, list[str]]
) -> tuple[str, str, Case, float]:
    """Change one input; give its kind, and what :func:`run_case` gives."""
    rng = random.Random(f"{seed} {number}")
    [kind] = rng.choices(kinds, [KINDS[kind][0] for kind in kinds])
    return kind, *run_case(original, lambda root: KINDS[kind][1](root, rng, options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Try inputs and print the faults; 1 where there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--accepted", action="store_true", help="print what ended with 0, to be read")
    chosen = parser.parse_args(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import lightning.pytorch  # what every command needs is imported once, before the processes fork
    import onnxruntime
    import timm
    import torch

    import gn_transfer.__main__

    torch.set_num_threads(1)
    del lightning, timm, onnxruntime
    with tempfile.TemporaryDirectory() as folder:
        original, text = Path(folder) / "original", Path(folder) / "output"
        original.mkdir()

        def first() -> int:
            prepare(original)
            return 0

        if run_forked(first, 600, text) != 0:
            print(text.read_text())
            return 2
        options = {}
        for words in (*COMMANDS.values(), OF_CONFIG, CHECK_MASKS, FIT_MASKS):
            end, _, _ = run_case(original, lambda _, words=words: Case(words, ""))  # type: ignore[misc]
            if end != "0":
                print(f"without a change, {' '.join(words)} ends with {end}")
                return 2
        for name, words in COMMANDS.items():
            verb = words[:2] if name.startswith("data ") else words[:1]
            run_forked(lambda verb=verb: gn_transfer.__main__.main([*verb, "--help"]), 60, text)  # type: ignore[misc]
            options[name] = options_of(text.read_text())
        ends: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        slowest, faults = 0.0, 0
        with ThreadPoolExecutor(chosen.workers) as pool:
            kinds = chosen.kinds or list(KINDS)
            tried = pool.map(lambda n: try_input(n, chosen.seed, kinds, original, options), range(chosen.inputs))
            for number, (kind, end, case, seconds) in enumerate(tried):
                good = end in ("0", "2", "3")
                ends[kind][end if good else "fault"] += 1
                slowest, faults = max(slowest, seconds), faults + (not good)
                if not good or (chosen.accepted and end == "0"):
                    print(f"{number} {kind}, {case.change}: {end}\n    {' '.join(case.words)!a:.300}", flush=True)
    for kind, counts in ends.items():
        print(f"{kind}: " + ", ".join(f"{count} x {end}" for end, count in sorted(counts.items())))
    print(f"{chosen.inputs} inputs, {faults} faults; the slowest took {slowest:.0f} s")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
