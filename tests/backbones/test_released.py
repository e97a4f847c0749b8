"""Weights that come with gn-transfer: the format, the card, the checksum, and `pretrained: auto`."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gn_transfer.backbones import create_backbone, released, resolve_pretrained
from gn_transfer.backbones.released import (
    Card,
    Preprocessing,
    TrainedNorm,
    Training,
    card_beside,
    cards,
    find_card,
    round_to_half,
    write_released,
)
from gn_transfer.config import ConfigError
from gn_transfer.files import sha256

CARD = Card(
    name="resnetv2_18.bn.tinyimagenet",
    backbone="resnetv2_18",
    norm=TrainedNorm("bn", 32),
    val_acc1=0.5,
    preprocessing=Preprocessing([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 64, "centre crop"),
    sha256="",
    license="test",
    training=Training("tinyimagenet", ["ant", "bee"], 1000, {"model": {"norm": "bn"}}, {"device": "cpu"}),
)


@pytest.fixture(scope="module")
def models():
    return {norm: create_backbone("resnetv2_18", norm=norm, num_classes=2).model for norm in ("bn", "gn_ws")}


@pytest.fixture
def folder(tmp_path, monkeypatch, models):
    """Stand-ins for the released pair, where an installed wheel has them."""
    checkpoints = tmp_path / "package" / released.FOLDER
    checkpoints.mkdir(parents=True)
    for norm, model in models.items():
        card = replace(CARD, name=f"resnetv2_18.{norm}.tinyimagenet", norm=TrainedNorm(norm, 32))
        write_released(model.state_dict(), card, checkpoints)
    monkeypatch.setattr(released, "__file__", str(tmp_path / "package" / "backbones" / "released.py"))
    return checkpoints


def test_the_file_is_float16_with_timms_keys_and_the_card_knows_its_checksum(folder, models):
    path = folder / "resnetv2_18.bn.tinyimagenet.safetensors"
    state = load_file(path)
    assert state.keys() == models["bn"].state_dict().keys()
    assert {value.dtype for value in state.values()} == {torch.float16, torch.int64}
    assert path.stat().st_size < released.MAX_BYTES
    assert path.stat().st_mode & 0o044  # others may read it: a wheel keeps the mode
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["sha256"] == sha256(path)
    assert card["training"]["samples_seen"] == 1000
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]


@pytest.mark.parametrize(("norm", "trained"), [("bn", "bn"), ("bn_frozen", "bn"), ("gn_ws", "gn_ws")])
def test_auto_takes_them(folder, models, norm, trained):
    backbone = create_backbone("resnetv2_18", norm=norm, num_classes=5, pretrained="auto")
    assert backbone.report.source == f"gn-transfer:resnetv2_18.{trained}.tinyimagenet"
    assert backbone.report.pretrained_on == "tinyimagenet (1,000 samples of 2 classes)"
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    expected = models[trained].stem.conv.weight.half().float()
    assert torch.equal(backbone.model.stem.conv.weight, expected)
    assert set(backbone.report.reinitialized) == {"head.fc.weight", "head.fc.bias"}


def test_they_can_be_named_and_converted(folder):
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    for pretrained in ("auto", "resnetv2_18.bn.tinyimagenet", "bn.tinyimagenet"):
        assert resolve_pretrained("resnetv2_18", "gn", pretrained, "calibrated").card.norm.name == "bn"
    kwargs = {"num_classes": 5, "pretrained": "auto", "conversion": "calibrated", "calibration": images}
    report = create_backbone("resnetv2_18", norm="gn", num_groups=8, **kwargs).report
    assert len(report.r2) == 17
    assert "stages.0.blocks.0.norm1.weight" in report.converted
    assert "stages.0.blocks.0.norm1.running_mean" in report.dropped
    assert any("of their BN layer's variance" in note for note in report.notes)
    with pytest.raises(ConfigError, match="needs training images"):
        create_backbone("resnetv2_18", norm="gn", **{**kwargs, "calibration": None})
    with pytest.raises(ConfigError, match=r"leads from BN to gn, ln or in, not to model\.norm=none"):
        create_backbone("resnetv2_18", norm="none", **kwargs)


def test_a_copy_elsewhere_keeps_its_card(folder):
    path = folder / "resnetv2_18.gn_ws.tinyimagenet.safetensors"
    backbone = create_backbone("resnetv2_18", norm="gn_ws", num_classes=5, pretrained=str(path))
    assert backbone.report.source == str(path)
    assert backbone.mean == (0.1, 0.2, 0.3)
    with pytest.raises(ConfigError, match=r"was trained with norm gn_ws, not with model\.norm=gn;"):
        create_backbone("resnetv2_18", norm="gn", num_classes=5, pretrained=str(path))
    with pytest.raises(ConfigError, match=r"model\.num_groups=32 and model\.group_size=null, not 16 and null"):
        create_backbone("resnetv2_18", norm="gn_ws", num_classes=5, num_groups=16, pretrained=str(path))


def test_a_changed_file_is_refused(folder):
    path = folder / "resnetv2_18.bn.tinyimagenet.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"describes: sha256 \w{12}\.\.\. instead of \w{12}\.\.\.;"):
        create_backbone("resnetv2_18", norm="bn", num_classes=5, pretrained="auto")
    path.unlink()
    with pytest.raises(ConfigError, match="is missing beside its card"):
        create_backbone("resnetv2_18", norm="bn", num_classes=5, pretrained="auto")


def test_where_they_are_not_installed_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(released, "__file__", str(tmp_path / "package" / "backbones" / "released.py"))
    assert cards() == []
    with pytest.raises(ConfigError, match=r"resnetv2_18\.gn_ws\.tinyimagenet, which come with gn-transfer, are not"):
        create_backbone("resnetv2_18", norm="gn_ws", num_classes=5, pretrained="auto")


@pytest.mark.parametrize(
    "change",
    [
        lambda card: {"name": "x"},
        lambda card: {**card, "training": {**card["training"], "samples_seen": "many"}},
        lambda card: {**card, "preprocessing": {**card["preprocessing"], "mean": 1}},
        lambda card: {**card, "norm": 5},
        lambda card: json.loads("[" * 900 + "]" * 900),
    ],
    ids=["parts", "samples", "mean", "norm", "nested"],
)
def test_a_corrupt_card(folder, change):
    path = folder / "resnetv2_18.bn.tinyimagenet.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match="is not a model card"):
        find_card("resnetv2_18.bn.tinyimagenet")


def test_weights_beyond_float16_are_not_released(tmp_path):
    with pytest.raises(ConfigError, match="beyond float16"):
        write_released({"w": torch.tensor([1e6])}, CARD, tmp_path)
    with pytest.raises(ConfigError, match=r"^a, b, c: values beyond"):
        write_released({name: torch.tensor([1e6]) for name in "abcd"}, CARD, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_too_large_is_not_released(tmp_path, monkeypatch):
    monkeypatch.setattr(released, "MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match="more than 1,000; release a smaller model"):
        write_released({"w": torch.zeros(1000)}, CARD, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_fit_becomes_a_released_file(folder_root, tmp_path, monkeypatch, capsys):
    from gn_transfer.__main__ import main

    monkeypatch.chdir(tmp_path)
    words = ["--data", "Folder", "--data.root", str(folder_root), "--data.img_size", "64", "--trainer.max_epochs", "1"]
    assert main(["fit", *words, "--model.backbone", "resnetv2_18", "--model.norm", "gn_ws"]) == 0
    path = Path(__file__).parents[2] / "checkpoints" / "release.py"
    spec = importlib.util.spec_from_file_location("release", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    checkpoint = "checkpoints/default/gn_ws-bs1-seed0/last.ckpt"
    command = ["release.py", checkpoint, "--data", "Folder", "--data_root", str(folder_root), "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    assert script.main() == 0
    written = tmp_path / "resnetv2_18.gn_ws.folder.safetensors"
    card = json.loads(written.with_suffix(".json").read_text())
    assert card["training"]["samples_seen"] == 9 or card["training"]["samples_seen"] == 10
    assert str(tmp_path) not in written.with_suffix(".json").read_text()
    metrics = json.loads(Path("runs/default/gn_ws-bs1-seed0/metrics.json").read_text())
    assert abs(card["val_acc1"] - metrics["val/acc1"]) < 0.34  # of three images, rounding may turn one
    backbone = create_backbone("resnetv2_18", norm="gn_ws", num_classes=5, pretrained=str(written))
    assert backbone.report.pretrained_on == f"folder ({card['training']['samples_seen']} samples of 2 classes)"
    monkeypatch.setattr("sys.argv", ["release.py", "nowhere.ckpt", "--data_root", "."])
    assert script.main() == 2
    assert "no such file" in capsys.readouterr().err


def test_the_pair_of_this_checkout_is_what_its_cards_say():
    for card in cards():
        found = find_card(card.name)
        assert found is not None
        assert released.read_released(*found)
        assert found[1].stat().st_size <= released.MAX_BYTES


def test_only_a_card_is_taken_for_one(tmp_path):
    weights = tmp_path / "w.safetensors"
    assert card_beside(weights) is None
    (tmp_path / "w.json").write_text("{}")  # of something else
    assert card_beside(weights) is None
    (tmp_path / "w.json").write_text('{"sha256": ""}')
    assert card_beside(tmp_path / "w.pth") is None
    with pytest.raises(ConfigError, match="is not a model card"):
        card_beside(weights)


def test_a_model_is_rounded_as_its_file_will_be():
    model = nn.BatchNorm1d(1)
    nn.init.constant_(model.weight, 1 / 3)
    round_to_half(model)
    assert model.weight.item() == torch.tensor(1 / 3).half().item()
    assert model.num_batches_tracked.dtype == torch.int64


def test_a_file_of_the_largest_size_is_released(tmp_path, monkeypatch):
    assert released.MAX_BYTES == 25 * 2**20
    path = write_released({"w": torch.zeros(10)}, CARD, tmp_path)
    monkeypatch.setattr(released, "MAX_BYTES", path.stat().st_size)
    write_released({"w": torch.zeros(10)}, CARD, tmp_path)
