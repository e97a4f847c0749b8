"""Calibrated conversion: the closed form, models of other libraries, what is refused."""

import copy
import warnings
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.functional import group_norm

from gn_transfer.config import ConfigError
from gn_transfer.layers import GroupNorm, convert_norm
from gn_transfer.layers.calibrate import BatchNormFunction, solve_affine

pytestmark = pytest.mark.filterwarnings("ignore:calibrated on . images")  # few, so that tests are quick


def settle(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and an affine that are not those of a new model."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if hasattr(layer, "running_mean"):
            size = layer.running_mean.shape
            layer.running_mean.copy_(torch.randn(size, generator=generator) * 0.2)
            layer.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            with torch.no_grad():
                layer.weight.copy_(torch.rand(size, generator=generator) + 0.5)
                layer.bias.copy_(torch.randn(size, generator=generator) * 0.2)
    return model.eval()


def test_least_squares_is_that_of_lstsq():
    generator = torch.Generator().manual_seed(0)
    y, z = torch.randn(2, 40, dtype=torch.float64, generator=generator)
    sums = [torch.tensor([float(v)]) for v in (40, y.sum(), z.sum(), (y * y).sum(), (z * z).sum(), (y * z).sum())]
    gamma, beta, r2 = solve_affine(*(s.double() for s in sums))
    expected = torch.linalg.lstsq(torch.stack([z, torch.ones(40)], 1).double(), y[:, None]).solution.flatten()
    assert torch.allclose(torch.cat([gamma, beta]), expected, atol=1e-6)
    residual = (y - gamma * z - beta).var() / y.var()
    assert r2 == pytest.approx(1 - residual.item(), abs=1e-5)


def test_a_channel_that_never_varies_becomes_its_mean():
    gamma, beta, _ = solve_affine(*(torch.tensor([v, v]) for v in (4.0, 8.0, 4.0, 20.0, 4.0, 8.0)))
    assert gamma.tolist() == [0.0, 0.0]
    assert beta.tolist() == [2.0, 2.0]


def test_the_function_read_off_a_layer_is_that_of_the_layer():
    x = torch.randn(3, 8, 4, 4)
    for layer in (nn.BatchNorm2d(8, eps=0.1), nn.BatchNorm2d(8, affine=False), torchvision.ops.FrozenBatchNorm2d(8)):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        torch.testing.assert_close(BatchNormFunction.of(layer)(x), layer.eval()(x))
    assert BatchNormFunction.of(nn.GroupNorm(2, 8)) is None


def test_one_layer_norm_of_one_image_is_reproduced_exactly():
    """One group and one image: GN differs from BN by an affine map alone, where channels keep their own."""
    torch.manual_seed(0)
    model = settle(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    )
    x = torch.randn(1, 3, 16, 16)
    expected = model(x)
    convert_norm(model, "ln", calibration=[x], report=(report := []))
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    assert [round(found.r2, 4) for found in report] == [1.0, 1.0]


def error(model: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - expected).square().mean() / expected.var())


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18"])
@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_calibrated_is_nearer_than_copied_on_other_images(name, norm):
    """Norms alone (v1) and norms that contain their activation (v2)."""
    torch.manual_seed(0)
    models = [settle(timm.create_model(name, num_classes=5)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    head = models[0].pretrained_cfg["classifier"]
    seen, unseen = torch.randn(2, 24, 3, 64, 64)
    with torch.no_grad():
        expected = models[0](unseen)
    convert_norm(models[0], norm, skip=[head])
    convert_norm(models[1], norm, skip=[head], calibration=seen.split(8), report=(report := []))
    assert error(models[1], unseen, expected) < 0.5 * error(models[0], unseen, expected)
    norms = [found for found in report if found.groups]
    assert all(0 < found.r2 <= 1 for found in norms)
    assert all(layer.forward.__func__ is type(layer).forward for layer in models[1].modules())


def test_statistics_modes_and_the_rest_of_the_net_stay():
    model = settle(timm.create_model("resnet18", num_classes=5)).train()
    model.layer1.eval()
    conv = {key: value.clone() for key, value in model.state_dict().items() if "conv" in key or "fc" in key}
    convert_norm(model, "gn", skip=["fc"], calibration=[torch.randn(4, 3, 64, 64)])
    assert model.training
    assert not model.layer1.training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in conv.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batches_may_come_as_a_data_loader_gives_them():
    torch.manual_seed(0)
    models = [settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))]
    models += [copy.deepcopy(models[0]), copy.deepcopy(models[0])]
    images, targets = torch.randn(4, 3, 12, 12), torch.zeros(4)
    for model, batch in zip(models, (images, [images, targets], (images, targets)), strict=True):
        convert_norm(model, "gn", calibration=[batch])
    assert all(torch.equal(model[3].weight, models[0][3].weight) for model in models)


def test_segmentation_net():
    torch.manual_seed(0)
    build = torchvision.models.segmentation.lraspp_mobilenet_v3_large
    model = settle(build(weights=None, weights_backbone=None, num_classes=4))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)["out"]
    kwargs = {"group_size": 8, "skip": ["classifier.low_classifier", "classifier.high_classifier"]}
    convert_norm(model, "gn", **kwargs, calibration=[x], report=(report := []))
    calibrated = (model(x)["out"] - expected).square().mean() / expected.var()
    assert calibrated < 0.9
    assert all(found.r2 is not None for found in report if found.groups)


@pytest.mark.slow
def test_detection_net_with_frozen_norms_and_norms_in_the_region_heads():
    """FrozenBatchNorm2d in the backbone; BN in the box head sees proposals, whose rows have no counterpart."""
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    for name, layer in list(model.backbone.body.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            frozen = torchvision.ops.FrozenBatchNorm2d(layer.num_features)
            setattr(model.backbone.body.get_submodule(parent), child, frozen)
    settle(model)
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    convert_norm(model, "gn", calibration=[images], report=(report := []))
    kinds = {found.before for found in report if found.groups}
    assert kinds == {"FrozenBatchNorm2d", "BatchNorm2d"}
    by_name = {found.name: found.r2 for found in report if found.groups}
    assert all(value is not None and value > 0 for value in by_name.values())
    assert any("roi_heads" in name for name in by_name)
    with torch.no_grad():
        assert len(model(images)) == 2
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert any(isinstance(layer, GroupNorm) for layer in model.modules())


@pytest.mark.parametrize(
    ("model", "norm", "batches", "message"),
    [
        (
            nn.Sequential(nn.BatchNorm2d(32)),
            "gn_ws",
            [torch.ones(2, 32, 4, 4)],
            "leads from batch norm to gn, ln or in",
        ),
        (nn.Sequential(nn.GroupNorm(4, 32)), "gn", [torch.ones(2, 32, 4, 4)], "no batch norm with running statistics"),
        (nn.Sequential(nn.BatchNorm2d(32)), "gn", [], "reached no norm"),
        (nn.Sequential(nn.BatchNorm2d(32)), "gn", [torch.full((2, 32, 4, 4), torch.inf)], "not finite"),
        (
            nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32)),
            "gn",
            [torch.ones(2, 4, 8, 8)],
            r"cannot compute a batch of the calibration \(shape \(2, 4, 8, 8\), torch.float32\)",
        ),
    ],
)
def test_refusals_leave_the_model_as_it_was(model, norm, batches, message):
    before = copy.deepcopy(model)
    with pytest.raises(ConfigError, match=message):
        convert_norm(model, norm, calibration=batches)
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in before.modules()]
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("number", "warns"), [(7, True), (8, False)])
def test_few_images_are_warned_about(number, warns):
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        convert_norm(model, "gn", calibration=[torch.randn(number, 3, 6, 6)])
    assert any(f"calibrated on {number} images, which fits them" in str(one.message) for one in said) == warns


@pytest.mark.parametrize("lacking", ["running_mean", "running_var"])
def test_a_layer_without_one_of_its_statistics_has_no_function(lacking):
    layer = nn.BatchNorm2d(2)
    assert BatchNormFunction.of(layer) is not None
    setattr(layer, lacking, None)
    assert BatchNormFunction.of(layer) is None


def test_a_later_layer_is_fitted_to_what_the_converted_model_gives_it():
    """Least squares of the second batch norm's output on the second group norm's normalized input, by channel."""
    torch.manual_seed(0)
    original = settle(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    )
    images = torch.randn(6, 3, 12, 12)
    converted = convert_norm(copy.deepcopy(original), "gn", num_groups=2, calibration=[images])
    with torch.no_grad():
        y = original(images).transpose(0, 1).flatten(1).double()
        z = nn.functional.group_norm(converted[:4](images), 2).transpose(0, 1).flatten(1).double()
    for channel in range(8):
        columns = torch.stack([z[channel], torch.ones_like(z[channel])], 1)
        gamma, beta = torch.linalg.lstsq(columns, y[channel][:, None]).solution.flatten()
        assert converted[4].weight[channel].item() == pytest.approx(gamma.item(), abs=1e-4)
        assert converted[4].bias[channel].item() == pytest.approx(beta.item(), abs=1e-4)


def test_images_are_counted_once_however_many_layers_they_reach():
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    with pytest.warns(UserWarning, match="calibrated on 5 images") as warned:
        convert_norm(model, "gn", calibration=[torch.randn(5, 3, 8, 8)])
    assert warned[0].filename == __file__  # the warning names the line that converts


def assert_least_squares(norm, original, inputs):
    """A layer norm gives the outputs of a batch norm as nearly as any affine map can, channel by channel.

    Args:
        norm: The fitted layer norm.
        original: The batch norm.
        inputs: Its inputs, batches of shape ``(N, C, H, W)``.
    """
    with torch.no_grad():
        ys, zs = (
            [f(x).transpose(0, 1).flatten(1) for x in inputs] for f in (original, partial(group_norm, num_groups=1))
        )
    for channel, (y, z) in enumerate(zip(torch.cat(ys, 1).double(), torch.cat(zs, 1).double(), strict=True)):
        fitted = torch.linalg.lstsq(torch.stack([z, torch.ones_like(z)], 1), y[:, None]).solution.flatten()
        assert [norm.weight[channel].item(), norm.bias[channel].item()] == pytest.approx(fitted.tolist(), abs=1e-4)


class Patches(nn.Module):
    """Rows that are no images, as the heads of a detection model see them."""

    def forward(self, x):
        return x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def test_rows_that_are_no_images_are_fitted_to_their_own():
    torch.manual_seed(0)
    original = settle(nn.Sequential(Patches(), nn.BatchNorm2d(3), nn.ReLU()))
    images = torch.randn(2, 3, 8, 8)
    fitted = convert_norm(copy.deepcopy(original), "ln", calibration=[images])
    assert_least_squares(fitted[1], original[1], [original[0](images)])


def test_batches_count_by_their_positions():
    torch.manual_seed(0)
    original = settle(nn.Sequential(nn.BatchNorm2d(4)))
    batches = [torch.randn(2, 4, 3, 3) + 1, 3 * torch.randn(2, 4, 9, 9)]
    fitted = convert_norm(copy.deepcopy(original), "ln", calibration=batches)
    assert_least_squares(fitted[0], original[0], batches)


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Dropout(0.5), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),  # off during the calibration
        (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.1)),
        (nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1)),
    ],
)
def test_one_image_is_reproduced_exactly_whatever_the_layers(layers):
    torch.manual_seed(0)
    model, x = settle(nn.Sequential(*layers)), torch.randn(1, 3, 16, 16)
    expected = model(x)
    convert_norm(model.train(), "ln", calibration=[x])
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-3, atol=1e-3)


def test_layers_that_are_as_good_as_lost_are_named():
    """Images that differ by their mean alone, which instance norm takes away."""
    torch.manual_seed(0)
    model = settle(nn.Sequential(nn.BatchNorm2d(2)))
    images = torch.randn(8, 2, 1, 1) + 0.01 * torch.randn(8, 2, 4, 4)
    with pytest.warns(UserWarning, match="1 of 1 calibrated norms reproduce less than 10% of") as warned:
        convert_norm(model, "in", calibration=[images])
    assert warned[0].filename == __file__


def test_a_layer_that_names_no_eps_has_the_usual_one():
    layer = nn.Module()
    layer.running_mean, layer.running_var = torch.zeros(2), torch.ones(2)
    assert BatchNormFunction.of(layer).scale.tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
