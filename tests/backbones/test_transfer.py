"""Which weights a name means, what goes into which model, and what is said about it: no weights are fetched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from gn_transfer.backbones import create_backbone, pretrained, resolve_pretrained
from gn_transfer.backbones.pretrained import auto_table, named_weights
from gn_transfer.backbones.released import TrainedNorm
from gn_transfer.backbones.transfer import TransferReport, check_norm, notes_on, trained_as, transfer
from gn_transfer.backbones.weights import Weights
from gn_transfer.config import ConfigError, Norm


@pytest.fixture(scope="module")
def bn_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "bn.safetensors"
    save_file(create_backbone("resnet18", norm="bn", num_classes=5).model.state_dict(), path)
    return str(path)


# What happened to weights


def test_a_copy_lists_norms_apart_from_what_fits(bn_file: str) -> None:
    report = create_backbone("resnet18", norm="gn", num_classes=5, pretrained=bn_file, conversion="copy").report
    assert {"bn1.weight", "layer1.0.bn1.weight"} <= set(report.converted)
    assert not [key for key in report.loaded if "bn" in key]


def test_statistics_that_a_calibration_will_read_are_dropped_in_the_end() -> None:
    model = create_backbone("resnet18", norm="bn", num_classes=5).model
    report = transfer(model.state_dict(), model, weights=Weights("w", "resnet18"), norm="gn", head="fc")
    assert "bn1.running_mean" in report.dropped
    assert "bn1.weight" in report.converted
    assert not [key for key in (*report.loaded, *report.converted) if "running" in key]


@pytest.mark.parametrize("conversion", ["calibrated", "distilled"])
def test_conversions_that_cannot_be(bn_file: str, conversion: pretrained.Conversion) -> None:
    given = {"num_classes": 5, "pretrained": bn_file, "conversion": conversion}
    with pytest.raises(ConfigError, match=rf"conversion={conversion} leads from BN to gn, ln or in, not to .*=gn_ws"):
        create_backbone("resnet18", norm="gn_ws", **given)
    with pytest.raises(ConfigError, match="needs training images; none were given"):
        create_backbone("resnet18", norm="gn", **given)


def test_a_misfit_names_three_tensors_and_groups_are_written_as_options(bn_file: str) -> None:
    three = r"does not fit resnet34: \d+ of \d+ tensors .* among them (\S+ \([\d, ]*\)[,;] ){3}give weights"
    with pytest.raises(ConfigError, match=three):
        create_backbone("resnet34", norm="bn", num_classes=5, pretrained=bn_file)
    weights = Weights("w", "resnet18", norm=TrainedNorm("gn", 16))
    with pytest.raises(ConfigError, match=r"model\.num_groups=16 and model\.group_size=null, not 32 and null"):
        check_norm(weights, {}, "gn", "error", num_groups=32, group_size=None)


def test_a_report_comes_back_from_json() -> None:
    report = TransferReport("w", "resnet18", "gn", loaded=("a", "b"), notes=("n",), r2={"norm": 0.5})
    plain = report.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert TransferReport.from_dict(plain) == report


def test_a_report_in_a_line() -> None:
    head = ("fc.weight", "fc.bias")
    report = TransferReport("w", "resnet18", "bn", ("a", "b"), dropped=head, reinitialized=head)
    said = "w: 2 tensors loaded; a new last layer for your classes (fc.weight, fc.bias)"
    assert report.summary() == said
    assert replace(report, converted=("n",)).summary() == f"{said}; 1 converted"
    assert replace(report, dropped=(), reinitialized=()).summary() == "w: 2 tensors loaded"
    long = replace(report, dropped=tuple("bcde"), reinitialized=("fc.bias",), converted=tuple("fgh"))
    assert long.summary() == (
        "w: 2 tensors loaded; 4 dropped (b, c, d, ...); 1 reinitialized (fc.bias); 3 converted (f, g, h)"
    )


@pytest.mark.parametrize(
    ("architecture", "norm", "words"),
    [
        ("resnet18", "gn_ws", []),
        ("resnetv2_50x1_bit", "gn", ["max-pool"]),
        ("resnetv2_50x1_bit", "gn_ws", ["max-pool", "21k"]),
    ],
)
def test_what_must_be_known_of_bit(architecture: str, norm: Norm, words: list[str]) -> None:
    notes = notes_on(architecture, norm)
    assert [word in note for word, note in zip(words, notes, strict=True)] == [True] * len(words)


def test_norms_that_share_weights() -> None:
    assert {norm: trained_as(norm) for norm in ("bn", "bn_frozen", "bn_sync", "bn_ws", "gn")} == {
        **dict.fromkeys(("bn", "bn_frozen", "bn_sync"), "bn"),
        **{"bn_ws": "bn_ws", "gn": "gn"},
    }


# Which weights a name means


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet17", "bn", None), r"resnet17 is not a model that timm knows; did you mean '\w+'\? use resnet18"),
        (("resnet18.a1.b", "bn", None), r"write model\.backbone=resnet18 and model\.pretrained=a1\.b"),
        (
            ("resnet18", "gn", "auto"),
            r"model\.norm=gn\. There are weights for: resnet50 with gn, resnet18 with bn\.",
        ),
        (("resnet18", "bn", "weights.pth"), "no such file"),
        (("resnet18", "bn", "no/such"), "no such file"),
        (("cnn_mnist", "bn", "a1_in1k"), "there are no weights for cnn_mnist"),
    ],
)
def test_names_that_mean_nothing(arguments: tuple[str, Norm, str | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_pretrained(*arguments)


def test_our_short_resnet_has_two_blocks_in_each_stage() -> None:
    model = create_backbone("resnetv2_26", norm="bn", num_classes=2).model
    assert [len(stage.blocks) for stage in model.stages] == [2, 2, 2, 2]


def test_auto_asks_timm_for_what_the_table_lacks() -> None:
    assert pretrained._auto("resnet152", "bn", "error").startswith("timm:resnet152.")
    assert pretrained._auto("resnet152", "bn_frozen", "error").startswith("timm:resnet152.")
    assert pretrained._auto("resnet152", "gn", "calibrated").startswith("timm:resnet152.")
    assert pretrained._auto("resnetv2_18", "gn", "calibrated") == "gn-transfer:resnetv2_18.bn.tinyimagenet"
    assert pretrained._auto("resnetv2_50", "gn_ws", "calibrated") == "timm:resnetv2_50x1_bit.goog_in21k_ft_in1k"
    for name in ("cnn_mnist", "resnetv2_26", "resnetv2_101d"):  # timm has no weights of the last
        with pytest.raises(ConfigError, match="no weights are known for"):
            pretrained._auto(name, "bn", "error")
    assert ("resnet50", "gn", "timm:resnet50_gn.a1h_in1k") in auto_table()


@pytest.mark.parametrize(
    ("file", "answers", "kind"), [(None, True, "timm"), (None, False, "package"), ("x", True, "package")]
)
def test_without_their_package_weights_come_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, file: str | None, answers: bool, kind: str
) -> None:
    monkeypatch.setattr(pretrained, "find_file", lambda name: file)
    monkeypatch.setattr(pretrained.hub, "answers", lambda: answers)
    assert pretrained._auto("tf_efficientnet_lite0", "bn", "error") == f"{kind}:tf_efficientnet_lite0.in1k"
    tagged = resolve_pretrained("tf_efficientnet_lite0", "bn", "in1k")
    assert tagged is not None
    assert tagged.name == f"{'package' if file else 'timm'}:tf_efficientnet_lite0.in1k"


@pytest.mark.parametrize("name", ["a1_in1k", "resnet18.a1_in1k", "timm:resnet18.a1_in1k"])
def test_a_tag_has_three_names(name: str) -> None:
    weights, other = (resolve_pretrained("resnet18", "bn", each) for each in (name, "resnet34.a1_in1k"))
    assert weights is not None
    assert other is not None
    assert (weights.name, other.architecture) == ("timm:resnet18.a1_in1k", "resnet34")


@pytest.mark.parametrize(
    ("full", "norm", "groups"),
    [
        ("timm:resnetv2_50x1_bit.goog_in21k_ft_in1k", "gn_ws", 32),
        ("timm:resnet50_gn.a1h_in1k", "gn", 32),
        ("timm:resnet18.a1_in1k", "bn", None),
        ("package:tf_efficientnet_lite0.in1k", "bn", None),
    ],
)
def test_a_full_name_says_the_norm(full: str, norm: Norm, groups: int | None) -> None:
    weights = named_weights(full)
    assert (weights.name, weights.norm) == (full, TrainedNorm(norm, groups))


@pytest.mark.parametrize("full", ["timm:resnet18", "timm:resnet18.nothing", "timm:nothing.x"])
def test_full_names_that_timm_does_not_know(full: str) -> None:
    with pytest.raises(ConfigError, match="not a set of weights that timm knows"):
        named_weights(full)
    with pytest.raises(ConfigError, match="which come with gn-transfer, are not"):
        named_weights("gn-transfer:nothing")


def test_an_npz_file_is_of_bit_where_a_bit_stands_for_the_backbone(tmp_path: Path) -> None:
    path = tmp_path / "BiT.npz"
    path.touch()  # not read before a model is built
    bit, other = resolve_pretrained("resnetv2_50", "gn_ws", str(path)), resolve_pretrained("resnet18", "bn", str(path))
    assert bit is not None
    assert other is not None
    assert (bit.architecture, bit.norm) == ("resnetv2_50x1_bit", TrainedNorm("gn_ws", 32))
    assert other.architecture == "resnet18"
