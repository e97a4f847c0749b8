"""Recipes through the real command line: freezing, averaging, batch-norm statistics, clipping, the range test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gn_transfer import learning_rate
from gn_transfer.__main__ import main
from gn_transfer.backbones import create_backbone
from gn_transfer.callbacks import read_checkpoint
from gn_transfer.callbacks.ema import average_into
from gn_transfer.classifier import TransferClassifier
from gn_transfer.config import ConfigError

SMALL = {
    "data.img_size": "64",
    "data.val_fraction": "0.3",
    "model.backbone": "resnet18",
    "model.schedule": "constant",
    "accumulation.effective_batch_size": "4",
    "mixed_precision.mode": "fp32",
    "trainer.max_epochs": "1",
}


@pytest.fixture(autouse=True)
def one_thread_in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a sum split among other threads rounds otherwise
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bn_file(tmp_path_factory):
    torch.manual_seed(3)
    net = create_backbone("resnet18", norm="bn", num_classes=5).net
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
            torch.nn.init.constant_(layer.weight, 0.5)
    path = tmp_path_factory.mktemp("weights") / "bn.safetensors"
    save_file(net.state_dict(), path)
    return path


def fit(root: Path, norm: str, **options: str) -> int:
    chosen = {**SMALL, **{key.replace("__", "."): value for key, value in options.items()}}
    words = [word for key, value in chosen.items() for word in (f"--{key}", value)]
    return main(["fit", "--data", "Folder", "--data.root", str(root), "--model.norm", norm, *words])


def last(folder: str = ".") -> dict:
    [path] = Path(folder).glob("checkpoints/default/*/last.ckpt")
    return read_checkpoint(path)


def body(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.startswith("net.fc.")}


def same(first: dict, second: dict) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_frozen_body_and_its_statistics_stay_and_learn_later(folder_root, bn_file, monkeypatch):
    """At batch size 2 running statistics would move at once; unfreezing happens in a resumed run as in a whole one."""
    options = {"model__pretrained": str(bn_file), "model__freeze_epochs": "1", "data__batch_size": "2"}
    before = {
        f"net.{key}": value
        for key, value in create_backbone("resnet18", norm="bn", num_classes=2, pretrained=str(bn_file))
        .net.state_dict()
        .items()
    }
    for folder in ("whole", "broken"):
        Path(folder).mkdir()
    with monkeypatch.context() as inside:
        inside.chdir("whole")
        assert fit(folder_root, "bn", **options, trainer__max_epochs="2") == 0
    monkeypatch.chdir("broken")
    assert fit(folder_root, "bn", **options) == 0
    frozen = last()["state_dict"]
    assert same(body(frozen), body(before))
    assert frozen["net.fc.weight"].abs().sum() > 0
    assert fit(folder_root, "bn", **options, trainer__max_epochs="2", ckpt_path="last") == 0
    learnt = last()["state_dict"]
    moved = [key for key, value in learnt.items() if not torch.equal(value, frozen[key])]
    assert {"net.conv1.weight", "net.bn1.running_mean", "net.fc.weight"} <= set(moved)
    assert same(learnt, last("../whole")["state_dict"])


def test_an_average_is_hand_computed():
    average = {"w": torch.tensor([1.0]), "count": torch.tensor(1)}
    average_into(average, {"w": torch.tensor([3.0]), "count": torch.tensor(7)}, decay=0.75)
    assert (average["w"].item(), average["count"].item()) == (1.5, 7)


def test_the_average_is_evaluated_saved_and_resumed(folder_root, monkeypatch, capsys):
    for folder in ("whole", "broken"):
        Path(folder).mkdir()
    with monkeypatch.context() as inside:
        inside.chdir("whole")
        assert fit(folder_root, "gn_ws", ema__decay="0.5", trainer__max_epochs="2") == 0
        whole = last()
        [run] = Path("runs/default").iterdir()
        metrics = json.loads((run / "metrics.json").read_text())
        capsys.readouterr()
        assert main(["validate", "--ckpt_path", f"checkpoints/default/{run.name}/last.ckpt"]) == 0
        assert f"val/loss             {metrics['val/loss']:.4f}" in capsys.readouterr().out
    said = "exponential moving average, decay 0.5 per step"
    assert metrics["evaluated_weights"] == whole["gn_transfer"]["weights"] == said
    trained = {f"net.{key}": value for key, value in whole["gn_transfer"]["trained_weights"].items()}
    assert not same(whole["state_dict"], trained)

    monkeypatch.chdir("broken")
    assert fit(folder_root, "gn_ws", ema__decay="0.5") == 0
    assert fit(folder_root, "gn_ws", ema__decay="0.5", trainer__max_epochs="2", ckpt_path="last") == 0
    broken = last()
    assert same(whole["state_dict"], broken["state_dict"])
    assert same(whole["gn_transfer"]["trained_weights"], broken["gn_transfer"]["trained_weights"])
    capsys.readouterr()
    assert fit(folder_root, "gn_ws", ema__decay="0.9", ckpt_path="last") == 2
    assert "ema.decay is 0.5 in the checkpoint and 0.9 here" in capsys.readouterr().err


def test_averaging_leaves_training_as_it_is(folder_root):
    assert fit(folder_root, "gn", ema__decay="0.9") == 0
    assert fit(folder_root, "gn") == 0
    averaged, plain = (read_checkpoint(f"checkpoints/default/gn-bs1-seed0{suffix}/last.ckpt") for suffix in ("", "-2"))
    trained = {f"net.{key}": value for key, value in averaged["gn_transfer"]["trained_weights"].items()}
    assert same(trained, plain["state_dict"])
    assert plain["gn_transfer"]["weights"] == "as trained"


def test_statistics_are_reestimated_before_validation(folder_root):
    """Nine training pictures, all of them used: the pooled mean of the first norm's input is that of the pictures."""
    assert fit(folder_root, "bn", model__reestimate_bn="100") == 0
    state = {key.removeprefix("net."): value for key, value in last()["state_dict"].items()}
    assert fit(folder_root, "bn") == 0
    plain = read_checkpoint("checkpoints/default/bn-bs1-seed0-2/last.ckpt")["state_dict"]
    different = {key for key, value in state.items() if not torch.equal(value, plain[f"net.{key}"])}
    assert different == {key for key in state if key.endswith(("running_mean", "running_var"))}


def test_frozen_statistics_are_those_of_the_target_pictures(folder_root, bn_file):
    options = {"model__pretrained": str(bn_file), "model__reestimate_bn": "100", "model__lr": "0.0001"}
    assert fit(folder_root, "bn_frozen", **options) == 0
    first = last()["state_dict"]
    assert fit(folder_root, "bn_frozen", **options, trainer__max_epochs="2", ckpt_path="last") == 0
    second = last()["state_dict"]
    original = create_backbone("resnet18", norm="bn", num_classes=2, pretrained=str(bn_file)).net.state_dict()
    for key in (key for key in first if key.endswith(("running_mean", "running_var"))):
        assert torch.equal(first[key], second[key])
        assert not torch.equal(first[key], original[key.removeprefix("net.")])
    assert not torch.equal(first["net.bn1.weight"], second["net.bn1.weight"])


def test_calibrated_conversion_by_the_command_line(folder_root, bn_file, capsys):
    options = {"model__pretrained": str(bn_file), "model__conversion": "calibrated"}
    assert fit(folder_root, "gn", **options) == 0
    assert "20 norms reproduce" in " ".join(capsys.readouterr().out.split())
    stored = last()["gn_transfer"]
    assert stored["architecture"]["num_groups"] == 4
    assert len(stored["transfer_report"]["explained"]) == 20
    assert main(["validate", "--ckpt_path", "checkpoints/default/gn-bs1-seed0/last.ckpt"]) == 0


def test_momentum_follows_the_micro_batch():
    model = TransferClassifier(backbone="resnet18", norm="bn", bn_momentum="corrected")
    model.build(["a", "b"], batch_size=4)
    assert model.net.bn1.momentum == pytest.approx(1 - 0.9**0.25)


def test_gradients_are_shortened_to_a_norm():
    model = TransferClassifier(backbone="resnet18", norm="gn", clip_norm=0.01)
    model.build(["a", "b"])
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    model.training_step((images, torch.tensor([0, 1])), 0)["loss"].backward()
    model.configure_gradient_clipping(None)
    total = torch.cat([parameter.grad.flatten() for parameter in model.net.parameters()]).norm()
    assert total.item() == pytest.approx(0.01, rel=1e-3)


def test_the_range_test_counts_windows_and_writes_nothing(folder_root, monkeypatch, capsys):
    monkeypatch.setattr(learning_rate, "STEPS", 8)
    words = [word for key, value in SMALL.items() for word in (f"--{key}", value)]
    command = ["fit", "--data", "Folder", "--data.root", str(folder_root), "--model.norm", "gn_ws", *words]
    assert main([*command, "--lr_find"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("lr 1e-05 loss") == 1
    assert "optimizer steps of 4 pictures" in printed or "the loss did not fall" in printed
    assert not Path("runs").exists()
    assert not Path("checkpoints").exists()


def test_the_plan_names_the_recipe(folder_root, capsys, monkeypatch):
    options = {"model__schedule": "bit", "model__freeze_epochs": "1", "model__clip_norm": "1.0"}
    monkeypatch.setattr("gn_transfer.cli.Command.claim_folder", None)  # nothing may get that far
    chosen = {**SMALL, **{key.replace("__", "."): value for key, value in options.items()}}
    command = [word for key, value in chosen.items() for word in (f"--{key}", value)]
    assert main(["fit", "--data", "Folder", "--data.root", str(folder_root), *command, "--dry_run"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "BiT-HyperRule: 256,000 samples" in words
    assert "the head alone learns for 1 of 1 epochs" in words
    assert "shortened to norm 1" in words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"norm": "gn", "bn_momentum": "corrected"},
            "model.bn_momentum is for batch norms, and model.norm=gn has none",
        ),
        ({"norm": "gn_ws", "reestimate_bn": 8}, "model.reestimate_bn is for batch norms"),
        ({"norm": "bn", "bn_momentum": 0.0}, "model.bn_momentum=0.0 is out of range"),
        ({"clip_norm": 0.0}, "model.clip_norm=0.0 is out of range"),
        ({"freeze_epochs": -1}, "model.freeze_epochs=-1 is out of range"),
    ],
)
def test_recipes_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        TransferClassifier(**options)


@pytest.mark.parametrize("decay", ["0", "1", "-0.5"])
def test_decays_that_cannot_be(folder_root, capsys, decay):
    assert fit(folder_root, "gn", ema__decay=decay) == 2
    assert "is out of range; use a number in (0, 1)" in capsys.readouterr().err
