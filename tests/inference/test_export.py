"""``gn-transfer export`` on tiny runs of the real command line, and the nets behind the graph."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from gn_transfer import load_bundle
from gn_transfer.__main__ import main
from gn_transfer.backbones.create import rebuild
from gn_transfer.config import ConfigError
from gn_transfer.inference import export
from gn_transfer.inference.bundle import open_graph
from gn_transfer.inference.bundle_description import metrics_of, provenance
from gn_transfer.inference.bundle_files import metadata_sha256
from gn_transfer.inference.export_source import check_output, find_checkpoint, run_data
from gn_transfer.inference.model_card import timm_lines
from gn_transfer.inference.onnx_graph import InferenceModel, plain, write_onnx
from gn_transfer.inference.parity import Parity, ParityMeter, compare_with_checkpoint
from gn_transfer.training.tasks import load_task

BACKBONE, SIZE = "resnetv2_18", 64
CHECKPOINT = Path("checkpoints/folder/gn_ws-bs4-seed0/best.ckpt")


@pytest.fixture
def in_root(exported_run: Path, monkeypatch) -> Path:
    monkeypatch.chdir(exported_run)
    return exported_run


def test_a_bundle_holds_what_was_promised(bundle):
    names = ["README.md", "bundle.json", "model.onnx", "model.safetensors"]
    assert sorted(path.name for path in bundle.iterdir()) == names
    assert not list(bundle.parent.glob(".bundle*"))
    metadata = json.loads((bundle / "bundle.json").read_text())
    assert sorted(metadata["files"]) == [name for name in names if name != "bundle.json"]
    expected = {"norm": "gn_ws", "backbone": BACKBONE, "img_size": SIZE, "weights": "as trained", "format_version": 2}
    assert expected.items() <= metadata.items()
    by_class = metadata["validation"]["by_class"]
    assert metadata["parity"]["images"] == sum(found["count"] for found in by_class.values()) == 6
    assert metadata["validation"]["same_images_as_the_run"] is True
    assert metadata["parity"]["max_difference"] < 1e-4
    assert metadata["parity"]["same_class"] <= metadata["parity"]["compared"] == 6
    assert metadata["metrics"]["val/acc1"] == pytest.approx(metadata["parity"]["metric_bundle"])
    right = sum(found["count"] * found["recall"] for found in by_class.values())
    assert right / 6 == pytest.approx(metadata["parity"]["metric_bundle"])
    assert metadata["task"] == "classification"
    assert metadata["provenance"]["transfer_report"]["source"] == "from scratch"
    assert "root" not in metadata["provenance"]["config"]["data"]["init_args"]
    assert {"torch", "timm", "onnx", "onnxruntime"} <= metadata["versions"].keys()
    assert metadata["evaluated_images"] == {"val": 6}
    assert re.search(r"val/acc1 \| 0\.\d{4} \(6 images, 95 % interval 0\.\d", (bundle / "README.md").read_text())
    assert str(bundle.parent) not in (bundle / "bundle.json").read_text()


def test_a_copy_that_only_predicts_needs_no_weights_for_training(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "model.safetensors").unlink()
    images = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    assert np.array_equal(
        load_bundle(copy).logits_and_probs(images)[1], load_bundle(bundle).logits_and_probs(images)[1]
    )
    (copy / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(ConfigError, match="is not the file that was exported"):
        load_bundle(copy)


def test_the_graph_has_plain_convolutions_and_no_trace_of_this_machine(bundle):
    graph = onnx.load(bundle / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert kinds["LayerNormalization"] == kinds["Relu"] == 17
    assert not {"BatchNormalization", "InstanceNormalization", "Sqrt"} & kinds.keys()
    [images] = graph.graph.input
    shape = images.type.tensor_type.shape.dim
    assert (shape[0].dim_param, [d.dim_value for d in shape[1:]]) == ("batch", [SIZE, SIZE, 3])
    assert [output.name for output in graph.graph.output] == ["logits", "probs"]
    assert b"site-packages" not in (bundle / "model.onnx").read_bytes()


def test_it_computes_what_the_model_in_timm_computes(bundle):
    loaded = load_bundle(bundle)
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    logits, probs = loaded.logits_and_probs(images)
    assert probs == pytest.approx(torch.softmax(torch.tensor(logits), 1).numpy(), abs=1e-6)

    card = (bundle / "README.md").read_text()
    code = card.split("## Train on")[1].split("```python\n")[1].split("```")[0]
    assert 'load_file("model.safetensors")' in code
    scope: dict[str, object] = {}
    exec(code.replace('"model.safetensors"', repr(str(bundle / "model.safetensors"))), scope)
    net = scope["model"]
    assert isinstance(net, nn.Module)
    mean, std = loaded.metadata["mean"], loaded.metadata["std"]
    pixels = (torch.tensor(images) / 255 - torch.tensor(mean)) / torch.tensor(std)
    with torch.no_grad():
        theirs = net.eval()(pixels.permute(0, 3, 1, 2).contiguous())
    assert theirs.numpy() == pytest.approx(logits, abs=1e-4)


def test_the_ten_lines_of_the_card(bundle, monkeypatch, capsys):
    images = np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    monkeypatch.chdir(bundle)
    np.save(bundle.parent / "images.npy", images)
    code = (bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(
        code.replace("images.npy", "../images.npy").replace('json.load(open("bundle.json"))', "__meta"),
        {"__meta": json.loads((bundle / "bundle.json").read_text())},
    )
    expected = [prediction.label for prediction in load_bundle(bundle).predict(list(images))]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [name.split()[0] for name in expected]


def test_bn_is_folded_where_it_is_exact(tmp_path):
    torch.manual_seed(0)
    net = rebuild(BACKBONE, norm="bn", num_classes=3, head="head.fc", num_groups=32, group_size=None).eval()
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5 if name.endswith("var") else -0.2, 1.0 if name.endswith("var") else 0.2)
    inference = InferenceModel(net, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    write_onnx(inference, SIZE, tmp_path / "bn.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "bn.onnx").graph.node)
    assert (kinds["Relu"], kinds["BatchNormalization"]) == (17, 9)  # eight follow a convolution and are in it now
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    logits, _ = open_graph(tmp_path / "bn.onnx", 1).run(None, {"images": images})
    with torch.no_grad():
        expected = inference(torch.tensor(images))[0].numpy()
    assert np.abs(logits - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())


def test_a_temperature_changes_probabilities_alone(in_root, bundle, monkeypatch, capsys):
    monkeypatch.setattr("gn_transfer.inference.confidence.FEWEST_IMAGES", 6)
    assert main(["export", str(CHECKPOINT), "--output", "warm", "--precision", "0.01"]) == 0
    said = capsys.readouterr().out
    warm = load_bundle("warm")
    temperature = warm.metadata["confidence"]["temperature"]
    assert temperature["images"] == 6
    assert f"temperature {temperature['value']:.3f}, fitted on 6 validation images" in said
    images = np.random.default_rng(2).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    logits, probs = warm.logits_and_probs(images)
    assert logits == pytest.approx(load_bundle(bundle).logits_and_probs(images)[0], abs=1e-6)
    assert temperature["value"] != 1
    assert probs == pytest.approx(torch.softmax(torch.tensor(logits) / temperature["value"], 1).numpy(), abs=1e-6)
    card = Path("warm/README.md").read_text()
    assert f"temperature {temperature['value']:.3f}" in card
    assert "calls an image unknown below" in card


def test_unknown_images(in_root, bundle, monkeypatch, capsys):
    """A threshold that no image of noise reaches: every format says so, and the likeliest class stays."""
    certain = load_bundle(bundle)
    assert certain.threshold is None
    assert all(prediction.known for prediction in certain.predict(["images/class 0/0.png"]))
    copy = in_root / "unsure"
    shutil.copytree(bundle, copy)
    metadata = json.loads((copy / "bundle.json").read_text())
    metadata["confidence"]["threshold"] = {"probability": 0.999}
    metadata["sha256"] = metadata_sha256(metadata)
    (copy / "bundle.json").write_text(json.dumps(metadata))
    [prediction] = load_bundle(copy).predict(["images/class 0/0.png"])
    assert not prediction.known
    assert "known=False" in repr(prediction)
    assert prediction.label == certain.predict(["images/class 0/0.png"])[0].label
    for form, said in (("table", "unknown: below the threshold"), ("json", '"known": false'), ("csv", ",false,")):
        assert main(["predict", "unsure", "images/class 0/0.png", "--format", form]) == 0
        assert said in capsys.readouterr().out
    assert main(["predict", str(bundle), "images/class 0/0.png", "--format", "csv"]) == 0
    assert "known" not in capsys.readouterr().out
    for wrong in ({"probability": 7.0}, {"probability": "0.5"}, [], {}):
        metadata["confidence"]["threshold"] = wrong
        metadata["sha256"] = metadata_sha256(metadata)
        (copy / "bundle.json").write_text(json.dumps(metadata))
        with pytest.raises(ConfigError, match="no export writes such confidence"):
            load_bundle(copy)


def test_int8(in_root, bundle, capsys):
    assert main(["export", str(CHECKPOINT), "--output", "int8", "--quantize", "int8", "--max_drop", "100"]) == 0
    said = capsys.readouterr().out
    assert "int8        ranges of 24 training images" in said
    assert "points lost" in said
    assert sorted(path.name for path in Path("int8").iterdir()) == sorted(path.name for path in bundle.iterdir())
    assert Path("int8/model.onnx").stat().st_size < 0.3 * (bundle / "model.onnx").stat().st_size
    kinds = Counter(node.op_type for node in onnx.load("int8/model.onnx").graph.node)
    assert kinds["LayerNormalization"] == 17  # in float
    assert kinds["QuantizeLinear"] > 20
    quantized, certain = load_bundle("int8"), load_bundle(bundle)
    found = quantized.metadata["quantization"]
    assert (found["kind"], found["images"]) == ("int8", 24)
    assert found["metric_float"] == certain.metadata["parity"]["metric_bundle"]
    held_out = json.loads(Path("runs/folder/gn_ws-bs4-seed0/split.json").read_text())["val"]
    predictions = quantized.predict([Path("images") / path for path in held_out])
    right = [prediction.label == path.split("/")[0] for prediction, path in zip(predictions, held_out, strict=True)]
    assert found["metric_int8"] == pytest.approx(np.mean(right))
    assert f"computes with 8-bit integers (ranges of 24 training images): accuracy {np.mean(right):.4f}" in (
        Path("int8/README.md").read_text()
    )
    expected = np.stack([prediction.logits for prediction in certain.predict([Path("images") / p for p in held_out])])
    logits = np.stack([prediction.logits for prediction in predictions])
    assert 0 < np.abs(logits - expected).max() < 0.5 * np.abs(expected - expected.mean()).max()


def test_the_threshold_is_that_of_the_int8_graph(in_root):
    words = ["--quantize", "int8", "--max_drop", "100", "--precision", "0.1"]
    assert main(["export", str(CHECKPOINT), "--output", "int8_sure", *words]) == 0
    bundle = load_bundle("int8_sure")
    held_out = json.loads(Path("runs/folder/gn_ws-bs4-seed0/split.json").read_text())["val"]
    predictions = bundle.predict([Path("images") / path for path in held_out])
    known = [
        prediction.label == path.split("/")[0]
        for prediction, path in zip(predictions, held_out, strict=True)
        if prediction.known
    ]
    threshold = bundle.metadata["confidence"]["threshold"]
    assert threshold["answered"] == pytest.approx(len(known) / len(held_out))
    assert threshold["reached"] == pytest.approx(np.mean(known))
    assert np.mean(known) >= 0.1


def test_int8_that_costs_too_much_is_not_left(in_root, bundle, monkeypatch, capsys):
    def compare(*arguments: object) -> list[ParityMeter]:
        meters = compare_with_checkpoint(*arguments)
        meters[-1].confusion[:] = np.roll(np.diag(meters[-1].confusion.sum(1)), 1, axis=1)  # every image is wrong
        return meters

    assert load_bundle(bundle).metadata["parity"]["metric_bundle"] > 0
    monkeypatch.setattr(export, "compare_with_checkpoint", compare)
    assert main(["export", str(CHECKPOINT), "--output", "spoilt", "--quantize", "int8"]) == 2
    assert "points of accuracy on the validation images, more than --max_drop 1" in capsys.readouterr().err
    assert not list(in_root.glob("*spoilt*"))


def test_the_drop_may_be_what_was_allowed():
    in_float, in_int8 = (Parity(100, 0.0, 1.0, 1e-4, 100, 100, "accuracy", 0.89, accuracy) for accuracy in (0.89, 0.88))
    assert export._check_drop(in_float, in_int8, 1.0, print)["metric_int8"] == 0.88
    with pytest.raises(ConfigError, match=r"costs 1\.00 points of accuracy .* more than --max_drop 0\.9"):
        export._check_drop(in_float, in_int8, 0.9, print)
    assert export._check_drop(in_int8, in_float, 0.0, print)["metric_int8"] == 0.89


def test_a_checkpoint_takes_no_figure_of_another(in_root):
    content = torch.load(CHECKPOINT, weights_only=True)
    best = metrics_of(CHECKPOINT, content)
    assert {"val/acc1", "val/loss"} <= best.keys()
    for name in ("best_reestimated.ckpt", "previous.ckpt"):
        assert metrics_of(CHECKPOINT.with_name(name), content) == {}
    last = CHECKPOINT.with_name("last.ckpt")
    assert "val/acc1" in metrics_of(last, torch.load(last, weights_only=True))
    content["gn_transfer"]["position"] = {"epoch": 0, "batch": 3}  # inside an epoch, and not validated there
    assert metrics_of(last, content) == {}


def test_what_was_written_meanwhile_is_not_replaced(in_root, monkeypatch, capsys):
    def compare(*arguments: object) -> list[ParityMeter]:
        Path("meanwhile").mkdir()
        Path("meanwhile/notes.txt").write_text("mine")
        return compare_with_checkpoint(*arguments)

    monkeypatch.setattr(export, "compare_with_checkpoint", compare)
    assert main(["export", str(CHECKPOINT), "--output", "meanwhile"]) == 2
    assert "holds something that is no bundle" in capsys.readouterr().err
    assert [path.name for path in Path("meanwhile").iterdir()] == ["notes.txt"]


def test_no_path_of_the_machine_leaves(in_root):
    content = torch.load(CHECKPOINT, weights_only=True)
    arguments = content["gn_transfer"]["config"]["data"]["init_args"]
    arguments |= {"augmentation": "/home/me/secret/mine.yaml", "cache_dir": "/home/me/cache"}
    said = json.dumps(provenance(content, CHECKPOINT))
    assert "/home/me" not in said
    assert "mine.yaml" in said


def test_exporting_again_replaces_the_bundle_alone(in_root, bundle, capsys):
    copy = in_root / "again"
    shutil.copytree(bundle, copy)
    run = json.loads((copy / "bundle.json").read_text())["provenance"]["run"]
    check_output(copy, run)
    for other in (f"{run.partition('/')[0]}/other-run", f"flowers/{run.partition('/')[2]}"):
        with pytest.raises(ConfigError, match=r"holds the bundle of another run .*would be lost; name a new folder"):
            check_output(copy, other)
    (copy / "notes.txt").write_text("mine")
    assert main(["export", str(CHECKPOINT), "--output", "again"]) == 2
    assert "holds something that is no bundle (notes.txt)" in capsys.readouterr().err
    assert (copy / "notes.txt").read_text() == "mine"


def test_a_bundle_that_differs_is_not_left(in_root, bundle, monkeypatch):
    def other_task(content, path):
        task = load_task(content, path)
        with torch.no_grad():
            task.model.get_submodule("head.fc").bias += 0.01
        return task

    monkeypatch.setattr(export, "load_task", other_task)
    monkeypatch.setattr(export, "write_onnx", lambda model, size, path: shutil.copy(bundle / "model.onnx", path))
    with pytest.raises(export.ParityError, match=r"differ by at most 1\.0e-02"):
        export.export_bundle(CHECKPOINT, Path("wrong"))
    assert not list(in_root.glob("*wrong*"))


def test_where_a_run_lies(in_root):
    for path in (CHECKPOINT, CHECKPOINT.parent, Path("runs/folder/gn_ws-bs4-seed0")):
        assert find_checkpoint(path).resolve() == CHECKPOINT.resolve()
    with pytest.raises(ConfigError, match=r"no such file or folder; give a checkpoint"):
        find_checkpoint(Path("gone"))
    with pytest.raises(ConfigError, match=r"has no best.ckpt or last.ckpt"):
        find_checkpoint(Path("runs"))


def test_other_validation_images_than_the_runs_are_told(in_root, bundle, monkeypatch, capsys):
    shutil.copytree("images", "more")
    held_out = Path("more") / json.loads(Path("runs/folder/gn_ws-bs4-seed0/split.json").read_text())["val"][0]
    held_out.rename(held_out.with_name("renamed.png"))
    monkeypatch.setattr(export, "write_onnx", lambda model, size, path: shutil.copy(bundle / "model.onnx", path))
    assert main(["export", str(CHECKPOINT), "--output", "more_bundle", "--data.root", "more"]) == 0
    assert "the validation images are not those of the run" in capsys.readouterr().out


def test_an_output_that_cannot_be_written(in_root, capsys):
    Path("file").write_text("x")
    assert main(["export", str(CHECKPOINT), "--output", "file/bundle"]) == 2
    assert "--output file/bundle cannot be written" in capsys.readouterr().err


def bad_checkpoint(root: Path, **changes: object) -> str:
    content = torch.load(root / CHECKPOINT, weights_only=True)
    for key, value in changes.items():
        if value is None:
            del content["gn_transfer"][key]
        else:
            content["gn_transfer"][key] = value
    torch.save(content, root / "bad.ckpt")
    return "bad.ckpt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "has checkpoint format 99, this gn-transfer reads format"),
        ({"architecture": None}, "architecture missing or of a wrong type"),
        ({"config": None}, "lacks config, which export needs"),
        ({"classes": ["a", "b"]}, "the checkpoint knows 2 classes (a, b), the data"),
    ],
)
def test_checkpoints_that_do_not_fit(in_root, capsys, changes, message):
    assert main(["export", bad_checkpoint(in_root, **changes), "--output", "refused"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("refused").exists()


def test_images_that_were_moved(folder_root, tmp_path):
    config = {"seed_everything": 0, "data": {"class_path": "gn_transfer.data.Folder", "init_args": {}}}
    config["data"]["init_args"] = {"root": str(tmp_path / "gone"), "img_size": 32, "val_fraction": 0.25}
    with pytest.raises(ConfigError, match=r"the run's images cannot be used.*Give --data.root PATH, where they lie"):
        run_data(config, ["apple", "pear"], None)
    assert len(run_data(config, ["apple", "pear"], str(folder_root)).val_dataset) == 3
    with pytest.raises(ConfigError, match=r"knows 2 classes \(apple, plum\), the data"):
        run_data(config, ["apple", "plum"], str(folder_root))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "names no data"),
        ([], "names no data"),
        ({}, "names no data"),
        ({"data": 5}, "names no data"),
        ({"data": {"class_path": 5, "init_args": {}}}, "names no data"),
        ({"data": {"class_path": "Folder", "init_args": {"root": "x", "unknown": 1}}}, "does not fit this gn-"),
        (
            {"data": {"class_path": "Folder", "init_args": {"root": "x", "img_size": "y"}}},
            "does not fit this gn-transf",
        ),
    ],
)
def test_configurations_of_data_that_no_run_has(config, message):
    with pytest.raises(ConfigError, match=message):
        run_data(config, ["a"], None)


def test_a_checkpoint_does_not_say_where_images_are_written(folder_root, tmp_path, monkeypatch):
    config = {"data": {"class_path": "Digits", "init_args": {"root": str(tmp_path / "elsewhere"), "val_fraction": 0.2}}}
    monkeypatch.chdir(folder_root)
    with pytest.raises(ConfigError, match=r"Digits would write its images into .*elsewhere; give --data.root PATH"):
        run_data(config, ["0"], None)
    arguments = {"root": str(folder_root), "img_size": 32, "val_fraction": 0.25}
    arguments |= {"cache": "disk", "cache_dir": str(tmp_path / "elsewhere"), "download": True}
    config = {"data": {"class_path": "Folder", "init_args": arguments}}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    next(iter(run_data(config, ["apple", "pear"], None).val_dataloader()))
    assert (tmp_path / "cache").exists()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("class_path", ["os.system", "mine.Folder", "gn_transfer.data.decode_image", "Nothing"])
def test_data_modules_that_are_not_ours(class_path):
    config = {"seed_everything": 0, "data": {"class_path": class_path, "init_args": {}}}
    with pytest.raises(ConfigError, match="only data modules of gn_transfer are run"):
        run_data(config, ["a"], None)


@pytest.mark.parametrize(
    "options",
    [
        ["--output", "x"],
        ["ckpt"],
        ["ckpt", "--output", "x", "--format", "h5"],
        ["ckpt", "--output", "x", "--quantize", "int4"],
        ["ckpt", "--output", "x", "--max_drop", "-1"],
        ["ckpt", "--output", "x", "--max_drop", "2"],
    ],
)
def test_bad_options(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *options]) == 2
    assert "gn-transfer: error:" in capsys.readouterr().err


def parity_of(of_checkpoint: np.ndarray, of_bundle: np.ndarray, targets: list) -> Parity:
    meter = ParityMeter(of_checkpoint.shape[1])
    for ours, theirs, target in zip(of_checkpoint, of_bundle, targets, strict=True):
        meter.update(ours, theirs, np.array(target))
    return meter.compute()


def test_parity_by_hand():
    theirs = np.array([[1.0, 3.0], [2.0, 2.00001], [5.0, 0.0]], np.float32)
    ours = np.array([[1.0, 3.0], [2.00002, 2.0], [5.0, 0.0]], np.float32)
    parity = parity_of(theirs, ours, [1, 1, 1])
    assert parity.max_difference == pytest.approx(2e-5, rel=0.1)
    assert parity.tolerance == pytest.approx(5e-4)
    assert (parity.images, parity.compared, parity.same_class) == (3, 3, 2)
    assert parity.metric == "accuracy"
    assert (parity.metric_checkpoint, parity.metric_bundle) == pytest.approx((2 / 3, 1 / 3))
    assert parity.holds
    assert not parity_of(theirs, theirs + 1e-3, [1, 1, 1]).holds
    assert not parity_of(theirs, theirs * np.nan, [1, 1, 1]).holds
    with pytest.raises(ConfigError, match="logits are not finite"):
        parity_of(np.full_like(theirs, np.inf), theirs, [1, 1, 1])


def test_parity_of_pixels_by_hand():
    """Four pixels, one of them without a label: IoU 2/3 of class 0 and 0 of class 1, which was found nowhere."""
    logits = np.stack([np.ones((1, 2, 2)), np.zeros((1, 2, 2))], axis=1).astype(np.float32)
    parity = parity_of(logits, logits, [[[0, 0], [1, 255]]])
    assert (parity.images, parity.compared, parity.same_class, parity.metric) == (1, 3, 3, "mIoU")
    assert parity.metric_bundle == pytest.approx((2 / 3 + 0) / 2)
    assert "equal on 100.0000% of the labeled pixels" in parity.summary()


NETS = [
    ("resnetv2_18", "gn_ws", {}),
    ("resnetv2_18", "gn", {"group_size": 16}),
    ("resnetv2_18", "bn_ws", {}),
    ("resnetv2_18", "in", {}),
    ("resnetv2_18", "ln", {}),
    ("resnetv2_18", "none", {}),
    ("resnetv2_18", "bn_frozen", {}),
    ("resnet18", "gn_ws", {}),
    ("resnetv2_26", "gn", {"num_groups": 16}),
]


@pytest.mark.parametrize(("name", "norm", "groups"), NETS, ids=lambda value: str(value))
def test_plain_nets_and_timm_nets_compute_the_same(name, norm, groups):
    head = "fc" if name == "resnet18" else "head.fc"
    architecture = {"num_groups": 32, "group_size": None, **groups}
    torch.manual_seed(0)
    net = rebuild(name, norm=norm, num_classes=3, head=head, **architecture).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(images)
        assert plain(net)(images) == pytest.approx(expected, abs=1e-5, rel=1e-4)

        scope: dict[str, object] = {}
        exec(timm_lines({"architecture": name, "norm": norm, "head": head, **architecture}, 3), scope)
        theirs = scope["model"]
        assert isinstance(theirs, nn.Module)
        theirs.load_state_dict(net.state_dict())
        assert theirs.eval()(images) == pytest.approx(expected, abs=1e-5, rel=1e-4)


def test_bit_needs_no_arguments():
    lines = timm_lines(
        {"architecture": "resnetv2_50x1_bit", "norm": "gn_ws", "head": "head.fc", "num_groups": 32, "group_size": None},
        5,
    )
    assert lines.endswith("model = timm.create_model('resnetv2_50x1_bit', num_classes=5)")
