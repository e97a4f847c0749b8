"""Mixup and CutMix along an accumulation step, whatever the micro-batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gn_transfer.backbones.model_config import ModelConfig
from gn_transfer.config import ConfigError
from gn_transfer.training.accumulation import MicroBatch
from gn_transfer.training.classification import RegularizationConfig, TransferClassifier
from gn_transfer.training.mixing import MixupCutmix, cut_box

PIXELS = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8)


def mix(size: int, mixup: float, cutmix: float, step: int = 0) -> list[torch.Tensor]:
    """Mix an accumulation step of eight in micro-batches of ``size``."""
    mixer = MixupCutmix(mixup, cutmix, (5, 0))
    parts = [
        mixer(PIXELS[start : start + size], TARGETS[start : start + size], step=step, offset=start)
        for start in range(0, 8, size)
    ]
    return [torch.cat([part[field] for part in parts]) for field in range(3)]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_any_micro_batch_gives_the_same_mixture(mixup: float, cutmix: float) -> None:
    whole = mix(8, mixup, cutmix)
    for size in (1, 2, 3, 4):
        for one, other in zip(mix(size, mixup, cutmix), whole, strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(mix(8, mixup, cutmix, step=1)[0], whole[0])


def test_mixup_is_the_weighted_mean_with_the_image_before() -> None:
    pixels, partners, weights = mix(1, 0.4, 0.0)
    assert weights[0] == 1.0
    assert torch.equal(pixels[0], PIXELS[0])
    assert partners.tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    for place in range(1, 8):
        expected = weights[place] * PIXELS[place] + (1 - weights[place]) * PIXELS[place - 1]
        torch.testing.assert_close(pixels[place], expected)


def test_cutmix_weighs_by_area() -> None:
    pixels, _, weights = mix(2, 0.0, 1.0)
    for place in range(1, 8):
        own = (pixels[place] == PIXELS[place]).all(dim=0)
        assert torch.equal(pixels[place][:, ~own], PIXELS[place - 1][:, ~own])
        assert own.float().mean().item() == pytest.approx(weights[place].item())


def test_the_weights_follow_beta() -> None:
    mixer = MixupCutmix(0.4, 0.0, (0, 0))
    pixels, targets = torch.zeros(2001, 1, 1, 1), torch.zeros(2001, dtype=torch.int64)
    weights = mixer(pixels, targets, step=0, offset=0).weights[1:].numpy()
    expected = np.random.default_rng(1).beta(0.4, 0.4, 100_000)
    np.testing.assert_allclose(np.quantile(weights, [0.1, 0.5, 0.9]), np.quantile(expected, [0.1, 0.5, 0.9]), atol=0.06)


def test_a_box_at_the_edge_is_cut_off() -> None:
    assert cut_box(0.0, 0.5, 0.5, 10, 10) == (0.0, (0, 0, 10, 10))
    assert cut_box(1.0, 0.5, 0.5, 10, 10) == (1.0, (5, 5, 5, 5))
    weight, (top, left, bottom, right) = cut_box(0.75, 0.99, 0.99, 10, 10)  # type: ignore[misc]
    assert (top, left, bottom, right) == (7, 7, 10, 10)
    assert weight == pytest.approx(0.91)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_an_accumulation_step_does_not_depend_on_the_micro_batch(smoothing: float) -> None:
    images = (torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255).byte()
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    gradients = []
    for size in (1, 2, 6):
        torch.manual_seed(0)
        task = TransferClassifier(
            ModelConfig("resnet18", "gn"), regularization=RegularizationConfig(smoothing, 0.4, 1.0)
        )
        task.build(["a", "b", "c"])
        task._mixer = task.create_mixer(0, 0)
        for start in range(0, 6, size):
            task.micro_batch = MicroBatch(step=3, offset=start)
            loss = task.training_step((images[start : start + size], targets[start : start + size]), 0)["loss"]
            (loss * size / 6).backward()
        assert task.model is not None
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in task.model.parameters()]))  # type: ignore[union-attr]
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_evaluation_mixes_nothing() -> None:
    task = TransferClassifier(ModelConfig("resnet18", "gn"), regularization=RegularizationConfig(mixup=0.4))
    task.build(["a", "b"])
    task._mixer = task.create_mixer(0, 0)
    assert task._mixer is not None
    logits = task.validation_step((torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.tensor([0, 1])), 0)
    assert task._mixer._before is None
    assert torch.isfinite(logits).all()


def test_an_accumulation_step_of_one_is_refused() -> None:
    task = TransferClassifier(ModelConfig("resnet18", "gn"), regularization=RegularizationConfig(mixup=0.4))
    with pytest.raises(
        ConfigError, match=r"regularization\.mixup=0\.4.*accumulation\.effective_batch_size to 2 or more"
    ):
        task.check_accumulation(1)
    task.check_accumulation(2)
    TransferClassifier(ModelConfig("resnet18", "gn")).check_accumulation(1)


def test_with_mixup_and_cutmix_half_of_the_images_are_cut() -> None:
    mixer = MixupCutmix(0.4, 1.0, (0, 0))
    cut = [mixer._random_mixture(0, position, 16, 16).box is not None for position in range(1, 2001)]
    assert sum(cut) / len(cut) == pytest.approx(0.5, abs=0.05)


def test_cutmix_of_wide_images() -> None:
    pixels = torch.rand(40, 1, 4, 16, generator=torch.Generator().manual_seed(0))
    mixed = MixupCutmix(0.0, 1.0, (0, 0))(pixels, torch.arange(40), step=0, offset=0)
    own = (mixed.pixels == pixels).all(dim=1).float().mean((1, 2))
    torch.testing.assert_close(own[1:], mixed.weights[1:].to(own.dtype), atol=1e-6, rtol=0)
