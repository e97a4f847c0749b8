"""convert_norm on real models: what is replaced, what is carried over, what is refused."""

from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
import torchvision
from timm.layers import GroupNormAct as TimmGroupNormAct
from timm.layers import StdConv2d as TimmStdConv2d
from torch import nn

from gn_transfer.config import NORMS, ConfigError
from gn_transfer.layers import (
    FrozenBatchNorm2d,
    GroupNorm,
    GroupNormAct,
    Replacement,
    StdConv2d,
    convert_norm,
    default_groups,
    group_counts,
    standardize_weight,
)
from gn_transfer.layers.convert import standardizable
from gn_transfer.layers.same_padding import StdConv2dSame

RUNNABLE = [norm for norm in NORMS if norm != "bn_sync"]


def small_v1():
    return timm.create_model("resnet18", num_classes=3, layers=[1, 1, 1, 1], channels=[32, 32, 64, 64])


def small_v2():
    return timm.create_model("resnetv2_50", num_classes=3, layers=[1, 1, 1, 1], channels=[128] * 4)


def small_frozen_torchvision():
    return torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=torchvision.ops.FrozenBatchNorm2d, num_classes=3
    )


NETS = {"v1": (small_v1, ()), "v2": (small_v2, ("head",)), "torchvision": (small_frozen_torchvision, ())}


def norms_of(model):
    kinds = (nn.BatchNorm2d, nn.GroupNorm, nn.SyncBatchNorm, torchvision.ops.FrozenBatchNorm2d)
    return [m for m in model.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize("model", NETS)
@pytest.mark.parametrize("norm", RUNNABLE)
def test_every_norm_trains_every_parameter(model, norm):
    build, skip = NETS[model]
    model = convert_norm(build(), norm, skip=skip)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    kinds = {type(m) for m in norms_of(model)}
    if norm in ("bn", "bn_ws"):
        assert all(issubclass(kind, nn.BatchNorm2d) and not issubclass(kind, FrozenBatchNorm2d) for kind in kinds)
    elif norm == "bn_frozen":
        assert all(issubclass(kind, FrozenBatchNorm2d) for kind in kinds)
    elif norm == "none":
        assert not kinds
    else:
        assert all(issubclass(kind, GroupNorm) for kind in kinds)
    assert any(isinstance(m, StdConv2d) for m in model.modules()) == norm.endswith("_ws")


@pytest.mark.parametrize("norm", RUNNABLE)
def test_there_and_back_gives_the_same_function(norm):
    """What carries over does: BN -> norm -> BN keeps statistics where both have them, the affine always."""
    if norm == "none":
        pytest.skip("none keeps no parameters to carry back")
    torch.manual_seed(0)
    model = small_v2().eval()
    for bn in norms_of(model):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.running_mean)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    convert_norm(convert_norm(model, norm, skip=["head"]), "bn", skip=["head"])
    after = model.state_dict()
    assert after.keys() == before.keys()
    keeps_statistics = norm.startswith("bn")
    for key, value in before.items():
        if keeps_statistics or ("running" not in key and "num_batches" not in key):
            assert torch.equal(after[key], value), key


def test_the_head_is_left_alone_and_the_report_lists_the_rest():
    model, report = small_v2(), []
    head = model.head.fc
    convert_norm(model, "gn_ws", skip=["head"], report=report)
    assert model.head.fc is head
    assert type(head) is nn.Conv2d
    names = {replacement.name for replacement in report}
    assert not any(name.startswith("head") for name in names)
    assert "stem.conv" in names
    norm = next(replacement for replacement in report if replacement.name == "norm")
    assert (norm.before, norm.after, norm.channels, norm.groups) == ("BatchNormAct2d", "GroupNormAct", 128, 32)
    assert convert_norm(model, "gn_ws", skip=["head"], report=(again := [])) is model
    assert again == []


def test_timm_layers_give_way_to_ours_with_their_weights():
    theirs = timm.create_model(  # as BiT's, but small
        "resnetv2_50",
        num_classes=3,
        layers=[1, 1, 1, 1],
        channels=[128] * 4,
        stem_type="fixed",
        norm_layer=partial(TimmGroupNormAct, num_groups=32),
        conv_layer=partial(TimmStdConv2d, eps=1e-8),
    )
    nn.init.normal_(theirs.head.fc.weight)
    for block in (theirs.stages[0].blocks[0], theirs.stages[3].blocks[0]):
        nn.init.normal_(block.norm2.weight)
    images = torch.randn(2, 3, 64, 64)
    expected = theirs(images)
    assert any(isinstance(m, TimmStdConv2d) for m in theirs.modules())
    ours = convert_norm(theirs, "gn_ws", skip=["head"])
    assert not any(isinstance(m, TimmStdConv2d) for m in ours.modules())
    torch.testing.assert_close(ours(images), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_torchvision_segmentation_net():
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    )
    convert_norm(model, "gn_ws", group_size=8, skip=["classifier.low_classifier", "classifier.high_classifier"])
    assert model(torch.randn(2, 3, 64, 64))["out"].shape == (2, 4, 64, 64)
    assert type(model.classifier.low_classifier) is nn.Conv2d
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_activation_and_eps_move_along():
    model = nn.Sequential(nn.BatchNorm2d(32, eps=1e-2), timm.layers.BatchNormAct2d(32, act_layer=nn.Tanh))
    act = model[1].act
    convert_norm(model, "gn")
    assert model[0].eps == 1e-2
    assert type(model[0]) is GroupNorm
    assert type(model[1]) is GroupNormAct
    assert model[1].act is act
    convert_norm(model, "none")
    assert type(model[0]) is nn.Identity
    assert list(model[1]) == [act]


def test_shared_and_root_layers():
    norm = nn.BatchNorm2d(32)
    model = nn.ModuleDict({"a": norm, "b": norm})
    convert_norm(model, "gn")
    assert model["a"] is model["b"]
    assert type(convert_norm(nn.BatchNorm2d(32), "ln")) is GroupNorm


def test_a_frozen_parameter_and_the_mode_stay():
    model = nn.Sequential(nn.BatchNorm2d(32), nn.Conv2d(32, 4, 3)).eval().requires_grad_(False)
    convert_norm(model, "gn_ws")
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())


def test_zero_convolutions_are_drawn_anew_under_weight_standardization():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False))
    nn.init.zeros_(model[0].weight)
    convert_norm(model, "gn_ws", report=(report := []))
    assert report[0].reinitialized
    assert model[0].weight.std() > 0.05


def test_one_weight_filters_stay_plain():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4, bias=False), nn.BatchNorm2d(4))
    assert type(convert_norm(model, "gn_ws", depthwise=True)[0]) is nn.Conv2d


def test_standardized_are_the_convolutions_that_a_norm_follows():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False),  # 0: no bias
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),  # 2: depthwise
        nn.Conv2d(8, 8, 1),  # 3: a bias, and a norm at once
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1),  # 5: a bias and no norm, as in squeeze-and-excitation
        nn.Sigmoid(),
    )
    kinds = [type(layer) for layer in convert_norm(deepcopy(model), "gn_ws", num_groups=2)]
    assert [place for place, kind in enumerate(kinds) if kind is StdConv2d] == [0, 3]
    kinds = [type(layer) for layer in convert_norm(model, "gn_ws", num_groups=2, depthwise=True)]
    assert [place for place, kind in enumerate(kinds) if kind is StdConv2d] == [0, 2, 3]


def test_narrow_layers_get_fewer_groups():
    model = nn.Sequential(*map(nn.BatchNorm2d, (16, 24, 64, 7)))
    assert [layer.num_groups for layer in convert_norm(deepcopy(model), "gn")] == [8, 12, 32, 1]
    named = {"0": 4, "1": 3, "2": 2, "3": 7}
    assert group_counts(convert_norm(deepcopy(model), "gn", num_groups=named)) == named
    with pytest.raises(ConfigError, match="num_groups names no groups for 3"):
        convert_norm(deepcopy(model), "gn", num_groups={"0": 4, "1": 3, "2": 2})
    with pytest.raises(ConfigError, match="num_groups=5 does not divide 16 channels of 0"):
        convert_norm(deepcopy(model), "gn", num_groups={"0": 5, "1": 3, "2": 2, "3": 7})


@pytest.mark.parametrize("size", [(9, 9), (8, 11)])
def test_same_padding_is_kept(size):
    theirs = timm.layers.Conv2dSame(4, 6, 3, stride=2, bias=False)
    images = torch.randn(2, 4, *size)
    ours = convert_norm(nn.Sequential(theirs, nn.BatchNorm2d(6)), "gn_ws", num_groups=2)[0]
    assert type(ours) is StdConv2dSame
    assert ours.weight is theirs.weight
    with torch.no_grad():
        expected = deepcopy(theirs)
        expected.weight.copy_(standardize_weight(theirs.weight, ours.eps))
    torch.testing.assert_close(ours(images), expected(images))
    back = convert_norm(nn.Sequential(ours, nn.BatchNorm2d(6)), "bn")[0]
    torch.testing.assert_close(back(images), theirs(images))


def test_norms_over_sequences_stay_and_are_named():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match=r"sequences or volumes stay as they are and look at the batch \(1\): 2"):
        convert_norm(model, "bn_frozen")
    assert type(convert_norm(model, "bn")[2]) is nn.BatchNorm1d


def test_a_model_without_such_norms_is_not_silent():
    with pytest.warns(UserWarning, match="norm=gn replaces nothing") as warned:
        convert_norm(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "gn")
    assert warned[0].filename == __file__  # the warning names the line that converts


def test_refusals_leave_the_net_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(64), nn.ModuleDict({"norm": nn.BatchNorm2d(48)}))
    with pytest.raises(ConfigError, match=r"num_groups=32 does not divide 48 channels of 1\.norm; use one of 1, 2, 3,"):
        convert_norm(model, "gn", num_groups=32)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(ConfigError, match="group_size=9 does not divide 64 channels of 0"):
        convert_norm(model, "gn", group_size=9)
    with pytest.raises(ConfigError, match="num_groups=4 and group_size=8 exclude each other; give one of them"):
        convert_norm(model, "gn", num_groups=4, group_size=8)
    with pytest.raises(ConfigError, match=r"takes a model \(nn\.Module\), not str"):
        convert_norm("resnet18", "gn")
    with pytest.raises(ConfigError, match="did you mean 'gn_ws'"):
        convert_norm(model, "gnws")
    with pytest.raises(ConfigError, match=r"skip names nrom, which the model lacks; did you mean 1\.norm"):
        convert_norm(model, "gn", skip=["nrom"])
    with pytest.raises(ConfigError, match=r"skip names norm, which the model lacks; did you mean 1\.norm\?"):
        convert_norm(model, "gn", skip="norm")
    with pytest.raises(ConfigError, match="ScaledStdConv2d"):
        convert_norm(nn.Sequential(timm.layers.ScaledStdConv2d(4, 4, 3)), "bn")


def test_bn_sync_needs_cuda(monkeypatch):
    monkeypatch.setattr("gn_transfer.layers.convert.cuda_available", lambda: False)
    with pytest.raises(ConfigError, match="bn_sync needs CUDA"):
        convert_norm(small_v2(), "bn_sync")
    monkeypatch.setattr("gn_transfer.layers.convert.cuda_available", lambda: True)
    model = convert_norm(small_v2(), "bn_sync", skip=["head"])
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms_of(model))
    assert all(hasattr(m, "act") for m in norms_of(model))


@pytest.mark.parametrize("norm", ["gn", "ln", "bn_frozen"])
def test_a_converted_norm_keeps_its_dtype(norm):
    model = convert_norm(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).double(), norm)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}


def converted(layer, norm, **options):
    """A single layer, converted."""
    return convert_norm(nn.Sequential(layer), norm, **options)[0]


@pytest.mark.parametrize(("before", "channels", "after"), [(8, 64, 8), (1, 64, 32), (64, 64, 32), (32, 32, 32)])
def test_a_group_norm_keeps_its_groups_unless_it_is_layer_or_instance_norm(before, channels, after):
    """32 groups of one channel each are the usual number, not instance norm."""
    for old in (nn.GroupNorm(before, channels), GroupNorm(channels, before)):
        assert converted(old, "gn").num_groups == after


def test_numbers_of_groups_where_none_is_given():
    assert {norm: converted(nn.BatchNorm2d(48), norm).num_groups for norm in ("ln", "in")} == {"ln": 1, "in": 48}
    assert (default_groups(calibrated=False), default_groups(calibrated=True)) == (32, 4)
    assert not Replacement("0", "BatchNorm2d", "GroupNorm", 8).reinitialized
    with pytest.raises(ConfigError, match="num_groups=0 does not divide 64 channels of 0"):
        converted(nn.BatchNorm2d(64), "gn", num_groups=0)


@pytest.mark.parametrize(
    ("norm", "kind"), [("bn", nn.BatchNorm2d), ("bn_ws", nn.BatchNorm2d), ("bn_frozen", FrozenBatchNorm2d)]
)
def test_a_batch_norm_that_is_what_is_wanted_stays(norm, kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8))
    layer = model[1]
    assert convert_norm(model, norm)[1] is layer


def test_a_frozen_batch_norm_looks_at_its_batch_again():
    assert type(converted(converted(nn.BatchNorm2d(8), "bn_frozen"), "bn")) is nn.BatchNorm2d


def test_the_affine_of_torchvisions_frozen_batch_norm_is_kept_and_learns():
    old = torchvision.ops.FrozenBatchNorm2d(8)
    old.weight.uniform_(0.5, 2.0)
    old.bias.normal_()
    new = converted(old, "gn")
    assert torch.equal(new.weight, old.weight)
    assert torch.equal(new.bias, old.bias)
    assert new.weight.requires_grad


def test_a_frozen_batch_norm_that_names_no_eps_has_the_usual_one():
    """That of DETR has four buffers, and 1e-5 in its forward."""
    old = nn.Module()
    for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
        old.register_buffer(name, torch.full((8,), value))
    new = converted(old, "bn")
    assert (new.eps, new.momentum) == (1e-5, 0.1)


def test_new_statistics_have_the_dtype_of_the_layer():
    assert converted(nn.GroupNorm(4, 8).double(), "bn").running_var.dtype == torch.float64


@pytest.mark.parametrize("part", ["act", "drop"])
def test_a_norm_with_one_part_inside_keeps_it(part):
    old, inside = nn.BatchNorm2d(8), nn.Tanh()
    setattr(old, part, inside)
    new = converted(old, "gn")
    assert type(new) is GroupNormAct
    assert getattr(new, part) is inside
    assert type(new.drop if part == "act" else new.act) is nn.Identity
    assert list(converted(new, "none")) == [inside]


def test_which_convolutions_are_standardized():
    same = partial(timm.layers.Conv2dSame, bias=False)
    plain, one_weight = same(4, 6, 3), same(4, 4, 1, groups=4)
    assert convert_norm(nn.Sequential(plain, nn.BatchNorm2d(6)), "bn_frozen")[0] is plain
    model = nn.Sequential(one_weight, nn.BatchNorm2d(4))
    assert convert_norm(model, "gn_ws", num_groups=2, depthwise=True)[0] is one_weight
    for conv, kind in ((same(2, 1, 1), StdConv2dSame), (nn.Conv2d(3, 1, 3, bias=False), StdConv2d)):  # one filter
        assert type(convert_norm(nn.Sequential(conv, nn.BatchNorm2d(1)), "gn_ws")[0]) is kind
    depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    assert (standardizable({"": depthwise}), standardizable({"": depthwise}, depthwise=True)) == (set(), {depthwise})
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(nn.BatchNorm2d(8)))
    assert type(convert_norm(model, "gn_ws", num_groups=2)[0][0]) is StdConv2d  # whatever contains them


class DoubledConv2d(nn.Conv2d):
    """Computes something else than a convolution."""

    def forward(self, input):
        return 2 * super().forward(input)


def test_a_convolution_that_computes_something_else():
    model = nn.Sequential(DoubledConv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
    conv = model[0]
    with pytest.raises(ConfigError, match="DoubledConv2d, which cannot be made a standardized convolution"):
        convert_norm(model, "gn_ws", num_groups=2)
    assert convert_norm(model, "gn", num_groups=2)[0] is conv


def test_norms_over_sequences_are_named_unless_they_are_skipped():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(4)), nn.BatchNorm1d(4))
    convert_norm(model, "gn", skip=["1", "2"])
    with pytest.warns(UserWarning, match=r"look at the batch \(1\): 1\.0\. Only") as warned:
        convert_norm(model, "bn_frozen", skip=["2"])
    assert warned[0].filename == __file__
    for number, names in ((3, r"0, 1, 2\. Only"), (4, r"0, 1, 2, \.\.\.\. Only")):
        model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(number)), nn.BatchNorm2d(4))
        with pytest.warns(UserWarning, match=rf"look at the batch \({number}\): {names}"):
            convert_norm(model, "gn")


def test_a_guess_names_three_layers():
    model = nn.Sequential(*(nn.ModuleDict({"norm": nn.BatchNorm2d(4)}) for _ in range(4)))
    with pytest.raises(ConfigError, match=r"did you mean 0\.norm or 1\.norm or 2\.norm\?$"):
        convert_norm(model, "gn", skip=["norm"])


def test_a_refused_calibration_leaves_a_single_layer_as_it_was():
    layer = nn.BatchNorm2d(8)
    with pytest.raises(ConfigError, match="reached no norm"):
        convert_norm(layer, "gn", calibration=[])
    assert list(layer.children()) == []
