"""Conversions are kept: the same weights, images and settings are converted once, and anything else anew."""

import pytest
import torch

from gn_transfer.backbones import fitting
from gn_transfer.backbones.create import create_backbone


@pytest.fixture
def computed(monkeypatch):
    """Count the conversions that are computed."""
    found = []
    calibrate = fitting._quality
    monkeypatch.setattr(fitting, "_quality", lambda r2: found.append(1) or calibrate(r2))
    monkeypatch.setattr(fitting, "DISTILLATION_SAMPLES", 8)
    return found


def images(seed=0):
    return torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def convert(cache, *, conversion="calibrated", seed=0, **options):
    return create_backbone(
        "resnetv2_18",
        norm="gn",
        num_classes=3,
        pretrained="auto",
        conversion=conversion,
        calibration=images(seed),
        conversion_cache=cache,
        **options,
    )


def without_head(built):
    return {name: tensor for name, tensor in built.model.state_dict().items() if not name.startswith("head.")}


def assert_same(one, other):
    ours, theirs = without_head(one), without_head(other)
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []
    assert one.report.r2 == other.report.r2


@pytest.mark.parametrize("conversion", ["calibrated", "distilled"])
def test_the_second_conversion_is_the_first(tmp_path, computed, conversion):
    plain = convert(None, conversion=conversion)
    first, second = (convert(tmp_path / "kept", conversion=conversion) for _ in range(2))
    assert len(computed) == 2  # without a cache, and the first with one
    assert_same(plain, first)
    assert_same(first, second)
    assert first.report.notes == second.report.notes
    assert [layer.num_groups for layer in second.model.modules() if isinstance(layer, torch.nn.GroupNorm)] == [
        layer.num_groups for layer in plain.model.modules() if isinstance(layer, torch.nn.GroupNorm)
    ]


def test_another_image_group_conversion_or_stride_is_converted_anew(tmp_path, computed):
    for options in ({}, {"seed": 1}, {"num_groups": 8}, {"conversion": "distilled"}, {"output_stride": 16}):
        convert(tmp_path, **options)
    assert len(computed) == 5
    assert len(list(tmp_path.iterdir())) == 5


def test_a_damaged_file_is_replaced(tmp_path, computed):
    first = convert(tmp_path)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert_same(first, convert(tmp_path))
    assert len(computed) == 2
    assert_same(first, convert(tmp_path))
    assert len(computed) == 2


def test_pixels_are_normalized_as_the_weights_expect():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    found = fitting.TrainingImages(pixels, mean=(0.1, 0.2, 0.5), std=(0.1, 0.5, 0.25)).normalized(pixels)
    assert found.flatten().tolist() == pytest.approx([-1.0, 0.0, 2.0])


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path, computed):
    (tmp_path / "file").write_text("")
    convert(tmp_path / "file" / "kept")
    assert len(computed) == 1
