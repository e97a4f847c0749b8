import math

import pytest
import torch
from lightning.pytorch import Trainer

from gn_transfer.backbones.model_config import ModelConfig
from gn_transfer.config import ConfigError
from gn_transfer.data import Folder
from gn_transfer.layers import AccumulationEngine
from gn_transfer.training.accumulation import GradientAccumulation, micro_batch
from gn_transfer.training.classification import RegularizationConfig, TransferClassifier
from gn_transfer.training.optimizer import OptimizerConfig

CLASSES = ["ant", "bee", "cow"]


def build(norm: str, regularization: RegularizationConfig | None = None, **model) -> TransferClassifier:
    torch.manual_seed(0)
    task = TransferClassifier(ModelConfig("resnet18", norm, **model), regularization=regularization)
    task.build(CLASSES)
    return task.train()


def random_batch(number: int, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (number, 3, size, size), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, len(CLASSES), (number,), generator=generator)


def gradients(norm: str, batch_size: int, number: int = 32) -> torch.Tensor:
    """Gradient of one accumulation step, as the accumulation callback and Lightning make it."""
    task = build(norm)
    images, targets = random_batch(number)
    count = number // batch_size
    for index in range(count):
        task.micro_batch = micro_batch(
            index, num_batches=count, micro_batches=count, batch_size=batch_size, num_samples=number
        )
        part = slice(index * batch_size, (index + 1) * batch_size)
        loss = task.training_step((images[part], targets[part]), index)["loss"]
        (loss / count).backward()
    return torch.cat([parameter.grad.flatten() for parameter in task.model.parameters()])


def relative_error(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("norm", ["gn", "gn_ws", "ln"])
def test_one_by_32_equals_32_by_one_without_batch_statistics(norm):
    assert relative_error(gradients(norm, 1), gradients(norm, 32)) < 1e-4


@pytest.mark.parametrize("norm", ["bn", "bn_ws"])
def test_accumulation_does_not_help_bn(norm):
    assert relative_error(gradients(norm, 1), gradients(norm, 32)) > 0.5


# Losses of five steps of SGD on the same four images, as this code computed them when the test was written. They
# change with the initialization, the norm or the step: change them only on purpose, and say so in the changelog.
GOLDEN = {
    "bn": [1.0866, 0.67304, 0.49541, 0.39597, 0.33091],
    "bn_frozen": [1.0764, 1.0679, 1.0598, 1.0518, 1.0443],
    "gn": [1.0657, 0.86087, 0.7489, 0.66271, 0.58968],
    "gn_ws": [1.1847, 0.73837, 0.51039, 0.38259, 0.31284],
    "bn_ws": [1.1568, 0.69574, 0.5086, 0.39846, 0.32683],
    "ln": [0.99952, 0.88416, 0.80168, 0.72705, 0.65723],
    "in": [1.0758, 1.0163, 0.98106, 0.96505, 0.94354],
    "none": [1.0764, 1.0576, 1.041, 1.0255, 1.0113],
}


def five_losses(norm: str) -> list[float]:
    task = build(norm)
    batch = random_batch(4)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = task.training_step(batch, 0)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("norm", ["bn", "bn_frozen", "gn", "gn_ws", "bn_ws", "ln", "in", "none"])
def test_golden_losses(norm):
    assert five_losses(norm) == pytest.approx(GOLDEN[norm], rel=2e-3)


@pytest.mark.parametrize("norm", ["bn", "gn_ws"])
def test_one_batch_is_learnt_by_heart(norm):
    task = build(norm)
    batch = random_batch(4)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        task.training_step(batch, 0)["loss"].backward()
        optimizer.step()
    logits = task(batch[0])
    assert task.evaluation_losses(logits, batch[1]).mean() < 0.1
    assert torch.equal(logits.argmax(1), batch[1])


def test_pixels_are_normalized_with_the_statistics_of_the_weights():
    task = build("bn")
    seen = []
    task.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    task(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    expected = [(1 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_class_weights_and_label_smoothing_act_in_training_alone():
    task = build("gn", RegularizationConfig(label_smoothing=0.3))
    task.class_weight = torch.tensor([5.0, 5.0, 5.0])
    batch = random_batch(4)
    training = task.training_step(batch, 0)["loss"]
    logits = task(batch[0])
    evaluation = task.evaluation_losses(logits, batch[1]).mean()
    assert evaluation.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, batch[1]).item())
    smooth = torch.nn.functional.cross_entropy(logits, batch[1], label_smoothing=0.3)
    assert training.item() == pytest.approx(5 * smooth.item(), rel=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        task = build("gn_ws", gradient_checkpointing=checkpointing)
        task.training_step(random_batch(2), 0)["loss"].backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in task.model.parameters()]))
    assert relative_error(*found) < 1e-5


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (OptimizerConfig, "optimizer.lr", 0.0),
        (OptimizerConfig, "optimizer.lr", math.nan),
        (OptimizerConfig, "optimizer.warmup_fraction", 1.0),
        (OptimizerConfig, "optimizer.layer_decay", 1.5),
        (OptimizerConfig, "optimizer.clip_norm", 0.0),
        (RegularizationConfig, "regularization.label_smoothing", -0.1),
    ],
)
def test_numbers_out_of_range(config, key, value):
    with pytest.raises(ConfigError, match=rf"{key}={value} is out of range; use a number in"):
        config(**{key.partition(".")[2]: value})


def test_a_compiled_engine_is_announced_under_autocast(monkeypatch, folder_root, tmp_path):
    """The graph takes the cast weights as inputs, so they must be ready, in the forward's dtype, before the forward."""
    compiled, announced = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    micro_batch_of = AccumulationEngine.micro_batch

    def announce(engine, *, first, last):
        micro_batch_of(engine, first=first, last=last)
        announced.append({weight.ready[0].dtype for weight in engine._weights if weight.ready})

    monkeypatch.setattr(AccumulationEngine, "micro_batch", announce)
    task = TransferClassifier(ModelConfig("resnetv2_18", "gn_ws", compile=True))
    data = Folder(folder_root, img_size=32, batch_size=2)
    accumulation = GradientAccumulation(4)
    trainer = Trainer(
        max_steps=1,
        precision="bf16-mixed",
        accelerator="cpu",
        callbacks=[accumulation],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, datamodule=data)
    assert compiled == [task.model]
    assert announced == [{torch.bfloat16}, {torch.bfloat16}]
    assert accumulation.engine is None
    assert task.model._compiled_call_impl is None
