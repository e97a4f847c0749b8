"""A bundle on the hub: timm loads it there, and what can go wrong leaves nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hub_server import serve
from huggingface_hub import constants
from torch import nn

from gn_transfer import load_bundle
from gn_transfer.__main__ import main
from gn_transfer.backbones.create import rebuild
from gn_transfer.config import ConfigError
from gn_transfer.inference.hub_repository import check_hub, find_arguments, push_bundle

CHECKPOINT = "checkpoints/folder/gn_ws-bs4-seed0/best.ckpt"

THEIRS = """
import json, sys
import numpy as np, timm, torch
model = timm.create_model("hf-hub:user/pets", pretrained=True).eval()
config = model.pretrained_cfg
images = torch.tensor(np.load("pixels.npy")) / 255
pixels = (images - torch.tensor(config["mean"])) / torch.tensor(config["std"])
with torch.no_grad():
    np.save("theirs.npy", model(pixels.permute(0, 3, 1, 2)).numpy())
print(json.dumps([config["label_names"], list(config["input_size"]), "gn_transfer" in sys.modules]))
"""


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serve() as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", stand_in.token)
        yield stand_in


def test_timm_loads_what_was_pushed(exported_run, server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(exported_run)
    assert main(["export", CHECKPOINT, "--output", "pushed", "--push_to_hub", "user/pets"]) == 0
    assert 'timm.create_model("hf-hub:user/pets", pretrained=True)' in capsys.readouterr().out
    bundle = load_bundle("pushed")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", images)
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    environment.pop("HF_TOKEN")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THEIRS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [bundle.classes, [3, 64, 64], False]
    assert np.load(tmp_path / "theirs.npy") == pytest.approx(bundle.logits_and_probs(images)[0], abs=1e-4)

    names = {name.removeprefix("user/pets/") for name in server.files}
    assert names == {
        *("README.md", "bundle.json", "model.onnx", "model.safetensors"),
        *("config.json", "timm.safetensors"),
    }
    copy = tmp_path / "downloaded"
    copy.mkdir()
    for name in names:
        (copy / name).write_bytes(server.files[f"user/pets/{name}"])
    assert load_bundle(copy).classes == bundle.classes  # it is a bundle, too
    assert main(["demo", str(copy), "--space", str(tmp_path / "space")]) == 0
    assert load_bundle(tmp_path / "space" / "bundle").classes == bundle.classes
    push_bundle(exported_run / "pushed", "user/pets")  # again, over itself
    assert {name.removeprefix("user/pets/") for name in server.files} == names
    card = (copy / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "validation accuracy of this bundle" in card


@pytest.mark.parametrize(
    ("name", "norm", "groups", "expected", "folded"),
    [
        ("resnetv2_18", "bn", 32, {}, False),
        ("resnetv2_18", "bn_ws", 32, {}, True),
        ("resnetv2_18", "gn", 32, {"norm_layer": "groupnorm"}, False),
        ("resnetv2_18", "ln", 32, {"norm_layer": "groupnorm1"}, False),
        ("resnet18", "gn_ws", 32, {"norm_layer": "groupnorm"}, True),
        ("resnetv2_18", "gn", 8, None, False),
        ("tf_efficientnet_lite0", "gn", 8, None, False),
    ],
)
def test_arguments_are_found_by_building(name, norm, groups, expected, folded):
    head = {"resnet18": "fc", "tf_efficientnet_lite0": "classifier"}.get(name, "head.fc")
    torch.manual_seed(0)
    model = rebuild(name, norm=norm, num_classes=3, head=head, num_groups=groups, group_size=None).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    metadata = {"classes": ["a", "b", "c"], "img_size": 64, "backbone": name, "norm": norm}
    metadata["architecture"] = {"architecture": name}
    if expected is None:
        with pytest.raises(ConfigError, match=f"timm cannot build {name} with norm gn from words in a file"):
            find_arguments(model, metadata)
        return
    found, arguments, weights, built = find_arguments(model, metadata)
    assert found == name
    assert (arguments, weights is not None) == (expected, folded)
    assert built.num_classes == 3


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("pets", "give USER/NAME"),
        ("user/na me", "--push_to_hub user/na me: Repo id must"),
        ("a/b/c", "--push_to_hub a/b/c: Repo id must"),
    ],
)
def test_names_of_no_repository(server, repository, message):
    with pytest.raises(ConfigError, match=message):
        check_hub(repository)
    assert not server.requests


def test_tokens(server, monkeypatch):
    check_hub("user/pets")
    check_hub("lab/pets")
    with pytest.raises(ConfigError, match="your token is one of user, lab; give such a USER"):
        check_hub("other/pets")
    server.role = "read"
    with pytest.raises(ConfigError, match="your token may only read"):
        check_hub("user/pets")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ConfigError, match=r"refuses the token. Log in with hf auth login as a user who may write"):
        check_hub("user/pets")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="there is no token; log in with hf auth login, or set HF_TOKEN"):
        check_hub("user/pets")


def test_a_repository_of_something_else_is_not_overwritten(server):
    server.files["user/pets/README.md"] = b"to be"
    check_hub("user/pets")
    server.files["user/pets/model.safetensors"] = b"mine"
    with pytest.raises(ConfigError, match=r"holds something that is no bundle .*name a new repository"):
        check_hub("user/pets")
    server.files["user/pets/bundle.json"] = b"{}"
    check_hub("user/pets")


def test_a_hub_that_fails_leaves_the_bundle(bundle, server, monkeypatch):
    server.mode = "500"
    with pytest.raises(ConfigError, match=r"--push_to_hub user/pets: .* answers 500"):
        push_bundle(bundle, "user/pets")
    assert not server.files
    load_bundle(bundle)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"127.0.0.1:9 cannot be reached, or HF_HUB_OFFLINE is set"):
        check_hub("user/pets")
