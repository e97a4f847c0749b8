"""When checkpoints are saved, and what they know of the training: with stand-ins for the trainer and its loops."""

from __future__ import annotations

import copy
import math
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from gn_transfer.config import ConfigError
from gn_transfer.training import checkpoint_callbacks
from gn_transfer.training.checkpoint_callbacks import (
    AtomicCheckpointIO,
    BestCheckpoint,
    LastCheckpoint,
    write_checkpoint,
)
from gn_transfer.training.divergence import DivergenceCheck

PROGRESS = "epoch_loop.batch_progress"


def stand_in(done: int = 0, ready: int | None = None, *, device: str = "cpu", **changes: Any) -> Any:
    """A trainer in its second epoch of nine micro-batches of two images, in steps of four."""
    batches = SimpleNamespace(ready=done if ready is None else ready, processed=done)
    values = {
        **{"state": SimpleNamespace(fn="fit"), "training": True, "fast_dev_run": False, "is_global_zero": True},
        **{"world_size": 1, "accumulate_grad_batches": 4, "num_training_batches": 9, "callbacks": []},
        "optimizers": [],
        "datamodule": SimpleNamespace(batch_size=2),
        **{"val_check_batch": float("inf"), "check_val_every_n_epoch": 1},
        "strategy": SimpleNamespace(root_device=torch.device(device), checkpoint_io=AtomicCheckpointIO()),
        "fit_loop": SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=batches)),
            epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=1, started=2, ready=2)),
        ),
    }
    return SimpleNamespace(**{**values, **changes})


def loops(processed: int, ready: int | None = None) -> dict[str, Any]:
    """Lightning's loops behind an epoch of nine micro-batches and ``processed`` of the next."""
    ready = processed if ready is None else ready

    def counted(before: int) -> dict[str, int]:
        ends = {"processed": before + processed, "completed": before + processed - 1}
        return {"ready": before + ready, "started": before + ready, **ends}

    progress = {"current": counted(0), "total": counted(9), "is_last_batch": ready == 9}
    return {"fit_loop": {PROGRESS: progress, "epoch_loop.state_dict": {"_batches_that_stepped": 5}}}


def saved_by(trainer: Any, processed: int, ready: int | None = None) -> dict[str, Any]:
    """What a checkpoint holds that this trainer saves."""
    content: dict[str, Any] = {"loops": loops(processed, ready)}
    LastCheckpoint().on_save_checkpoint(trainer, None, content)  # type: ignore[arg-type]
    return content


def stored(batch: int = 0, **changes: Any) -> dict[str, Any]:
    """A checkpoint of one device in its second epoch."""
    ours = {
        **{"position": {"epoch": 1, "batch": batch}, "batch_size": 2, "devices": 1, "images_per_step": 8},
        "torch_rng_state": torch.get_rng_state(),
    }
    return {"gn_transfer": {**ours, **changes}, "loops": loops(batch)}


def load(content: dict[str, Any], **changes: Any) -> list[tuple[int, int]]:
    """Load a checkpoint into a stand-in; give the places that its sampler was sent to."""
    places = []
    sampler = SimpleNamespace(resume_at=lambda epoch, batch: places.append((epoch, batch)))
    data = SimpleNamespace(batch_size=changes.pop("batch_size", 2), train_sampler=sampler)
    LastCheckpoint().on_load_checkpoint(stand_in(datamodule=data, **changes), None, content)  # type: ignore[arg-type]
    return places


# What a checkpoint says


def test_a_checkpoint_between_two_steps_says_where_it_is() -> None:
    content = saved_by(stand_in(4, world_size=2, datamodule=SimpleNamespace(batch_size=3)), 4)
    ours = content["gn_transfer"]
    assert ours["position"] == {"epoch": 1, "batch": 4}
    assert (ours["batch_size"], ours["devices"], ours["images_per_step"]) == (3, 2, 24)
    assert "cuda_rng_state" not in ours
    assert content["loops"] == loops(4)


def test_a_checkpoint_behind_an_epoch_stands_at_the_next() -> None:
    ours = saved_by(stand_in(9, datamodule=None), 9)["gn_transfer"]
    assert ours["position"] == {"epoch": 2, "batch": 0}
    assert ours["batch_size"] == 1  # loaders of the user's own do not say


@pytest.mark.parametrize(("processed", "done"), [(5, 4), (8, 8)])  # inside a step; in the last of the epoch
def test_a_step_that_found_no_memory_is_forgotten(processed: int, done: int) -> None:
    content = saved_by(stand_in(processed, ready=processed + 1), processed, ready=processed + 1)
    assert content["gn_transfer"]["position"] == {"epoch": 1, "batch": done}
    expected = loops(done)
    expected["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] = 4
    assert content["loops"] == expected


def test_the_generator_of_a_gpu_is_saved_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    state, restored = torch.tensor([7], dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append(state.tolist()))
    assert saved_by(stand_in(4, device="cuda"), 4)["gn_transfer"]["cuda_rng_state"] is state
    load(stored(cuda_rng_state=state), device="cuda")
    load(stored(cuda_rng_state=state))
    load(stored(), device="cuda")  # trained on a CPU before
    assert restored == [[7]]


# Going on from a checkpoint


@pytest.mark.parametrize(
    ("batch", "devices", "accumulate", "message"),
    [
        (0, 2, 4, r"saved with 8 images per step on 1 device, and here are 2; continue with --trainer\.devices 1\."),
        (4, 2, 2, "saved inside an epoch on 1 device, and here are 2"),
    ],
)
def test_another_number_of_devices_is_refused(batch: int, devices: int, accumulate: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(stored(batch), world_size=devices, accumulate_grad_batches=accumulate)


def test_a_checkpoint_behind_an_epoch_fits_devices_with_as_many_images_per_step() -> None:
    assert load(stored(0), world_size=2, accumulate_grad_batches=2) == [(1, 0)]
    assert load(stored(4)) == [(1, 4)]


def test_micro_batches_are_counted_anew_where_they_hold_fewer_images() -> None:
    inside, behind = stored(4, batch_size=4), stored(0, batch_size=4)
    assert load(inside) == [(1, 8)]
    assert inside["loops"]["fit_loop"][PROGRESS] == loops(8)["fit_loop"][PROGRESS]
    untouched = copy.deepcopy(behind["loops"])
    assert load(behind) == [(1, 0)]
    assert behind["loops"] == untouched


def test_random_numbers_go_on_where_they_were() -> None:
    torch.manual_seed(3)
    content, following = stored(), torch.rand(2)
    load(content)
    assert torch.equal(torch.rand(2), following)


@pytest.mark.parametrize(
    "position",
    [None, {"epoch": 1}, {"epoch": 0.5, "batch": 0}, {"epoch": 0, "batch": -1}, {"epoch": 2**31, "batch": 0}],
)
def test_places_that_cannot_be(position: object) -> None:
    with pytest.raises(ConfigError, match="does not say where in the training it was"):
        load(stored(position=position))


def test_the_largest_epoch_and_no_training_at_all() -> None:
    assert load(stored(position={"epoch": 2**31 - 1, "batch": 0})) == [(2**31 - 1, 0)]
    assert load({}, state=SimpleNamespace(fn="validate")) == []


# When it is saved


def batches_saved_behind(number: int, minutes: float) -> list[int]:
    """Micro-batches of an epoch, from 0 and in steps of four, behind which a checkpoint is saved."""
    callback, saved = LastCheckpoint(every_minutes=minutes), []
    callback._save = lambda trainer, module: saved.append(module)  # type: ignore[assignment,method-assign,func-returns-value]
    for batch in range(number):
        callback.on_train_batch_end(stand_in(num_training_batches=number), batch, None, None, batch)  # type: ignore[arg-type]
    return saved


def test_steps_are_saved_but_the_last_of_an_epoch_only_behind_its_validation() -> None:
    assert batches_saved_behind(8, minutes=0.0) == [3]
    assert batches_saved_behind(9, minutes=0.0) == [3, 7]


@pytest.mark.parametrize(("seconds", "saved"), [(179.0, []), (180.0, [3])])
def test_so_many_minutes_pass_between_checkpoints(
    monkeypatch: pytest.MonkeyPatch, seconds: float, saved: list[int]
) -> None:
    times = iter([50.0, 50.0 + seconds])
    monkeypatch.setattr(checkpoint_callbacks, "time", SimpleNamespace(monotonic=lambda: next(times)))
    assert batches_saved_behind(5, minutes=3.0) == saved


def test_minutes_are_five_and_never_negative() -> None:
    assert LastCheckpoint().every_minutes == 5.0
    with pytest.raises(ConfigError, match=r"checkpoint\.every_minutes=-0\.5 is out of range"):
        LastCheckpoint(-0.5)


def test_a_training_that_is_asked_to_stop_saves_first() -> None:
    callback, saved = LastCheckpoint(), []
    callback._save = lambda trainer, module: saved.append(module)  # type: ignore[assignment,method-assign,func-returns-value]
    callback.on_train_epoch_end(stand_in(), "an epoch")  # type: ignore[arg-type]
    callback.stop_requested = True
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_batch_end(stand_in(), "a step", None, None, 3)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_epoch_end(stand_in(), "the last epoch")  # type: ignore[arg-type]
    assert saved == ["an epoch", "a step", "the last epoch"]


def test_one_of_several_processes_is_enough_to_stop() -> None:
    asked = []

    def decide(decision: bool, all: bool) -> bool:
        asked.append((decision, all))
        return True

    several = stand_in(world_size=2, strategy=SimpleNamespace(reduce_boolean_decision=decide))
    assert checkpoint_callbacks._any_process(several, False)
    assert asked == [(False, False)]


# Saving


def test_a_disk_that_is_full_is_said_and_is_no_last_good_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []
    check, callback, path = DivergenceCheck(), LastCheckpoint(), tmp_path / "last.ckpt"
    callback.directory, callback.say = tmp_path, said.append
    trainer = stand_in(callbacks=[check])
    io = trainer.strategy.checkpoint_io
    trainer.save_checkpoint = lambda path: io.problems.update({path: "No space left on device"})
    assert not callback._save(trainer, nn.Linear(1, 1))  # type: ignore[arg-type]
    assert (callback.saved, check.last_good) == (None, "")
    assert said == [
        f"warning: {path} could not be written (No space left on device); the training goes on, and what was there "
        "stays"
    ]
    trainer.save_checkpoint = lambda path: io.save_checkpoint({}, path)
    assert callback._save(trainer, nn.Linear(1, 1))  # type: ignore[arg-type]
    assert (callback.saved, check.last_good, io.problems) == (path, str(path), {})
    assert len(said) == 1


@pytest.mark.parametrize(
    ("has_folder", "changes", "weight"),
    [(False, {}, 0.0), (True, {"fast_dev_run": 1}, 0.0), (True, {}, math.inf)],
)
def test_nothing_is_saved_without_folder_in_a_trial_or_of_broken_weights(
    tmp_path: Path, has_folder: bool, changes: dict[str, Any], weight: float
) -> None:
    callback, module, saved = LastCheckpoint(), nn.Linear(1, 1), []
    nn.init.constant_(module.weight, weight)
    callback.directory = tmp_path if has_folder else None
    assert callback._save(stand_in(save_checkpoint=saved.append, **changes), module) is False  # type: ignore[arg-type]
    assert saved == []


def test_the_end_of_a_training_tries_again_what_could_not_be_written(tmp_path: Path) -> None:
    trainer, callback, tries = stand_in(), LastCheckpoint(), []
    problems = trainer.strategy.checkpoint_io.problems
    callback._save = lambda trainer, module: tries.append("tried")  # type: ignore[assignment,method-assign,func-returns-value]
    callback.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert not tries
    problems[tmp_path / "last.ckpt"] = "No space left on device"
    with pytest.raises(ConfigError, match=r"last\.ckpt could not be written \(No space left on device\)"):
        callback.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert tries == ["tried"]
    callback.retry(trainer, None)  # type: ignore[arg-type]
    assert tries == ["tried"]  # by now, an average may have taken the place of the weights
    trainer.is_global_zero = False  # the other processes leave it to the first
    callback.on_train_end(trainer, None)  # type: ignore[arg-type]
    trainer.is_global_zero, callback = True, LastCheckpoint()
    callback._save = lambda trainer, module: problems.clear()  # type: ignore[assignment,method-assign]
    callback.on_train_end(trainer, None)  # type: ignore[arg-type]


def test_signals_have_their_handlers_back_when_a_training_ends() -> None:
    before, callback = signal.getsignal(signal.SIGINT), LastCheckpoint()
    callback.on_train_start(stand_in(), None)  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is not before
    callback.on_train_end(stand_in(), None)  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_first_process_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    part, callback = tmp_path / f".last.ckpt.{2**22 + 1}.part", LastCheckpoint()
    part.touch()
    callback.on_fit_start(stand_in(), None)  # type: ignore[arg-type]
    callback.directory = tmp_path
    callback.on_fit_start(stand_in(is_global_zero=False), None)  # type: ignore[arg-type]
    assert part.exists()
    callback.on_fit_start(stand_in(), None)  # type: ignore[arg-type]
    assert not part.exists()


# Without memory


def goes_on(done: int = 0, *, saves: bool = True, began: bool = True, **changes: Any) -> bool:
    """Tell whether a training may go on behind a step that found no memory; its gradients must be gone then."""
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    trainer, callback = stand_in(done, optimizers=[torch.optim.SGD([weight])], **changes), LastCheckpoint()
    callback.training_began = callback.out_of_memory = True  # left by the training before
    callback._save = lambda trainer, module: saves  # type: ignore[method-assign]
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    if began:
        callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    callback.on_exception(trainer, None, torch.OutOfMemoryError("out of memory"))  # type: ignore[arg-type]
    callback._restore_handlers()
    assert not callback.out_of_memory or weight.grad is None
    return callback.out_of_memory


def test_fewer_images_at_a_time_where_the_steps_before_are_saved_or_were_none() -> None:
    assert goes_on(4)
    assert goes_on(0, saves=False)
    assert goes_on(3, saves=False)
    assert not goes_on(4, saves=False)
    assert not goes_on(1, saves=False, accumulate_grad_batches=1)


def test_memory_that_runs_out_elsewhere_asks_for_nothing() -> None:
    assert not goes_on(began=False)
    assert not goes_on(training=False)
    assert not goes_on(world_size=2)


# The best checkpoint


class Accuracies(LightningModule):
    """Its validations give these accuracies, one after the other."""

    def __init__(self, *accuracies: float) -> None:
        super().__init__()
        self.accuracies, self.layer = list(accuracies), nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch).sum()
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/acc1", self.accuracies.pop(0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("accuracies", "step"), [((0.7, 0.5, 0.6, 0.4), 1), ((0.5, 0.7, 0.6, 0.7), 2)])
def test_the_best_checkpoint_is_that_of_the_first_best_validation(
    tmp_path: Path, accuracies: tuple[float, ...], step: int
) -> None:
    best = BestCheckpoint()
    best.dirpath = str(tmp_path)
    trainer = Trainer(
        **{"max_epochs": 2, "val_check_interval": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1},
        **{"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False},
        callbacks=[best],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(Accuracies(*accuracies), DataLoader(torch.zeros(2, 1)), DataLoader(torch.zeros(1, 1)))
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == step


def test_a_run_in_another_folder_knows_the_best_so_far(tmp_path: Path) -> None:
    moved, stays = BestCheckpoint(), str(tmp_path / "old/best.ckpt")
    before = BestCheckpoint()
    before.dirpath, moved.dirpath = str(tmp_path / "old"), str(tmp_path / "new")
    before.best_k_models, before.best_model_score = {stays: torch.tensor(0.5)}, torch.tensor(0.5)
    before.best_model_path = before.kth_best_model_path = stays
    (tmp_path / "new").mkdir()
    moved.load_state_dict(before.state_dict())
    assert moved.best_model_score is None  # its file was not taken along
    (tmp_path / "new/best.ckpt").write_bytes(b"weights")
    moved.load_state_dict(before.state_dict())
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(reduce_boolean_decision=lambda decision: decision))
    assert not moved.check_monitor_top_k(trainer, torch.tensor(0.4))
    assert moved.check_monitor_top_k(trainer, torch.tensor(0.6))
    assert moved.best_model_path == str(tmp_path / "new/best.ckpt")


# Writing


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sizes = tmp_path / "best.ckpt", []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append((os.fstat(number).st_size, path.exists())))
    write_checkpoint({"weight": torch.zeros(9)}, path)
    write_checkpoint({"weight": torch.zeros(9)}, path)
    size = path.stat().st_size
    assert sizes == [(size, False), (size, True)]
    assert list(tmp_path.iterdir()) == [path]  # only last.ckpt keeps the one before


def test_another_error_of_torchs_writer_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(content: object, file: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="something else"):
        write_checkpoint({}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("every", "batch", "changes", "saved"),
    [
        (4, 3, {}, False),  # the validation behind the fourth micro-batch would be lost
        (4, 1, {}, True),
        (4, 5, {}, True),
        (2, 1, {}, True),  # every step is validated: there is no other place
        (float("inf"), 3, {}, True),
        (4, 1, {"check_val_every_n_epoch": None}, False),  # counted over epochs: this is the twelfth
    ],
)
def test_no_timed_save_stands_in_front_of_a_validation(every: float, batch: int, changes: Any, saved: bool) -> None:
    trainer, callback, saves = (
        stand_in(batch + 1, val_check_batch=every, accumulate_grad_batches=2, **changes),
        LastCheckpoint(0),
        [],
    )
    trainer.fit_loop.epoch_loop.total_batch_idx = 11
    callback._save = lambda trainer, module: saves.append("saved")  # type: ignore[assignment,method-assign,func-returns-value]
    callback.on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
    assert bool(saves) == saved
    callback.stop_requested, count = True, len(saves)
    with pytest.raises(KeyboardInterrupt) if saved else nullcontext():  # a stop waits for the validation
        callback.on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
    assert len(saves) == count + 1  # and saves in front of it, in case that it does not live so long


def test_a_run_that_was_ended_inside_an_epoch_is_saved_inside_it() -> None:
    """Lightning counts the epoch as done, where max_steps or a stop ends it early."""
    trainer = stand_in(4)
    trainer.fit_loop.epoch_progress.current.processed = 2
    content = {"loops": loops(4)}
    content["loops"]["fit_loop"]["epoch_progress"] = {"current": {"processed": 2}, "total": {"processed": 2}}
    LastCheckpoint().on_save_checkpoint(trainer, None, content)  # type: ignore[arg-type]
    assert content["gn_transfer"]["position"] == {"epoch": 1, "batch": 4}
    assert content["loops"]["fit_loop"]["epoch_progress"] == {"current": {"processed": 1}, "total": {"processed": 1}}
