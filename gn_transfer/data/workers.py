"""How many threads load data beside those that compute."""

from __future__ import annotations

import os


def choose_num_workers(cores: int, compute_threads: int, *, on_gpu: bool, processes: int = 1) -> int:
    """Choose how many data threads fit.

    On a CPU a data thread beside a full set of compute threads makes every barrier wait: they take only the
    cores that are left. Beside a GPU the main thread needs one core, and more than 8 do not help.

    Args:
        cores: Cores that this machine gives us.
        compute_threads: torch's threads per process; not counted on a GPU.
        on_gpu: Whether the model runs on an accelerator.
        processes: Training processes on this machine, each with its own data threads.

    Returns:
        Data threads per training process, >= 0.

    Example:
        >>> choose_num_workers(2, 2, on_gpu=False), choose_num_workers(16, 16, on_gpu=True)
        (0, 8)
    """
    share = cores // processes
    return max(0, min(8, share - 1)) if on_gpu else max(0, share - compute_threads)


def core_count() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
