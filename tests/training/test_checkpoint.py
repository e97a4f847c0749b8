import errno
import os
import zipfile
from pathlib import Path

import pytest
import torch

from gn_transfer.__main__ import main
from gn_transfer.config import ConfigError
from gn_transfer.training.checkpoint import CHECKPOINT_VERSION, CorruptCheckpointError, check_classes, read_checkpoint
from gn_transfer.training.checkpoint_callbacks import AtomicCheckpointIO, write_checkpoint

ARCHITECTURE = {
    **{"backbone": "resnet18", "architecture": "resnet18", "norm": "gn", "num_groups": 32, "group_size": None},
    **{"head": "fc", "num_classes": 2, "in_chans": 3, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def checkpoint(position, **changes):
    described = {
        "classes": ["cat", "dog"],
        "architecture": ARCHITECTURE,
        "transfer_report": {"source": "from scratch", "loaded": [], "r2": {"norm": 0.5}},
        "position": position,
    }
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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_groups", "32))\n__import__('os').system('true')  #"),
        ("norm", "gn\n"),
        ("in_chans", 2),
        ("mean", "abc"),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, 0.5, float("nan")]),
        ("std", [0.2, 0.2, 0.0]),
        ("groups", {"norm1": "32"}),
        ("architecture", None),
        ("decoder", "other"),
    ],
)
def test_an_architecture_holds_plain_values_of_its_kinds(tmp_path, key, value):
    path = tmp_path / "x.ckpt"
    torch.save(checkpoint(None, architecture={**ARCHITECTURE, key: value}), path)
    with pytest.raises(ConfigError, match=rf"architecture\.{key} missing or of a wrong type"):
        read_checkpoint(path)


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")])
def test_weights_that_are_no_dense_tensors(tmp_path, tensor):
    path = tmp_path / "x.ckpt"
    torch.save({**checkpoint(None), "state_dict": {"weight": tensor}}, path)
    with pytest.raises(ConfigError, match=r"state_dict missing or of a wrong type|cannot be read"):
        read_checkpoint(path)


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path):
    plain, packed = tmp_path / "plain.ckpt", tmp_path / "packed.ckpt"
    write_checkpoint(checkpoint(1), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_checkpoint(packed)


def test_no_link_is_followed_when_a_checkpoint_is_written(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / f".{name}.{os.getpid()}.part").symlink_to(victim)
    for position in (1, 2):
        write_checkpoint(checkpoint(position), tmp_path / "last.ckpt", keep_previous=True)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert read_checkpoint(tmp_path / "previous.ckpt")["gn_transfer"]["position"] == 1


def test_other_classes_are_named_up_to_four():
    check_classes(["a", "b"], ["a", "b"])
    message = r"knows 4 classes \(a, b, c, d\), the data has 5 \(a, b, c, d, \.\.\.\)"
    with pytest.raises(ConfigError, match=message):
        check_classes(list("abcd"), list("abcde"))


def test_the_format_that_users_have_is_read(tmp_path):
    torch.save(checkpoint(None, version=2), tmp_path / "x.ckpt")
    assert read_checkpoint(tmp_path / "x.ckpt")["gn_transfer"]["version"] == 2


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("batch_size", "4", "batch_size"),
        ("classes", ("cat", "dog"), "classes"),
        ("transfer_report", {"source": ["a"]}, "transfer_report"),
        ("config", {"model": "-1"}, r"config\.model"),
        ("config", {"data": {"class_path": "Folder", "init_args": [1]}}, r"config\.data"),
        ("config", {"samples": "many"}, r"config\.samples"),
    ],
)
def test_a_description_holds_values_of_its_kinds(tmp_path, key, value, named):
    torch.save(checkpoint(None, **{key: value}), tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match=f"{named} missing or of a wrong type"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_a_configuration_may_hold_more_than_is_known(tmp_path):
    torch.save(checkpoint(None, config={"note": "first", "ema": {"decay": None}}), tmp_path / "x.ckpt")
    assert read_checkpoint(tmp_path / "x.ckpt")["gn_transfer"]["config"]["note"] == "first"


def test_the_epoch_is_a_number(tmp_path):
    torch.save({**checkpoint(None), "epoch": "x"}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="epoch missing or of a wrong type"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_no_checkpoint_at_all(capsys):
    assert main(["fit", "--ckpt_path", ""]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "corrupt"), [(errno.EINVAL, True), (errno.ENOTCONN, False), (errno.EIO, False), (errno.EACCES, False)]
)
def test_what_cannot_be_read_now_is_not_called_corrupt(tmp_path, monkeypatch, number, corrupt):
    torch.save({"gn_transfer": {}}, tmp_path / "last.ckpt")

    def fail(_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("zipfile.ZipFile.testzip", fail)
    with pytest.raises(ConfigError, match="cannot be read") as found:
        read_checkpoint(tmp_path / "last.ckpt")
    assert isinstance(found.value, CorruptCheckpointError) == corrupt
