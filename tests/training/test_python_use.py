"""Training from Python: Lightning's Trainer with our module, data and callbacks, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import gn_transfer as gnt
from gn_transfer.config import ConfigError
from gn_transfer.inference.export import export_bundle
from gn_transfer.training.checkpoint import describe_task
from gn_transfer.training.checkpoint_callbacks import BestCheckpoint, LastCheckpoint
from gn_transfer.training.freezing import BackboneFreezing
from gn_transfer.training.run_config import config_of
from gn_transfer.training.run_folder import claim_run
from gn_transfer.training.train import create_trainer, prepare, train

QUIET: dict[str, Any] = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


def task(norm: str = "gn_ws") -> gnt.TransferClassifier:
    return gnt.TransferClassifier(gnt.ModelConfig("resnet18", norm), gnt.OptimizerConfig(lr=0.01))


def loader(images: int = 6, batch_size: int = 2) -> DataLoader[Any]:
    pixels = torch.randint(0, 256, (images, 3, 64, 64), dtype=torch.uint8)
    return DataLoader(TensorDataset(pixels, torch.arange(images) % 2), batch_size)


def test_the_trainer_fits_our_module_with_our_data(folder_root: Path, tmp_path: Path) -> None:
    module, data = task(), gnt.Folder(folder_root, img_size=64, num_workers=0)
    assert "not set up" in repr(data)
    trainer = Trainer(**QUIET, callbacks=[gnt.GradientAccumulation(4)], use_distributed_sampler=False)
    trainer.fit(module, datamodule=data)
    assert trainer.accumulate_grad_batches == 4
    assert "val/acc1" in trainer.callback_metrics
    assert "train 9, val 3" in repr(data)
    assert str(data) == repr(data)
    [metrics] = trainer.validate(module, datamodule=data, verbose=False)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    loaded = gnt.TransferClassifier.load_from_checkpoint(tmp_path / "mine.ckpt")
    assert loaded.classes == ["apple", "pear"]
    torch.testing.assert_close((loaded.mean, loaded.std), (module.mean, module.std))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), module.eval()(images))
    assert metrics["val/acc1"] == trainer.callback_metrics["val/acc1"]


def test_loaders_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = task("gn")
    with pytest.raises(ConfigError, match=r"call module\.build\(class_names\) before trainer\.fit"):
        Trainer(**QUIET).fit(module, loader(), loader())
    scales = []
    module = task("gn")
    module.build(["cat", "dog"])
    step = module.training_step
    monkeypatch.setattr(
        module, "training_step", lambda *args: (scales.append(module.micro_batch.loss_scale), step(*args))[1]
    )
    trainer = Trainer(**QUIET, callbacks=[gnt.GradientAccumulation(4)], gradient_clip_val=0.1)
    trainer.fit(module, loader(), loader())
    assert (trainer.global_step, scales) == (2, [1.0, 1.0, 2.0])  # three batches in steps of two
    [schedule] = trainer.lr_scheduler_configs
    assert schedule.scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-9)  # over two steps, not over three batches
    [probs, *_] = trainer.predict(module, loader())
    torch.testing.assert_close(probs.sum(1), torch.ones(2))
    with pytest.raises(ConfigError, match=r"takes pixels as uint8, 0 to 255, .*these are torch\.float32"):
        module.eval()(torch.rand(1, 3, 64, 64))


def test_what_was_frozen_learns_in_the_next_training() -> None:
    module = task("gn")
    module.build(["cat", "dog"])
    for callbacks in ([BackboneFreezing(99)], []):
        before = module.model.conv1.weight.detach().clone()
        Trainer(**QUIET, callbacks=[gnt.GradientAccumulation(), *callbacks]).fit(module, loader(), loader())
        assert torch.equal(before, module.model.conv1.weight) == bool(callbacks)


def test_a_trainer_takes_the_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("gn_transfer.training.train.device_type", lambda name: (asked.append(name), "cpu")[1])
    create_trainer()
    create_trainer(accelerator="cpu")
    assert asked == ["auto", "cpu"]


def test_callbacks_beside_those_that_every_run_needs() -> None:
    def kinds(*callbacks: Callback) -> list[type]:
        return [type(callback) for callback in create_trainer(callbacks=callbacks).callbacks]  # type: ignore[attr-defined]

    assert kinds(ModelCheckpoint(monitor="val/loss")).count(BestCheckpoint) == 1
    assert kinds(LastCheckpoint(1.0)).count(LastCheckpoint) == 1


def test_a_script_stores_what_decides_its_course(folder_root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    module, data = task(), gnt.Folder(folder_root, img_size=64, num_workers=0)
    callbacks = [gnt.ExponentialMovingAverage(0.5), BackboneFreezing(1), LastCheckpoint(7.0)]
    trainer = create_trainer(max_epochs=1, callbacks=callbacks, limit_train_batches=3, log_every_n_steps=1)
    prepare(module, data)
    run = claim_run(Path(), "photos", module.norm, data.batch_size, data.seed)
    train(module, data, trainer, run)
    config = yaml.safe_load((run.logs / "config.yaml").read_text())
    assert (config["ema"], config["freezing"]) == ({"decay": 0.5}, {"epochs": 1})
    assert config["checkpoint"] == {"every_minutes": 7.0}
    limits = {"limit_train_batches": 3, "limit_val_batches": None, "val_check_interval": None}
    assert limits.items() <= config["trainer"].items()
    assert config_of(module, data, create_trainer(val_check_interval="00:00:10:00"))["trainer"]["max_epochs"] == 10
    from gn_transfer.__main__ import main

    last = str(run.checkpoints / "last.ckpt")
    assert main(["fit", "--ckpt_path", last, "--trainer.max_epochs", "2"]) == 0
    assert "averaging_state" in torch.load(last, weights_only=True)


def test_predictions_of_the_test_images(folder_root: Path) -> None:
    data = gnt.Folder(folder_root, img_size=64, num_workers=0, test_fraction=0.3)
    module = task()
    module.build(data.list_fit().classes)
    found = torch.cat(Trainer(**QUIET).predict(module, datamodule=data))
    assert found.shape == (len(data.list_test()), len(module.classes))


def test_overfitting_some_batches(folder_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = gnt.Folder(folder_root, img_size=64, num_workers=0, recipe="none"), []
    module = task()
    monkeypatch.setattr(module, "on_train_batch_start", lambda batch, index: seen.append(batch[0].sum().item()))
    Trainer(**{**QUIET, "max_epochs": 2}, overfit_batches=2, use_distributed_sampler=False).fit(module, datamodule=data)
    assert len(seen) == 4
    assert seen[:2] == seen[2:]  # the same images in both epochs


def test_a_script_leaves_what_the_command_leaves(
    folder_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module, data = task(), gnt.Folder(folder_root, img_size=64, num_workers=0)
    trainer = create_trainer(
        max_epochs=1, log_every_n_steps=1, callbacks=[gnt.GradientAccumulation(4), gnt.ExponentialMovingAverage(None)]
    )
    prepare(module, data)
    run = claim_run(Path(), "photos", module.norm, data.batch_size, data.seed)
    train(module, data, trainer, run)
    names = {path.name for path in run.logs.iterdir()}
    assert {"config.yaml", "metrics.json", "run.log", "split.json", "transfer_report.json", "epochs.csv"} <= names
    assert "epoch 1/1" in (run.logs / "run.log").read_text()
    from gn_transfer.__main__ import main

    best = run.checkpoints / "best.ckpt"
    assert gnt.TransferClassifier.load_from_checkpoint(best).run_config["config_name"] == "photos"
    assert main(["validate", "--ckpt_path", str(best)]) == 0
    assert main(["export", str(best), "--output", "bundle"]) == 0
    assert main(["fit", "--ckpt_path", str(run.checkpoints / "last.ckpt"), "--trainer.max_epochs", "2"]) == 0
    assert main(["compare", str(run.logs)]) == 0


@pytest.mark.slow
def test_a_script_on_the_sample_can_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = task()
    data = gnt.Sample("sample", img_size=64, num_workers=0, shots_per_class=2, val_fraction=0.02, cache="none")
    trainer = create_trainer(max_epochs=1, limit_train_batches=2, figures=False, log_every_n_steps=1)
    prepare(module, data)
    run = claim_run(Path(), "sample", module.norm, data.batch_size, data.seed)
    train(module, data, trainer, run, loggers=None)
    assert export_bundle(run.checkpoints / "best.ckpt", Path("bundle")).holds


def described(module: Any) -> dict[str, Any]:
    """What a checkpoint holds of a module of two classes."""
    module.build(["cat", "dog"])
    content: dict[str, Any] = {"state_dict": module.state_dict()}
    describe_task(module, content)
    return content


def test_a_checkpoint_states_groups_and_decoder() -> None:
    of_gn, of_bn = (described(task(norm))["gn_transfer"]["architecture"] for norm in ("gn", "bn"))
    assert set(of_gn["groups"].values()) == {32}
    assert "decoder" not in of_gn
    assert "groups" not in of_bn
    config = gnt.ModelConfig("resnet18", "bn", decoder="fpn", decoder_norm="gn")
    found = described(gnt.TransferSegmenter(config))["gn_transfer"]["architecture"]
    assert (found["decoder"], found["decoder_norm"]) == ("fpn", "gn")
    assert found["groups"]


def test_synchronized_bn_comes_back_as_bn(tmp_path: Path) -> None:
    content = described(task("bn"))
    content["gn_transfer"]["architecture"]["norm"] = "bn_sync"
    torch.save(content, tmp_path / "sync.ckpt")
    assert gnt.TransferClassifier.load_from_checkpoint(tmp_path / "sync.ckpt").norm == "bn"


def test_weights_that_are_not_finite_do_not_come_back(tmp_path: Path) -> None:
    content = described(task())
    content["state_dict"]["model.conv1.weight"][0] = torch.nan
    torch.save(content, tmp_path / "nan.ckpt")
    with pytest.raises(ConfigError, match=r"not finite, in model\.conv1\.weight"):
        gnt.TransferClassifier.load_from_checkpoint(tmp_path / "nan.ckpt")
