"""The micro-batch: chosen by measurement, halved where memory runs out, another one on a resumed run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gn_transfer.__main__ import main
from gn_transfer.training import batch_size as module
from gn_transfer.training.batch_size import BatchSizeChoice, Candidate
from gn_transfer.training.classification import TransferClassifier
from gn_transfer.training.step_cost import StepCost

OPTIONS = {
    "data.img_size": "64",
    "model.backbone": "resnet18",
    "accumulation.effective_batch_size": "4",
    "mixed_precision.mode": "fp32",
    "trainer.max_epochs": "2",
    "regularization.mixup": "0.3",
    "optimizer.momentum": "0.9",
    "ema.decay": "0.5",
}


def words(root: Path, batch_size: object, norm: str = "gn", **options: str) -> list[str]:
    given = {**OPTIONS, "data.batch_size": str(batch_size), "model.norm": norm, **options}
    return ["fit", "--data", "Folder", "--data.root", str(root), *(w for k, v in given.items() for w in (f"--{k}", v))]


def result(name: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The last weights of a run and its record."""
    state = torch.load(f"checkpoints/default/{name}/last.ckpt", weights_only=True)["current_model_state"]
    return state, json.loads(Path(f"runs/default/{name}/metrics.json").read_text())


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def costs(monkeypatch):
    """Costs by micro-batch in place of measured ones: seconds and peak; None is out of memory."""
    table: dict[int, tuple[float, float] | None] = {}
    measured: list[int] = []

    def measure(task, accumulation, size, img_size, evaluation_shape, precision, device):
        measured.append(size)
        if table[size] is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        seconds, peak = table[size]
        return StepCost(seconds, activations_mib=100.0 * size, state_mib=1.0, peak_mib=peak)

    monkeypatch.setattr(module, "measure_step", measure)
    return table, measured


def choose(root, capsys, *more: str, norm: str = "gn", effective: str = "8", code: int = 0) -> str:
    arguments = words(root, "auto", norm, **{"accumulation.effective_batch_size": effective})
    assert main([*arguments, "--dry_run", *more]) == code
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_the_smallest_that_is_as_good_as_the_fastest_is_taken(folder_root, capsys, costs):
    costs[0].update({1: (1.0, 500), 2: (1.0, 600), 4: (1.0, 800), 8: (1.95, 1200)})
    printed = choose(folder_root, capsys)
    assert "4 4.0 images/s, about 800 MiB; chosen 8 4.1 images/s" in printed
    assert "batch 4 x 2 accumulated = effective batch 8" in printed


def test_what_would_not_fit_is_not_tried(folder_root, capsys, costs):
    costs[0].update({1: (1.0, 500), 2: (1.0, 600)})
    printed = choose(folder_root, capsys, "--memory_limit", "0.75")  # 768 MiB; 4 would take 600 + 200
    assert costs[1] == [1, 2]
    assert "4 about 800 MiB, of 768 that may be taken" in printed
    assert "batch 2 x 4 accumulated" in printed


def test_a_device_without_room_for_it(folder_root, capsys, costs):
    costs[0].update({1: (1.0, 500), 2: (1.0, 600), 4: None})
    assert "batch 2 x 4 accumulated" in choose(folder_root, capsys)
    assert costs[1] == [1, 2, 4]


def test_larger_ones_are_not_measured_when_two_are_no_faster(folder_root, capsys, costs):
    costs[0].update({1: (1.0, 500), 2: (2.0, 600), 4: (4.0, 800)})
    assert "batch 1 x 8 accumulated" in choose(folder_root, capsys)
    assert costs[1] == [1, 2, 4]


def test_under_batch_norm_it_shows_the_choices_and_leaves_them_to_the_user(folder_root, capsys, costs):
    costs[0].update({1: (1.0, 500), 2: (1.0, 600), 4: (1.0, 800)})
    printed = choose(folder_root, capsys, norm="bn", effective="4", code=2)
    assert "1 1.0 images/s, about 500 MiB; bn sees a single image" in printed
    assert "4 4.0 images/s, about 800 MiB; bn sees 4 images" in printed
    assert "each of these numbers trains another model" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--accumulation.effective_batch_size", "null"], "divides accumulation.effective_batch_size"),
        (["--memory_limit", "0.25"], "a single image at a time takes about 500 MiB, 256 may be taken"),
        (["--memory_limit", "0"], "memory_limit=0.0 is out of range"),
        (["--data.batch_size", "4", "--memory_limit", "2"], "is for data.batch_size=auto"),
        (["--trainer.devices", "2"], "is measured on one device, and here are 2"),
    ],
)
def test_what_cannot_be_chosen(folder_root, capsys, costs, more, message):
    costs[0].update({1: (1.0, 500)})
    assert message in choose(folder_root, capsys, *more, code=2)
    assert not Path("runs").exists()


def test_a_choice_where_nothing_fits_is_one_image():
    cost = StepCost(1.0, 10.0, 1.0, 900.0)
    choice = BatchSizeChoice([Candidate(1, cost, 900.0), Candidate(2, None, 910.0)], 800.0, None)
    assert choice.chosen.batch_size == 1


def test_a_real_choice_trains_like_one_image_at_a_time_and_is_kept_on_resume(folder_root, capsys):
    assert main(words(folder_root, 1)) == 0
    assert main(words(folder_root, "auto")) == 0
    (whole, one), (chosen, two) = result("gn-bs1-seed0"), result("gn-bsauto-seed0")
    assert two["micro_batch_size"] in (1, 2, 4)
    assert one["samples_seen"] == two["samples_seen"]
    for name, value in whole.items():
        torch.testing.assert_close(chosen[name], value, rtol=1e-4, atol=1e-5)
    checkpoint = "checkpoints/default/gn-bsauto-seed0/last.ckpt"
    stored = torch.load(checkpoint, weights_only=True)["gn_transfer"]
    assert stored["config"]["data"]["init_args"]["batch_size"] == "auto"
    assert stored["batch_size"] == two["micro_batch_size"]
    capsys.readouterr()
    assert main(["fit", "--ckpt_path", checkpoint, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^batch +batch {stored['batch_size']} ", printed, re.MULTILINE)
    assert "chosen" not in printed  # nothing is measured again


@pytest.mark.parametrize(("batch_size", "call"), [(4, 1), (4, 2), (4, 4), (2, 2), (2, 4), (2, 8)])
def test_memory_that_runs_out_halves_the_micro_batch_and_changes_no_result(
    folder_root, monkeypatch, capsys, batch_size, call
):
    """9 training images in steps of 4: calls 1, 2, 3 of an epoch with batches of 4; 1, ..., 5 with batches of 2."""
    assert main(words(folder_root, batch_size // 2)) == 0
    calls, step = 0, TransferClassifier.training_step

    def training_step(self, batch, batch_idx):
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TransferClassifier, "training_step", training_step)
    capsys.readouterr()
    assert main(words(folder_root, batch_size)) == 0
    assert f"out of memory: on from the last optimizer step, with data.batch_size={batch_size // 2}" in (
        capsys.readouterr().out
    )
    (whole, one), (halved, two) = result(f"gn-bs{batch_size // 2}-seed0"), result(f"gn-bs{batch_size}-seed0")
    for name, value in whole.items():
        torch.testing.assert_close(halved[name], value, rtol=1e-4, atol=1e-5)
    assert two["micro_batch_size"] == batch_size // 2
    for name in ("status", "epochs", "optimizer_steps", "samples_seen"):
        assert one[name] == two[name]
    assert two["train/loss"] == pytest.approx(one["train/loss"], abs=1e-4)


@pytest.mark.parametrize("batch_size", [4, "auto"])
def test_a_budget_of_images_stays_when_memory_runs_out(folder_root, monkeypatch, costs, batch_size):
    costs[0].update({1: (1.0, 500), 2: (1.0, 600), 4: (1.0, 800)})
    step = TransferClassifier.training_step
    failed = []

    def training_step(self, batch, batch_idx):
        if len(batch[1]) > 1 and not failed:
            failed.append(len(batch[1]))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TransferClassifier, "training_step", training_step)
    assert main(words(folder_root, batch_size, **{"samples": "8"})) == 0
    assert failed == [4]
    _, record = result(f"gn-bs{batch_size}-seed0")
    assert record["samples_seen"] == 8
    assert record["optimizer_steps"] == 2


def test_under_batch_norm_memory_that_runs_out_ends_the_run_and_says_why(folder_root, monkeypatch, capsys):
    def training_step(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(TransferClassifier, "training_step", training_step)
    assert main(words(folder_root, 4, "bn")) == 2
    assert "Norm bn takes its statistics from these images" in capsys.readouterr().err


def test_one_image_that_does_not_fit_ends_the_run(folder_root, monkeypatch, capsys):
    def training_step(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(TransferClassifier, "training_step", training_step)
    assert main(words(folder_root, 2)) == 2
    printed = capsys.readouterr()
    assert "data.batch_size=1" in printed.out
    assert "out of memory (CUDA out of memory" in printed.err


def test_another_error_after_memory_ran_out_is_not_taken_for_the_same(folder_root, monkeypatch):
    errors = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("something else")]

    def training_step(self, batch, batch_idx):
        raise errors.pop(0)

    monkeypatch.setattr(TransferClassifier, "training_step", training_step)
    with pytest.raises(RuntimeError, match="something else"):
        main(words(folder_root, 4))


def test_a_run_goes_on_with_another_micro_batch(folder_root):
    constant = {"optimizer.schedule": "constant", "trainer.max_epochs": "3"}
    assert main(words(folder_root, 2, **constant)) == 0
    assert main(words(folder_root, 4, **{**constant, "trainer.max_epochs": "2"})) == 0
    checkpoint = "checkpoints/default/gn-bs4-seed0/last.ckpt"
    more = ["--data.batch_size", "2", "--trainer.max_epochs", "3"]
    assert main(["fit", "--ckpt_path", checkpoint, *more]) == 0
    (whole, one), (resumed, two) = result("gn-bs2-seed0"), result("gn-bs4-seed0")
    assert one["samples_seen"] == two["samples_seen"]
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


def test_under_batch_norm_another_micro_batch_is_another_run(folder_root, capsys):
    assert main(words(folder_root, 4, "bn")) == 0
    assert main(["fit", "--ckpt_path", "last", "--data.batch_size", "2", "--trainer.max_epochs", "3"]) == 2
    assert "data.init_args.batch_size is 4 in the checkpoint and 2 here" in capsys.readouterr().err


def choice_for(
    effective: int = 8, images: int = 100, limit_mib: float | None = 8192.0, device: str = "cpu"
) -> BatchSizeChoice:
    """Choose without a model; the fixture ``costs`` says what is measured."""
    data = SimpleNamespace(train_dataset=range(images), img_size=64, evaluation_shape=lambda size: (size, 64, 64))
    return module.choose_batch_size(
        SimpleNamespace(model_config=SimpleNamespace(norm_over_batch=None)),
        data,
        accumulation=SimpleNamespace(effective_batch_size=effective),
        precision="32-true",
        device=torch.device(device),
        memory_limit_gib=None if limit_mib is None else limit_mib / 1024,
    )


def test_a_tenth_of_what_is_free_is_kept(monkeypatch):
    monkeypatch.setattr(module, "available_ram_bytes", lambda: 700 * 2**20)
    monkeypatch.setattr(module, "resident_bytes", lambda: 300 * 2**20)
    assert module.memory_limit_mib(torch.device("cpu")) == pytest.approx(900.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500 * 2**20, 4000 * 2**20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100 * 2**20)
    assert module.memory_limit_mib(torch.device("cuda")) == pytest.approx(540.0)


@pytest.mark.parametrize("silent", ["available_ram_bytes", "resident_bytes"])
def test_a_system_that_does_not_say_sets_no_limit(monkeypatch, silent):
    monkeypatch.setattr(module, silent, lambda: None)
    assert module.memory_limit_mib(torch.device("cpu")) == math.inf


def test_exactly_the_limit_may_be_taken(costs):
    costs[0].update({1: (1.0, 500), 2: (1.0, 600), 4: (1.0, 800)})
    assert choice_for(limit_mib=800).chosen.batch_size == 4
    assert choice_for(limit_mib=500).chosen.batch_size == 1


def test_what_takes_more_than_was_foreseen_does_not_fit(costs):
    costs[0].update({1: (1.0, 500), 2: (1.0, 900)})
    found = choice_for(limit_mib=768).candidates  # 600 were foreseen
    assert [(each.batch_size, each.cost is None, each.needed_mib) for each in found] == [
        (1, False, 500),
        (2, True, 900),
    ]


def test_one_image_is_tried_where_little_is_free(monkeypatch, costs):
    costs[0].update({1: (1.0, 500)})
    monkeypatch.setattr(module, "memory_limit_mib", lambda device: 400.0)
    assert [each.cost is None for each in choice_for(limit_mib=None).candidates] == [False, True]


def test_activations_grow_with_the_images(costs):
    costs[0].update({1: (1.0, 500)})
    assert choice_for(effective=3, limit_mib=600).candidates[1].needed_mib == 500 + 100 * 2


def test_there_are_no_more_images_at_a_time_than_training_images(costs):
    costs[0].update({1: (1.0, 500), 2: (1.0, 600), 5: (1.0, 900)})
    choice_for(effective=10, images=9)
    assert costs[1] == [1, 2, 5]


def test_no_faster_is_said_of_a_ratio(costs):
    costs[0].update({1: (0.1, 500), 2: (0.2, 600), 4: (0.4, 800)})
    choice_for()
    assert costs[1] == [1, 2, 4]


def test_another_error_of_a_measurement_is_not_taken_for_too_little_memory(monkeypatch):
    def measure(task, accumulation, size, *rest):
        if size == 2:
            raise RuntimeError("something else")
        return StepCost(1.0, 100.0, 1.0, 500.0)

    monkeypatch.setattr(module, "measure_step", measure)
    with pytest.raises(RuntimeError, match="something else"):
        choice_for()


def test_a_device_without_room_for_a_second_image_or_for_the_first(costs):
    costs[0].update({1: (1.0, 500), 2: None})
    assert choice_for().chosen.batch_size == 1
    costs[0][1] = None
    with pytest.raises(torch.OutOfMemoryError):
        choice_for()


@pytest.mark.parametrize(("device", "times"), [("cuda", 1), ("cpu", 0)])
def test_a_gpu_gets_back_what_a_measurement_took(monkeypatch, costs, device, times):
    costs[0].update({1: (1.0, 500), 2: None})
    emptied, began_anew = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("emptied"))
    monkeypatch.setattr(module, "reset_peak_memory", began_anew.append)
    choice_for(device=device)
    assert len(emptied) == times
    assert began_anew == [torch.device(device)]


def test_what_does_not_fit_is_not_chosen():
    slow = StepCost(10.0, 10.0, 1.0, 900.0)
    for cost in (slow, None):
        choice = BatchSizeChoice([Candidate(1, cost, 900.0), Candidate(2, None, 910.0)], 800.0, None)
        assert choice.chosen.batch_size == 1
