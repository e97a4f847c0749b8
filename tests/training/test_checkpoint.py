from pathlib import Path

import pytest
import torch

from gn_transfer.config import ConfigError
from gn_transfer.training.checkpoint import read_checkpoint
from gn_transfer.training.checkpoint_callbacks import AtomicCheckpointIO


class Unpicklable:
    def __reduce__(self):
        return (print, ("code in a checkpoint ran",))


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"gn_transfer": {"step": 1}}, path)

    def half(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        writer.save_checkpoint({"gn_transfer": {"step": 2}}, path)
    assert read_checkpoint(path)["gn_transfer"] == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


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
