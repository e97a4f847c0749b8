"""Recipes through the real command line: freezing, averaging, batch-norm statistics, clipping."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from gn_transfer.__main__ import main
from gn_transfer.backbones.create import create_backbone
from gn_transfer.backbones.model_config import ModelConfig
from gn_transfer.config import ConfigError
from gn_transfer.data import Folder
from gn_transfer.layers import reestimate_statistics
from gn_transfer.training.batch_norm_statistics import BatchNormStatistics
from gn_transfer.training.checkpoint import read_checkpoint
from gn_transfer.training.classification import TransferClassifier
from gn_transfer.training.ema import ExponentialMovingAverage
from gn_transfer.training.freezing import BackboneFreezing, FreezeBatchNorm
from gn_transfer.training.optimizer import OptimizerConfig

SMALL = {
    "data.img_size": "64",
    "data.val_fraction": "0.3",
    "model.backbone": "resnet18",
    "optimizer.schedule": "constant",
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
    net = create_backbone("resnet18", norm="bn", num_classes=5).model
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
    return {key: value for key, value in state.items() if not key.startswith("model.fc.")}


def same(first: dict, second: dict) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_frozen_body_and_its_statistics_stay_and_learn_later(folder_root, bn_file, monkeypatch):
    """At batch size 2 running statistics would move at once; unfreezing happens in a resumed run as in a whole one."""
    options = {"model__pretrained": str(bn_file), "freezing__epochs": "1", "data__batch_size": "2"}
    before = {
        f"model.{key}": value
        for key, value in create_backbone("resnet18", norm="bn", num_classes=2, pretrained=str(bn_file))
        .model.state_dict()
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
    assert frozen["model.fc.weight"].abs().sum() > 0
    assert fit(folder_root, "bn", **options, trainer__max_epochs="2", ckpt_path="last") == 0
    learnt = last()["state_dict"]
    moved = [key for key, value in learnt.items() if not torch.equal(value, frozen[key])]
    assert {"model.conv1.weight", "model.bn1.running_mean", "model.fc.weight"} <= set(moved)
    assert same(learnt, last("../whole")["state_dict"])


def test_an_average_is_hand_computed():
    """The first update copies the weights; the second has the decay min(0.75, 2 / 11)."""
    ema = ExponentialMovingAverage(0.75)
    averaged = AveragedModel(torch.nn.Linear(1, 1, bias=False), **ema._kwargs)
    for value in (1.0, 3.0):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, value)
        averaged.update_parameters(model)
    assert averaged.module.weight.item() == pytest.approx(1.0 * 2 / 11 + 3.0 * 9 / 11)
    assert ema._kwargs["avg_fn"](torch.tensor(3), torch.tensor(5), 4).item() == 5  # a counter is taken over


def test_what_is_said_of_the_weights_that_are_evaluated():
    assert ExponentialMovingAverage().describe() == "as trained"
    assert ExponentialMovingAverage(0.5).describe() == "exponential moving average, decay 0.5 per step"


def test_freezing_norms_leaves_their_affine_learning_unless_asked():
    for affine, callback in ((True, FreezeBatchNorm()), (False, FreezeBatchNorm(affine=False))):
        module = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
        callback.setup(None, module, "fit")
        assert module[0].weight.requires_grad == affine


@pytest.mark.parametrize("evaluation", ["running", "batch"])
def test_a_test_uses_the_statistics_that_were_asked_for(evaluation):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2)).eval()
    images = torch.randn(4, 2, 3, 3) + 5.0
    callback = BatchNormStatistics(evaluation=evaluation)
    callback.on_test_start(None, SimpleNamespace(model=model))
    assert (float(model(images).detach().mean().abs()) < 0.1) == (evaluation == "batch")
    callback.on_exception(None, None, KeyboardInterrupt())
    assert float(model(images).detach().mean()) > 4.0


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
    trained = whole["current_model_state"]
    assert not same(whole["state_dict"], trained)
    assert whole["averaging_state"]["n_averaged"] == whole["global_step"]  # once per step, not per micro-batch

    monkeypatch.chdir("broken")
    assert fit(folder_root, "gn_ws", ema__decay="0.5") == 0
    assert fit(folder_root, "gn_ws", ema__decay="0.5", trainer__max_epochs="2", ckpt_path="last") == 0
    broken = last()
    assert same(whole["state_dict"], broken["state_dict"])
    assert same(whole["current_model_state"], broken["current_model_state"])
    capsys.readouterr()
    assert fit(folder_root, "gn_ws", ema__decay="0.9", ckpt_path="last") == 2
    assert "ema.decay is 0.5 in the checkpoint and 0.9 here" in capsys.readouterr().err


def test_averaging_leaves_training_as_it_is(folder_root):
    assert fit(folder_root, "gn", ema__decay="0.9") == 0
    assert fit(folder_root, "gn") == 0
    averaged, plain = (read_checkpoint(f"checkpoints/default/gn-bs1-seed0{suffix}/last.ckpt") for suffix in ("", "-2"))
    trained = averaged["current_model_state"]
    assert same(trained, plain["state_dict"])
    assert "weights" not in plain["gn_transfer"]


def test_statistics_are_reestimated_before_validation(folder_root):
    """Nine training images, all of them used: the pooled mean of the first norm's input is that of the images."""
    assert fit(folder_root, "bn", batch_norm__reestimate_images="100") == 0
    state = {key.removeprefix("model."): value for key, value in last()["state_dict"].items()}
    assert fit(folder_root, "bn") == 0
    plain = read_checkpoint("checkpoints/default/bn-bs1-seed0-2/last.ckpt")["state_dict"]
    different = {key for key, value in state.items() if not torch.equal(value, plain[f"model.{key}"])}
    assert different == {key for key in state if key.endswith(("running_mean", "running_var"))}


@pytest.mark.parametrize("norm", ["bn", "bn_ws"])
def test_statistics_are_those_of_the_average(folder_root, capsys, norm):
    assert fit(folder_root, norm, batch_norm__reestimate_images="100", ema__decay="0.9", data__batch_size="4") == 0
    [path] = Path().glob("checkpoints/default/*/last.ckpt")
    [record] = Path().glob("runs/default/*/metrics.json")
    task = TransferClassifier.load_from_checkpoint(path)
    data = Folder(folder_root, img_size=64, val_fraction=0.3, num_workers=0)
    data.setup("fit")
    before = {key: value.clone() for key, value in task.state_dict().items()}
    reestimate_statistics(task.model, (task.normalize(part) for part in torch.split(data.training_images(100), 4)))
    for key, value in task.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-3, atol=1e-4)
    capsys.readouterr()
    assert main(["validate", str(path)]) == 0  # what was validated is what was saved
    assert f"val/loss             {json.loads(record.read_text())['val/loss']:.4f}" in capsys.readouterr().out


def test_frozen_statistics_are_those_of_the_target_images(folder_root, bn_file):
    options = {"model__pretrained": str(bn_file), "batch_norm__reestimate_images": "100", "optimizer__lr": "0.0001"}
    assert fit(folder_root, "bn_frozen", **options) == 0
    first = last()["state_dict"]
    assert fit(folder_root, "bn_frozen", **options, trainer__max_epochs="2", ckpt_path="last") == 0
    second = last()["state_dict"]
    original = create_backbone("resnet18", norm="bn", num_classes=2, pretrained=str(bn_file)).model.state_dict()
    for key in (key for key in first if key.endswith(("running_mean", "running_var"))):
        assert torch.equal(first[key], second[key])
        assert not torch.equal(first[key], original[key.removeprefix("model.")])
    assert not torch.equal(first["model.bn1.weight"], second["model.bn1.weight"])


def test_calibrated_conversion_by_the_command_line(folder_root, bn_file, capsys):
    options = {"model__pretrained": str(bn_file), "model__conversion": "calibrated"}
    assert fit(folder_root, "gn", **options) == 0
    assert "20 norms reproduce" in " ".join(capsys.readouterr().out.split())
    stored = last()["gn_transfer"]
    assert stored["architecture"]["num_groups"] == 4
    assert len(stored["transfer_report"]["r2"]) == 20
    assert main(["validate", "--ckpt_path", "checkpoints/default/gn-bs1-seed0/last.ckpt"]) == 0


def test_distilled_conversion_by_the_command_line(folder_root, bn_file, monkeypatch, capsys):
    monkeypatch.setattr("gn_transfer.backbones.fitting.DISTILLATION_SAMPLES", 64)
    options = {"model__pretrained": str(bn_file), "model__conversion": "distilled"}
    assert fit(folder_root, "gn", **options) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = re.search(r"distilled on 64 images in \d+ s: the features' error fell from (\d+)% to (\d+)%", said)
    assert found is not None
    assert int(found[2]) <= int(found[1])
    stored = last()["gn_transfer"]
    assert stored["architecture"]["num_groups"] == 4
    assert main(["validate", "--ckpt_path", "checkpoints/default/gn-bs1-seed0/last.ckpt"]) == 0
    assert fit(folder_root, "gn_ws", **options) == 2
    assert "model.conversion=distilled leads from BN to gn, ln or in" in capsys.readouterr().err


@pytest.mark.parametrize(("momentum", "expected"), [("corrected", 1 - 0.9 ** (2 / 16)), ("0.3", 0.3)])
def test_momentum_follows_the_micro_batch(folder_root, monkeypatch, momentum, expected):
    found = []
    monkeypatch.setattr(
        "gn_transfer.training.classification.TransferClassifier.on_train_epoch_start",
        lambda task: found.append(task.model.bn1.momentum),
    )
    assert fit(folder_root, "bn", batch_norm__momentum=momentum, data__batch_size="2") == 0
    assert found == [pytest.approx(expected)]


def test_gradients_are_clipped_to_a_norm():
    task = TransferClassifier(ModelConfig("resnet18", "gn"), OptimizerConfig(clip_norm=0.01))
    task.build(["a", "b"])
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    task.training_step((images, torch.tensor([0, 1])), 0)["loss"].backward()
    task.configure_gradient_clipping(None)
    total = torch.cat([parameter.grad.flatten() for parameter in task.model.parameters()]).norm()
    assert total.item() == pytest.approx(0.01, rel=1e-3)


def test_the_plan_names_the_recipe(folder_root, capsys, monkeypatch):
    options = {"optimizer__schedule": "bit", "freezing__epochs": "1", "optimizer__clip_norm": "1.0"}
    monkeypatch.setattr("gn_transfer.commands.fit.choose_run", None)  # nothing may get that far
    chosen = {**SMALL, **{key.replace("__", "."): value for key, value in options.items()}}
    command = [word for key, value in chosen.items() for word in (f"--{key}", value)]
    assert main(["fit", "--data", "Folder", "--data.root", str(folder_root), *command, "--dry_run"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "BiT-HyperRule: 256,000 samples" in words
    assert "the head alone learns for 1 of 1 epochs" in words
    assert "clipped to norm 1" in words


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        (
            "gn",
            {"batch_norm__momentum": "corrected"},
            "batch_norm.momentum is for batch norms, and model.norm=gn has none",
        ),
        ("gn_ws", {"batch_norm__reestimate_images": "8"}, "batch_norm.reestimate_images is for batch norms"),
        ("bn", {"batch_norm__momentum": "0.0"}, "batch_norm.momentum=0.0 is out of range"),
        ("bn_frozen", {"batch_norm__evaluation": "batch"}, "takes no statistics from a batch"),
        ("gn", {"freezing__epochs": "-1"}, "freezing.epochs=-1 is out of range"),
    ],
)
def test_recipes_that_cannot_be(folder_root, capsys, norm, options, message):
    assert fit(folder_root, norm, **options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("decay", ["0", "1", "-0.5"])
def test_decays_that_cannot_be(folder_root, capsys, decay):
    assert fit(folder_root, "gn", ema__decay=decay) == 2
    assert "is out of range; use a number in (0, 1)" in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "devices", "refused"), [("fit", 2, True), ("fit", 1, False), ("validate", 2, False)])
def test_freezing_is_refused_where_several_devices_train(stage, devices, refused):
    assert BackboneFreezing(1).enabled
    assert not BackboneFreezing().enabled
    with pytest.raises(ConfigError, match="DDP cannot unfreeze") if refused else nullcontext():
        BackboneFreezing(1).setup(SimpleNamespace(world_size=devices), None, stage)


def test_the_head_trains_while_the_rest_is_frozen():
    head = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2))
    model = torch.nn.Sequential(OrderedDict(body=torch.nn.BatchNorm2d(2), head=head))
    callback, module = BackboneFreezing(1), SimpleNamespace(model=model, head="head")
    for epoch in (0, 1):
        callback.on_train_batch_start(SimpleNamespace(current_epoch=epoch), module, None, 0)
        assert head[0].training
        assert head[1].weight.requires_grad
        assert model.body.training == model.body.weight.requires_grad == (epoch == 1)


def test_a_validation_by_statistics_of_its_batches_leaves_the_running_ones():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2)).eval()
    images = torch.randn(4, 2, 3, 3) + 5.0
    callback = BatchNormStatistics(evaluation="batch")
    trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"))
    callback.on_validation_epoch_start(trainer, SimpleNamespace(model=model))
    assert float(model(images).detach().mean().abs()) < 0.1
    callback.on_validation_end(trainer, None)
    assert float(model(images).detach().mean()) > 4.0


def test_ranges_of_the_options_of_batch_norm():
    assert BatchNormStatistics(1.0).momentum == 1.0
    with pytest.raises(ConfigError, match=r"batch_norm\.momentum=1\.5 is out of range; use a number in \(0, 1\]"):
        BatchNormStatistics(1.5)
    with pytest.raises(ConfigError, match=r"batch_norm\.reestimate_images=-1 is out of range"):
        BatchNormStatistics(reestimate_images=-1)
    task = SimpleNamespace(model_config=ModelConfig("resnet18", "gn"))
    with pytest.raises(ConfigError, match=r"batch_norm\.reestimate_images is for batch norms"):
        BatchNormStatistics(reestimate_images=1).setup(None, task, "fit")
