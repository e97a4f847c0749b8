"""Runs that are killed at moments chosen by chance and continued: whether they end like runs that were not killed.

    python tests/kill_runs.py --kills 5 --workers 2

Each case is trained once without a kill, and then again and again with up to three kills -9 on the way. Weights,
optimizer, schedule, records and predictions must be equal, bit for bit, and nothing half-written may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from forked import run_forked
from PIL import Image

UNLIKE = {"images_per_sec", "peak_memory_mib", "wall_time_s", "images", "seconds"}
"""Entries of records and of callbacks that hold times and memory."""
UNLIKE |= {"dirpath", "best_model_path", "best_k_models", "kth_best_model_path", "last_model_path", "current_score"}
"""Paths, and a score that Lightning overwrites before it reads it."""
KILLS_OF_A_RUN = 3
LONGEST_SECONDS = 900.0
EVERY_MINUTES = ("0", "0.01", "60")
"""Checkpoints behind each step, behind some, and at the ends of epochs alone."""

COMMON = ["--accumulation.effective_batch_size", "4", "--trainer.max_epochs", "3", "--mixed_precision.mode", "fp32"]
COMMON += ["--data.num_workers", "1", "--data.val_fraction", "0.3"]
IMAGES = ["--data", "Folder", "--data.root", "../images", "--data.img_size", "64", "--model.backbone", "resnet18"]
PAIRS = ["--config", "segmentation_folder.yaml", "--data.root", "../pairs", "--data.img_size", "64"]
PAIRS += ["--model.backbone", "resnetv2_18", "--model.pretrained", "null"]
MIXUP = ["--regularization.mixup", "0.3", "--regularization.cutmix", "0.5"]
CASES: dict[str, list[str]] = {
    "gn_ws": [*IMAGES, "--model.norm", "gn_ws"],
    "bn": [*IMAGES, "--model.norm", "bn", "--batch_norm.reestimate_images", "8"],
    "bn_frozen": [*IMAGES, "--model.norm", "bn_frozen", "--model.pretrained", "../bn.ckpt"],
    "EMA": [*IMAGES, "--model.norm", "gn_ws", "--ema.decay", "0.9"],
    "EMA, bn": [*IMAGES, "--model.norm", "bn", "--ema.decay", "0.9"],
    "Mixup": [*IMAGES, "--model.norm", "gn", *MIXUP, "--optimizer.name", "adamw", "--optimizer.lr", "0.001"],
    "freezing": [*IMAGES, "--model.norm", "gn_ws", "--freezing.epochs", "1", "--early_stopping.patience", "9"],
    "gradient checkpointing": [*IMAGES, "--model.norm", "gn_ws", "--model.gradient_checkpointing", "true"],
    "segmentation": [*PAIRS, "--model.norm", "gn_ws"],
    "segmentation, EMA": [*PAIRS, "--model.norm", "bn", "--ema.decay", "0.9", "--model.decoder", "fpn"],
}


def prepare(root: Path) -> None:
    """Make images in class folders, images with masks, and BN weights."""
    from gn_transfer.__main__ import main

    generator = np.random.default_rng(0)
    for folder in ("images/apple", "images/pear", "pairs/images", "pairs/masks"):
        (root / folder).mkdir(parents=True)
    for number in range(30):
        pixels = generator.integers(0, 256, (72, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / ("apple", "pear")[number % 3 == 0] / f"{number}.jpg")
    for number in range(16):
        pixels = generator.integers(0, 256, (72, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pairs" / "images" / f"{number}.png")
        Image.fromarray(pixels[..., 0] // 100).save(root / "pairs" / "masks" / f"{number}.png")
    (root / "pairs" / "classes.txt").write_text("ground\ncat\ndog\n")
    (root / "weights").mkdir()
    os.chdir(root / "weights")
    assert main(["fit", *CASES["bn"], *COMMON]) == 0
    next(Path.cwd().glob("checkpoints/*/*/last.ckpt")).rename(root / "bn.ckpt")


def differences(whole: Path, broken: Path) -> list[str]:
    """Compare two folders in which the same run was trained, without times and paths; say where they differ."""
    import torch

    first, second = (_only(folder.glob("runs/*/*")) for folder in (whole, broken))
    tables = [{path.name: path.read_text() for path in folder.glob("*.csv")} for folder in (first, second)]
    records = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    found = _differences(*tables, "tables") + _differences(*records, "metrics.json")
    first, second = (_only(folder.glob("checkpoints/*/*")) for folder in (whole, broken))
    for name in ("last.ckpt", "best.ckpt"):
        contents = [torch.load(folder / name, weights_only=True) for folder in (first, second)]
        for content in contents:
            del content["gn_transfer"]["config"]["checkpoint"]  # how often one is saved is changed on the way
        found += _differences(*contents, name)
    names = {path.name for folder in (first, second) for path in folder.iterdir()}
    left = [path for path in broken.rglob(".*") if path.name.endswith((".part", ".old"))]
    return found + [f"left over: {name}" for name in [*(names - {"last.ckpt", "best.ckpt", "previous.ckpt"}), *left]]


def _only(paths: Any) -> Path:
    [path] = paths
    return Path(path)


def _differences(one: Any, two: Any, place: str) -> list[str]:
    """List the places in which nested values differ."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [place]
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [said for key in one if key not in UNLIKE for said in _differences(one[key], two[key], f"{place} {key}")]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        return _differences(dict(enumerate(one)), dict(enumerate(two)), place)
    return [] if one == two or (one != one and two != two) else [place]


def run(folder: Path, words: list[str], seconds: float) -> int | None:
    """Run a command in a folder; None where it was killed behind so many seconds, with its loader processes."""

    def command() -> int:
        from gn_transfer.__main__ import main

        os.chdir(folder)
        return main(words)

    return run_forked(command, seconds, folder / "output.log")


def kill_and_continue(case: str, kills: int, root: Path, seed: int) -> tuple[int, int, list[str]]:
    """Train one case with kills; give how many there were, how many runs they fell into, and what went wrong."""
    rng = random.Random(f"{seed} {case}")
    whole = root / f"{case} whole"
    whole.mkdir()
    words, began = ["fit", *CASES[case], *COMMON], time.monotonic()
    if (code := run(whole, words, LONGEST_SECONDS)) != 0:
        return 0, 0, [f"the whole run ended with {code}: {(whole / 'output.log').read_text()[-1000:]}"]
    seconds, done, runs, wrong = time.monotonic() - began, 0, 0, []
    while done < kills:
        broken = root / f"{case} {runs}"
        broken.mkdir()
        runs += 1
        code, allowed = None, min(KILLS_OF_A_RUN, kills - done)
        while code is None:
            begun = [*broken.glob("checkpoints/*/*/last.ckpt"), *broken.glob("checkpoints/*/*/previous.ckpt")]
            if not begun:  # killed before its first checkpoint; another run would get the name behind it
                shutil.rmtree(broken)
                broken.mkdir()
            options = ["--checkpoint.every_minutes", rng.choice(EVERY_MINUTES)] + ["--ckpt_path", "last"] * bool(begun)
            killed_behind = rng.uniform(0.1, 1.0) * seconds if allowed else LONGEST_SECONDS
            code = run(broken, [*words, *options], killed_behind)
            if code is None and not allowed:
                break
            done, allowed = done + (code is None), allowed - (code is None)
        if code != 0:
            wrong.append(f"run {runs} ended with {code}: {(broken / 'output.log').read_text()[-1000:]}")
        else:
            wrong += [f"run {runs}: {said}" for said in differences(whole, broken)]
    return done, runs, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill runs of every case and print what differs; 1 where something does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=4, help="of each case (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    chosen = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # a sum split among other threads rounds otherwise
    import lightning.pytorch
    import timm
    import torch  # what every run needs is imported once, before the processes fork

    torch.set_num_threads(1)
    del lightning, timm
    total, faults = 0, 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(chosen.workers) as pool:
        root = Path(folder)

        def first() -> int:
            os.environ["XDG_CACHE_HOME"] = str(root / "cache")
            prepare(root)
            return 0

        if run_forked(first, 900, root / "output.log") != 0:
            print((root / "output.log").read_text())
            return 2
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        cases = chosen.cases or list(CASES)
        ended = pool.map(kill_and_continue, cases, repeat(chosen.kills), repeat(root), repeat(chosen.seed))
        for case, (kills, runs, wrong) in zip(cases, ended, strict=True):
            print(f"{case}: {kills} kills in {runs} runs, {len(wrong)} differences", flush=True)
            for said in wrong:
                print(f"    {said}", flush=True)
            total, faults = total + kills, faults + len(wrong)
    print(f"{total} kills, {faults} differences")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
