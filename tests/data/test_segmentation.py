"""Images with masks: what values mean, how folders are read, what evaluation and training see, what is refused."""

import os
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from gn_transfer.config import ConfigError
from gn_transfer.data import PetsSegmentation, SegmentationFolder, SegmentationSample
from gn_transfer.data.check import list_all
from gn_transfer.data.decode import BadImageError, decode_mask
from gn_transfer.data.describe import describe_data
from gn_transfer.data.mask_check import check_split_masks
from gn_transfer.data.masks import IGNORED, MaskValues, describe_shares
from gn_transfer.data.pair_augmentation import PairAugmentation, pair_pipeline
from gn_transfer.data.pair_layout import holds_pairs
from gn_transfer.data.tiles import blending_window, tile_starts

CLASSES = ("ground", "cat", "dog")


def write_pair(root, name, size=(40, 56), values=(0, 1, 2), split="", seed=0):
    """An image whose colour tells the class of every pixel, and its mask: vertical bands of the values."""
    height, width = size
    mask = np.repeat(np.asarray(values, np.uint8), -(-width // len(values)))[None, :width].repeat(height, 0)
    noise = np.random.default_rng(seed).integers(0, 8, (height, width, 3), np.uint8)
    pixels = noise + 40 * np.minimum(mask, 5)[..., None]
    for folder, content in (("images", pixels), ("masks", mask)):
        path = Path(root, split, folder, f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "own"
    for number in range(6):
        write_pair(root, f"photo_{number}", seed=number)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def data_of(root, **options):
    return SegmentationFolder(root, **{"img_size": 32, "cache": "none", "num_workers": 0, **options})


def set_up(root, stage="fit", **options):
    data = data_of(root, **options)
    data.setup(stage)
    return data


# ---- reading ------------------------------------------------------------------------------------------------------


def test_a_folder_of_images_and_masks(folder):
    data = set_up(folder)
    assert data.classes == list(CLASSES)
    assert (len(data.train_dataset), len(data.val_dataset)) == (5, 1)
    images, targets = data.train_dataset.batch([(0, 0), (0, 1)])
    assert images.shape == (2, 3, 32, 32)
    assert targets.shape == (2, 32, 32)
    rows = dict(describe_data(data))
    assert rows["class balance"].startswith("ground 33.9%, cat 33.9%, dog 32.1% of the pixels")


def test_image_and_mask_stay_together_in_training(folder):
    data = set_up(folder, recipe="crop_flip")
    for epoch in range(3):
        images, targets = data.train_dataset.batch([(epoch, index) for index in range(5)])
        seen = targets != IGNORED
        expected = (images.float().mean(1) / 40).round().clamp(0, 2).long()  # the colour of a pixel is its class
        inside = torch.nn.functional.max_pool2d(targets[:, None].float(), 3, 1, 1)[:, 0] == targets  # away from edges
        wrong = (expected != targets) & seen & inside
        assert wrong.float().mean() < 0.02


@pytest.mark.parametrize("axis", [0, 1])
def test_the_edges_of_a_mask_stay_on_those_of_its_image(axis):
    """Over many random scales, an edge between black and white lies where the one between two classes lies."""
    augment = PairAugmentation("crop_flip", 64)
    white = np.arange(200) >= 97
    mask = np.broadcast_to(white if axis else white[:, None], (200, 200)).astype(np.uint8)
    image = np.repeat(255 * mask[:, :, None], 3, 2)
    offsets = []
    for seed in range(400):
        pixels, target = augment(image, mask, seed)
        if set(np.unique(target)) == {0, 1} and (target != IGNORED).all():  # a flip may turn it
            line_of_image, line_of_mask = pixels[:, :, 0].mean(1 - axis) / 255, target.mean(1 - axis)
            offset = line_of_image.sum() - line_of_mask.sum()
            offsets.append(offset if line_of_mask[0] == 0 else -offset)
    assert len(offsets) > 100
    assert abs(np.mean(offsets)) < 0.1


def test_images_for_a_calibration_have_the_scale_of_evaluation(folder):
    stripes = np.zeros((200, 200, 3), np.uint8)
    stripes[:, ::2] = 255
    for number in range(4):
        Image.fromarray(stripes).save(folder / f"images/wide_{number}.png")
        Image.fromarray(np.zeros((200, 200), np.uint8)).save(folder / f"masks/wide_{number}.png")
    data = set_up(folder, short_side=0, val_fraction=0.5)
    images = data.training_images(1000)
    assert images.shape == (len(data.train_dataset), 3, 32, 32)
    striped = [image for image in images.float() if image[:, :, ::2].std() == 0 and image.std() > 100]
    assert len(striped) == sum("wide" in path for path in data.train_dataset.paths) > 0


def test_the_same_seed_gives_the_same_pairs_with_and_without_cache(folder, tmp_path):
    keys = [(2, index) for index in range(5)]
    plain = set_up(folder)
    expected = plain.train_dataset.batch(keys)
    for mode in ("ram", "disk"):
        data = set_up(folder, cache=mode, cache_dir=tmp_path / "cache")
        data.decoded_cache.fill(data.train_dataset, 1)
        assert data.train_dataset.masks.store is not None
        for ours, theirs in zip(data.train_dataset.batch(keys), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_evaluation_sees_whole_images_one_at_a_time(folder):
    write_pair(folder, "tall", size=(90, 48), seed=9)
    data = set_up(folder, val_fraction=0.5, batch_size=3)
    sizes = [(tuple(images.shape), tuple(targets.shape)) for images, targets in data.val_dataloader()]
    assert {shape[0][0] for shape in sizes} == {1}
    assert all(image[2:] == target[1:] for image, target in sizes)
    assert {min(image[2:]) for image, _ in sizes} == {32}
    assert {min(i.shape[2:]) for i, _ in set_up(folder, val_fraction=0.5, short_side=0).val_dataloader()} >= {40}


def test_splits_of_ones_own(tmp_path):
    root = tmp_path / "own"
    for split, count in (("Train", 3), ("validation", 2), ("test", 1)):
        for number in range(count):
            write_pair(root, f"{split}_{number}", split=split)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    data = set_up(root)
    assert (len(data.train_dataset), len(data.val_dataset)) == (3, 2)
    data.setup("test")
    assert data.test_dataset.paths == ["test/images/test_0.png"]


def test_splits_below_the_folders_of_images_and_masks(tmp_path):
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for number in range(count):
            write_pair(tmp_path, f"{split}/photo_{number}")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    data = set_up(tmp_path)
    data.setup("test")
    assert {name: len(images) for name, images in data.datasets().items()} == {"train": 3, "val": 2, "test": 1}
    assert data.val_dataset.images[0].mask == "masks/val/photo_0.png"
    assert set(data.own_splits) == {"train", "val", "test"}


def test_a_line_whose_value_is_ignored_is_no_class(folder):
    data = set_up(folder, ignore_index=0)
    assert data.classes == ["cat", "dog"]
    _, targets = data.val_dataset.batch([0])
    assert set(targets.unique().tolist()) == {0, 1, IGNORED}
    (folder / "classes.txt").write_text("ground\ncat\n")
    with pytest.raises(ConfigError, match=r"ignore_index=0 leaves 1 class of"):
        set_up(folder, ignore_index=0)


@pytest.mark.parametrize("seed", range(4))
def test_validation_has_its_share_of_the_masks_with_a_rare_class(tmp_path, seed):
    for number in range(20):
        write_pair(tmp_path, f"photo_{number}", values=(0, 1, 2) if number < 4 else (0, 0, 1))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    data = set_up(tmp_path, seed=seed, val_fraction=0.25)
    counts = [data.class_counts(part.images)["dog"] // (40 * 18) for part in (data.train_dataset, data.val_dataset)]
    assert counts == [3, 1]


def test_images_turned_by_exif(folder):
    """The mask has the size of the image as it is seen."""
    path = folder / "images" / "photo_0.jpg"
    image = Image.open(path.with_suffix(".png"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(path, exif=exif)
    path.with_suffix(".png").unlink()
    with pytest.raises(BadImageError, match="56 x 40 pixels for an image of 40 x 56"):
        set_up(folder)
    rewrite(folder, lambda mask: mask.transpose(Image.Transpose.ROTATE_270))
    assert len(set_up(folder).train_dataset) == 5
    splits, _ = list_all(data_of(folder))
    report = check_split_masks(data_of(folder), splits, threads=1)
    assert any("1 images are turned or mirrored by EXIF: images/photo_0.jpg" in warning for warning in report.warnings)
    assert "1 images are turned or mirrored by EXIF: images/photo_0.jpg" in set_up(folder).cautions()[0]


def test_images_smaller_than_the_crop_are_named_and_calibrate_without_grey(folder):
    assert set_up(folder, img_size=32).cautions() == []
    data = set_up(folder, img_size=64)
    [caution] = data.cautions()
    assert caution.startswith("the short side of half of the images is seen at 40 px or less, and a crop has 64")
    assert "is seen at 20 px or less, and a crop has 32" in set_up(folder, img_size=32, short_side=20).cautions()[0]
    images = data.training_images(4).numpy()
    assert images.shape[2:] == (64, 64)
    assert not (images == 127).all(1).any()


@pytest.mark.parametrize("size", [(1, 56), (40, 1)])
def test_images_of_one_row_or_column_are_refused(folder, size):
    write_pair(folder, "photo_0", size, values=(0, 1) if size[1] > 1 else (1,))
    with pytest.raises(
        BadImageError, match=rf"photo_0.*{size[1]} x {size[0]} pixels; an image for segmentation has two"
    ):
        set_up(folder)
    data = set_up(folder, on_bad_image="skip")
    assert len(data.train_dataset) + len(data.val_dataset) == 5


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_without_any_label_is_refused(tmp_path, split):
    for part in ("train", "val", "test"):
        for number in range(3):
            write_pair(tmp_path, f"photo_{number}", split=part, values=(IGNORED,) if part == split else (0, 1, 2))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    with pytest.raises(ConfigError, match=f"no mask of the {split} split has a pixel that counts"):
        set_up(tmp_path, "test" if split == "test" else "fit")


def test_the_largest_image_of_the_validation_decides_the_memory_of_an_evaluation(folder):
    assert set_up(folder).evaluation_shape(4) == (1, 32, 64)  # 40 x 56 reduced to 32 x 45
    assert set_up(folder, short_side=0).evaluation_shape(4) == (1, 64, 64)
    assert set_up(folder, short_side=0, tile_size=32).evaluation_shape(4) == (1, 32, 32)


def test_a_palette_png_and_an_ignored_value(folder):
    mask = Image.open(folder / "masks" / "photo_0.png")
    values = np.array(mask)
    values[0] = 255
    palette = Image.fromarray(values, mode="P")
    palette.putpalette([channel for value in range(256) for channel in (value, 255 - value, 7)])
    palette.save(folder / "masks" / "photo_0.png")
    assert np.array_equal(decode_mask(folder / "masks" / "photo_0.png"), values)
    data = set_up(folder)
    assert sum(data.class_counts(data.train_dataset.images + data.val_dataset.images).values()) == 6 * 40 * 56 - 56
    with pytest.raises(BadImageError, match="values 255, which are no class; known are 0 ground, 1 cat, 2 dog"):
        set_up(folder, ignore_index=None)


def test_balanced_class_weights_count_pixels(folder):
    weights = set_up(folder, class_weights="balanced").class_weight_tensor
    assert weights.argmax() == 2  # the band that is cut off
    assert weights.mean() == pytest.approx(1.0, abs=0.01)
    assert set_up(folder).class_weight_tensor is None


def test_pets_with_and_without_the_border(tmp_path):
    data = SegmentationSample(tmp_path, img_size=64, cache="none")
    data.prepare_data()
    data.setup("fit")
    assert data.classes == ["background", "pet"]
    _, targets = data.val_dataset.batch([0])
    assert set(targets.unique().tolist()) == {0, 1, IGNORED}
    breeds = {image.path.rpartition("/")[2].rpartition("_")[0] for image in data.val_dataset.images}
    assert len(breeds) == 5  # stratified by breed
    three = PetsSegmentation(tmp_path, border="class", img_size=64, cache="none")
    three.setup("test")
    assert three.classes == ["background", "pet", "border"]
    assert set(three.test_dataset.batch([0])[1].unique().tolist()) == {0, 1, 2}
    cover = [data.class_counts([image])["pet"] / 80**2 for image in data.train_dataset.images]
    assert min(cover) > 0.15
    assert max(cover) < 0.85


@pytest.mark.skipif("GN_TRANSFER_TEST_DATA" not in os.environ, reason="GN_TRANSFER_TEST_DATA is not set")
def test_real_trimaps():
    data = PetsSegmentation(Path(os.environ["GN_TRANSFER_TEST_DATA"]) / "pets_seg2", cache="none")
    data.setup("fit")
    data.setup("test")
    assert [len(dataset) for dataset in data.datasets().values()] == [160, 40, 198]
    shares = data.pixel_counts(data.train_dataset.images) / data.pixel_counts(data.train_dataset.images).sum()
    assert 0.2 < shares[1] < 0.5


# ---- what is refused ----------------------------------------------------------------------------------------------


def rewrite(folder, change, name="photo_0.png"):
    path = folder / "masks" / name
    change(Image.open(path)).save(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask.convert("RGB"), "a mask in colours.*8-bit grey or palette PNG"),
        (lambda mask: Image.fromarray(np.array(mask).astype(np.uint16) * 200), "a mask of 16 bits"),
        (lambda mask: mask.resize((28, 20)), "28 x 20 pixels for an image of 56 x 40"),
        (lambda mask: mask.transpose(Image.Transpose.ROTATE_90), "40 x 56 .* 56 x 40 .*save the mask upright"),
        (
            lambda mask: Image.fromarray(cv2.GaussianBlur(np.array(mask) * 100, (9, 9), 3)),
            "values that are no class, from .*soft edges",
        ),
        (lambda mask: Image.fromarray(np.array(mask) + 3), "values 3, 4, 5, which are no class; known are 0 ground"),
    ],
)
def test_masks_that_are_not_what_they_should_be(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(BadImageError, match=message) as caught:
        set_up(folder)
    assert "photo_0" in str(caught.value)
    data = set_up(folder, on_bad_image="skip")
    assert [path for path, _ in data.bad_images] == ["images/photo_0.png"]
    assert len(data.train_dataset) + len(data.val_dataset) == 5


@pytest.mark.parametrize(
    ("unknown", "message"),
    [
        (range(10, 18), "values 10, 11, 12, 13, 14, 15, 16, 17, which are no class"),
        (range(10, 19), "a mask with 9 values that are no class, from 10 to 18: soft edges"),
    ],
)
def test_a_few_wrong_values_are_listed(unknown, message):
    values = MaskValues(CLASSES, {0: 0, 1: 1, 2: 2})
    with pytest.raises(BadImageError, match=message):
        values.to_targets(np.array([[0, 1, *unknown]], np.uint8), "mask.png")


def test_every_mask_that_was_looked_at_is_counted(folder):
    rewrite(folder, lambda mask: mask.resize((28, 20)))
    data, seen = data_of(folder), []
    splits, _ = list_all(data)
    check_split_masks(data, splits, threads=2, advance=lambda: seen.append(1))
    assert len(seen) == 6


def test_a_jpeg_is_no_mask(folder):
    path = folder / "masks" / "photo_0.png"
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    with pytest.raises(BadImageError, match="a JPEG, which changes the values of a mask"):
        set_up(folder)


def test_pairs_that_do_not_match(folder):
    for path in (folder / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    with pytest.raises(ConfigError, match=r"6 images have no mask .*6 masks have no image .*'_mask' in the names"):
        set_up(folder)
    for path in (folder / "masks").iterdir():
        path.rename(path.with_name(path.name.replace("_mask", "")))
    (folder / "masks" / "photo_3.png").unlink()
    with pytest.raises(ConfigError, match=r"1 images have no mask \(.*photo_3.png\)"):
        set_up(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file. Write the names.*The first masks hold the values 0, 1, 2"),
        ("ground\ncat\n", "values 2, which are no class"),
        ("ground\n", "names 1 classes"),
        ("a\na\nb\n", "a occurs twice"),
        ("ground\ncat\ndog\nhorse\n", "no training mask has a pixel of horse. The first masks hold the values 0, 1, 2"),
    ],
)
def test_class_names(folder, text, message):
    (folder / "classes.txt").unlink()
    if text is not None:
        (folder / "classes.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        set_up(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 100}, "not a multiple of 32.*use 96"),
        ({"tile_size": 20}, "tile_size=20 is not a multiple"),
        ({"short_side": -1}, "short_side=-1"),
        ({"ignore_index": 300}, "no value of a mask"),
        ({"recipe": "bit"}, "recipe of classification"),
        ({"shots_per_class": 3}, "shots_per_class=3 is for images by class"),
    ],
)
def test_options(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        set_up(folder, **options)


def test_batch_statistics_of_whole_images_are_refused(folder):
    data = data_of(folder, batch_size=2)
    data.evaluate_in_training_batches = True
    with pytest.raises(ConfigError, match="one whole image at a time"):
        data.setup("fit")


def test_masks_of_0_and_255(folder):
    for number in range(6):
        rewrite(folder, lambda mask: mask.point(lambda value: 255 * (value > 0)), f"photo_{number}.png")
    (folder / "classes.txt").write_text("ground\ncat\n")
    with pytest.raises(ConfigError, match=r"values 0, 255; known are .*if 255, which does not count, stands for cat"):
        set_up(folder)


def test_splits_that_are_unclear(tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    for split in ("train", "vall"):
        write_pair(tmp_path, "photo", split=split)
    with pytest.raises(ConfigError, match="vall holds images and masks; is it val"):
        set_up(tmp_path)
    (tmp_path / "vall").rename(tmp_path / "other")
    with pytest.raises(ConfigError, match="1 image"):  # one pair is too few to cut validation from
        set_up(tmp_path)
    write_pair(tmp_path, "photo")
    with pytest.raises(ConfigError, match="images and train stand beside each other"):
        set_up(tmp_path)
    (tmp_path / "train").rename(tmp_path / "more")
    write_pair(tmp_path, "train/photo")
    write_pair(tmp_path, "street/photo")
    with pytest.raises(ConfigError, match="street stands beside the split train"):
        set_up(tmp_path)


def test_folders_that_hold_pairs(folder, tmp_path):
    assert holds_pairs(folder)
    write_pair(tmp_path / "split", "photo", split="train")
    assert holds_pairs(tmp_path / "split")
    (tmp_path / "split/train/masks").rename(tmp_path / "split/train/cats")
    assert not holds_pairs(tmp_path / "split")
    assert not holds_pairs(tmp_path)


def test_masks_of_a_split_that_are_missing(tmp_path):
    write_pair(tmp_path, "train/photo")
    write_pair(tmp_path, "val/photo")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    (tmp_path / "masks/val").rename(tmp_path / "masks/elsewhere")
    with pytest.raises(ConfigError, match=r"masks: no folder val, which .*images/val needs"):
        set_up(tmp_path)


def pipeline_file(path, *transforms):
    A.save(A.Compose(transforms), str(path), data_format="yaml")
    return path


def test_pipelines_of_ones_own(folder, tmp_path, monkeypatch):
    pad = {"min_height": 32, "min_width": 32}
    good = pipeline_file(tmp_path / "a.yaml", A.PadIfNeeded(**pad, fill_mask=IGNORED), A.RandomCrop(32, 32))
    assert set_up(folder, augmentation=good).train_dataset.batch([0])[0].shape == (1, 3, 32, 32)
    counting = pipeline_file(tmp_path / "b.yaml", A.PadIfNeeded(**pad), A.RandomCrop(32, 32))
    with pytest.raises(ConfigError, match=r"puts the value 0 into a mask that does not hold it: .*fill_mask=255"):
        set_up(folder, augmentation=counting)
    rarely = pipeline_file(
        tmp_path / "d.yaml",
        A.PadIfNeeded(**pad, fill_mask=IGNORED),
        A.RandomCrop(32, 32),
        A.Rotate((30, 40), fill_mask=200, p=0.2),
    )
    with pytest.raises(ConfigError, match=r"puts the value 200 into a mask"):
        set_up(folder, augmentation=rarely)
    with monkeypatch.context() as rarer:
        rarer.setattr("gn_transfer.data.pair_augmentation._TRIED", 0)
        dataset = set_up(folder, augmentation=rarely).train_dataset
    with pytest.raises(BadImageError, match=r"images/.*: data\.augmentation puts the value 200 into a mask"):
        dataset.batch([(epoch, 0) for epoch in range(40)])
    too_small = pipeline_file(tmp_path / "c.yaml", A.RandomCrop(32, 32))
    with pytest.raises(ConfigError, match=r"fails on an image of 16 x 24 .*PadIfNeeded"):
        set_up(folder, augmentation=too_small)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        set_up(tmp_path / "nothing")
    (tmp_path / "cats").mkdir()
    with pytest.raises(ConfigError, match=r"no folder images .*there: cats"):
        set_up(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(ConfigError, match="no folder masks"):
        set_up(tmp_path)


# ---- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["none", "light", "crop_flip", "strong"])
def test_small_images_are_padded_with_pixels_that_do_not_count(recipe):
    image, mask = PairAugmentation(recipe, 64)(np.full((40, 50, 3), 200, np.uint8), np.ones((40, 50), np.uint8), seed=1)
    assert image.shape == (64, 64, 3)
    assert set(np.unique(mask)) == {1, IGNORED}
    if recipe != "strong":
        assert (image[mask == IGNORED] == 127).all()


def test_tiles_cover_and_blend():
    for length in (128, 129, 200, 1000):
        covered = np.zeros(length, int)
        for start in tile_starts(length, 128):
            assert 0 <= start <= length - 128
            covered[start : start + 128] += 1
        assert covered.min() >= 1
        assert all(b - a <= 96 for a, b in zip(tile_starts(length, 128), tile_starts(length, 128)[1:], strict=False))
    window = blending_window(64, 32)
    assert window.shape == (64, 32)
    assert window.min() > 0
    assert window[32, 16] == window.max() == 1


def test_values():
    values = MaskValues(("a", "b"), {7: 0, 9: 1}, frozenset({3}))
    assert values.to_targets(np.array([[7, 9, 3]], np.uint8), "x").tolist() == [[0, 1, IGNORED]]


def test_a_split_that_lacks_its_images_or_training(tmp_path):
    write_pair(tmp_path / "one", "val/photo")
    with pytest.raises(ConfigError, match=r"no folder train; there: val\."):
        set_up(tmp_path / "one")
    write_pair(tmp_path / "two", "photo", split="train")
    (tmp_path / "two/train/images").rename(tmp_path / "two/train/photos")
    with pytest.raises(ConfigError, match="train: no folder images; put images into images"):
        set_up(tmp_path / "two")
    for name in "abcdefg":
        (tmp_path / "three" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"there: a, b, c, d, e\. Put"):
        set_up(tmp_path / "three")


def test_pipelines_whose_results_do_not_fit(folder, tmp_path):
    pad = A.PadIfNeeded(min_height=32, min_width=32, fill_mask=IGNORED)
    for name, transforms in (("size", [pad]), ("floats", [pad, A.RandomCrop(32, 32), A.Normalize()])):
        wrong = pipeline_file(tmp_path / f"{name}.yaml", *transforms)
        with pytest.raises(ConfigError, match=r"gives an image of shape .*leave Normalize and ToTensorV2 out"):
            set_up(folder, augmentation=wrong)


def test_recipes_scale_and_color_as_they_say():
    scale, *_, color = pair_pipeline("strong", 64).transforms
    assert scale.scale_limit == (-0.25, 0.5)
    assert (color.brightness, color.contrast, color.saturation) == ((0.6, 1.4),) * 3


def test_the_share_of_a_single_pixel():
    assert describe_shares({"ground": 1}) == "ground 100.0% of the pixels"
