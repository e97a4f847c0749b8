"""What runs stored of each image, read and measured by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gn_transfer.report.predictions import (
    PixelPredictions,
    Predictions,
    image_weights,
    read_predictions,
    weight_blocks,
)

IMAGES = """path,target,predicted,prob_target,prob_predicted
b.jpg,cat,dog,0.25,0.75
a.jpg,cat,cat,0.875,0.875
c.jpg,dog,dog,0.5,0.5
"""
PIXELS = """path,miou,intersection:cat,union:cat,pixels:cat,intersection:dog,union:dog,pixels:dog
b.png,0.5,1,4,3,6,8,7
a.png,0.5,2,4,3,0,0,0
"""


def read(folder: Path, text: str, **how: bool):
    path = folder / "predictions_val.csv"
    path.write_text(text)
    return read_predictions(path, **how)


def test_classes_of_images(tmp_path):
    found = read(tmp_path, IMAGES)
    assert (found.paths, found.targets, found.predicted) == (
        ["a.jpg", "b.jpg", "c.jpg"],
        ["cat", "cat", "dog"],
        ["cat", "dog", "dog"],
    )
    assert found.prob_target is None
    assert found.value == pytest.approx(2 / 3)
    assert found.guess == pytest.approx(2 / 3)
    assert found.measure(np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])).tolist() == pytest.approx([2 / 3, 0.0])
    assert list(found.opinions())[1] == ("b.jpg", "cat", 0.0, "dog")
    assert found.by_class({"a.jpg", "b.jpg"}) == {"cat": 0.5}
    assert read(tmp_path, IMAGES, probabilities=True).prob_predicted.tolist() == [0.875, 0.75, 0.5]


def test_classes_of_pixels(tmp_path):
    found = read(tmp_path, PIXELS)
    assert (found.paths, found.classes) == (["a.png", "b.png"], ["cat", "dog"])
    assert found.intersection.tolist() == [[2, 0], [1, 6]]
    assert found.union.tolist() == [[4, 0], [4, 8]]
    assert found.pixels.tolist() == [[3, 0], [3, 7]]
    assert found.value == pytest.approx((3 / 8 + 6 / 8) / 2)
    # A class that no image of a sample has is left out of its mean.
    assert found.measure(np.array([[2.0, 0.0], [0.0, 2.0]])).tolist() == pytest.approx([0.5, (1 / 4 + 6 / 8) / 2])


def test_an_image_without_a_labeled_pixel_has_no_iou(tmp_path):
    found = read(tmp_path, PIXELS + "c.png,,0,0,0,0,0,0\n")
    assert np.isnan(found.image_ious).tolist() == [False, False, True]
    assert [path for path, *_ in found.opinions()] == ["a.png", "b.png"]


def test_the_same_images_have_the_same_digest_whatever_their_order(tmp_path):
    lines = IMAGES.splitlines(keepends=True)
    digest = read(tmp_path, IMAGES).digest
    assert len(digest) == 64
    assert read(tmp_path, "".join([lines[0], *lines[:0:-1]])).digest == digest
    assert read(tmp_path, "".join(lines[:3])).digest != digest
    assert read(tmp_path, PIXELS).digest not in (digest, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "path,target\n",
        IMAGES.splitlines()[0],
        PIXELS.splitlines()[0],
        PIXELS.replace(",7\n", "\n"),
        "path,miou,x\n",
        "path,miou\n\n\n",
    ],
)
def test_what_cannot_be_read_is_none(tmp_path, text):
    assert read(tmp_path, text) is None
    assert read_predictions(tmp_path / "missing.csv") is None


def test_blocks_of_samples_are_the_samples(monkeypatch):
    whole = image_weights(7, 3)
    monkeypatch.setattr("gn_transfer.report.predictions._BLOCK", 7 * 600)
    blocks = list(weight_blocks(7, 3))
    assert [len(block) for block in blocks] == [600, 600, 600, 200]
    assert np.array_equal(np.concatenate(blocks), whole)


def test_samples_of_images_add_up_and_differ_between_lists():
    weights = image_weights(5, 0)
    assert weights.sum(axis=1).tolist() == [5.0] * len(weights)
    assert np.array_equal(weights, image_weights(5, 0))
    assert not np.array_equal(weights, image_weights(5, 1))


def test_guessing_pixels_is_the_share_of_the_most_frequent_over_the_classes_that_are_there():
    pixels = np.array([[7.0, 1.0, 0.0]])
    found = PixelPredictions(["0.png"], ["ground", "cat", "dog"], np.zeros((1, 3)), np.ones((1, 3)), pixels=pixels)
    assert found.guess == pytest.approx(7 / 8 / 2)


def test_an_interval_leaves_out_as_much_below_as_above():
    """Of 100 images of which 80 are right, the quartiles are 77 and 83."""
    found = Predictions([str(place) for place in range(100)], ["a"] * 100, ["a"] * 80 + ["b"] * 20)
    assert found.interval(0.5) == pytest.approx((0.77, 0.83))


def test_every_class_of_pixels_has_three_columns(tmp_path):
    classes = ["cat", "dog", "owl", "pug"]
    columns = [f"{kind}:{name}" for name in classes for kind in ("intersection", "union", "pixels")]
    text = "\n".join([f"path,miou,{','.join(columns)}", f"a.png,0.5,{','.join(['1', '2', '1'] * 4)}", ""])
    assert read(tmp_path, text).classes == classes
    assert read(tmp_path, text.replace(",intersection:pug,union:pug,pixels:pug", "")) is None


def test_probabilities_are_in_every_line_or_nothing_is_read(tmp_path):
    assert read(tmp_path, IMAGES + "d.jpg,dog,dog\n", probabilities=True) is None
    wider = "".join(f"{line},more\n" for line in IMAGES.splitlines())
    assert read(tmp_path, wider, probabilities=True).prob_predicted.tolist() == [0.875, 0.75, 0.5]


def test_images_say_their_iou(tmp_path):
    found = read(tmp_path, PIXELS.replace("6,8,7", "7,8,7"))
    assert list(found.opinions()) == [("a.png", "", 0.5, "IoU 50 %"), ("b.png", "", 0.5625, "IoU 56 %")]


@pytest.mark.parametrize("prob", ["nan", "inf", "-0.1", "1.5"])
def test_what_is_no_probability_is_corrupt(tmp_path, prob):
    text = IMAGES.replace("0.25", prob)
    assert read(tmp_path, text, probabilities=True) is None
    assert read(tmp_path, text) is not None
