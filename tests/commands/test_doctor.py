"""``gn-transfer doctor`` and ``gn-transfer reestimate`` on a run whose statistics are spoilt on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gn_transfer.__main__ import main
from gn_transfer.training.checkpoint import read_checkpoint
from gn_transfer.training.checkpoint_callbacks import write_checkpoint

SMALL = ["--model.backbone", "resnet18", "--data.img_size", "64", "--data.batch_size", "4"]
SMALL += ["--mixed_precision.mode", "fp32", "--trainer.max_epochs", "3", "--data.cache", "none"]


@pytest.fixture(autouse=True)
def one_thread_in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def checkpoint(pets_root):
    words = ["fit", "--data", "Pets", "--data.root", str(pets_root), "--model.norm", "bn", *SMALL]
    assert main(words) == 0
    [path] = Path().glob("checkpoints/default/*/last.ckpt")
    return path


def spoil(path: Path) -> None:
    """Make two layers of a checkpoint normalize by statistics that are not those of its images."""
    content = read_checkpoint(path)
    content["state_dict"]["model.layer2.0.bn1.running_var"] *= 25
    content["state_dict"]["model.layer3.0.bn2.running_mean"] += 4
    write_checkpoint(content, path)


def doctor(capsys, *words: str) -> dict:
    capsys.readouterr()
    assert main(["doctor", *words, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_spoilt_statistics_are_found_and_repaired(checkpoint, capsys):
    spoilt = checkpoint.with_name("spoilt.ckpt")
    content = read_checkpoint(checkpoint)
    write_checkpoint(content, spoilt)
    spoil(spoilt)
    found = doctor(capsys, str(spoilt), "--batch_size", "4")
    off = {layer["name"] for layer in found["layers"] if layer["mean_shift"] > 3 or layer["variance_factor"] > 10}
    assert off == {"layer2.0.bn1", "layer3.0.bn2"}

    assert main(["reestimate", str(spoilt), "--images", "24"]) == 0
    printed = capsys.readouterr().out
    repaired = spoilt.with_name("spoilt_reestimated.ckpt")
    assert f"checkpoint {repaired}" in printed
    assert "before" in printed
    after = read_checkpoint(repaired)
    assert after["gn_transfer"]["statistics"] == "re-estimated on 24 training images"
    changed = {key for key, value in after["state_dict"].items() if not torch.equal(value, content["state_dict"][key])}
    assert all(key.endswith(("running_mean", "running_var")) for key in changed)
    found = doctor(capsys, str(repaired), "--batch_size", "4")
    assert all(layer["variance_factor"] < 10 and layer["mean_shift"] < 3 for layer in found["layers"])
    assert main(["export", str(repaired), "--output", "bundle"]) == 0


def test_a_model_with_the_images_of_its_run(checkpoint, capsys, tmp_path):
    figure = tmp_path / "layers.svg"
    capsys.readouterr()
    assert main(["doctor", str(checkpoint), "--batch_size", "1", "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert "20 batch norms, 20 of them use the statistics of their batch in training; measured on 6 images" in printed
    assert "gn-transfer fit ... --model.norm" in printed
    assert "accuracy:" in printed
    assert "<svg" in figure.read_text()
    assert doctor(capsys, str(checkpoint))["batch_size"] == 4  # that of the run
    assert main(["doctor", str(checkpoint), "--figure", "layers.nonsense"]) == 2
    assert "--figure layers.nonsense cannot be written" in capsys.readouterr().err


def test_a_model_of_timm(folder_root, capsys):
    found = doctor(
        capsys, "resnet18", "--data", "Folder", "--data.root", str(folder_root), "--model.pretrained", "null", *SMALL
    )
    assert len(found["layers"]) == 20
    assert found["accuracy"] == {}  # its last layer has learnt nothing yet
    found = doctor(
        capsys,
        *("resnet18", "--data", "Folder", "--data.root", str(folder_root), "--model.norm", "gn"),
        *("--model.pretrained", "null", *SMALL),
    )
    assert found["findings"] == []


def test_a_segmentation(capsys):
    words = ["--data", "SegmentationSample", "--data.root", "sample", "--data.img_size", "64", "--model.norm", "bn"]
    words += ["--model.decoder", "fpn", "--model.pretrained", "null", "--data.cache", "none"]
    found = doctor(capsys, "resnet18", *words, "--batch_size", "1")
    assert len(found["layers"]) > 20
    assert found["gradient_angle"] > 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["doctor", "resnet18"], "doctor resnet18: no images are named"),
        (["doctor", "resnet18", "--batch_size", "0"], "--batch_size 0 is out of range"),
        (["doctor", "none.ckpt"], "none.ckpt: no such file"),
        (["doctor"], "required: CKPT_OR_MODEL"),
        (["reestimate", "none.ckpt"], "none.ckpt: no such file"),
        (["reestimate", "none.ckpt", "--images", "0"], "--images 0 is out of range"),
    ],
)
def test_what_cannot_be(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_no_plan_is_asked_of_what_plans_nothing(checkpoint, folder_root, capsys):
    for words in (
        ["reestimate", str(checkpoint)],
        ["doctor", str(checkpoint)],
        ["doctor", "resnet18", str(folder_root)],
    ):
        assert main([*words, "--dry_run"]) == 2
        assert f"{words[0]} has no --dry_run" in capsys.readouterr().err
    assert not list(Path("checkpoints").rglob("*_reestimated.ckpt"))


def test_models_without_statistics_and_files_that_exist(pets_root, capsys):
    words = ["fit", "--data", "Pets", "--data.root", str(pets_root), "--model.norm", "gn", *SMALL]
    assert main([*words, "--trainer.max_epochs", "1"]) == 0
    [path] = Path().glob("checkpoints/default/*/last.ckpt")
    assert main(["reestimate", str(path)]) == 2
    assert "model.norm=gn has no running statistics" in capsys.readouterr().err
    assert main(["reestimate", str(path), "--output", str(path)]) == 2
    assert "exists already; name another file" in capsys.readouterr().err
