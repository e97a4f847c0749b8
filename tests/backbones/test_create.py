import json
import math
import time
import warnings
import zipfile

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from torch import nn

from gn_transfer.backbones.create import check_input, create_backbone, parameter_depths, resolve_pretrained
from gn_transfer.config import ConfigError
from gn_transfer.layers import StdConv2d

WITHOUT_CUDA = ("bn", "bn_frozen", "gn", "gn_ws", "bn_ws", "ln", "in", "none")


def small(norm, **kwargs):
    return create_backbone("resnet18", norm=norm, num_classes=5, **kwargs)


@pytest.fixture(scope="module")
def bn_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "bn.safetensors"
    save_file(small("bn").model.state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18", "resnetv2_26"])
@pytest.mark.parametrize("norm", ["bn", "gn_ws"])
def test_the_head_is_neither_normalized_nor_standardized(name, norm):
    backbone = create_backbone(name, norm=norm, num_classes=7)
    head = backbone.model.get_submodule(backbone.head)
    assert not isinstance(head, StdConv2d)
    assert head.weight.shape[0] == 7
    standardized = [module for module in backbone.model.modules() if isinstance(module, StdConv2d)]
    assert bool(standardized) == (norm == "gn_ws")


def test_no_convolution_starts_at_zero_under_weight_standardization():
    for name in ("resnet18", "resnetv2_18"):
        for module in create_backbone(name, norm="gn_ws", num_classes=2).model.modules():
            if isinstance(module, StdConv2d):
                assert module.weight.abs().sum() > 0


def test_without_norm_each_block_starts_as_the_identity():
    model = create_backbone("resnetv2_18", norm="none", num_classes=2).model.eval()
    x = torch.randn(2, 64, 8, 8)
    block = model.stages[0].blocks[0]
    assert torch.equal(block(x), x)


def test_weights_of_the_same_norm_are_loaded_except_the_head(bn_file):
    backbone = small("bn", pretrained=str(bn_file))
    assert set(backbone.report.reinitialized) == {"fc.weight", "fc.bias"}
    assert backbone.report.source == str(bn_file)
    assert not backbone.report.converted
    assert "conv1.weight" in backbone.report.loaded


@pytest.mark.parametrize("norm", ["gn", "gn_ws", "ln", "in", "none"])
def test_bn_weights_into_another_norm_are_refused_by_name(bn_file, norm):
    with pytest.raises(ConfigError, match=rf"trained with BatchNorm and model.norm={norm}.*model.conversion=copy"):
        small(norm, pretrained=str(bn_file))


def test_bn_weights_are_copied_when_asked_for_by_name(bn_file):
    report = small("gn", pretrained=str(bn_file), conversion="copy").report
    assert "bn1.weight" in report.converted
    assert "bn1.running_mean" in report.dropped
    assert "conv1.weight" in report.loaded


def test_gn_weights_into_bn_are_refused(tmp_path):
    path = tmp_path / "gn.safetensors"
    save_file(small("gn").model.state_dict(), path)
    with pytest.raises(ConfigError, match="trained without BatchNorm"):
        small("bn", pretrained=str(path))


def test_weights_of_another_architecture(bn_file):
    with pytest.raises(ConfigError, match=r"does not fit resnet34: \d+ of \d+ tensors"):
        create_backbone("resnet34", norm="bn", num_classes=5, pretrained=str(bn_file))


def test_a_tensor_of_another_shape_under_the_right_name(tmp_path):
    state = small("bn").model.state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ConfigError, match=r"1 of \d+ tensors .* layer1\.0\.conv1\.weight \(64, 64, 3, 3\)"):
        small("bn", pretrained=str(tmp_path / "odd.safetensors"))


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_a_small_archive_of_much_is_not_read(tmp_path, suffix):
    with zipfile.ZipFile(tmp_path / f"bomb{suffix}", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**24))
    with pytest.raises(ConfigError, match="compressed to less than a tenth, as no weights are; refused"):
        small("bn", pretrained=str(tmp_path / f"bomb{suffix}"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_a_truncated_file(tmp_path, bn_file, suffix):
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(bn_file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        small("bn", pretrained=str(path))


def test_auto_picks_architecture_and_tag_for_the_norm():
    names = {
        ("resnetv2_50", "gn_ws"): "timm:resnetv2_50x1_bit.goog_in21k_ft_in1k",
        ("resnetv2_50", "bn_frozen"): "timm:resnetv2_50.a1h_in1k",
        ("resnet50", "gn"): "timm:resnet50_gn.a1h_in1k",
    }
    for (backbone, norm), name in names.items():
        weights = resolve_pretrained(backbone, norm, "auto")
        assert weights.name == name
        assert weights.architecture == name.partition(":")[2].partition(".")[0]
    for conversion in ("calibrated", "distilled"):
        assert resolve_pretrained("resnetv2_50", "gn", "auto", conversion).name == "timm:resnetv2_50.a1h_in1k"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet17", "bn", None), "resnet17 is not a model"),
        (("resnet18.a1_in1k", "bn", None), "write model.backbone=resnet18 and model.pretrained=a1_in1k"),
        (("resnet18", "gn", "auto"), "no weights are known for model.backbone=resnet18 with model.norm=gn"),
        (("resnet18", "bn", "a1_in2k"), "did you mean 'a1_in1k'"),
        (("resnet18", "bn", "no/such/file.pth"), "no such file"),
    ],
)
def test_what_cannot_be_resolved_names_the_way_out(arguments, message):
    with pytest.raises(ConfigError, match=message):
        resolve_pretrained(*arguments)


class RunsCode:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"state_dict": {"w": RunsCode()}}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="could run code, and was refused"):
        small("bn", pretrained=str(tmp_path / "evil.pth"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_folder_in_timms_layout_states_architecture_and_pixels(tmp_path, bn_file, name):
    folder = tmp_path / "resnet18.mine"
    folder.mkdir()
    state = load_file(bn_file)
    save_file(state, folder / name) if name.endswith("safetensors") else torch.save(state, folder / name)
    stated = {"tag": "a1_in1k", "mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"architecture": "resnet18", "pretrained_cfg": stated}
    (folder / "config.json").write_text(json.dumps(config))
    for path in (folder, folder / name):
        backbone = small("bn", pretrained=str(path))
        assert torch.equal(backbone.model.conv1.weight, state["conv1.weight"])
        assert (backbone.mean, backbone.std) == ((0.5,) * 3, (0.25,) * 3)
        assert backbone.report.pretrained_on == "ImageNet-1k (1.3 M images)"
    with pytest.raises(ConfigError, match=r"holds weights of resnet18, model\.backbone is resnet34"):
        create_backbone("resnet34", norm="bn", num_classes=5, pretrained=str(folder))
    for key, value in (("std", 0), ("std", math.nan), ("mean", math.inf), ("mean", 10**400)):
        (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {**stated, key: [value] * 3}}))
        with pytest.raises(ConfigError, match=r"is not timm's config\.json"):
            small("bn", pretrained=str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"is not timm's config\.json"):
        small("bn", pretrained=str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        small("bn", pretrained=str(tmp_path / "empty"))


def test_a_checkpoint_of_ours_states_its_norm_groups_and_pixels(tmp_path):
    built = small("gn", num_groups=16)
    ours = {
        "architecture": {
            "architecture": "resnet18",
            "norm": "gn",
            "num_groups": 16,
            "group_size": None,
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
        },
        "transfer_report": built.report.as_dict(),
        "config": {"data": {"class_path": "gn_transfer.data.Pets"}},
    }
    path = tmp_path / "best.ckpt"
    state = {f"model.{key}": value for key, value in built.model.state_dict().items()}
    torch.save({"state_dict": state, "gn_transfer": ours}, path)
    backbone = small("gn", num_groups=16, pretrained=str(path))
    assert (backbone.mean, backbone.report.pretrained_on) == ((0.1, 0.2, 0.3), "Pets")
    with pytest.raises(ConfigError, match=r"was trained with model\.num_groups=16"):
        small("gn", pretrained=str(path))
    with pytest.raises(ConfigError, match=r"was trained with norm gn, not with model\.norm=gn_ws"):
        small("gn_ws", num_groups=16, pretrained=str(path))


@pytest.mark.slow
def test_npz_files_of_bit(tmp_path):
    """Google's own layout, written from a model of timm's, loads into resnetv2_50 as BiT's architecture."""
    model = timm.create_model("resnetv2_50x1_bit").eval()
    arrays = {"head/conv2d/kernel": model.head.fc.weight, "head/conv2d/bias": model.head.fc.bias}
    arrays |= {"root_block/standardized_conv2d/kernel": model.stem.conv.weight}
    arrays |= {"group_norm/gamma": model.norm.weight, "group_norm/beta": model.norm.bias}
    for i, stage in enumerate(model.stages, 1):
        for j, block in enumerate(stage.blocks, 1):
            unit = f"block{i}/unit{j:02d}"
            for letter, number in zip("abc", "123", strict=True):
                norm = getattr(block, f"norm{number}")
                arrays[f"{unit}/{letter}/standardized_conv2d/kernel"] = getattr(block, f"conv{number}").weight
                arrays |= {
                    f"{unit}/{letter}/group_norm/{k}": v for k, v in (("gamma", norm.weight), ("beta", norm.bias))
                }
            if block.downsample is not None:
                arrays[f"{unit}/a/proj/standardized_conv2d/kernel"] = block.downsample.conv.weight
    path = tmp_path / "BiT-M-R50x1.npz"
    values = {f"resnet/{key}": value.detach().numpy() for key, value in arrays.items()}
    np.savez(path, **{key: v.transpose(2, 3, 1, 0) if v.ndim == 4 else v for key, v in values.items()})
    backbone = create_backbone("resnetv2_50", norm="gn_ws", num_classes=5, pretrained=str(path))
    assert backbone.report.architecture == "resnetv2_50x1_bit"
    assert backbone.mean == (0.5, 0.5, 0.5)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.model.eval().forward_features(x), model.forward_features(x), rtol=1e-3, atol=1e-3
        )
    with pytest.raises(ConfigError, match=r"was trained with norm gn_ws, not with model\.norm=gn"):
        create_backbone("resnetv2_50", norm="gn", num_classes=5, pretrained=str(path))


def test_groups_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"model.num_groups=48 does not divide 64 channels of"):
        small("gn", num_groups=48)


@pytest.mark.parametrize("norm", ["bn", "in"])
def test_a_norm_over_a_single_value_is_refused_before_training(norm):
    model = small(norm).model
    with pytest.raises(ConfigError, match=r"data.img_size=32 with data.batch_size=1.*model.norm=gn_ws"):
        check_input(model, norm, batch_size=1, img_size=32)
    check_input(model, norm, batch_size=1, img_size=64)


def test_checking_leaves_the_net_untouched():
    model = small("bn").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_input(model, "bn", batch_size=2, img_size=64)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_depths_rise_from_stem_to_head():
    backbone = create_backbone("resnetv2_18", norm="gn_ws", num_classes=2)
    depths = parameter_depths(backbone.model)
    assert depths["stem.conv.weight"] == 0
    assert depths["head.fc.weight"] == max(depths.values())
    assert set(depths) == {name for name, _ in backbone.model.named_parameters()}


@pytest.mark.parametrize("norm", WITHOUT_CUDA)
@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18", "resnet50"])
def test_every_norm_trains_two_steps_at_batch_size_1(name, norm):
    torch.manual_seed(0)
    model = create_backbone(name, norm=norm, num_classes=3).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = nn.functional.cross_entropy(model(torch.randn(1, 3, 64, 64)), torch.tensor([1]))
        loss.backward()
        assert torch.isfinite(loss)
        missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing
        optimizer.step()


def test_synchronized_bn_needs_cuda():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match="bn_sync"):
        small("bn_sync")


def test_without_a_network_the_message_says_what_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing answers
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"a1_in1k are not on this machine.*set model.pretrained to its path"):
        small("bn", pretrained="auto")
    assert time.monotonic() - began < 10
    assert not hub.HF_HUB_OFFLINE
