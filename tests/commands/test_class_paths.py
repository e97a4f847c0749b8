"""No file from outside runs code: what a configuration, a study or a checkpoint may name."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import jsonargparse._typehints as typehints
import pytest
import torch
import yaml

from gn_transfer.__main__ import main
from gn_transfer.commands.class_paths import (
    OF_LIGHTNING,
    check_file_values,
    config_of_checkpoint,
    only_known_classes,
    read_config,
    typed_classes,
)
from gn_transfer.config import ConfigError

SMALL = ["--model.backbone", "resnetv2_18", "--data.img_size", "32", "--trainer.max_epochs", "1"]


def hidden(command: list[str]) -> dict[str, Any]:
    """A callback that is harmless, with a class in an argument of any type."""
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": command}}
    return {
        "class_path": "lightning.pytorch.callbacks.RichProgressBar",
        "init_args": {"console_kwargs": {"x": popen}},
    }


def profiler(command: list[str]) -> dict[str, Any]:
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": command}}
    return {
        "class_path": "lightning.pytorch.profilers.PyTorchProfiler",
        "init_args": {"table_kwargs": {"header": popen}},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on twelve images."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("class_paths")
    for name in ("apple", "pear"):
        (root / "fruit" / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "fruit" / name / f"{number}.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        arguments = ["--data", "Folder", "--data.root", str(root / "fruit"), "--name", "own", *SMALL]
        assert main(["fit", *arguments]) == 0
    return root


def changed(trained: Path, target: Path, change: Callable[[dict[str, Any]], object], *, whole: bool = False) -> Path:
    """The checkpoint of the run, with another description; with ``whole``, everything in it can change."""
    [source] = trained.glob("checkpoints/own/*/last.ckpt")
    content = torch.load(source, weights_only=True)
    change(content if whole else content["gn_transfer"])
    torch.save(content, target)
    return target


@pytest.mark.parametrize("command", ["validate", "test", "fit", pytest.param("export", marks=pytest.mark.slow)])
@pytest.mark.parametrize("key", ["callbacks", "profiler", "logger", "strategy"])
def test_a_checkpoint_runs_no_code(trained: Path, tmp_path: Path, monkeypatch, capsys, command: str, key: str) -> None:
    monkeypatch.chdir(tmp_path)
    touched = tmp_path / "touched"
    value = profiler(["touch", str(touched)]) if key == "profiler" else [hidden(["touch", str(touched)])]
    path = changed(trained, tmp_path / "evil.ckpt", lambda stored: stored["config"]["trainer"].update({key: value}))
    arguments = ["--ckpt_path", str(path)] if command != "export" else [str(path), "--output", "bundle"]
    code = main([command, *arguments, *(["--dry_run"] if command == "fit" else [])])
    assert code == (2 if command == "test" else 0), capsys.readouterr().err  # there is no test split
    assert not touched.exists()
    if command == "fit":
        assert f"not taken from the checkpoint: trainer.{key}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored["config"]["data"].update(class_path="subprocess.Popen"), "no data module; refused"),
        (lambda stored: stored["config"]["data"].update(class_path=[[]]), "config.data missing or of a wrong type"),
        (lambda stored: stored["config"]["data"]["init_args"].update(root={"class_path": "os.system"}), "data.root"),
        (lambda stored: stored["config"].update(model=5), "config.model missing or of a wrong type"),
        (lambda stored: stored["config"]["model"].update(norm=[{"class_path": "x"}]), "model.norm"),
        (lambda stored: stored.update(config=None), "config missing or of a wrong type"),
        (lambda stored: stored.pop("config"), "stores no configuration"),
        (lambda stored: stored.update(classes=["a", 5]), "classes missing or of a wrong type"),
        (lambda stored: stored.update(classes=["a"]), "classes missing or of a wrong type"),
        (lambda stored: stored.update(architecture="resnet"), "architecture missing or of a wrong type"),
        (lambda stored: stored.update(version="two"), "which is no number"),
        (lambda stored: stored.update(split={"train": {}, "val": [[1]]}), "split missing or of a wrong type"),
        (lambda stored: stored.update(batch_size=0), "batch_size missing or of a wrong type"),
        (lambda stored: stored.update(config_name="a\0b"), "config_name missing or of a wrong type"),
        (lambda stored: stored["config"]["trainer"].update(devices=torch.ones(2)), "config.trainer missing or of a"),
    ],
)
def test_a_crafted_checkpoint_is_refused(trained: Path, tmp_path: Path, monkeypatch, capsys, change, message) -> None:
    monkeypatch.chdir(tmp_path)
    path = changed(trained, tmp_path / "evil.ckpt", change)
    assert main(["validate", "--ckpt_path", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["gn_transfer"].update(position={"epoch": 1.5, "batch": 0}), "does not say where"),
        (lambda content: content["gn_transfer"].update(position={"epoch": 10**20, "batch": 0}), "does not say where"),
        (lambda content: content["gn_transfer"].update(torch_rng_state=[0]), "does not say where"),
        (lambda content: content.update(optimizer_states=[]), "lacks a part of the state"),
        (lambda content: content.pop("loops"), "lacks a part of the state"),
        (lambda content: content.pop("callbacks"), "lacks a part of the state"),
        (lambda content: content["loops"]["fit_loop"].clear(), "lacks a part of the state"),
        (lambda content: content.update(lr_schedulers=[5]), "lacks a part of the state"),
        (lambda content: content["lr_schedulers"][0].update(base_lrs=["x"]), "lacks a part of the state"),
        (lambda content: content["optimizer_states"][0]["param_groups"][0].update(lr="x"), "lacks a part of the state"),
        (lambda content: content["callbacks"].update(RunRecord={"wall_time_s": "x"}), "state that cannot be restored"),
        (lambda content: content.update({"pytorch-lightning_version": "garbage"}), "state that cannot be restored"),
        (lambda content: content["state_dict"].update(more=torch.zeros(1)), "more"),
        (
            lambda content: content["gn_transfer"]["architecture"].pop("architecture"),
            "architecture.architecture missing",
        ),
        (
            lambda content: content["gn_transfer"]["architecture"].update(architecture="hf-hub:evil/model"),
            "no model of timm",
        ),
    ],
)
def test_no_run_goes_on_from_a_state_that_is_not_whole(trained, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    path = changed(trained, tmp_path / "own.ckpt", change, whole=True)
    assert main(["fit", "--ckpt_path", str(path), "--trainer.max_epochs", "2"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.log", "training_images.jpg", "", ".."])
def test_no_run_goes_on_through_links(trained, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for kind in ("runs", "checkpoints"):
        shutil.copytree(trained / kind, tmp_path / kind)
    [run] = Path("runs/own").iterdir()
    place = Path(os.path.normpath(run / name))
    outside = tmp_path / "outside"
    if place.exists():
        place.rename(outside)
    place.symlink_to(outside)
    before = sorted((path, path.stat().st_mtime_ns) for path in outside.rglob("*"))
    assert main(["fit", "--ckpt_path", f"checkpoints/own/{run.name}/last.ckpt", "--trainer.max_epochs", "2"]) == 2
    assert "is a link to" in capsys.readouterr().err
    assert sorted((path, path.stat().st_mtime_ns) for path in outside.rglob("*")) == before


def test_a_checkpoint_says_neither_where_runs_nor_where_caches_are_written(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def change(stored: dict[str, Any]) -> None:
        stored["config_name"] = "../../outside"
        stored["config"]["data"]["init_args"]["cache_dir"] = str(tmp_path / "other")
        stored["config"]["trainer"]["default_root_dir"] = str(tmp_path / "other")

    path = changed(trained, tmp_path / "moved.ckpt", change)
    assert main(["fit", "--ckpt_path", str(path), "--trainer.max_epochs", "2"]) == 0
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["outside"]
    assert not (tmp_path / "other").exists()
    assert "not taken from the checkpoint: data.cache_dir" in capsys.readouterr().out


def test_values_of_a_checkpoint_that_are_taken(tmp_path):
    stored = {
        "seed_everything": 3,
        "samples": None,
        "data": {"class_path": "gn_transfer.data.Folder", "init_args": {"root": "photos", "cache_dir": None}},
        "model": {"norm": "gn"},
        "trainer": {"max_epochs": 3, "callbacks": None, "logger": False, "plugins": ["x"], "unknown": 5},
        "other": {"class_path": "subprocess.Popen"},
    }
    taken, left_out = config_of_checkpoint(stored, tmp_path)
    assert taken == {
        "seed_everything": 3,
        "samples": None,
        "data": {"class_path": "gn_transfer.data.Folder", "init_args": {"root": "photos"}},
        "model": {"norm": "gn"},
        "trainer": {"max_epochs": 3, "logger": False},
    }
    assert left_out == ["trainer.plugins"]


def test_a_checkpoint_starts_no_processes_and_no_logger_by_name(tmp_path):
    one = {"devices": 1, "num_nodes": 1, "strategy": "auto", "logger": True, "accelerator": "cpu"}
    many = {"devices": 500, "num_nodes": 2, "strategy": "ddp", "logger": "WandbLogger", "accelerator": "cpu"}
    assert config_of_checkpoint({"trainer": one}, tmp_path) == ({"trainer": one}, [])
    taken, left_out = config_of_checkpoint({"trainer": many}, tmp_path)
    assert taken == {"trainer": {**one, "accelerator": "cpu"}}
    assert set(left_out) == {f"trainer.{key}" for key in ("devices", "num_nodes", "strategy", "logger")}


@pytest.mark.parametrize("kind", ["Sample", "gn_transfer.data.Digits", "SegmentationSample"])
def test_a_checkpoint_does_not_say_where_images_are_written(tmp_path, monkeypatch, kind):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    stored = {"data": {"class_path": kind, "init_args": {"root": "../elsewhere"}}}
    with pytest.raises(ConfigError, match=r"would write its images into \.\./elsewhere; give --data\.root PATH"):
        config_of_checkpoint(stored, tmp_path)
    assert config_of_checkpoint(stored, tmp_path, root_is_typed=True)[0] == stored
    for folder in ("oxford-iiit-pet", "sklearn"):  # they are there already
        (tmp_path / "elsewhere" / folder).mkdir(parents=True)
    assert config_of_checkpoint(stored, tmp_path)[0] == stored
    stored["data"]["init_args"]["root"] = "below"
    assert config_of_checkpoint(stored, tmp_path)[0] == stored


@pytest.mark.parametrize(
    "content",
    [
        {"trainer": {"callbacks": [hidden(["true"])]}},
        {"trainer": {"callbacks": hidden(["true"])}},
        {"trainer": {"profiler": profiler(["true"])}},
        {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LambdaCallback"}]}},
        {"trainer": {"callbacks": ["lightning.pytorch.callbacks.LambdaCallback"]}},
        {"trainer": {"callbacks": "evil.yaml"}},
        {"trainer": {"logger": "evil"}},
        {"trainer": {"plugins": ["os.system"]}},
        {"data": {"class_path": "subprocess.Popen"}},
        {"data": {"class_path": {"x": "Folder"}}},
        {"data": {"class_path": [None]}},
        {"data": "subprocess.Popen"},
        {"data": "evil"},
        {"model": {"backbone": '{"class_path": "subprocess.Popen"}'}},
        {"trainer": {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "evil"}}}},
        {"trainer.callbacks": [hidden(["true"])]},
        {"data.class_path": "subprocess.Popen"},
        {"trainer": {"logger": {"class_path": "CSVLogger", "init_args.x": '{"class\\u005fpath": "subprocess.Popen"}'}}},
        {"model": {"backbone": "'{class_path: subprocess.Popen}'"}},
        {"model": {"backbone": '["{class_path: subprocess.Popen}"]'}},
        {"model": {"backbone": '{"class_path": "subprocess.Popen"'}},
        {"model": {"backbone": '{"a": "{class_path: subprocess.Popen}"}'}},
    ],
)
def test_a_configuration_names_no_classes_of_strangers(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("evil").write_text("class_path: subprocess.Popen")  # the parser reads a text that names a file
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="--allow_class_path"):
        read_config(path)
    assert read_config(path, allow_class_path=True) == content


@pytest.mark.parametrize(
    "content",
    [
        {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]}},
        {"trainer": {"callbacks": ["RichModelSummary"], "logger": ["CSVLogger"], "strategy": "ddp"}},
        {"trainer": {"logger": False, "accelerator": "cpu", "profiler": "simple"}},
        {"data": "Folder"},
        {"data": {"class_path": "Folder", "init_args": {"root": "photos/my_class_paths"}}},
        {"data": {"class_path": "gn_transfer.data.Pets", "init_args": {"root": "photos", "augmentation": "a.yaml"}}},
        {"data": {"class_path": "Folder", "init_args": {"root": "[photos"}}},
        {"data": {"class_path": "Folder", "init_args": {"root": "photos:mine"}}},
        {"data": {"class_path": "Folder", "init_args": {"root": "'photos:mine'"}}},
    ],
)
def test_a_configuration_names_what_it_needs(tmp_path, content):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    assert read_config(path) == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n", "model holds None"),
        ("trainer: 5\n", "trainer holds 5"),
        ("model: resnet18\n", "model holds 'resnet18'"),
        ("data: 5\n", "data holds 5"),
        ("ckpt_path: last\n", "give it on the command line"),
        ("", "holds no keys"),
        ("[1, 2]\n", "holds no keys"),
        ("5: {a: 1}\n", "holds no keys"),
        ("model: {norm: bn}\nmodel: {norm: gn}\n", "model stands twice"),
    ],
)
def test_a_configuration_that_cannot_be_meant(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_what_a_file_may_name_takes_no_function():
    for module, names in OF_LIGHTNING.items():
        for name in names:
            kind = getattr(importlib.import_module(module), name)
            for parameter in inspect.signature(kind).parameters.values():
                kinds = [parameter.annotation, *get_args(parameter.annotation)]
                assert not any(get_origin(kind) is Callable or kind is Callable for kind in kinds), (name, parameter)


def test_the_command_line_may_name_any_class(folder_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    callback = ["--trainer.callbacks+=lightning.pytorch.callbacks.LambdaCallback"]
    assert main(["fit", "--data", "Folder", "--data.root", str(folder_root), *SMALL, *callback, "--dry_run"]) == 0


ESCAPED = '{"class\\u005fpath": "subprocess.Popen", "init_args": {"args": ["touch", "touched"]}}'


@pytest.mark.parametrize("name", ["own.yaml", "Popen.yaml", "subprocess.Popen.yaml"])
def test_no_name_of_a_file_makes_its_classes_known(folder_root, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data.root", str(folder_root), *SMALL, "--dry_run"]
    for callback in (hidden(["touch", "touched"]), {**hidden([]), "init_args": {"console_kwargs": {"x": ESCAPED}}}):
        Path(name).write_text(yaml.safe_dump({"data": "Folder", "trainer": {"callbacks": [callback]}}))
        assert main(["fit", "--config", name, *arguments]) == 2
        assert "--allow_class_path" in capsys.readouterr().err
        assert not Path("touched").exists()


def test_words_of_other_options_name_no_classes():
    words = [
        "fit",
        "Popen",
        "--config=Popen.yaml",
        "--data.root",
        "Popen",
        "--trainer.max_time",
        "Popen",
        "--name=Popen",
    ]
    assert not typed_classes(words)
    words = [
        "--trainer.logger.class_path",
        "A",
        "--trainer.callbacks+=b.B",
        "--trainer.callbacks",
        "[{class_path: c.C}]",
    ]
    assert {"A", "b.B", "c.C"} <= typed_classes(words)
    assert {"d.D", "e.E"} <= typed_classes(["--trainer.callbacks=[d.D, e.E]"])


def test_a_short_name_that_is_typed_loads_no_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_other.py").write_text("class Timer:\n    pass\n")
    with pytest.raises(ConfigError, match=r"names the class evil_other\.Timer"), only_known_classes({"Timer"}):
        typehints.import_object("evil_other.Timer")
    assert "evil_other" not in sys.modules


def test_what_slips_through_the_look_at_a_file_is_not_imported(folder_root, tmp_path, monkeypatch, capsys):
    """The guard around the parser's import holds alone: here nothing looks at the files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("evil_module.py").write_text("open('imported', 'w').close()\nclass Evil:\n    pass\n")
    monkeypatch.setattr("gn_transfer.commands.class_paths.check_file_values", lambda *_, **__: None)
    callback = {
        **hidden([]),
        "init_args": {"console_kwargs": {"x": ESCAPED.replace("subprocess.Popen", "evil_module.Evil")}},
    }
    contents = [
        {"data": "Folder", "trainer": {"callbacks": [callback]}},
        {"data": "Folder", "trainer": {"callbacks": "evil_module.Evil"}},
        {"data.class_path": "evil_module.Evil"},
    ]
    for content in contents:
        Path("own.yaml").write_text(yaml.safe_dump(content))
        assert main(["fit", "--config", "own.yaml", "--data.root", str(folder_root), *SMALL, "--dry_run"]) == 2
        assert "names the class evil_module.Evil" in capsys.readouterr().err
        assert not Path("imported").exists()
        assert "evil_module" not in sys.modules


def test_a_file_beside_the_configuration_is_looked_at(folder_root, tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "more").write_text(yaml.safe_dump([hidden(["touch", "touched"])]))
    (tmp_path / "theirs" / "own.yaml").write_text("data: Folder\ntrainer:\n  callbacks: more\n")
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "theirs/own.yaml", "--data.root", str(folder_root), *SMALL, "--dry_run"]) == 2
    assert "trainer.callbacks is 'more'" in capsys.readouterr().err
    assert not (tmp_path / "touched").exists()


def test_a_file_that_the_command_line_names_is_looked_at_as_well(folder_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("callbacks.yaml").write_text(yaml.safe_dump([hidden(["touch", "touched"])]))
    arguments = ["--data", "Folder", "--data.root", str(folder_root), *SMALL, "--trainer.callbacks", "callbacks.yaml"]
    assert main(["fit", *arguments, "--dry_run"]) == 2
    assert "names the class subprocess.Popen" in capsys.readouterr().err
    assert not Path("touched").exists()


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize("place", ["set", "grid", "cases"])
def test_a_study_names_no_classes_of_strangers(tmp_path, monkeypatch, capsys, place, escaped):
    monkeypatch.chdir(tmp_path)
    key, value = "trainer.callbacks", [hidden(["touch", "touched"])]
    if escaped:
        value = [{**hidden([]), "init_args": {"console_kwargs": {"x": ESCAPED}}}]
    content = {
        "base": "sample_gnws.yaml",
        "samples": 10,
        "set": {key: value} if place == "set" else {},
        "grid": {"model.norm": ["bn"], **({key: [value]} if place == "grid" else {})},
        **({"cases": {"one": {key: value}}} if place == "cases" else {}),
    }
    Path("study.yaml").write_text(yaml.safe_dump(content))
    assert main(["sweep", "--config", "study.yaml", "--dry_run"]) == 2
    assert "--allow_class_path" in capsys.readouterr().err
    assert not Path("touched").exists()
    assert not Path("runs").exists()


@pytest.mark.parametrize("typed", [True, False])
def test_a_study_takes_a_class_that_is_typed(folder_root, tmp_path, monkeypatch, capsys, typed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    key, callback = "trainer.callbacks", "lightning.pytorch.callbacks.LambdaCallback"
    content = {"base": "folder.yaml", "samples": 8, "set": {"data.root": str(folder_root)}, "seeds": 1}
    content["grid"] = {"model.norm": ["gn_ws"]} | ({} if typed else {key: [callback]})
    Path("study.yaml").write_text(yaml.safe_dump(content))
    words = [f"--{key}", callback] if typed else []
    assert main(["sweep", "--config", "study.yaml", "--dry_run", *SMALL[:4], *words]) == (0 if typed else 2)
    assert typed or "--allow_class_path" in capsys.readouterr().err


def test_a_text_of_a_checkpoint_that_holds_a_class_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.backbone is .*; refused"):
        config_of_checkpoint({"model": {"backbone": '{"class_path": "subprocess.Popen"}'}}, tmp_path)


def test_values_of_a_file_name_no_classes_unless_that_is_said(tmp_path):
    with pytest.raises(ConfigError, match="--allow_class_path"):
        check_file_values({"data": "subprocess.Popen"}, "own.yaml", tmp_path)


def test_other_errors_pass_the_guard():
    with pytest.raises(ZeroDivisionError), only_known_classes(()):
        raise ZeroDivisionError
