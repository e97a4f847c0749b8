"""Reading files that anyone may have written, and writing files that are whole or absent."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gn_transfer.config import ConfigError
from gn_transfer.files import (
    going_on_without,
    parse_json,
    read_json,
    read_text,
    refuse_link,
    remove_leftovers,
    sha256,
    spreadsheet_cell,
    whole_file,
    whole_folder,
    write_csv,
    write_json,
    write_text,
)
from gn_transfer.yaml_files import parse_yaml, read_yaml

DEAD = 2**22 + 1  # above the largest number of a process

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
    with pytest.raises(FileNotFoundError, match=r"\[Errno 2\] no such file"):
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
    for name in (f".last.ckpt.{DEAD}.part", f".b.{os.getpid()}.part", ".hidden.part", "x.part"):
        (tmp_path / name).touch()
    (tmp_path / f".bundle.{DEAD}.part").mkdir()
    (tmp_path / f".bundle.{DEAD}.part" / "model.onnx").touch()
    (tmp_path / f".lost.{DEAD}.old").mkdir()  # it was killed between its two renames
    (tmp_path / f".kept.{DEAD}.old").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "model.onnx").touch()
    remove_leftovers(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f".b.{os.getpid()}.part", ".hidden.part", "x.part", "lost", "kept"}
    remove_leftovers(tmp_path / "nowhere")


def test_a_folder_beside_other_files_removes_only_its_own_leftovers(tmp_path: Path) -> None:
    mine = [f".bashrc.{DEAD}.old", f".thesis.{DEAD}.part"]
    for name in mine:
        (tmp_path / name).touch()
    (tmp_path / f".bundle.{DEAD}.part").mkdir()
    with whole_folder(tmp_path / "bundle") as folder:
        (folder / "model.onnx").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, "bundle"])


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        with whole_file(tmp_path / "pipe") as file:
            file.write("results\n")
        assert reader.communicate(timeout=60)[0] == "results\n"
    assert (tmp_path / "pipe").is_fifo()


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


def test_yaml_up_to_its_limits_is_read() -> None:
    assert repr(parse_yaml("[1, 1.5, 0x10]")) == "[1, 1.5, 16]"
    assert parse_yaml("a: &x 1\nb: [*x, *x]") == {"a": 1, "b": [1, 1]}
    assert parse_yaml("a: " + "1" * 64) == {"a": int("1" * 64)}
    assert parse_yaml("#" + "x" * (4 * 2**20 - 1)) is None
    assert parse_yaml("[" * 32 + "]" * 32)
    assert len(parse_yaml("[" + "1," * 99_998 + "1]")) == 99_999  # 100,000 with the list
    assert len(parse_yaml("[&x 1" + ", *x" * 99_998 + "]")) == 99_999


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "1" * 65, "a number of 65 characters"),
        ("[" * 33 + "]" * 33, "deeper than 32"),
        ("[" + "1," * 99_999 + "1]", "more than 100,000 values"),
        ("[&x 1" + ", *x" * 99_999 + "]", "more than 100,000 values"),
    ],
)
def test_yaml_just_beyond_its_limits_is_not(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_a_text_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(256 * 2**20 + 1)  # takes no room
    with pytest.raises(ValueError, match="larger than 256 MiB"):
        read_text(path)
    assert read_json(path) == {}
    path.write_text("null")
    monkeypatch.setattr("gn_transfer.files._MAX_TEXT", 4)
    assert read_text(path) == "null"


@pytest.mark.parametrize(("text", "content"), [('{"a": 1}', {"a": 1}), ("[1]", {}), ("{", {})])
def test_json_that_is_no_mapping_counts_as_empty(tmp_path: Path, text: str, content: dict[str, int]) -> None:
    (tmp_path / "x.json").write_text(text)
    assert read_json(tmp_path / "x.json") == content
    assert read_json(None) == {}


def test_a_checksum_that_is_published(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_table_has_empty_fields_and_names_that_are_no_text(tmp_path: Path) -> None:
    write_csv(tmp_path / "x.csv", ["name", "value"], [("a,b", 1.5), ("\udcff", None)])
    assert (tmp_path / "x.csv").read_bytes() == b'name,value\n"a,b",1.5\n\xff,\n'


def test_a_spreadsheet_runs_no_cell() -> None:
    cells = {"=1+1": "'=1+1", "-x": "'-x", "a": "a", -1.5: -1.5, None: None}
    assert {value: spreadsheet_cell(value) for value in cells} == cells


def test_a_file_that_is_not_finished_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError), whole_file(path) as file:
        file.write("half" + "\ud800")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["before"]


def test_no_link_is_followed_when_a_file_is_written(tmp_path: Path) -> None:
    path, victim = tmp_path / "x.txt", tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".x.txt.{os.getpid()}.part").symlink_to(victim)
    write_text(path, "new")
    assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("mine", "new", False)
    refuse_link(path)
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="is a link to"):
        refuse_link(path)


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for name in ("first", "second"):
        (tmp_path / f".bundle.{DEAD}.part").mkdir()
        (tmp_path / f".bundle.{os.getpid()}.old" / "stale").mkdir(parents=True)
        with whole_folder(target) as folder:
            (folder / name).touch()
        assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["bundle", f"bundle/{name}"]
    with pytest.raises(FileNotFoundError), whole_folder(target) as folder:
        (folder / "third" / "file").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["bundle", "bundle/second"]


def test_a_folder_comes_back_where_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "bundle", Path.rename
    target.mkdir()
    (target / "first").touch()

    def rename_but_not_the_new(self: Path, to: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", rename_but_not_the_new)
    with pytest.raises(OSError, match="No space"), whole_folder(target) as folder:
        (folder / "second").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["bundle", "bundle/first"]


def test_what_another_user_writes_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    (tmp_path / ".a.7.part").touch()
    remove_leftovers(tmp_path)
    assert (tmp_path / ".a.7.part").exists()
