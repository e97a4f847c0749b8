"""Free memory: the tightest of the machine, its control groups, and the limits of the shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gn_transfer.data import free_memory
from gn_transfer.data.free_memory import available_ram_bytes, resident_bytes

MIB = 2**20


def group(folder: Path, names: tuple[str, str], limit: str, use: int, cache: tuple[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{use}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache[0]} {cache[1]}\n")


@pytest.fixture
def place(monkeypatch, tmp_path):
    """Control groups below ``tmp_path``; the text says where this process is."""
    read_text = Path.read_text

    def at(text: str) -> Path:
        monkeypatch.setattr(
            Path, "read_text", lambda self, **how: text if str(self) == "/proc/self/cgroup" else read_text(self, **how)
        )
        monkeypatch.setattr(free_memory, "_CONTROL_GROUPS", tmp_path)
        return tmp_path

    return at


@pytest.mark.skipif(sys.platform != "linux", reason="the files of Linux")
def test_a_group_and_those_around_it(place):
    root, names = place("0::/user/job\n"), ("memory.max", "memory.current")
    group(root / "user" / "job", names, "max", 100 * MIB, ("inactive_file", 0))
    group(root / "user", names, str(300 * MIB), 250 * MIB, ("inactive_file", 30 * MIB))  # cached files are given back
    assert available_ram_bytes() == 80 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="the files of Linux")
@pytest.mark.parametrize("own", ["/job", "/not/seen/inside"])
def test_groups_of_the_first_version(place, own):
    root, names = place(f"9:cpu:/\n4:memory:{own}\n0::/\n"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(root / "memory", names, "9223372036854771712", 0, ("total_inactive_file", 0))
    group(root / "memory" / "job", names, str(200 * MIB), 150 * MIB, ("total_inactive_file", 10 * MIB))
    free = available_ram_bytes()
    assert free == 60 * MIB if own == "/job" else free > 60 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of Linux")
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_shell(kind):
    code = f"""
import resource
resource.setrlimit(resource.{kind}, (300 * 2**20, 300 * 2**20))
from gn_transfer.data.free_memory import available_ram_bytes
print(available_ram_bytes())
"""
    folder = str(Path(free_memory.__file__).parents[2])
    code = code.replace("from gn_transfer.data.free_memory", "from free_memory")
    path = [str(Path(folder) / "gn_transfer" / "data")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"], capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) < 300 * MIB


def test_what_is_left_of_a_limit(monkeypatch):
    limits = {free_memory.resource.RLIMIT_AS: 100 * MIB, free_memory.resource.RLIMIT_DATA: 50 * MIB}
    monkeypatch.setattr(
        free_memory.resource, "getrlimit", lambda kind: (limits[kind], free_memory.resource.RLIM_INFINITY)
    )
    assert list(free_memory._of_limits({"VmSize:": 30 * 1024, "VmData:": 20 * 1024})) == [70 * MIB, 30 * MIB]


@pytest.mark.skipif(sys.platform != "linux", reason="the files of Linux")
def test_nothing_above_the_root_of_the_groups_is_looked_at(place):
    root, names = place("0::/job\n"), ("memory.max", "memory.current")
    group(root / "job", names, str(200 * MIB), 100 * MIB, ("inactive_file", 0))
    group(root.parent, names, str(10 * MIB), 9 * MIB, ("inactive_file", 0))
    assert available_ram_bytes() == 100 * MIB


def test_this_machine():
    free, resident = available_ram_bytes(), resident_bytes()
    assert free is None or free > 0
    assert resident is None or 10 * MIB < resident < 100_000 * MIB


def test_lines_without_a_number_do_not_count(tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nGroups:\t\n\nVmSize:\t  300 kB\ninactive_file 5\n")
    assert free_memory._numbers(tmp_path / "status") == {"VmSize:": 300, "inactive_file": 5}


@pytest.mark.skipif(sys.platform != "linux", reason="the files of Linux")
def test_without_a_limit_what_the_kernel_says_counts(place, monkeypatch):
    """In KiB; as on most desktops, no control group and no ``ulimit`` allow less."""
    place("0::/\n")
    no_limit = free_memory.resource.RLIM_INFINITY
    monkeypatch.setattr(free_memory.resource, "getrlimit", lambda kind: (no_limit, no_limit))
    numbers = {"/proc/meminfo": {"MemAvailable:": 300 * 1024}, "/proc/self/status": {"RssAnon:": 20 * 1024}}
    monkeypatch.setattr(free_memory, "_numbers", lambda path: numbers[str(path)])
    assert (available_ram_bytes(), resident_bytes()) == (300 * MIB, 20 * MIB)


@pytest.mark.skipif(sys.platform != "linux", reason="the files of Linux")
def test_a_group_with_a_colon_in_its_name_and_one_over_its_limit(place):
    root, names = place("0::/docker:job\n"), ("memory.max", "memory.current")
    group(root / "docker:job", names, str(100 * MIB), 40 * MIB, ("slab", 7))  # nothing is said of cached files
    assert available_ram_bytes() == 60 * MIB
    group(root / "docker:job", names, str(100 * MIB), 150 * MIB, ("slab", 7))
    assert available_ram_bytes() == 0


def test_a_system_without_limits(monkeypatch):
    monkeypatch.setattr(free_memory, "resource", None)
    assert list(free_memory._of_limits({"VmSize:": 1})) == []
