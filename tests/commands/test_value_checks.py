"""Values of the right type that are no values: one message, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from gn_transfer.__main__ import main


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("data.img_size", "null", "data.img_size=null is not allowed"),
        ("data.batch_size", "null", "data.batch_size=null is not allowed"),
        ("data.val_fraction", "null", "data.val_fraction=null is not allowed"),
        ("data.batch_size", "1000", "more than the 9 training images"),
        ("data.num_workers", "99999999999999999999", "out of range"),
        ("data.num_workers", "5000", "[0, 1024]"),
        ("seed_everything", "-1", "[0, 4294967295]"),
        ("seed_everything", "99999999999", "[0, 4294967295]"),
        ("freezing.epochs", "99999999999999999999", "out of range"),
        ("samples", "99999999999999999999", "out of range"),
        ("accumulation.effective_batch_size", "99999999999999999999", "out of range"),
        ("optimizer.lr", ".nan", "not a finite number"),
        ("optimizer.head_lr", ".inf", "not a finite number"),
        ("optimizer.lr", "1e30", "optimizer.lr=1e+30 is out of range; use a number in (0, 1000]"),
        ("optimizer.weight_decay", "1e30", "use a number in [0, 1000]"),
        ("regularization.mixup", "1e30", "use a number in [0, 1000]"),
        ("optimizer.lr", "1" * 400, "a number is too large; use one below 1e308"),
        ("trainer.val_check_interval", "0", "use more than 0"),
        ("trainer.val_check_interval", "../../x", "Expected 'DD:HH:MM:SS'"),
        ("data.tile_size", "{}", "data.tile_size is not a key of Folder, but of SegmentationSample"),
        ("data.tile_size", "512", "data.tile_size is a key of other data"),
        ("trainer.val_check_interval", "99", "more than the 9 batches"),
        ("trainer.limit_train_batches=2 --trainer.val_check_interval", "3", "more than the 2 batches"),
        ("trainer.check_val_every_n_epoch", "0", "use 1 or more"),
        ("trainer.limit_train_batches", "0", "use more than 0"),
        ("trainer.log_every_n_steps", "0", "use 1 or more"),
        ("trainer.max_epochs", "-1", "no steps, or no end"),
        ("trainer.max_steps", "0", "no steps, or no end"),
        ("trainer.accelerator", "warp", "trainer: "),
        ("trainer.strategy", "warp", "trainer: "),
        ("trainer.devices", "-3", "trainer: "),
        ("trainer.devices", "many", "trainer: "),
        ("trainer.max_time", "soon", "trainer: "),
        ("trainer.barebones", "true", "trainer: "),
        ("trainer.sync_batchnorm", "true", "model.norm=bn_sync"),
        ("model", "null", "give the keys of model one by one"),
        ("data.root", "x" * 5000, "File name too long"),
    ],
)
def test_refused(folder_root, tmp_path, monkeypatch, capsys, option, value, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--data", "Folder", "--data.root", str(folder_root), "--data.img_size", "32"]
    words += ["--model.backbone", "resnet18", *f"--{option}".split(), value]
    if not option.startswith("trainer.max"):
        words += ["--trainer.max_epochs", "1"]
    assert main(["fit", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("runs").exists()


def test_validations_may_be_counted_over_epochs(folder_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "--data",
        "Folder",
        "--data.root",
        str(folder_root),
        "--data.img_size",
        "32",
        "--model.backbone",
        "resnet18",
    ]
    words += ["--trainer.val_check_interval", "12", "--trainer.check_val_every_n_epoch", "null"]
    assert main(["fit", *words, "--trainer.max_epochs", "2"]) == 0
    [table] = Path().glob("runs/default/*/epochs.csv")
    assert len(table.read_text().splitlines()) == 2


def test_a_missing_root_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--data", "Folder"]) == 2
    assert "data.root is not given, and Folder needs it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_in_the_way_of_the_runs(folder_root, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "file":
        Path("runs").write_text("mine")
    else:
        Path("runs").symlink_to(tmp_path / "gone" / "away")
    words = ["--data", "Folder", "--data.root", str(folder_root), "--data.img_size", "32"]
    assert main(["fit", *words, "--model.backbone", "resnet18", "--trainer.max_epochs", "1"]) == 2
    assert "the folder of the run cannot be made" in capsys.readouterr().err
