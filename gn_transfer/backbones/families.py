"""Which models of timm the norms were tried on: one of each family."""

TESTED_FAMILIES = (
    *("resnet18", "resnetv2_18", "resnext26ts", "seresnet18", "regnetx_002", "regnety_002", "efficientnet_b0"),
    *("tf_efficientnet_lite0", "mobilenetv2_050", "mobilenetv3_small_050", "mnasnet_small", "densenet121", "vgg11_bn"),
    *("dla46_c", "hrnet_w18_small", "ghostnet_050", "repvgg_a0", "darknet17", "hardcorenas_a", "fbnetc_100"),
    *("semnasnet_075", "lcnet_050", "tinynet_e", "inception_v3", "res2net50_14w_8s", "resnest14d", "skresnet18"),
    *("cspresnet50", "dpn48b", "selecsls42b", "vovnet39a", "xception41", "rexnet_100", "legacy_seresnet18"),
)
"""A test takes a training step with each under bn, bn_frozen, gn and gn_ws; ``benchmarks/families.py`` trains and
exports each under bn, bn_frozen, gn and calibrated gn."""
