"""What evaluation sees, checked against Pillow and by hand."""

from __future__ import annotations

import numpy as np
from PIL import Image

from gn_transfer.data.preprocess import preprocess_image


def test_the_centre_is_cut() -> None:
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, 110:190] = 200  # 80 wide, within the 88 of the square
    square = preprocess_image(image, 88)
    assert square.shape == (88, 88, 3)
    assert (square[:, 4:84] == 200).all()
    assert (square[:, :4] == 0).all()
    assert (square[:, 84:] == 0).all()


def test_shrinking_averages_instead_of_aliasing() -> None:
    checkers = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    for size in (56, 112):  # by 4, and by 2
        square = preprocess_image(np.repeat(checkers[:, :, None], 3, 2), size)
        assert np.abs(square.astype(int) - 128).max() <= 1


def test_near_to_resize_then_crop_by_pillow() -> None:
    coarse = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC))
    shrunk = np.asarray(Image.fromarray(image).resize((341, 256), Image.Resampling.BOX))
    expected = shrunk[16:240, 58:282].astype(int)
    assert np.abs(preprocess_image(image, 224) - expected).mean() < 1.5


def test_small_and_long_images() -> None:
    assert preprocess_image(np.full((1, 1, 3), 7, np.uint8), 32).tolist() == np.full((32, 32, 3), 7).tolist()
    assert preprocess_image(np.zeros((2, 60_000, 3), np.uint8), 224).shape == (224, 224, 3)
