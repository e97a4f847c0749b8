"""Time and memory of ``gn-transfer compare`` with all its files, over made-up runs.

    python benchmarks/compare.py --json

The runs are those of the tests (tests/fabricate.py): 4 norms x 5 batch sizes x 10 seeds, each with 498
validation and 498 test images. Each round is a process of its own; the first, with cold caches, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fabricate import fabricate


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        for seed in range(10):
            for norm in ("bn", "bn_frozen", "gn", "gn_ws"):
                for batch_size in (1, 2, 4, 8, 16):
                    accuracy = 0.5 + 0.01 * seed + 0.02 * len(norm)
                    fabricate(runs, norm, batch_size, seed, accuracy, effective_batch_size=16, images=498)
        command = [sys.executable, "-m", "gn_transfer", "compare", str(runs), "--output", str(Path(folder) / "report")]
        rounds = [measure(command) for _ in range(options.rounds + 1)][1:]
    seconds, peaks = zip(*rounds, strict=True)
    result = {
        "runs": 200,
        "seconds_median": round(statistics.median(seconds), 2),
        "seconds_range": [round(min(seconds), 2), round(max(seconds), 2)],
        "peak_memory_mib": round(max(peaks), 1),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result, indent=2) if options.json else result)


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; give its seconds and its peak memory in MiB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - began, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
