"""How much memory this process may still take: of the machine, of its control groups, of the limits of its shell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_CONTROL_GROUPS = Path("/sys/fs/cgroup")

# Folder below that, and the names of: limit, use, and the part of the use that can be given back at once.
_MEMORY_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_ram_bytes() -> int | None:
    """Tell how much memory this process may still take, in a container too; None where the system does not say."""
    try:
        total = _numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024
        status = _numbers(Path("/proc/self/status"))
        places = Path("/proc/self/cgroup").read_text(encoding="ascii", errors="replace").splitlines()
    except (OSError, KeyError):
        return None
    return max(0, min([total, *_of_control_groups(places), *_of_limits(status)]))


def resident_bytes() -> int | None:
    """Tell how much memory this process takes for itself now, without mapped files; None if the system does not say."""
    try:
        return _numbers(Path("/proc/self/status"))["RssAnon:"] * 1024
    except (OSError, KeyError):
        return None


def _of_control_groups(places: list[str]) -> Iterator[int]:
    """Bytes that are left in each group that this process is in."""
    for folder, limit, use, free in _MEMORY_FILES:
        root = _CONTROL_GROUPS / folder
        own = next((place for _, kinds, place in (p.split(":", 2) for p in places) if folder in kinds.split(",")), "/")
        inner = root / own.lstrip("/")
        for group in (inner, *inner.parents):
            with suppress(OSError, ValueError, KeyError):  # not seen from inside a container, or no limit
                left = int((group / limit).read_text()) - int((group / use).read_text())
                yield left + _numbers(group / "memory.stat").get(free, 0)
            if group == root:
                break


def _of_limits(status: dict[str, int]) -> Iterator[int]:
    """Bytes that are left of what ``ulimit`` allows: address space and private memory."""
    if resource is None:
        return
    for kind, taken in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        allowed = resource.getrlimit(kind)[0]
        if allowed != resource.RLIM_INFINITY and taken in status:
            yield allowed - 1024 * status[taken]


def _numbers(path: Path) -> dict[str, int]:
    """Read a file of the kernel with a name and a number in each line; other lines are left out."""
    rows = [line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
