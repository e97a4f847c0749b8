"""The segmentation task: loss and gradients, figures by hand, whole images and tiles, runs from start to end."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gn_transfer.backbones.model_config import ModelConfig
from gn_transfer.config import ConfigError
from gn_transfer.data import Sample, SegmentationSample
from gn_transfer.data.masks import IGNORED
from gn_transfer.layers import AccumulationEngine, GroupNorm
from gn_transfer.training.accumulation import GradientAccumulation
from gn_transfer.training.batch_norm_statistics import BatchNormStatistics
from gn_transfer.training.checkpoint_callbacks import LastCheckpoint
from gn_transfer.training.classification import TransferClassifier
from gn_transfer.training.optimizer import OptimizerConfig
from gn_transfer.training.run_folder import claim_run, run_of_checkpoint
from gn_transfer.training.segmentation import SegmentationConfig, TransferSegmenter, losses_over_labeled
from gn_transfer.training.train import create_trainer, evaluate, prepare, train


def task_of(norm="gn_ws", decoder="fpn", loss="both", classes=("a", "b", "c"), **options):
    torch.manual_seed(0)
    config = ModelConfig("resnetv2_18", norm, decoder=decoder, **options)
    task = TransferSegmenter(config, OptimizerConfig(lr=0.01), SegmentationConfig(loss))
    task.build(list(classes))
    for layer in task.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0
    return task


def batch(images=4, size=32, seed=0):
    """Images with different numbers of labeled pixels; the last one has none."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, size, size, generator=generator)
    targets = torch.randint(0, 3, (images, size, size), generator=generator).to(torch.uint8)
    for index in range(images):
        targets[index, : index * size // (images - 1)] = IGNORED
    return pixels, targets


# ---- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5])])
def test_cross_entropy_is_a_mean_over_the_labeled_pixels_of_each_image(weight):
    _, targets = batch()
    logits = torch.randn(4, 3, 32, 32)
    by_hand = [
        F.cross_entropy(one[None], target[None].long(), weight, ignore_index=IGNORED, reduction="sum")
        / (target != IGNORED).sum()
        for one, target in zip(logits[:3], targets[:3], strict=True)
    ]
    torch.testing.assert_close(losses_over_labeled(logits, targets.long(), weight).mean(), sum(by_hand) / 4)
    assert losses_over_labeled(logits[3:], targets[3:].long(), weight) == 0


def test_an_image_of_one_class_keeps_the_weight_of_its_class():
    logits, targets = torch.randn(1, 2, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64)
    rare = losses_over_labeled(logits, targets, torch.tensor([25.0, 0.5]))
    torch.testing.assert_close(rare, 25 * losses_over_labeled(logits, targets))


@pytest.mark.parametrize("number", [2, 21, 150])
def test_dice_averages_over_the_classes_of_an_image(number):
    """Of an image with two classes, in equal parts, a model that gives both half the probability has a Dice of 0.5."""
    task = TransferSegmenter()
    targets = torch.arange(2).repeat(8, 4)
    targets[0] = IGNORED
    logits = torch.full((number, 8, 8), -50.0)
    logits[:2] = 0
    assert float(task._dice_loss(logits, targets)) == pytest.approx(0.5, abs=1e-4)
    assert float(task._dice_loss(logits, torch.full((8, 8), IGNORED))) == 0
    one_class = torch.where(targets == IGNORED, targets, 1)
    assert float(task._dice_loss(logits, one_class)) == pytest.approx(1 - 2 * 0.5 / 1.5, abs=1e-4)


@pytest.mark.parametrize("loss", ["cross_entropy", "dice", "both"])
def test_one_batch_of_four_has_the_gradient_of_four_batches_of_one(loss):
    pixels, targets = batch()
    whole, parts = task_of("gn", loss=loss).double().train(), task_of("gn", loss=loss).double().train()
    whole.training_loss(pixels.double(), targets).backward()
    for one, target in zip(pixels.double(), targets, strict=True):
        (parts.training_loss(one[None], target[None]) / 4).backward()
    # the loss itself is float32
    for (name, ours), theirs in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name


def test_the_engine_gives_the_same_gradient():
    pixels, targets = batch()
    ours, plain = task_of("bn_frozen"), task_of("bn_frozen")
    for task in (ours, plain):
        task.model.train().to(memory_format=torch.channels_last)
    engine = AccumulationEngine(ours.model)
    engine.fold_norms(pixels[:1])
    for index, (one, target) in enumerate(zip(pixels, targets, strict=True)):
        engine.micro_batch(first=index == 0, last=index == 3)
        for task in (ours, plain):
            task.training_loss(one[None], target[None]).backward()
    for (name, mine), theirs in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() <= 1e-3 * max(theirs.grad.norm(), 1e-4), name


# ---- figures ------------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    """Six labeled pixels in two images, four of them right; a: 2 of 3, b: 2 of 4, c: 0 of 1."""
    task = TransferSegmenter()
    task.classes = ["a", "b", "c"]
    metrics = task.configure_metrics(3)
    for predicted, true in (([[0, 0, 1, 1]], [[0, 0, 1, 2]]), ([[1, 1, 0]], [[1, 0, IGNORED]])):
        logits = F.one_hot(torch.tensor([predicted]), 3).permute(0, 3, 1, 2).float()
        metrics.update(logits, torch.tensor([true]))
    found = {name: round(float(value), 4) for name, value in metrics.compute().items()}
    assert found["iou_a"] == round(2 / 3, 4)
    assert found["iou_b"] == 0.5
    assert found["iou_c"] == 0.0
    assert found["miou"] == round((2 / 3 + 0.5) / 3, 4)
    assert found["pixel_acc"] == round(4 / 6, 4)


def test_a_class_that_neither_occurs_nor_was_given_has_no_iou():
    task = TransferSegmenter()
    task.classes = ["a", "b", "c"]
    metrics = task.configure_metrics(3)
    logits = F.one_hot(torch.tensor([[[0, 0, 1, 1]]]), 3).permute(0, 3, 1, 2).float()
    metrics.update(logits, torch.tensor([[[0, 0, 0, 0]]]))
    found = metrics.compute()
    assert found["iou_c"].isnan()
    assert float(found["miou"]) == pytest.approx((float(found["iou_a"]) + float(found["iou_b"])) / 2) == 0.25


def test_images_without_a_labeled_pixel_do_not_count_in_the_loss_of_an_evaluation():
    task, (_, targets) = task_of(), batch()
    logits = torch.randn(4, 3, 32, 32)
    assert len(task.evaluation_losses(logits, targets)) == 3
    torch.testing.assert_close(task.evaluation_losses(logits, targets), losses_over_labeled(logits, targets.long())[:3])
    assert task.evaluation_losses(logits[3:], targets[3:]).shape == (0,)


def test_pixels_that_are_not_uint8_are_refused_in_evaluation():
    with pytest.raises(ConfigError, match=r"pixels as uint8, .* these are torch.float32"):
        task_of().eval()(torch.rand(1, 3, 64, 64))


def test_a_number_of_groups_is_the_most_in_a_decoder():
    task = task_of("gn", "unet", num_groups=32)
    norms = [layer for layer in task.model.decoder.modules() if isinstance(layer, GroupNorm)]
    assert {layer.num_channels: layer.num_groups for layer in norms} == {256: 32, 128: 32, 64: 32, 32: 16, 16: 8}


@pytest.mark.parametrize(("norm", "decoder_norm"), [("bn_frozen", "bn"), ("gn", "bn"), ("bn_frozen", "gn")])
def test_statistics_are_reestimated_where_they_are(norm, decoder_norm):
    """Those of a frozen backbone once, before the training, those of a decoder that trains before every validation."""
    task = task_of(norm, decoder_norm=decoder_norm)
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    data = SimpleNamespace(batch_size=2, training_images=lambda number: images)
    trainer = SimpleNamespace(datamodule=data, ckpt_path=None, state=SimpleNamespace(fn="fit"))
    callback = BatchNormStatistics(reestimate_images=6)
    callback.setup(trainer, task, "fit")

    def changed(hook):
        before = {name: value.clone() for name, value in task.model.named_buffers() if name.endswith("running_mean")}
        hook(trainer, task)
        return {
            name.partition(".")[0]
            for name, value in task.model.named_buffers()
            if name in before and not torch.equal(value, before[name])
        }

    assert changed(callback.on_fit_start) == ({"encoder"} if norm == "bn_frozen" else set())
    assert changed(callback.on_validation_epoch_start) == ({"decoder"} if decoder_norm == "bn" else set())


def test_images_of_any_size_are_padded_and_cut_back():
    task = task_of().eval()
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(task(image), task.model(task.normalize(image)))
        assert task(image[:, :, :50, :37]).shape == (1, 3, 50, 37)


def test_tiles_of_a_network_that_looks_at_single_pixels_equal_the_whole():
    task = task_of()
    task.model = nn.Conv2d(3, 3, 1)
    image = torch.randint(0, 256, (1, 3, 150, 210), dtype=torch.uint8)
    with torch.no_grad():
        whole = task.eval()(image)
        task.tile_size = 64
        torch.testing.assert_close(task(image), whole, rtol=1e-4, atol=1e-5)


def test_evaluation_in_tiles_uses_every_tile():
    task, seen = task_of().eval(), []
    task.tile_size = 64
    task.model.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape[2:])))
    with torch.no_grad():
        assert task(torch.zeros(1, 3, 100, 60, dtype=torch.uint8)).shape == (1, 3, 100, 60)
    assert seen == [(64, 64), (64, 64)]


# ---- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    data = SegmentationSample(tmp_path_factory.mktemp("sample"))
    data.prepare_data()
    return data.root


def start(root, folder, *, norm="gn_ws", steps=2, ckpt_path=None, **options):
    torch.manual_seed(0)
    data = SegmentationSample(root, img_size=32, short_side=32, cache="ram", num_workers=0)
    task = TransferSegmenter(ModelConfig("resnetv2_18", norm, decoder="fpn", **options), OptimizerConfig(lr=0.01))
    trainer = create_trainer(
        max_epochs=2,
        max_steps=steps,
        callbacks=[GradientAccumulation(4), LastCheckpoint(every_minutes=0)],
        figures=False,
        log_every_n_steps=1,
        limit_train_batches=8,
        limit_val_batches=6,
        accelerator="cpu",
    )
    stored = None if ckpt_path is None else torch.load(ckpt_path, weights_only=True)["gn_transfer"]
    prepare(task, data, stored=stored)
    run = claim_run(Path(folder), "seg", norm, 1, 0) if ckpt_path is None else run_of_checkpoint(ckpt_path)
    train(task, data, trainer, run, ckpt_path=ckpt_path)
    return task, run


def test_a_run_from_start_to_test(images, tmp_path):
    _, run = start(images, tmp_path)
    record = json.loads((run.logs / "metrics.json").read_text())
    assert record["status"] == "finished"
    assert 0 < record["best/val/miou"] < 1
    assert {"val/miou", "val/iou_background", "val/iou_pet", "val/pixel_acc", "val/dice", "val/loss"} <= record.keys()
    rows = (run.logs / "predictions_val.csv").read_text().splitlines()
    assert rows[0] == "path,miou," + ",".join(
        f"{count}:{name}" for name in ("background", "pet") for count in ("intersection", "union", "pixels")
    )
    pixels = torch.tensor([[int(value) for value in row.split(",")[2:]] for row in rows[1:]]).sum(0)
    assert (pixels[0] / pixels[1] + pixels[3] / pixels[4]).item() / 2 == pytest.approx(record["val/miou"], abs=1e-6)
    best = run.checkpoints / "best.ckpt"
    loaded = TransferSegmenter.load_from_checkpoint(best)
    assert loaded.model_config.decoder == "fpn"
    data = SegmentationSample(images, img_size=32, cache="none", num_workers=0)
    data.setup("test")
    said: list[str] = []
    for limit in (4, 1.0):
        trainer = create_trainer(evaluates=True, figures=False, limit_test_batches=limit, accelerator="cpu")
        metrics = evaluate(loaded, data, trainer, best, "test", say=said.append)
        assert "test/miou" in metrics
        assert (run.logs / "predictions_test.csv").exists() == (limit == 1.0)  # a part of the images is no test
    assert any("only 4 images were tested" in line for line in said)
    assert len((run.logs / "predictions_test.csv").read_text().splitlines()) == 1 + len(data.test_dataset)


class CrashError(Exception):
    """Stands for a crash."""


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_crashed_run_continues_exactly(images, tmp_path, monkeypatch):
    options = {"norm": "bn_frozen", "steps": 4, "pretrained": "auto"}
    whole, _ = start(images, tmp_path / "whole", **options)
    calls, own = [], LastCheckpoint.on_train_batch_end

    def crash_at_the_tenth(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            raise CrashError
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_end", crash_at_the_tenth)
        with pytest.raises(CrashError):
            start(images, tmp_path / "parts", **options)
    [last] = (tmp_path / "parts").glob("checkpoints/seg/*/last.ckpt")
    resumed, _ = start(images, tmp_path / "parts", ckpt_path=last, **options)
    theirs = resumed.state_dict()
    different = [name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, theirs[name])]
    assert not different


@pytest.mark.parametrize(
    "norm", ["gn_ws", "bn_frozen", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gn", "ln", "in"))]
)
def test_four_images_can_be_learned_by_heart(norm):
    """Under every norm but batch norm at batch size 1."""
    generator = torch.Generator().manual_seed(0)
    targets = F.interpolate(torch.rand(4, 1, 4, 4, generator=generator), size=64).gt(0.5).byte()[:, 0]
    pixels = torch.where(targets[:, None].bool(), 1.0, -1.0) + torch.randn(4, 3, 64, 64, generator=generator)
    task = task_of(norm, "unet", classes=("a", "b"), pretrained="auto" if norm in ("gn_ws", "bn_frozen") else None)
    task.train()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    for _ in range(40):
        for one, target in zip(pixels, targets, strict=True):
            (task.training_loss(one[None], target[None]) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    metrics = task.eval().configure_metrics(2)
    with torch.no_grad():
        metrics.update(task.model(pixels), targets.long())
    assert metrics.compute()["miou"] > 0.95


def test_a_decoder_is_refused_where_images_are_classified():
    with pytest.raises(ConfigError, match=r"model\.decoder=unet is for segmentation"):
        TransferClassifier(ModelConfig("resnet18", "gn", decoder="unet"))


def test_class_weights_need_a_loss_that_uses_them(images):
    data = SegmentationSample(images, img_size=64, class_weights="balanced", num_workers=0, cache="none")
    data.setup("fit")
    task = TransferSegmenter(
        ModelConfig("resnetv2_18", "gn", pretrained=None, decoder="unet"), segmentation=SegmentationConfig("dice")
    )
    with pytest.raises(ConfigError, match=r"data\.class_weights=balanced does nothing with segmentation\.loss=dice"):
        task.build_for(data)


def test_data_of_the_other_task_are_refused(images):
    masks = SegmentationSample(images, cache="none")
    masks.setup("fit")
    with pytest.raises(ConfigError, match="SegmentationSample has masks"):
        TransferClassifier().build_for(masks)
    whole = Sample(images, cache="none")
    whole.setup("fit")
    with pytest.raises(ConfigError, match="Sample has no masks"):
        TransferSegmenter().build_for(whole)
