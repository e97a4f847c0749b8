"""How start-up and studies grow: images of a data set against the plan of a run, trials against a study's own work.

    python benchmarks/scale.py --json

The images are small JPEGs of random pixels, all different files, in class folders of 100; ``fit --dry_run`` lists,
verifies, splits and looks for copies, builds the model and measures a step. A study's own work is all that is done
beside the runs: entering its trials, planning, claiming and finishing each of them, in SQLite; runs take no time here.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gn_transfer.study.definition import read_study
from gn_transfer.study.planning import Outcome, plan_trials
from gn_transfer.study.store import Store
from gn_transfer.study.worker import run_trials
from gn_transfer.training.environment import environment

FIT = "--data Folder --data.img_size 64 --data.cache none --model.backbone resnetv2_18 --mixed_precision.mode fp32"


def fabricate_images(root: Path, number: int) -> None:
    """Write JPEGs of 64 x 64 pixels and 5 to 8 KB; what makes each differ stands in its comment."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    encoded = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    for index in range(number):
        folder = root / f"class_{index // 100:05}"
        folder.mkdir(parents=True, exist_ok=True)
        comment = index.to_bytes(4, "little") + bytes(int(generator.integers(0, 3000)))
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        plain = encoded[index % 10]
        (folder / f"{index:06}.jpg").write_bytes(plain[:2] + segment + plain[2:])


def plan_of_images(number: int) -> dict[str, Any]:
    """Time ``fit --dry_run`` on a folder of fabricated images."""
    with tempfile.TemporaryDirectory() as folder:
        fabricate_images(Path(folder) / "images", number)
        os.sync()  # what is still to be written would be counted, too
        command = [
            sys.executable,
            "-m",
            "gn_transfer",
            "fit",
            *FIT.split(),
            "--data.root",
            f"{folder}/images",
            "--dry_run",
        ]
        for _ in range(2):  # the second finds all directories in memory
            began = time.perf_counter()
            process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0, command
            seconds = time.perf_counter() - began
    return {"images": number, "seconds": round(seconds, 1), "peak_mib": round(usage.ru_maxrss / 1024)}


def work_of_trials(number: int) -> dict[str, Any]:
    """Time all that a study does beside its runs, with one worker."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep_scale.yaml"
        path.write_text(f"base: digits.yaml\nsamples: 16\ngrid: {{model.norm: [bn, gn]}}\nseeds: {number // 2}\n")
        study = read_study(path)
        began = time.perf_counter()
        store, stop = Store(f"sqlite:///{folder}/study.db", study.name), threading.Event()
        store.begin(study.shared_settings())
        store.enter(plan_trials(study, store.outcomes()).trials)
        left = number

        def run(_: object) -> Outcome:
            nonlocal left
            left -= 1
            if left == 0:
                stop.set()
            return Outcome("complete", value=0.5, loss=1.0, seconds=0.0)

        run_trials(store, study, run, stop)
        done = sum(outcome.ended for outcome in store.outcomes().values())
        store.close()
    assert done == number
    seconds = time.perf_counter() - began
    return {"trials": number, "seconds": round(seconds, 2), "ms_per_trial": round(1000 * seconds / number, 1)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--trials", type=int, nargs="*", default=[10, 100, 1_000])
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = {
        "images": [plan_of_images(number) for number in options.images],
        "trials": [work_of_trials(number) for number in options.trials],
    }
    result = {**rows, "cores": os.cpu_count(), "environment": environment()}
    print(json.dumps(result, indent=2) if options.json else result)


if __name__ == "__main__":
    main()
