"""From a trained segmentation to a bundle: any size, tiles, masks as files, without torch."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import gn_transfer as gnt
from gn_transfer import ModelConfig, TransferSegmenter, load_bundle
from gn_transfer.__main__ import main
from gn_transfer.config import ConfigError
from gn_transfer.inference.bundle_files import METADATA, metadata_sha256
from gn_transfer.inference.onnx_graph import export_graph, plain
from gn_transfer.inference.onnx_segmentation import _ExportedPooling, for_any_size, write_segmentation_onnx
from gn_transfer.layers import GroupNorm

CHECKPOINT = Path("checkpoints/segmentation_folder/gn_ws-bs1-seed0/best.ckpt")


@pytest.fixture(scope="module")
def run_root(tmp_path_factory) -> Path:
    """What a run of a few steps leaves. The classes are left and right."""
    root = tmp_path_factory.mktemp("run")
    for kind in ("images", "masks"):
        (root / "own" / kind).mkdir(parents=True)
    for number in range(12):
        height, width = 60 + 3 * number, 90
        mask = np.zeros((height, width), np.uint8)
        mask[:, 30 + number :] = 1
        mask[:2] = 255
        pixels = np.random.default_rng(number).integers(0, 90, (height, width, 3), np.uint8) + 120 * mask[..., None]
        Image.fromarray(mask).save(root / "own" / "masks" / f"{number}.png")
        Image.fromarray(pixels).save(root / "own" / "images" / f"{number}.png")
    (root / "own" / "classes.txt").write_text("left\nright\n")
    words = (
        "--model.backbone resnet18 --model.norm gn_ws --model.pretrained null --model.decoder fpn --data.batch_size 1"
    )
    words += " --data.img_size 64 --accumulation.effective_batch_size 4 --mixed_precision.mode fp32"
    words += " --trainer.max_epochs 1 --trainer.limit_train_batches 4"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main(["fit", "--config", "segmentation_folder.yaml", "--data.root", "own", *words.split()]) == 0
        assert main(["export", str(CHECKPOINT), "--output", "bundle"]) == 0
    return root


@pytest.fixture
def in_root(run_root: Path, monkeypatch) -> Path:
    monkeypatch.chdir(run_root)
    return run_root


def test_a_bundle_computes_what_was_trained(in_root):
    metadata = json.loads((in_root / "bundle" / METADATA).read_text())
    assert (metadata["task"], metadata["tile_size"], metadata["short_side"]) == ("segmentation", None, 64)
    parity = metadata["parity"]
    assert parity["max_difference"] <= parity["tolerance"] == pytest.approx(1e-4 * max(1.0, parity["max_logit"]))
    assert parity["same_class"] / parity["compared"] > 0.999
    assert parity["metric_bundle"] == pytest.approx(metadata["metrics"]["val/miou"], abs=1e-4)
    by_class = metadata["validation"]["by_class"]
    assert np.mean([found["iou"] for found in by_class.values()]) == pytest.approx(parity["metric_bundle"])
    assert sum(found["count"] for found in by_class.values()) == parity["compared"]
    assert f"| left | {by_class['left']['iou']:.4f} |" in (in_root / "bundle" / "README.md").read_text()


def test_tiles_are_blended_as_in_training(in_root, tmp_path):
    tiled = Path(shutil.copytree("bundle", tmp_path / "tiled"))
    metadata = {**json.loads((tiled / METADATA).read_text()), "tile_size": 32}
    (tiled / METADATA).write_text(json.dumps({**metadata, "sha256": metadata_sha256(metadata)}))
    task = gnt.load(CHECKPOINT)
    task.tile_size = 32
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    [result] = load_bundle(tiled).predict([pixels])
    with torch.no_grad():
        [expected] = task(torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()).numpy()
    assert result.logits == pytest.approx(expected, abs=1e-4)
    [whole] = load_bundle("bundle").predict([pixels])
    assert np.abs(whole.logits - expected).max() > 1e-2  # group norm sees less of a tile than of the image


def test_a_large_image_is_segmented_at_its_size(in_root):
    """The short side is reduced to 64 pixels; the mask has the size of the image, whatever way the image comes."""
    bundle = load_bundle("bundle")
    pixels = np.random.default_rng(0).integers(0, 256, (150, 330, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("large.png")
    results = bundle.predict(["large.png", pixels, Image.fromarray(pixels), Path("large.png").read_bytes()])
    for result in results:
        assert result.mask.shape == (150, 330)
        assert result.logits.shape == (2, 64, 141)
        assert np.array_equal(result.mask, results[0].mask)
        assert result.probs.sum(0) == pytest.approx(1.0, abs=1e-5)
        assert sum(result.pixels.values()) == 150 * 330
        ties = np.abs(result.probs[0] - result.probs[1]) < 1e-6
        assert (result.mask == result.probs.argmax(0))[~ties].all()


def test_the_graph_alone_takes_any_size(in_root):
    session = onnxruntime.InferenceSession("bundle/model.onnx")
    task = gnt.load(CHECKPOINT)
    assert isinstance(task, TransferSegmenter)
    for shape in ((1, 64, 96, 3), (1, 33, 7, 3), (2, 70, 50, 3)):
        images = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        logits, probs, classes = session.run(None, {"images": images})
        with torch.no_grad():
            expected = task(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
        assert logits == pytest.approx(expected.numpy(), abs=1e-4)
        assert probs == pytest.approx(expected.softmax(1).numpy(), abs=1e-4)
        assert classes.dtype == np.uint8
        assert np.array_equal(classes, logits.argmax(1))


def test_a_bundle_tells_how_it_was_trained(in_root):
    config = json.loads(Path("bundle", METADATA).read_text())["provenance"]["config"]
    assert config["segmentation"] == {"loss": "both"}
    assert "regularization" not in config
    assert gnt.load_for_training("bundle").tile_size is None


def test_a_class_that_no_validation_mask_has(run_root, tmp_path, monkeypatch):
    for folder in ("runs", "checkpoints", "own"):
        shutil.copytree(run_root / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    [record] = Path("runs").rglob("metrics.json")
    without = {name: None if "iou_left" in name else value for name, value in json.loads(record.read_text()).items()}
    record.write_text(json.dumps(without))
    assert main(["export", str(CHECKPOINT), "--output", "bundle"]) == 0
    card = Path("bundle/README.md").read_text()
    assert "val/iou_right" in card
    assert "val/iou_left" not in card


def test_the_lines_of_the_card_run(in_root, monkeypatch):
    card = (in_root / "bundle" / "README.md").read_text()
    monkeypatch.chdir(in_root / "bundle")
    np.save("images.npy", np.zeros((1, 40, 50, 3), np.uint8))
    Image.new("RGB", (50, 40)).save("cat.jpg")
    scope: dict = {}
    for block in card.split("```python\n")[1:]:
        exec(block.partition("```")[0], scope)
    for name in ("images.npy", "cat.jpg"):
        Path(name).unlink()
    trained = gnt.load(in_root / CHECKPOINT).state_dict()
    assert scope["task"].training
    assert all(torch.equal(tensor, trained[name]) for name, tensor in scope["task"].state_dict().items())


def test_predicting_masks(in_root, tmp_path, capsys):
    nested = tmp_path / "photos" / "sub"
    nested.mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        shutil.copy("own/images/3.png", tmp_path / "photos" / name)
    (nested / "broken.png").write_bytes(b"no image")
    masks, table, figure = tmp_path / "masks", tmp_path / "areas.csv", tmp_path / "overlays.png"
    options = ["--masks", str(masks), "--output", str(table), "--figure", str(figure)]
    assert main(["predict", "bundle", str(tmp_path / "photos"), *options]) == 3
    assert "broken.png" in capsys.readouterr().err
    [expected] = load_bundle("bundle").predict(["own/images/3.png"])
    assert sorted(path.relative_to(masks).as_posix() for path in masks.rglob("*.png")) == ["a.png", "sub/b.png"]
    with Image.open(masks / "sub" / "b.png") as mask:
        assert (mask.mode, (masks / "sub" / "b.png").read_bytes()[24]) == ("P", 8)  # bits of a pixel, in PNG's header
        assert np.array_equal(np.asarray(mask), expected.mask)
    with table.open() as file:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    assert [rows["a.png"][f"pixels:{name}"] for name in ("left", "right")] == [str(n) for n in expected.pixels.values()]
    assert (rows["a.png"]["width"], rows["a.png"]["height"]) == ("90", "69")
    assert rows["broken.png"]["error"]
    with Image.open(figure) as sheet:
        assert sheet.size[0] > 200


def test_predicting_areas(in_root, capsys):
    assert main(["predict", "bundle", "own/images/0.png"]) == 0
    assert "% left" in capsys.readouterr().out
    assert main(["predict", "bundle", "own/images/0.png", "--format", "json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)
    assert (entry["width"], entry["height"], sum(entry["pixels"].values())) == (90, 60, 90 * 60)


def test_no_predicted_mask_replaces_a_file(in_root, tmp_path, capsys):
    before = Path("own/masks/0.png").read_bytes()
    assert main(["predict", "bundle", "own/images", "--masks", "own/masks"]) == 2
    assert "exists and is not an empty folder; name a new one" in capsys.readouterr().err
    assert Path("own/masks/0.png").read_bytes() == before
    for name in ("x.png", "x.bmp"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    assert main(["predict", "bundle", str(tmp_path), "--masks", str(tmp_path / "new")]) == 2
    assert "would have one mask" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--top_k", "--batch_size"])
def test_options_of_classification_are_refused(in_root, capsys, option):
    assert main(["predict", "bundle", "own/images", option, "2"]) == 2
    assert f"{option}: bundle segments images" in capsys.readouterr().err


def test_masks_are_refused_of_a_classification(bundle_dir, tmp_path, capsys):
    assert main(["predict", str(bundle_dir), str(bundle_dir), "--masks", str(tmp_path / "m")]) == 2
    assert "classifies whole images and gives no masks" in capsys.readouterr().err


def test_no_torch_is_imported(in_root):
    script = (
        "import sys; from gn_transfer import load_bundle; load_bundle('bundle').predict(['own/images/0.png']);"
        "assert not {'torch', 'lightning', 'timm', 'albumentations'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("decoder", "backbone", "norm"),
    [
        pytest.param("upernet", "resnet18", "ln", marks=pytest.mark.slow),
        pytest.param("unet", "tf_efficientnet_lite0", "gn", marks=pytest.mark.slow),
        pytest.param("deeplabv3plus", "resnetv2_18", "bn_frozen", marks=pytest.mark.slow),
    ],
)
def test_every_decoder_leaves(tmp_path, decoder, backbone, norm):
    torch.manual_seed(0)
    task = TransferSegmenter(ModelConfig(backbone, norm, pretrained=None, decoder=decoder))
    task.build(["a", "b", "c"])
    task.eval()
    mean, std = ((statistic.flatten() / 255).tolist() for statistic in (task.mean, task.std))
    write_segmentation_onnx(task.model, mean, std, 3, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((1, 100, 37, 3), (1, 64, 160, 3)):
        images = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        with torch.no_grad():
            expected = task(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).numpy()
        [logits] = session.run(["logits"], {"images": images})
        assert logits == pytest.approx(expected, abs=1e-4 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize(("length", "bins"), [(7, 6), (12, 6), (1, 3), (5, (2, 3))])
def test_adaptive_pooling_as_products(length, bins):
    maps = torch.randn(2, 3, length, length + 2)
    assert _ExportedPooling(bins)(maps) == pytest.approx(nn.AdaptiveAvgPool2d(bins)(maps), abs=1e-5)


def test_a_norm_of_a_large_group_loses_no_digits():
    """onnxruntime adds up in float32, value after value: over 600,000 values at once, four digits would be lost."""
    torch.manual_seed(0)
    model = nn.Sequential(GroupNorm(96, 4)).eval()
    maps = 3 * torch.randn(1, 96, 128, 192) + 2
    graph = export_graph(plain(model), torch.zeros(2, 96, 128, 192), {0: torch.export.Dim("batch")}, "maps", ["normal"])
    [normal] = onnxruntime.InferenceSession(graph.SerializeToString()).run(["normal"], {"maps": maps.numpy()})
    assert np.abs(normal - nn.functional.group_norm(maps.double(), 4).numpy()).max() < 5e-6


def test_padding_of_any_size():
    """TensorFlow's padding depends on the size of the image; on sides that the stride divides it does not."""
    task = TransferSegmenter(ModelConfig("tf_efficientnet_lite0", "bn_frozen", pretrained=None, decoder="fpn"))
    task.build(["a", "b"])
    task.eval()
    model = for_any_size(task.model)
    assert not any(type(layer).__name__ == "Conv2dSame" for layer in model.modules())
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert model(pixels) == pytest.approx(task.model(pixels), abs=1e-5, rel=1e-4)


def test_the_wrong_task_for_a_checkpoint(in_root):
    with pytest.raises(ConfigError, match=r"model\.decoder=fpn is for segmentation"):
        gnt.TransferClassifier.load_from_checkpoint(CHECKPOINT)


def test_int8(in_root, capsys):
    words = ["export", str(CHECKPOINT), "--output", "int8", "--quantize", "int8", "--max_drop"]
    assert main([*words, "100"]) == 0
    assert "points lost; top class equal to the checkpoint's on" in capsys.readouterr().out
    quantized, certain = load_bundle("int8"), load_bundle("bundle")
    assert quantized.metadata["quantization"]["kind"] == "int8"
    assert quantized.metadata["quantization"]["metric_float"] == certain.metadata["parity"]["metric_bundle"]
    assert Path("int8/model.onnx").stat().st_size < 0.4 * Path("bundle/model.onnx").stat().st_size
    for number in (0, 7):  # images of other sizes than those that the ranges come from
        [ours], [theirs] = (one.predict([f"own/images/{number}.png"]) for one in (quantized, certain))
        assert ours.mask.shape == theirs.mask.shape
        assert 0 < np.abs(ours.logits - theirs.logits).mean() < 0.2 * np.abs(theirs.logits).mean() + 0.05
    for option, value in (("--precision", "0.9"), ("--push_to_hub", "user/pets")):
        assert main(["export", str(CHECKPOINT), "--output", "other", option, value]) == 2
        assert f"{option} is for models that classify images" in capsys.readouterr().err
