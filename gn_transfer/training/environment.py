"""What the figures of a run were obtained with: versions, git commit, device, threads."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Say what the figures of a run were obtained with: versions, git commit, device, threads."""
    names = ("gn-transfer", "torch", "torchvision", "lightning", "timm", "albumentations", "torchmetrics")
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    )
    return {
        "versions": {name: version(name) for name in names},
        "git_commit": _git_commit(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _git_commit() -> str | None:
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # installed: a repository around the environment would not be ours
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
