"""Reading files that anyone may have written, and writing files that are whole or absent."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gn_transfer.files import going_on_without, parse_json, read_json, read_text, remove_leftovers, write_json
from gn_transfer.yaml_files import read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n" for before, after in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {norm: bn}\nmodel: {norm: gn}\n", "model stands twice"),
        ("a: 1\nb: {c: 1, c: 2}\n", "c stands twice"),
        ("a: " + "[" * 500 + "]" * 500, "deeper than 32"),
        ("a: " + "[" * 100_000 + "]" * 100_000, "deeper than 32"),
        (BOMB, "more than 100,000 values"),
        ("a: [1", "expected"),
        ("a: !!python/object/apply:os.system [id]", "the tag !!python/object/apply:os.system"),
        ("a: !!bool maybe", "the tag !!bool"),
        ("a: !!pairs [b: 1]", "the tag !!pairs"),
        ("a: 0x" + "F" * 5000, "a number of 5,002 characters"),
        ("a: 1" + ":1" * 200_000, "a number of 400,001 characters"),
        ("a: [" + "1," * 1_200_000 + "1]", "more than 100,000 values"),
        (
            "a0: &a0 {x: 1}\n"
            + "".join(f"a{n + 1}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}]}}\n" for n in range(9)),
            "more than 100,000 values",
        ),
        ("a: &a [*a]", "the alias a inside"),
        ("a: " + "x" * (4 * 2**20), "longer than 4 MiB"),
        ("a: 2001-99-99", "month"),
        (b"\xff\xfea\x00:\x00 \x001\x00", "utf-8"),
        (b"a: \xe9t\xe9", "utf-8"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_yaml(path)


def test_yaml_with_aliases_and_merged_keys_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("base: &base {lr: 0.1, norm: bn}\nown: {<<: *base, norm: gn}\nsame: *base\n")
    assert read_yaml(path)["own"] == {"lr": 0.1, "norm": "gn"}


def test_an_alias_counts_as_much_as_what_it_stands_for(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"many: [{'1,' * 60_000}1]\nfew: &few [2, 3]\nagain: *few\n")
    assert read_yaml(path)["again"] == [2, 3]
    path.write_text(f"many: &many [{'1,' * 60_000}1]\nagain: *many\n")
    with pytest.raises(ValueError, match="more than 100,000 values"):
        read_yaml(path)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    os.mkfifo(path)
    with pytest.raises(FileNotFoundError):
        read_text(path)
    assert read_json(path) == {}


def test_json_that_is_nested_too_deeply() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_json_has_no_numbers_that_are_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"loss": math.nan, "rows": [(1.5, math.inf)], "name": "nan"})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "rows": [[1.5, None]], "name": "nan"}


def test_leftovers_of_killed_processes_go_away(tmp_path: Path) -> None:
    dead = 2**22 + 1  # above the largest number of a process
    for name in (f".last.ckpt.{dead}.part", f".b.{os.getpid()}.part", ".hidden.part", "x.part"):
        (tmp_path / name).touch()
    (tmp_path / f".bundle.{dead}.part").mkdir()
    (tmp_path / f".bundle.{dead}.part" / "model.onnx").touch()
    (tmp_path / f".lost.{dead}.old").mkdir()  # it was killed between its two renames
    (tmp_path / f".kept.{dead}.old").mkdir()
    (tmp_path / "kept").mkdir()
    remove_leftovers(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f".b.{os.getpid()}.part", ".hidden.part", "x.part", "lost", "kept"}
    remove_leftovers(tmp_path / "nowhere")


def test_what_a_running_process_writes_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        (tmp_path / f".a.{running.pid}.part").touch()
        (tmp_path / ".b.1.part").touch()  # the first process of the system, which may not be ours to ask
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        running.communicate(b"\n")


def test_a_file_that_cannot_be_written_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with going_on_without("the tables of this test"):
            raise OSError(28, "No space left on device")
    assert caplog.messages == [
        "warning: the tables of this test cannot be written (No space left on device); the run goes on without"
    ]
