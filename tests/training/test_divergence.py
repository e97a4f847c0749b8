"""Trainings that go wrong: they stop in time, keep the last good checkpoint, and say what to try."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gn_transfer.__main__ import main
from gn_transfer.config import ConfigError
from gn_transfer.training.divergence import DivergenceCheck, _images_of, is_finite
from gn_transfer.training.predictions import ImagePredictions

OPTIONS = {
    "data.img_size": "32",
    "model.backbone": "resnetv2_18",
    "mixed_precision.mode": "fp32",
    "optimizer.warmup_fraction": "0",
    "checkpoint.every_minutes": "0",
}


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def words(root: Path, **more: str) -> list[str]:
    options = {**OPTIONS, **{key.replace("__", "."): value for key, value in more.items()}}
    return [
        "fit",
        *("--data", "Folder", "--data.root", str(root)),
        *(word for key, value in options.items() for word in (f"--{key}", value)),
    ]


def assert_whole_checkpoints(*names: str) -> None:
    paths = list(Path("checkpoints").glob("*/*/*.ckpt"))
    assert {path.name for path in paths} == set(names)
    for path in paths:
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(bool(torch.isfinite(value).all()) for value in state.values()), path


def test_a_loss_that_is_not_finite(folder_root, capsys):
    assert main(words(folder_root, optimizer__lr="1000", optimizer__weight_decay="1000")) == 2
    error = capsys.readouterr().err
    assert "the training loss became nan at step" in error
    assert ".jpg)" in error  # the images of the batch
    step, batch = map(int, re.search(r"at step (\d+), batch (\d+) of epoch 1 ", error).groups())
    assert step == batch  # a step for every image
    assert "The last good checkpoint is checkpoints/default/gn_ws-bs1-seed0/last.ckpt" in error
    assert "Lower optimizer.lr (1000)" in error
    assert_whole_checkpoints("last.ckpt", "previous.ckpt")
    [record] = Path("runs").glob("*/*/metrics.json")
    assert json.loads(record.read_text(), parse_constant=pytest.fail)["status"] == "failed"


def test_a_validation_that_is_not_finite(folder_root, capsys, monkeypatch):
    from gn_transfer.training.classification import TransferClassifier

    calls = 0
    own = TransferClassifier.evaluation_losses

    def loss(self, logits, targets):
        nonlocal calls
        calls += 1
        return own(self, logits, targets) * (float("nan") if calls > 1 else 1.0)

    monkeypatch.setattr(TransferClassifier, "evaluation_losses", loss)
    options = words(folder_root, optimizer__lr="0.01", trainer__max_epochs="3", checkpoint__every_minutes="5")
    assert main(options) == 2
    assert "the validation loss became inf in epoch 2" in capsys.readouterr().err
    assert_whole_checkpoints("best.ckpt", "last.ckpt")
    [record] = Path("runs").glob("*/*/metrics.json")
    assert json.loads(record.read_text(), parse_constant=pytest.fail)["val/loss"] > 0  # that of the first epoch


def test_accuracy_at_the_level_of_guessing_is_said_once(folder_root, capsys):
    options = words(folder_root, optimizer__lr="1e-9", trainer__max_epochs="3", data__val_fraction="0.4")
    assert main(options) == 0
    assert capsys.readouterr().out.count("is what guessing reaches (0.600), for 2 validations now") == 1


def test_finite_modules():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    assert is_finite(module)
    module[1].running_var[0] = float("inf")
    assert not is_finite(module)


class Task:
    monitor = "val/acc1"

    def guess(self, scores, images):
        return 0.5


def trainer_with(accuracy):
    return SimpleNamespace(
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
        callback_metrics={"val/acc1": torch.tensor(accuracy), "val/loss": torch.tensor(1.0)},
        callbacks=[ImagePredictions()],
        datamodule=SimpleNamespace(val_dataset=SimpleNamespace(images=[])),
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])],
        current_epoch=1,
    )


@pytest.mark.parametrize(
    ("accuracies", "warned"), [((0.5, 0.4), 1), ((0.5, 0.4, 0.4), 1), ((0.5, 0.6, 0.5), 0), ((0.6, 0.6), 0)]
)
def test_two_validations_in_a_row_at_the_level_of_guessing_are_said(accuracies, warned):
    callback, said = DivergenceCheck(), []
    callback.say = said.append
    for accuracy in accuracies:
        callback.on_validation_end(trainer_with(accuracy), Task())
    assert len(said) == warned
    assert all("optimizer.lr 0.1 is probably too high for this model: try 0.01. If" in line for line in said)


@pytest.mark.parametrize("change", [{"sanity_checking": True}, {"state": SimpleNamespace(fn="validate")}])
def test_validations_outside_of_a_training_do_not_count(change):
    callback, said = DivergenceCheck(), []
    callback.say = said.append
    for _ in range(2):
        callback.on_validation_end(SimpleNamespace(**{**vars(trainer_with(0.4)), **change}), Task())
    assert not said


@pytest.mark.parametrize("change", [{"callbacks": []}, {"datamodule": None}, {"callback_metrics": {}}])
def test_what_cannot_be_compared_with_guessing_is_not(change):
    callback = DivergenceCheck()
    callback.on_validation_end(SimpleNamespace(**{**vars(trainer_with(0.4)), **change}), Task())


@pytest.mark.parametrize(("wrong", "noticed"), [(1, 3), (5, 6)])
def test_a_gpu_is_asked_after_some_steps_and_at_the_end_of_an_epoch(wrong, noticed):
    """Every two optimizer steps of two micro-batches, and behind the last of seven."""
    callback, module = DivergenceCheck(), SimpleNamespace(device=torch.device("cuda"))
    loop = {"num_training_batches": 7, "log_every_n_steps": 2, "accumulate_grad_batches": 2, "global_step": 3}
    trainer = SimpleNamespace(**vars(trainer_with(0.5)), **loop)

    def end(batch):
        loss = torch.tensor(float("nan") if batch == wrong else 1.0)
        callback.on_train_batch_end(trainer, module, {"mean_loss": loss}, None, batch)

    for batch in range(noticed):
        end(batch)
    with pytest.raises(ConfigError, match=f"loss became nan at step 3, batch {wrong + 1} of epoch 2"):
        end(noticed)


def test_at_most_four_images_of_a_batch_are_named():
    sampler = SimpleNamespace(num_samples=6, seed=0, shuffle=False, rank=0, world_size=1, batch_size=6)
    images = [SimpleNamespace(path=f"{number}.jpg") for number in range(6)]
    data = SimpleNamespace(train_sampler=sampler, train_dataset=SimpleNamespace(images=images))
    trainer = SimpleNamespace(datamodule=data, current_epoch=0)
    assert _images_of(trainer, 0) == "0.jpg, 1.jpg, 2.jpg, 3.jpg and 2 more"
    sampler.batch_size = 4
    assert _images_of(trainer, 0) == "0.jpg, 1.jpg, 2.jpg, 3.jpg"
