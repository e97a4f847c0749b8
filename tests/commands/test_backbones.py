"""The command `backbones`: what it lists, and fetching ahead."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import constants

from gn_transfer.__main__ import main
from gn_transfer.backbones import hub
from gn_transfer.backbones.weights import UNKNOWN, pretraining_datasets


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_the_table_for_a_norm(capsys):
    assert main(["backbones", "--norm", "gn_ws"]) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert "resnetv2_50x1_bit.goog_in21k_ft_in1k" in printed
    assert "ImageNet-21k" in printed
    assert "resnet18.a1" not in printed


def test_json_states_pixels_and_what_was_seen(capsys):
    assert main(["backbones", "--format", "json"]) == 0
    rows = {(row["backbone"], row["norm"]): row for row in json.loads(capsys.readouterr().out)}
    bit, plain = rows["resnetv2_50", "gn_ws"], rows["resnet50", "bn"]
    assert bit["pretrained_on"] == "ImageNet-21k (14 M images), then ImageNet-1k (1.3 M images)"
    assert (bit["mean"], bit["img_size"], bit["where"]) == ([0.5, 0.5, 0.5], 448, "to be downloaded")
    assert (plain["pretrained_on"], plain["mean"]) == ("ImageNet-1k (1.3 M images)", [0.485, 0.456, 0.406])
    assert ("resnetv2_18", "gn_ws") in rows


def test_frozen_norms_share_bn_weights_and_norms_without_any_say_so(capsys):
    assert main(["backbones", "--norm", "bn_frozen", "--format", "json"]) == 0
    assert {row["norm"] for row in json.loads(capsys.readouterr().out)} == {"bn"}
    assert main(["backbones", "--norm", "ln"]) == 0
    assert "--model.conversion calibrated" in capsys.readouterr().out


def test_downloads_are_read(monkeypatch, capsys, tmp_path):
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"conv1.weight": zeros(1)}, tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(
        hub, "fetch", lambda repository, name: asked.append(repository) or tmp_path / "model.safetensors"
    )
    for words in (["resnet18"], ["resnet18.a1_in1k"], ["timm:resnet18.a1_in1k"], ["resnet50", "--norm", "gn"]):
        assert main(["backbones", "--download", *words]) == 0
        assert "1 tensors" in capsys.readouterr().out
    assert asked == [*["timm/resnet18.a1_in1k"] * 3, "timm/resnet50_gn.a1h_in1k"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--norm", "gnws"], "--norm gnws is not a norm; did you mean 'gn_ws'"),
        (["--format", "yaml"], "invalid choice: 'yaml'"),
        (["--download", "resnet81"], "did you mean 'resnet18"),
        (["--download", "resnet18.a1_in2k"], "did you mean 'a1_in1k'"),
        (["--download", "resnet50"], "Add --norm gn or --norm bn"),
        (["--download", "resnet18"], "HF_HUB_OFFLINE is set"),
        (["--donwload", "resnet18"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_message(capsys, words, message):
    assert main(["backbones", *words]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_what_tags_say():
    assert (
        pretraining_datasets("fb_swsl_ig1b_ft_in1k")
        == "Instagram (940 M images with hashtags), then ImageNet-1k (1.3 M images)"
    )
    assert pretraining_datasets("goog_distilled_in1k").endswith("distilled from a model pretrained on ImageNet-21k")
    assert pretraining_datasets("something_else") == UNKNOWN
