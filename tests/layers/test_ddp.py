"""The engine under DistributedDataParallel: two gloo processes, no_sync on all but the last micro-batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("ddp_worker.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_both_processes_have_the_gradient_of_plain_ddp(tmp_path):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(tmp_path / "store"), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=100)
        assert worker.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for dtype, tolerance in (("fp32", 1e-5), ("bf16", 2e-2)):
        ours, plain, theirs = first[f"ours_{dtype}"], first[f"plain_{dtype}"], second[f"ours_{dtype}"]
        assert ours.keys() == plain.keys()
        for name, gradient in ours.items():
            assert torch.equal(gradient, theirs[name]), name
            assert (gradient - plain[name]).norm() <= tolerance * plain[name].norm(), name
