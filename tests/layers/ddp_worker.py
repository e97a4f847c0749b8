"""One of two processes of test_ddp.py: gradients under DistributedDataParallel with and without the engine.

Usage: python ddp_worker.py RANK STORE OUTPUT
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gn_transfer.layers import AccumulationEngine, FrozenBatchNorm2d, GroupNormAct, StdConv2d


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 3, 1, bias=False),
        FrozenBatchNorm2d(3),
        StdConv2d(3, 8, 3, bias=False),
        GroupNormAct(8, 4),
        StdConv2d(8, 16, 1, bias=False),
        nn.Conv2d(16, 16, 3),
        nn.Flatten(),
        nn.Linear(16 * 9, 5),
    )


def gradients(rank: int, *, engine: bool, bfloat16: bool, steps: int = 2, count: int = 3) -> dict[str, torch.Tensor]:
    model = make_net()
    accumulation = AccumulationEngine(model) if engine else None
    if accumulation is not None:
        assert accumulation.fold_norms(torch.zeros(2, 3, 7, 7)) == 1
    # buckets of 1 kB: some are reduced while the backward still runs
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.001)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        model.zero_grad()
        for i in range(count):
            last = i == count - 1
            images = torch.randn(2, 3, 7, 7, generator=generator)
            if accumulation is not None:
                accumulation.micro_batch(first=i == 0, last=last)
            with contextlib.nullcontext() if last else ddp.no_sync():
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    loss = F.cross_entropy(ddp(images).float(), torch.tensor([i, rank]))
                (loss / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main(rank: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    runs = {
        f"{name}_{dtype}": gradients(rank, engine=name == "ours", bfloat16=dtype == "bf16")
        for dtype in ("fp32", "bf16")
        for name in ("ours", "plain")
    }
    torch.save(runs, Path(output) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
