"""The diagnosis of batch norms: what it measures, by hand, and that it finds what was done to a model on purpose."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gn_transfer.config import ConfigError
from gn_transfer.layers import convert_norm, reestimate_statistics
from gn_transfer.layers.measure_norms import diagnose


def images(number=64, seed=0):
    """Images that differ in brightness and contrast, as photographs do."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.randn(number, 3, 4, 4, generator=generator), size=16, mode="bilinear")
    return smooth * (0.3 + torch.rand(number, 1, 1, 1, generator=generator)) + torch.randn(
        number, 1, 1, 1, generator=generator
    )


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    reestimate_statistics(model, [images()])
    return model.train()


def keys(found):
    return [finding.key for finding in found.findings]


def test_batch_size_1_is_found_and_freezing_comes_first():
    found = diagnose(net(), [images()], batch_size=1)
    assert keys(found) == ["batch", "momentum"]
    assert [remedy.command.partition("... ")[2] for remedy in found.findings[0].remedies] == [
        "--model.norm bn_frozen",
        "--model.norm gn --model.conversion calibrated",
    ]
    assert "corrected_momentum(batch_size)" in found.as_text()
    assert "--batch_norm.momentum corrected" in found.as_text(commands=True)
    assert found.gradient_angle > 45
    assert all(layer.batch_noise > 0.5 for layer in found.layers)
    assert [layer.values_per_channel for layer in found.layers] == [64, 16]
    assert [round(layer.averaged_images) for layer in found.layers] == [19, 19]


def test_batch_size_32_is_fine():
    found = diagnose(net(), [images(16, seed) for seed in range(4)], batch_size=32)
    assert keys(found) == []
    assert found.images == 64
    assert found.as_text().endswith("Nothing to mend: batch size 32 suits this model's norms.")


def test_the_noise_of_a_batch_falls_with_its_size():
    noise = [diagnose(net(), [images()], batch_size=size).layers[0].batch_noise for size in (1, 4, 16)]
    assert noise[0] > 1.5 * noise[1] > 1.5 * noise[2]
    pixels = torch.tensor([1.0, 3.0, 5.0, 7.0]).reshape(4, 1, 1, 1)  # mean 4, variance 20 / 3, batches of 2: 2 and 6
    [layer] = diagnose(nn.BatchNorm2d(1, eps=1e-12), [pixels], batch_size=2).layers
    assert layer.batch_noise == pytest.approx((4 / (20 / 3) / (1 - 2 / 4)) ** 0.5)
    assert diagnose(nn.BatchNorm2d(1), [pixels], batch_size=4).layers[0].batch_noise is None


@pytest.mark.parametrize("norm", ["bn_frozen", "gn"])
def test_norms_that_do_not_look_at_the_batch_are_fine_at_batch_size_1(norm):
    found = diagnose(convert_norm(net(), norm, **({} if norm == "bn_frozen" else {"num_groups": 4})), [images()])
    assert keys(found) == []
    assert found.gradient_angle is None
    assert len(found.layers) == (2 if norm == "bn_frozen" else 0)


def test_spoilt_statistics_are_found_by_layer_whatever_the_layers_before():
    model = net()
    model[1].running_mean += 3 * model[1].running_var.sqrt()
    model[4].running_var *= 9
    found = diagnose(model, [images()], batch_size=32)
    assert keys(found) == ["statistics"]
    first, second = found.layers
    assert first.mean_shift == pytest.approx(3, rel=0.05)
    assert first.variance_factor == pytest.approx(1, rel=0.01)
    assert second.mean_shift == pytest.approx(0, abs=0.01)
    assert second.variance_factor == pytest.approx(9, rel=0.01)
    reestimate_statistics(model, [images()])
    assert keys(diagnose(model, [images()], batch_size=32)) == []


def test_statistics_of_a_frozen_norm_count_too():
    model = convert_norm(net(), "bn_frozen")
    model[4].running_var *= 9
    found = diagnose(model, [images()])
    assert keys(found) == ["statistics"]
    assert found.layers[1].variance_factor == pytest.approx(9, rel=0.01)


def test_accuracy_tells_bad_statistics_from_a_bad_function():
    model, pixels = net(), images()
    with torch.no_grad():
        targets = model.eval()(pixels).argmax(1)
    model[4].running_mean[:16] += 5
    found = diagnose(model, [(pixels, targets)], batch_size=32)
    assert found.accuracy["images"] == 1.0
    assert found.accuracy["running"] < 0.8
    assert "with statistics of these images 100%" in found.findings[0].what


def test_a_single_value_per_channel_stops_the_training():
    model = nn.Sequential(net()[:7], nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8))
    found = diagnose(model, [images()], batch_size=1)
    assert keys(found)[0] == "crash"
    assert "1 would take the mean of a single value" in found.findings[0].what.replace("2 would", "1 would")
    assert found.gradient_angle is found.output_difference is None
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(images()[:1])
    assert "crash" not in keys(diagnose(model, [images()], batch_size=2))


def test_frozen_parameters_with_moving_statistics():
    model = net()
    for layer in model[:6]:
        layer.requires_grad_(False)
    found = diagnose(model, [images()], batch_size=32)
    assert keys(found) == ["moving"]
    assert "1, 4" in found.findings[0].what


def test_statistics_that_never_move_are_averaged_over_no_images():
    model = net()
    model[1].momentum = 0.0
    assert diagnose(model, [images()], batch_size=32).layers[0].averaged_images is None


def test_evaluation_mode_is_undone_by_training():
    model = net()
    model[1].eval()
    [finding] = diagnose(model, [images()], batch_size=32).findings
    assert finding.key == "undone"
    assert finding.what.startswith("1 are in evaluation mode")


def test_the_model_is_left_as_it_was():
    for model in (net(), net().eval(), convert_norm(net(), "bn_frozen")):
        model[4].eval()
        before = deepcopy(model.state_dict())
        modes = [layer.training for layer in model.modules()]
        diagnose(model, [images()])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [layer.training for layer in model.modules()] == modes
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any("forward" in vars(layer) or layer._forward_pre_hooks for layer in model.modules())
        assert all(layer.track_running_stats for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))


def test_the_gradient_is_that_of_a_loss_of_ones_own():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, input):
            return {"out": [self.body(input)]}

    seen = []

    def loss(output, targets):
        seen.append((len(targets), output["out"][0].shape))
        return output["out"][0].square().mean()

    found = diagnose(Named(), [(images(), torch.zeros(64))], batch_size=4, loss=loss)
    assert seen == [(4, (4, 4))] * 4 + [(16, (16, 4))]
    assert found.gradient_angle > 5
    assert found.accuracy == {}


def test_a_segmentation_is_measured_by_pixels():
    model = nn.Sequential(net()[:6], nn.Upsample(scale_factor=4), nn.Conv2d(32, 2, 1))
    targets = torch.randint(0, 2, (64, 16, 16))
    found = diagnose(model, [(images(), targets)], batch_size=32)
    assert set(found.accuracy) == {"running", "batch", "images"}


def test_what_is_found_goes_into_json():
    found = diagnose(net(), [images()], batch_size=1).as_dict()
    assert found["layers"][0]["name"] == "1"
    assert found["findings"][0]["remedies"][0]["code"] == "freeze_batch_norm(model)"


@pytest.mark.parametrize(
    ("batches", "batch_size", "message"),
    [
        ([images(1)], 1, "needs two images at least, and got 1"),
        ([images(4), torch.randn(4, 3, 8, 8)], 1, "images of one size"),
        ([[torch.randn(3, 8, 8)]], 1, "of a detector, diagnose the backbone"),
        ([images()], 0, "batch_size=0 is out of range"),
    ],
)
def test_what_cannot_be_diagnosed(batches, batch_size, message):
    with pytest.raises(ConfigError, match=message):
        diagnose(net(), batches, batch_size=batch_size)
