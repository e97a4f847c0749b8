"""Encoders and decoders: shapes, norms, weights, unused parameters; what cannot be built is refused."""

import pytest
import torch
from torch import nn

from gn_transfer.backbones import parameter_depths
from gn_transfer.backbones.create import check_input, create_backbone
from gn_transfer.backbones.model_config import ModelConfig, build_backbone, rebuild_backbone
from gn_transfer.backbones.segmentation import Encoder
from gn_transfer.config import ConfigError
from gn_transfer.layers import FrozenBatchNorm2d, GroupNorm, StdConv2d, group_counts

DECODERS = ("unet", "fpn", "deeplabv3plus", "upernet")


def built(backbone="resnetv2_18", norm="gn", **options):
    return build_backbone(ModelConfig(backbone, norm, **options), 3).model


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("backbone", ["resnetv2_18", "tf_efficientnet_lite0"])
def test_logits_have_the_size_of_the_image_and_every_parameter_a_gradient(backbone, decoder):
    model = built(backbone, decoder=decoder).train()
    logits = model(torch.randn(1, 3, 64, 96))
    assert logits.shape == (1, 3, 64, 96)
    logits.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("backbone", ["ghostnet_050", "rexnet_100", "selecsls42b", "vgg11_bn", "dla46_c"])
def test_encoders_of_other_families(backbone):
    """With layers behind the last map, a map of the image's own size, or maps beyond stride 32."""
    encoder = Encoder(create_backbone(backbone, norm="gn", num_classes=2).model, in_chans=3)
    maps = encoder(torch.randn(1, 3, 64, 64))
    assert [each.shape[2] for each in maps] == [64, 32, 16, 8, 4, 2]
    assert [each.shape[1] for each in maps] == encoder.channels
    sum(each.sum() for each in maps).backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_the_maps_are_those_of_the_model_before_its_head():
    model = create_backbone("resnetv2_18", norm="gn_ws", num_classes=2).model.eval()
    pixels = torch.randn(1, 3, 64, 64)
    expected = model.forward_features(pixels)
    torch.testing.assert_close(Encoder(model, 3)(pixels)[-1], expected)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("backbone", "norm", "pretrained"),
    [
        ("resnetv2_18", "gn_ws", "auto"),
        ("resnetv2_18", "bn", "auto"),
        ("tf_efficientnet_lite0", "bn", "auto"),
        ("densenet121", "gn_ws", None),
    ],
)
def test_the_last_map_matters_to_a_new_decoder(backbone, norm, pretrained, decoder):
    """The maps before it may be sums that no norm has seen, with values up to 200 times those of the last."""
    if backbone == "densenet121" and decoder == "deeplabv3plus":
        pytest.skip("has no output stride of 16")
    torch.manual_seed(0)
    model = built(backbone, norm, decoder=decoder, decoder_norm="gn", pretrained=pretrained).eval()
    maps = model.encoder(torch.rand(1, 3, 128, 128) * 2 - 1)
    logits = model.decoder(maps)
    without = model.decoder([*maps[:-1], torch.zeros_like(maps[-1])])
    assert (without - logits).std() > 0.1 * logits.std()


@pytest.mark.parametrize(
    ("backbone", "decoder", "expected"),
    [
        ("resnetv2_18", "unet", ["1", "2", "3", "4"]),
        ("tf_efficientnet_lite0", "fpn", ["2", "3", "4"]),
        ("resnet18", "deeplabv3plus", []),
        ("resnet18", "upernet", []),
        ("starnet_s1", "unet", ["2", "3", "4"]),  # its first map has stride 4
    ],
)
def test_maps_that_a_decoder_mixes_get_norms(backbone, decoder, expected):
    assert list(built(backbone, "bn", decoder=decoder).decoder.map_norms) == expected


@pytest.mark.parametrize(
    ("norm", "decoder_norm", "in_encoder", "in_decoder"),
    [
        ("gn_ws", None, GroupNorm, GroupNorm),
        ("bn_frozen", None, FrozenBatchNorm2d, GroupNorm),
        ("bn_frozen", "bn", FrozenBatchNorm2d, nn.BatchNorm2d),
        ("bn", "gn", nn.BatchNorm2d, GroupNorm),
    ],
)
@pytest.mark.parametrize("decoder", DECODERS)
def test_norms_of_encoder_and_decoder(norm, decoder_norm, in_encoder, in_decoder, decoder):
    model = built(norm=norm, decoder=decoder, decoder_norm=decoder_norm)
    for part, kind in ((model.encoder, in_encoder), (model.decoder, in_decoder)):
        norms = [m for m in part.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
        assert norms
        assert all(isinstance(each, kind) for each in norms)
    standardized = [isinstance(m, StdConv2d) for m in model.decoder.modules() if isinstance(m, nn.Conv2d)]
    assert any(standardized) == (norm == "gn_ws")
    assert type(model.decoder.classifier) is nn.Conv2d


@pytest.mark.parametrize("norm", ["bn", "bn_ws", "in"])
@pytest.mark.parametrize("decoder", ["deeplabv3plus", "upernet"])
def test_pooling_to_one_value_is_refused_at_batch_1(norm, decoder):
    model = built(norm=norm, decoder=decoder)
    with pytest.raises(ConfigError, match=rf"model\.decoder={decoder}.*decoder_norm=gn.*unet or fpn"):
        check_input(model, norm, batch_size=1, img_size=64, decoder=decoder)


@pytest.mark.parametrize("norm", ["gn", "gn_ws", "ln", "none"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_norms_that_do_not_see_the_batch_train_at_batch_1(norm, decoder):
    check_input(built(norm=norm, decoder=decoder), norm, batch_size=1, img_size=64, decoder=decoder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "bn_frozen", "decoder_norm": "bn_frozen"}, "no statistics to freeze"),
        ({"backbone": "cnn_mnist"}, "no feature maps"),
        ({"backbone": "hardcorenas_a", "decoder": "deeplabv3plus"}, "output stride of 16"),
        ({"backbone": "vgg11_bn", "decoder": "deeplabv3plus"}, "output stride of 16"),
    ],
)
def test_what_cannot_be_built(options, message):
    with pytest.raises(ConfigError, match=message):
        built(**{"decoder": "unet", **options})


def test_weights_go_to_the_encoder_and_depths_end_with_the_decoder():
    with_weights = build_backbone(ModelConfig("resnetv2_18", "gn_ws", pretrained="auto", decoder="unet"), 3)
    plain = create_backbone("resnetv2_18", norm="gn_ws", num_classes=2, pretrained="auto").model
    ours = with_weights.model.encoder.model.state_dict()
    for name, tensor in plain.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(ours[name], tensor), name
    assert with_weights.head == "decoder"
    depths = parameter_depths(with_weights.model)
    assert depths.keys() == dict(with_weights.model.named_parameters()).keys()
    deepest = {name for name, depth in depths.items() if depth == max(depths.values())}
    assert deepest == {name for name in depths if name.startswith("decoder.")}
    assert min(depths.values()) == 0


@pytest.mark.parametrize("backbone", ["resnetv2_18", "tf_efficientnet_lite0", "ghostnet_050", "rexnet_100"])
def test_a_model_is_rebuilt_from_its_description(backbone):
    """EfficientNet and others have a norm behind the last feature map, which a segmentation does not keep."""
    config = ModelConfig(backbone, "gn", decoder="unet")
    first = build_backbone(config, 3)
    groups = group_counts(first.model)
    stored = {"architecture": backbone, "groups": groups, "head": first.head, "num_classes": 3}
    stored |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    again = rebuild_backbone(config, stored, first.report.as_dict()).model
    again.load_state_dict(first.model.state_dict())
    assert group_counts(again) == groups
    for name in (next(iter(groups)), [*groups][-1]):  # of the encoder, of the decoder
        fewer = {each: number for each, number in groups.items() if each != name}
        with pytest.raises((KeyError, ConfigError), match="groups"):
            rebuild_backbone(config, {**stored, "groups": fewer}, first.report.as_dict())
