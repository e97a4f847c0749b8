import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from gn_transfer.config import ConfigError
from gn_transfer.training.run_folder import RunFolder, claim_run, find_last, run_of_checkpoint
from gn_transfer.training.run_log import RunLog
from gn_transfer.training.tensorboard import RunLogger, flat_hparams


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: claim_run(tmp_path, "pets", "bn", 1, 0).name, range(8)))
    assert sorted(runs) == ["pets/bn-bs1-seed0", *(f"pets/bn-bs1-seed0-{k}" for k in range(2, 9))]


def test_a_name_whose_checkpoints_are_left_is_not_used_again(tmp_path):
    (tmp_path / "checkpoints/pets/bn-bs1-seed0").mkdir(parents=True)
    assert claim_run(tmp_path, "pets", "bn", 1, 0).name == "pets/bn-bs1-seed0-2"


def test_a_checkpoint_knows_its_run_by_its_place(tmp_path):
    run = claim_run(tmp_path, "pets", "bn", 1, 0)
    run.checkpoints.mkdir(parents=True)
    checkpoint = run.checkpoints / "last.ckpt"
    checkpoint.touch()
    assert run_of_checkpoint(checkpoint) == run
    assert find_last(tmp_path, "pets") == find_last(tmp_path, "*") == checkpoint
    assert find_last(tmp_path, "other") is None
    assert run_of_checkpoint(tmp_path / "elsewhere" / "last.ckpt") is None


def started(root, name, when, *, saved=True, status="running"):
    run = RunFolder(name, root)
    run.logs.mkdir(parents=True)
    (run.logs / "metrics.json").write_text(json.dumps({"status": status}))
    (run.logs / "config.yaml").touch()
    os.utime(run.logs / "config.yaml", (when, when))
    if saved:
        run.checkpoints.mkdir(parents=True)
        (run.checkpoints / "last.ckpt").touch()
    return run


def test_the_last_run_is_the_one_that_started_last(tmp_path):
    started(tmp_path, "pets/a", 300)
    newest = started(tmp_path, "pets/b", 400)
    os.utime(tmp_path / "checkpoints/pets/b/last.ckpt", (100, 100))  # the other one has saved since
    started(tmp_path, "pets/c", 500, saved=False, status="fast_dev_run")
    assert find_last(tmp_path, "pets") == newest.checkpoints / "last.ckpt"


def test_an_older_run_is_not_continued_in_silence(tmp_path):
    older = started(tmp_path, "pets/a", 300)
    started(tmp_path, "pets/b", 400, saved=False)
    with pytest.raises(ConfigError, match=r"pets/b, stopped before its first checkpoint.*" + str(older.checkpoints)):
        find_last(tmp_path, "pets")


@pytest.mark.parametrize("name", ["my[1]", "a*"])
def test_names_that_look_like_patterns(tmp_path, name):
    run = started(tmp_path, f"{name}/a", 300)
    started(tmp_path, "my1/a", 400)
    assert find_last(tmp_path, name) == run.checkpoints / "last.ckpt"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "gone" / "away")
    with pytest.raises(ConfigError, match="cannot be made"):
        claim_run(tmp_path, "pets", "bn", 1, 0)


def config(head_lr=None, **model):
    return {
        "seed_everything": 3,
        "data": {"init_args": {"batch_size": 2, "img_size": 64, "recipe": "none"}},
        "model": {
            **dict.fromkeys(("group_size", "pretrained", "num_groups")),
            "norm": "gn",
            "backbone": "r18",
            **model,
        },
        "optimizer": {"name": "sgd", "lr": 0.1, "head_lr": head_lr, "weight_decay": 0},
        "regularization": {"label_smoothing": 0, "mixup": 0, "cutmix": 0},
        "batch_norm": {"momentum": None, "reestimate_images": 0, "evaluation": "running"},
        "accumulation": {"effective_batch_size": None},
        "mixed_precision": {"mode": "auto"},
        "trainer": {"max_epochs": 1},
    }


def test_hparams_have_the_same_keys_and_types_in_every_run():
    first, second = flat_hparams(config()), flat_hparams(config(group_size=8, pretrained="auto", head_lr=1))
    assert {key: type(value) for key, value in first.items()} == {key: type(value) for key, value in second.items()}
    assert None not in first.values()
    assert (first["effective_batch_size"], first["head_lr"], first["group_size"]) == (2, 0.1, "none")


@pytest.mark.parametrize(
    ("model", "groups"),
    [
        ({"num_groups": 8}, ("8", "none")),
        ({}, ("32", "none")),
        ({"group_size": 8}, ("none", "8")),
        ({"norm": "bn", "num_groups": 32}, ("none", "none")),
    ],
)
def test_hparams_show_groups_only_where_the_norm_has_some(model, groups):
    found = flat_hparams(config(**model))
    assert (found["num_groups"], found["group_size"]) == groups


def test_the_log_file_begins_with_what_was_said_before_it_was_there(tmp_path, capsys):
    log = RunLog()
    log.print("[plan] first")
    log.attach(tmp_path / "run.log")
    log.print("second")
    log.close()
    assert (tmp_path / "run.log").read_text() == "[plan] first\nsecond\n"
    assert capsys.readouterr().out == "[plan] first\nsecond\n"


def test_the_log_file_is_written_in_a_notebook_too(tmp_path, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    log = RunLog(Console(file=io.StringIO(), force_jupyter=False))
    log.print("first")
    log.attach(tmp_path / "run.log")
    log.print("second")
    log.close()
    assert (tmp_path / "run.log").read_text() == "first\nsecond\n"


def test_the_hparams_tab_shows_norm_and_batch_size_first(tmp_path):
    logger = RunLogger(claim_run(tmp_path, "pets", "bn", 1, 0), flat_hparams(config()))
    logger.announce()
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    stored = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/experiment"])
    first = {info.name for info in stored.experiment.hparam_infos if info.differs}
    assert first == {"norm", "batch_size", "num_groups", "lr", "seed"}
    assert len(stored.experiment.hparam_infos) == len(flat_hparams(config()))


def test_a_run_with_a_link_in_it_is_not_continued(tmp_path):
    run = started(tmp_path, "pets/a", 300)
    (run.logs / "run.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"run\.log is a link to"):
        run_of_checkpoint(run.checkpoints / "last.ckpt")


def test_a_checkpoint_whose_logs_are_gone_is_of_no_run(tmp_path):
    assert run_of_checkpoint(tmp_path / "checkpoints/pets/a/last.ckpt") is None
