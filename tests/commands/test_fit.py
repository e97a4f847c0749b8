"""The real command line, in process, on small images in the real layouts."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gn_transfer.__main__ import COMMANDS, main
from gn_transfer.data.splits import split_digest
from gn_transfer.training.checkpoint import read_checkpoint

SMALL = ["--model.backbone", "resnet18", "--data.img_size", "64", "--trainer.max_epochs", "1"]
SMALL += ["--mixed_precision.mode", "fp32"]


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def pets(root: Path) -> list[str]:
    return ["--config", "pets_gnws.yaml", "--data.root", str(root), "--model.pretrained", "null", *SMALL]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def failure(capsys, *arguments: str) -> str:
    began = time.monotonic()
    assert main(list(arguments)) == 2
    assert time.monotonic() - began < 10
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    [line] = captured.err.strip().splitlines()
    assert not Path("runs").exists()
    assert not Path("checkpoints").exists()
    return line


def test_the_public_surface():
    commands = "fit validate test sweep data export predict demo report compare doctor reestimate backbones"
    assert list(COMMANDS) == commands.split()


def test_help_imports_no_torch_and_is_quick():
    code = "import sys; from gn_transfer.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 2.0  # 0.3 s on a quiet machine
    assert "pets_gnws.yaml" in done.stdout


@pytest.mark.parametrize("spelling", ["int, float", "float, int"])
def test_one_batch_is_a_number_of_batches_whoever_wrote_the_same_union_before(spelling):
    """Python keeps the order of the first union; with 1.0 as the value, an epoch would take all batches."""
    code = f"""
from typing import Optional, Union
Optional[Union[{spelling}]], Union[{spelling}]
from gn_transfer.commands.training_cli import parsed
words = "--data Sample --trainer.limit_train_batches 1 --trainer.overfit_batches 2 --trainer.limit_val_batches 0.5"
with parsed("fit", words.split(), builds=False) as cli:
    print([cli.section.trainer[key] for key in ("limit_train_batches", "overfit_batches", "limit_val_batches")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[1, 2, 0.5]"


def test_an_installation_for_prediction_alone(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gn_transfer.inference.export", None)  # importing it fails as without torch
    monkeypatch.delitem(sys.modules, "gn_transfer.commands.export", raising=False)
    with pytest.raises(ModuleNotFoundError):  # a fault of ours is not the user's
        main(["export"])
    monkeypatch.delitem(sys.modules, "gn_transfer.inference.export")
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "gn_transfer.inference.onnx_graph", raising=False)
    assert "export needs onnx, which is not installed" in failure(capsys, "export")


def test_an_unknown_command(capsys):
    assert "did you mean 'fit'" in failure(capsys, "fti")


def test_an_epoch_without_validation_shows_no_older_one(pets_root, capsys):
    more = ["--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2", "--trainer.limit_train_batches", "1"]
    assert main(["fit", *pets(pets_root), *more]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["val/acc1" in line for line in lines] == [False, True, False]


def test_a_run_that_ends_before_its_first_validation_names_the_checkpoint_that_there_is(pets_root, capsys):
    assert main(["fit", *pets(pets_root), "--trainer.max_steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "warning: the run ends after 1 of the" in printed
    named = set(re.findall(r"\S+\.ckpt", printed.partition("metrics ")[2]))
    assert {Path(name).name for name in named} == {"last.ckpt"}
    assert all(Path(name).is_file() for name in named)
    assert not re.search(r"^best ", printed, re.MULTILINE)


@pytest.mark.parametrize("norm", ["gn_ws", "bn"])
def test_fit_validate_test(pets_root, capsys, norm):
    command = [*pets(pets_root), "--accumulation.effective_batch_size", "4", "--model.norm", norm]
    assert main(["fit", *command]) == 0
    printed = capsys.readouterr().out
    assert "effective batch 4" in printed
    assert "gn-transfer test checkpoints" in printed
    assert "gn-transfer export " in printed
    assert ("Accumulation does not help BN" in printed) == (norm == "bn")

    run = Path("runs/pets_gnws") / f"{norm}-bs1-seed0"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    assert metrics["samples_seen"] == 24
    assert metrics["optimizer_steps"] == 6
    expected = {"norm": norm, "backbone": "resnet18", "batch_size": 1, "effective_batch_size": 4, "seed": 0}
    assert expected.items() <= metrics.items()
    assert {"images_per_sec", "peak_memory_mib", "wall_time_s", "versions", "git_commit", "device"} <= metrics.keys()
    split = json.loads((run / "split.json").read_text())
    assert split.keys() == {"train", "val", "test"}
    assert metrics["format_version"] == 1
    assert (metrics["val_split"], metrics["weights"]) == (split_digest(split["val"]), "from scratch")
    [epoch] = read_csv(run / "epochs.csv")
    assert (epoch["epoch"], epoch["samples_seen"]) == ("1", "24")
    assert float(epoch["val/acc1"]) == metrics["val/acc1"]
    for name in ("predictions_val.csv", "predictions_best_val.csv"):
        rows = read_csv(run / name)
        assert [row["path"] for row in rows] == split["val"]
        assert sum(row["target"] == row["predicted"] for row in rows) / len(rows) == pytest.approx(metrics["val/acc1"])
    assert "epoch 1/1" in (run / "run.log").read_text()

    for name, prefix in (("best", "best/val"), ("last", "val")):
        checkpoint = Path("checkpoints/pets_gnws") / run.name / f"{name}.ckpt"
        assert main(["validate", "--ckpt_path", str(checkpoint)]) == 0
        printed = capsys.readouterr().out
        assert f"val/acc1             {metrics[f'{prefix}/acc1']:.4f}" in printed
        assert f"val/loss             {metrics[f'{prefix}/loss']:.4f}" in printed

    assert "test/acc1" not in metrics
    assert main(["test", "--ckpt_path", str(checkpoint)]) == 0
    noted = json.loads((run / "metrics.json").read_text())
    printed = capsys.readouterr().out
    assert f"test/acc1            {noted['test/acc1']:.4f}" in printed
    assert re.search(r"\d of 6 images are right: \d+\.\d% \[\d+\.\d, \d+\.\d\]", printed)
    assert noted.items() >= metrics.items()
    rows = read_csv(run / "predictions_test.csv")
    assert noted["test_split"] == split_digest(row["path"] for row in rows)
    assert main(["test", "--ckpt_path", str(checkpoint)]) == 0
    assert "this run was tested before" in capsys.readouterr().out
    (run / "metrics.json").write_text(json.dumps({**noted, "test/acc1": "x"}))  # written by someone else
    assert main(["test", "--ckpt_path", str(checkpoint)]) == 0
    assert json.loads((run / "metrics.json").read_text()) == noted
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    for said in ("Training images as the model saw them", "<h2>Calibration", "effective batch 4", "of the test images"):
        assert said in page, said
    assert sum(row["target"] == row["predicted"] for row in rows) / len(rows) == pytest.approx(noted["test/acc1"])


def test_the_newest_run_of_a_configuration_is_evaluated_as_it_was_trained(pets_root, capsys):
    assert main(["fit", *pets(pets_root), "--model.norm", "bn"]) == 0
    accuracy = json.loads(Path("runs/pets_gnws/bn-bs1-seed0/metrics.json").read_text())["val/acc1"]
    capsys.readouterr()
    assert main(["validate", "--config", "pets_gnws.yaml", "--ckpt_path", "last"]) == 0  # its own norm is gn_ws
    assert f"val/acc1             {accuracy:.4f}" in capsys.readouterr().out


def test_the_newest_run_is_where_the_configuration_puts_its_runs(pets_root, capsys):
    Path("mine.yaml").write_text("trainer: {default_root_dir: elsewhere}\n")
    words = ["validate", "--config", "mine.yaml", "--ckpt_path", "last"]
    assert "no run under elsewhere/checkpoints/mine has a last.ckpt" in failure(capsys, *words)
    typed = [*words, "--trainer.default_root_dir", "here"]
    assert "no run under here/checkpoints/mine has a last.ckpt" in failure(capsys, *typed)


def test_a_fast_dev_run_is_no_finished_run(pets_root, capsys):
    assert main(["fit", *pets(pets_root), "--trainer.fast_dev_run", "true", "--trainer.val_check_interval", "2"]) == 0
    printed = capsys.readouterr().out
    assert "nothing was saved" in printed
    assert "gn-transfer test" not in printed
    run = Path("runs/pets_gnws/gn_ws-bs1-seed0")
    assert json.loads((run / "metrics.json").read_text())["status"] == "fast_dev_run"
    assert not list(Path().glob("checkpoints/*/*/*.ckpt"))
    assert main(["compare", str(run)]) == 2
    assert "a trial of a batch or two" in capsys.readouterr().err


def test_a_second_run_overwrites_nothing_and_repeats_the_first(pets_root):
    for _ in range(2):
        assert main(["fit", *pets(pets_root), "--accumulation.effective_batch_size", "8"]) == 0
    first, second = (
        Path("checkpoints/pets_gnws") / name / "last.ckpt" for name in ("gn_ws-bs1-seed0", "gn_ws-bs1-seed0-2")
    )
    ours, theirs = read_checkpoint(first)["state_dict"], read_checkpoint(second)["state_dict"]
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_tensorboard_holds_curves_figures_and_a_row_of_hparams(pets_root):
    assert main(["fit", *pets(pets_root), "--accumulation.effective_batch_size", "8"]) == 0
    events = EventAccumulator("runs/pets_gnws/gn_ws-bs1-seed0")
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/images_per_sec", "val/acc1", "val/loss"} <= set(tags["scalars"])
    assert {"train/images", "val/confusion", "val/worst_predictions"} <= set(tags["images"])
    plugins = events.PluginTagToContent("hparams")
    assert {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"} <= set(plugins)


def test_dry_run_prints_the_plan_and_leaves_nothing(pets_root, capsys):
    assert main(["fit", *pets(pets_root), "--accumulation.effective_batch_size", "4", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "1 epochs x 6 optimizer steps = 6" in printed
    assert not Path("runs").exists()
    assert not Path("checkpoints").exists()


def test_a_checkpoint_of_another_norm_is_refused_naming_both(pets_root, capsys):
    assert main(["fit", *pets(pets_root), "--accumulation.effective_batch_size", "8"]) == 0
    capsys.readouterr()
    checkpoint = "checkpoints/pets_gnws/gn_ws-bs1-seed0/last.ckpt"
    for command in ("fit", "validate"):
        assert main([command, "--ckpt_path", checkpoint, "--model.norm", "gn"]) == 2
        assert "model.norm is gn_ws in the checkpoint and gn here" in capsys.readouterr().err


def test_another_learning_rate_on_resume_is_refused(pets_root, capsys):
    assert main(["fit", *pets(pets_root), "--accumulation.effective_batch_size", "8"]) == 0
    assert main(["fit", "--ckpt_path", "last", "--optimizer.lr", "0.5"]) == 2
    assert "optimizer.lr is 0.003 in the checkpoint and 0.5 here" in capsys.readouterr().err


def test_a_finished_run_goes_on_with_more_epochs_in_its_own_folder(pets_root):
    assert main(["fit", *pets(pets_root), "--accumulation.effective_batch_size", "8"]) == 0
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    assert [path.name for path in Path("runs/pets_gnws").iterdir()] == ["gn_ws-bs1-seed0"]
    metrics = json.loads(Path("runs/pets_gnws/gn_ws-bs1-seed0/metrics.json").read_text())
    assert (metrics["samples_seen"], metrics["epochs"]) == (48, 2)


def test_a_run_goes_on_with_milder_crops_and_says_so(pets_root, capsys):
    assert main(["fit", *pets(pets_root), "--data.recipe", "crop_flip"]) == 0
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2", "--data.min_crop_scale", "0.7"]) == 0
    assert "augmentation changes from here on: min_crop_scale None -> 0.7" in capsys.readouterr().out
    run = Path("runs/pets_gnws/gn_ws-bs1-seed0")
    assert "min_crop_scale None -> 0.7" in (run / "run.log").read_text()
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.nrom", "gn"], "model.nrom is not a key; did you mean 'model.norm'"),
        (["--model.norm", "gnws"], "model.norm=gnws is not allowed; did you mean 'gn_ws'"),
        (["--model.norm", "gn", "--model.num_groups", "48"], "model.num_groups=48 does not divide 64 channels of"),
        (["--data.img_size", "32", "--model.norm", "bn"], "data.img_size=32 with data.batch_size=1 cannot be trained"),
        (["--data.img_sze", "32"], "did you mean 'data.img_size'"),
        (["--optimizer.lr", "-1"], "optimizer.lr=-1.0 is out of range"),
        (["--optimizer.lr", "fast"], "optimizer.lr=fast is not of type float"),
        (["--batch_norm.momentum", "fast"], "batch_norm.momentum=fast is not allowed; use null, a number or corrected"),
        (["--trainer.gradient_clip_val", "1"], "set optimizer.clip_norm"),
        (["--ema.decay", "1.0"], "ema.decay=1.0 is out of range"),
        (["--accumulation.effective_batch_size", "3", "--data.batch_size", "2"], "effective_batch_size=3 is not"),
        (["--trainer.precision", "16-mixed"], "set mixed_precision.mode"),
        (["--trainer.accumulate_grad_batches", "4"], "set accumulation.effective_batch_size"),
        (["--config", "pets_gnw.yaml"], "did you mean 'pets_gnws.yaml'"),
        (["--data", "Petz"], "data=Petz is not a data module; did you mean 'Pets'"),
        (["--ckpt_path", "nowhere.ckpt"], "no such file"),
        (["--data.root", "nowhere"], "nowhere"),
        (["--data.batch_size", "0"], "data.batch_size=0 is out of range; give an integer of at least 1."),
        (["--data.cahce", "ram"], "did you mean 'data.cache'"),
        (["--data.cache", "rom"], "data.cache=rom is not allowed; did you mean 'ram'"),
        (["--data.shots_per_class", "50"], "data.shots_per_class=50: 3 classes have fewer training images"),
        (
            ["--regularization.mixup", "0.2", "--accumulation.effective_batch_size", "1"],
            "set accumulation.effective_batch_size to 2 or more",
        ),
        (["--model.backbone", "resnet81"], "resnet81 is not a model"),
        (["--samples", "1000", "--trainer.limit_train_batches", "5"], "trainer.limit_train_batches=5: set one of them"),
        (["--trainer.accelerator", "gpu"], "trainer: No supported gpu backend found! Correct the keys of trainer"),
        (["--trainer.logger", "CometLogger"], "trainer.logger: lightning.pytorch.loggers.CometLogger cannot be made"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_message_and_leaves_nothing(pets_root, capsys, arguments, message):
    assert message in failure(capsys, "fit", *pets(pets_root), *arguments)


def test_a_misspelt_key_in_a_file(pets_root, capsys):
    Path("bad.yaml").write_text(f"model:\n  nrom: gn\ndata:\n  class_path: Pets\n  init_args:\n    root: {pets_root}\n")
    assert "did you mean 'model.norm'" in failure(capsys, "fit", "--config", "bad.yaml")


def test_a_truncated_image_stops_with_its_path(pets_root, capsys):
    image = pets_root / "oxford-iiit-pet" / "images" / "Abyssinian_2.jpg"
    image.write_bytes(image.read_bytes()[:-300])
    assert image.name in failure(capsys, "fit", *pets(pets_root))


def test_an_empty_folder(capsys):
    Path("empty").mkdir()
    assert "empty" in failure(capsys, "fit", "--config", "folder.yaml", "--data.root", "empty")


def test_evaluation_needs_a_checkpoint(capsys):
    assert "give --ckpt_path" in failure(capsys, "validate")
