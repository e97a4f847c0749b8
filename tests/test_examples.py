"""The scripts in examples/ run, and do what they say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torchvision.models import mobilenet_v2, resnet18

from gn_transfer.layers import FrozenBatchNorm2d, GroupNorm

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'example("{path.stem}")' not in tested] == []


def trained(model):
    """Give batch norms statistics of their own, as a pretrained model has them."""
    model.train()
    for _ in range(4):
        model(torch.randn(16, 3, 64, 64) * 2 + 1)
    return model.eval()


@pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec")
def test_frozen_statistics_survive_training_mode():
    freeze = example("freeze_batch_norm")
    for state in (freeze.plain_loop(affine=True), freeze.plain_loop(affine=False), freeze.in_lightning()):
        assert state["bn1.running_mean"].abs().max() == 0
        assert (state["bn1.running_var"] == 1).all()
    assert not torch.equal(freeze.plain_loop(affine=True)["bn1.bias"], torch.zeros(64))
    assert torch.equal(freeze.plain_loop(affine=False)["bn1.bias"], torch.zeros(64))
    assert not torch.equal(freeze.in_lightning()["bn1.bias"], torch.zeros(64))


def test_a_detector_learns_from_one_image():
    losses = example("torchvision_detector").main()
    assert all(torch.tensor(loss).isfinite() for loss in losses.values())
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


def test_a_segmentation_has_two_norms():
    model = example("smp_segmentation").main()
    assert any(isinstance(layer, FrozenBatchNorm2d) for layer in model.encoder.modules())
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.decoder.modules())
    assert any(isinstance(layer, GroupNorm) for layer in model.decoder.modules())


def test_a_calibrated_encoder_is_nearer_than_an_exchanged_one():
    images = torch.randn(16, 3, 96, 96) * 2 + 1
    exchanged, calibrated = example("policy_encoder").main(trained(resnet18(num_classes=3)), images)
    assert calibrated < 0.7 * exchanged


@pytest.mark.filterwarnings("ignore")  # those of Opacus
def test_a_private_step_with_a_calibrated_model():
    pytest.importorskip("opacus", reason="pip install 'gn-transfer[examples]'")
    errors = example("private_training").main(trained(mobilenet_v2(num_classes=3)), torch.randn(8, 3, 64, 64) * 2 + 1)
    assert errors["gn_transfer"] < 0.7 * errors["opacus"]


def test_the_engine_changes_no_result():
    accumulate = example("accumulate_gradients")
    ours, plain = accumulate.main(), accumulate.main(engine=False)
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # those of transformers
def test_the_engine_under_hugging_faces_trainer():
    pytest.importorskip("transformers", reason="pip install 'gn-transfer[examples]'")
    from transformers import Trainer

    hugging_face = example("hugging_face_trainer")
    ours, plain = hugging_face.main(), hugging_face.main(Trainer)
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)


def test_the_layers_import_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import gn_transfer.layers;"
        "own = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(own - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"gn_transfer", "torch"}
