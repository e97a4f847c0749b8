"""Weights from a stand-in hub on loopback: what it may answer, and that nothing half-written stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from hub_server import serve
from huggingface_hub import constants
from safetensors.torch import save

from gn_transfer.backbones import create_backbone, hub
from gn_transfer.config import ConfigError

REPOSITORY = "timm/resnet18.a1_in1k"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A stand-in hub with a file of 200 kB, and an empty cache."""
    with serve() as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "SILENCE_S", 0.2)
        stand_in.files[f"{REPOSITORY}/model.safetensors"] = save({"w": torch.randn(50_000)})
        yield stand_in


def leftovers(folder: Path) -> list[Path]:
    return [path for part in ("blobs", "snapshots") for path in folder.rglob(f"{part}/**/*") if path.is_file()]


def test_a_file_is_downloaded_once(server):
    path = hub.fetch(REPOSITORY, "them")
    assert path.read_bytes() == server.files[f"{REPOSITORY}/model.safetensors"]
    assert hub.in_cache(REPOSITORY)
    server.mode = "500"
    assert hub.fetch(REPOSITORY, "them") == path


def test_the_other_name_is_tried(server):
    server.files[f"{REPOSITORY}/pytorch_model.bin"] = server.files.pop(f"{REPOSITORY}/model.safetensors")
    assert hub.fetch(REPOSITORY, "them").name == "pytorch_model.bin"


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("404", "answers 404 for model.safetensors and pytorch_model.bin"),
        ("500", "answers 500"),
        ("hang", "could not be downloaded"),
        ("dead", "does not answer"),
        ("truncated", "could not be downloaded"),
        ("wrong", "instead of the"),
    ],
)
def test_a_hub_that_fails_is_one_message_and_leaves_nothing(server, tmp_path, monkeypatch, mode, message):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own attempts
    monkeypatch.setattr(hub, "ANSWER_S", 0.5)
    server.mode = mode
    if mode == "404":
        server.files.clear()
    began = time.monotonic()
    with pytest.raises(ConfigError, match=message) as caught:
        hub.fetch(REPOSITORY, "the weights of the test")
    assert time.monotonic() - began < 20
    assert "the weights of the test" in str(caught.value)
    assert "set model.pretrained to its path" in " ".join(str(caught.value).split())
    assert not leftovers(tmp_path)
    assert not hub.in_cache(REPOSITORY)


def test_offline_by_environment_asks_nobody(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        hub.fetch(REPOSITORY, "them")
    assert not server.requests


@pytest.mark.parametrize("address", ["hub.example", "http://[", "http://127.0.0.1:1"])
def test_an_address_that_is_none_does_not_answer(monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert not hub.answers()


def test_weights_that_cannot_be_read_leave_the_cache(server):
    server.files[f"{REPOSITORY}/model.safetensors"] = b"<html>not weights</html>"
    with pytest.raises(ConfigError, match=r"cannot be read as weights.*removed from the cache"):
        create_backbone("resnet18", norm="bn", num_classes=3, pretrained="auto")
    assert not hub.in_cache(REPOSITORY)


def test_auto_downloads_loads_and_says_what_the_weights_saw(server):
    theirs = timm.create_model("resnet18")
    server.files[f"{REPOSITORY}/model.safetensors"] = save(theirs.state_dict())
    backbone = create_backbone("resnet18", norm="bn", num_classes=3, pretrained="auto")
    assert torch.equal(backbone.model.conv1.weight, theirs.conv1.weight)
    assert backbone.report.pretrained_on == "ImageNet-1k (1.3 M images)"
    assert backbone.mean == (0.485, 0.456, 0.406)


@pytest.mark.slow
def test_pets_gnws_as_written_trains_from_the_hub(tmp_path, real_data):
    """BiT-50 through HF_ENDPOINT and the command line; a second run needs no hub."""
    with serve() as stand_in:
        model = timm.create_model("resnetv2_50x1_bit")
        stand_in.files["timm/resnetv2_50x1_bit.goog_in21k_ft_in1k/model.safetensors"] = save(model.state_dict())
        environment = {**os.environ, "HF_ENDPOINT": stand_in.url, "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, "-m", "gn_transfer", "fit", "--config", "pets_gnws.yaml"]
        command += ["--data.root", str(real_data / "pets5"), "--data.num_workers", "0"]
        command += ["--trainer.limit_val_batches", "1", "--trainer.max_steps", "1"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    [metrics] = tmp_path.glob("runs/pets_gnws/*/metrics.json")
    assert json.loads(metrics.read_text())["optimizer_steps"] == 1
    [report] = tmp_path.glob("runs/pets_gnws/*/transfer_report.json")
    assert json.loads(report.read_text())["source"] == "timm:resnetv2_50x1_bit.goog_in21k_ft_in1k"
    again = subprocess.run([*command, "--dry_run"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert again.returncode == 0
