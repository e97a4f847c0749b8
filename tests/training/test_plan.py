import pytest
import torch

from gn_transfer.backbones.model_config import ModelConfig
from gn_transfer.data import Folder
from gn_transfer.training.accumulation import GradientAccumulation
from gn_transfer.training.batch_norm_statistics import BatchNormStatistics
from gn_transfer.training.classification import TransferClassifier
from gn_transfer.training.plan import make_plan


@pytest.fixture
def data(folder_root):
    data = Folder(folder_root, img_size=64, val_fraction=0.3, batch_size=2)
    data.prepare_data()
    data.setup("fit")
    return data


def plan(data, norm="gn", **kwargs):
    task = TransferClassifier(ModelConfig("resnet18", norm))
    task.build(data.classes)
    arguments = {
        "accumulation": GradientAccumulation(4),
        "batch_norm": BatchNormStatistics(),
        "precision": "32-true",
        "device": torch.device("cpu"),
        "num_devices": 1,
        "max_epochs": 3,
        "max_steps": -1,
        "limit_batches": 1.0,
    }
    return make_plan(task, data, **{**arguments, **kwargs})


def test_accumulation_and_steps(data):
    rows = dict(plan(data).rows)
    assert len(data.train_dataset) == 9
    assert rows["steps"] == "3 epochs x 3 optimizer steps = 9"
    assert rows["batch"] == "batch 2 x 2 accumulated = effective batch 4; the last step of an epoch has 1 micro-batches"


def test_max_steps_and_limited_batches(data):
    assert dict(plan(data, max_steps=4).rows)["steps"].endswith("= 4")
    assert dict(plan(data, limit_batches=2).rows)["steps"] == "3 epochs x 1 optimizer steps = 3"
    assert not any("validat" in warning for warning in plan(data, max_steps=3).warnings)
    assert "--samples 8 in place of --trainer.max_steps 2" in plan(data, max_steps=2).warnings[-1]


def test_bn_at_a_small_batch_is_warned_about_and_gn_is_not(data):
    warnings = {norm: plan(data, norm).warnings[1:] for norm in ("bn", "bn_frozen", "gn_ws")}  # the first: equal images
    assert "Accumulation does not help BN" in warnings["bn"][0]
    assert "has nothing to freeze" in warnings["bn_frozen"][0]
    assert warnings["gn_ws"] == []


def test_planning_uses_no_random_numbers(data):
    torch.manual_seed(0)
    model = TransferClassifier(ModelConfig("resnet18", "bn"))
    model.build(data.classes)
    model.model.layer4.append(torch.nn.Dropout(0.5))
    state = torch.get_rng_state()
    buffers = {name: value.clone() for name, value in model.state_dict().items()}
    make_plan(
        model,
        data,
        accumulation=GradientAccumulation(),
        batch_norm=BatchNormStatistics(),
        precision="32-true",
        device=torch.device("cpu"),
        num_devices=1,
        max_epochs=1,
        max_steps=-1,
        limit_batches=1.0,
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())


def test_a_backbone_that_never_learns_is_warned_of(data):
    assert any(
        "only the last layer learns" in warning for warning in plan(data, frozen_epochs=3, max_epochs=3).warnings
    )
    assert not any("never learns" in warning for warning in plan(data, frozen_epochs=2, max_epochs=3).warnings)
