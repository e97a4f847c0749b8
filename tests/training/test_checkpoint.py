from pathlib import Path

import pytest
import torch

from gn_transfer.config import ConfigError
from gn_transfer.training.checkpoint import CHECKPOINT_VERSION, check_classes, read_checkpoint
from gn_transfer.training.checkpoint_callbacks import AtomicCheckpointIO, write_checkpoint


def checkpoint(position, **changes):
    described = {"classes": ["cat", "dog"], "architecture": {}, "transfer_report": {}, "position": position}
    return {"gn_transfer": {**described, **changes}, "state_dict": {"weight": torch.arange(1000.0)}}


class Unpicklable:
    def __reduce__(self):
        return (print, ("code in a checkpoint ran",))


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint(checkpoint(1), path)

    def half(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    writer.save_checkpoint(checkpoint(2), path)  # a training goes on
    assert writer.problems == {path: "No space left on device"}
    assert read_checkpoint(path)["gn_transfer"]["position"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_in_torchs_own_writer(tmp_path, monkeypatch):
    def full(content, file):
        raise RuntimeError("[enforce fail at inline_container.cc:745] . unexpected pos 128 vs 22")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_before_the_last_stays(tmp_path):
    for position in (1, 2, 3):
        AtomicCheckpointIO().save_checkpoint(checkpoint(position), tmp_path / "last.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert read_checkpoint(tmp_path / "last.ckpt")["gn_transfer"]["position"] == 3
    assert read_checkpoint(tmp_path / "previous.ckpt")["gn_transfer"]["position"] == 2


def test_every_changed_byte_of_the_weights_is_noticed(tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint(checkpoint(1), path)
    whole = path.read_bytes()
    place = whole.index(torch.arange(1000.0).numpy().tobytes())
    for offset in (0, 1999, 3999):
        damaged = bytearray(whole)
        damaged[place + offset] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="checksum"):
            read_checkpoint(path)
    path.write_bytes(whole[: len(whole) // 2] + bytes(1024) + whole[len(whole) // 2 + 1024 :])
    with pytest.raises(ConfigError, match=r"checksum|cannot be read"):
        read_checkpoint(path)


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "evil.ckpt"
    torch.save({"gn_transfer": Unpicklable()}, path)
    with pytest.raises(ConfigError, match="more than plain"):
        read_checkpoint(path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "cannot be read"), (b"PK\x03\x04 cut short", "cannot be read")],
)
def test_missing_and_corrupt_files(tmp_path: Path, content, message):
    path = tmp_path / "x.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(path)


def test_a_foreign_checkpoint_is_named_as_such(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ConfigError, match="not a checkpoint of gn-transfer"):
        read_checkpoint(path)


@pytest.mark.parametrize(("newer", "remedy"), [(1, "update gn-transfer"), (-1, "use the version that wrote it")])
def test_a_checkpoint_of_another_format(tmp_path, newer, remedy):
    path = tmp_path / "x.ckpt"
    torch.save(checkpoint(None, version=CHECKPOINT_VERSION + newer), path)
    with pytest.raises(ConfigError, match=f"has checkpoint format {CHECKPOINT_VERSION + newer}, .*; {remedy}"):
        read_checkpoint(path)
    torch.save(checkpoint(None, version=CHECKPOINT_VERSION), path)
    assert read_checkpoint(path)["gn_transfer"]["version"] == CHECKPOINT_VERSION


def test_other_classes_are_named_up_to_four():
    check_classes(["a", "b"], ["a", "b"])
    message = r"knows 4 classes \(a, b, c, d\), the data has 5 \(a, b, c, d, \.\.\.\)"
    with pytest.raises(ConfigError, match=message):
        check_classes(list("abcd"), list("abcde"))
