from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from gn_transfer.config import ConfigError
from gn_transfer.training.accumulation import GradientAccumulation, MicroBatch, micro_batch, micro_batches_per_step


def weights(num_samples: int, batch_size: int, micro_batches: int) -> list[float]:
    """Weight of each image in its optimizer step, as Lightning applies the scaled loss."""
    num_batches = -(-num_samples // batch_size)
    found = []
    for index in range(num_batches):
        images = min(batch_size, num_samples - index * batch_size)
        step = micro_batch(
            index,
            num_batches=num_batches,
            micro_batches=micro_batches,
            batch_size=batch_size,
            num_samples=num_samples,
        )
        # A mean loss gives each image 1 / images; Lightning divides by the full count of micro-batches.
        found += [step.loss_scale / micro_batches / images] * images
    return found


def test_every_image_of_a_step_weighs_alike():
    assert weights(5, 1, 4) == [0.25] * 4 + [1.0]


def test_a_smaller_last_batch_does_not_weigh_more():
    # steps of two batches of three: 6 images, then 3 + 1
    assert weights(10, 3, 2) == pytest.approx([1 / 6] * 6 + [1 / 4] * 4)


@pytest.mark.parametrize(("num_samples", "batch_size", "micro_batches"), [(7, 2, 3), (8, 2, 2), (1, 4, 4), (33, 1, 16)])
def test_weights_of_each_step_sum_to_one(num_samples, batch_size, micro_batches):
    size = batch_size * micro_batches
    found = weights(num_samples, batch_size, micro_batches)
    for start in range(0, num_samples, size):
        assert sum(found[start : start + size]) == pytest.approx(1.0)


def test_first_and_last():
    steps = [micro_batch(i, num_batches=5, micro_batches=2, batch_size=1, num_samples=5) for i in range(5)]
    assert [step.first for step in steps] == [True, False, True, False, True]
    assert [step.last for step in steps] == [False, True, False, True, True]


def test_micro_batches_per_step():
    assert micro_batches_per_step(None, 3, 2) == 1
    assert micro_batches_per_step(16, 2, 2) == 4
    assert micro_batches_per_step(4, 2, 2) == 1
    with pytest.raises(ConfigError, match=r"data\.batch_size=2 on 2 devices; use 4"):
        micro_batches_per_step(5, 2, 2)


def test_a_micro_batch_is_a_step_of_its_own_unless_told_otherwise():
    assert MicroBatch() == MicroBatch(first=True, last=True, loss_scale=1.0, step=0, offset=0)


@pytest.mark.parametrize(("effective", "batch", "remedy"), [(10, 4, "use 8"), (2, 4, "use 4")])
def test_an_effective_batch_that_is_no_multiple_is_refused(effective, batch, remedy):
    with pytest.raises(ConfigError, match=f"effective_batch_size={effective} .*batch_size={batch}; {remedy}"):
        micro_batches_per_step(effective, batch, 1)


def test_the_least_effective_batch():
    assert GradientAccumulation(1).effective_batch_size == 1
    with pytest.raises(ConfigError, match="effective_batch_size=0: use 1 or more"):
        GradientAccumulation(0)


class Engine:
    """Notes what it is told."""

    def __init__(self, model, compiled):
        self.told = []

    def fold_norms(self, pixels):
        self.told.append(f"fold {tuple(pixels.shape)}")

    def micro_batch(self, *, first, last):
        self.told.append((first, last))

    def remove(self):
        self.told.append("removed")


@pytest.mark.parametrize("with_sampler", [True, False])
def test_the_engine_is_told_of_every_micro_batch(monkeypatch, with_sampler):
    """With a data module of ours, and with one of the user's own, whose loader says how many images there are."""
    monkeypatch.setattr("gn_transfer.training.accumulation.AccumulationEngine", Engine)
    callback = GradientAccumulation(4)
    loader = SimpleNamespace(batch_size=2, sampler=range(6))
    ours = SimpleNamespace(batch_size=2, train_sampler=range(6))
    trainer = SimpleNamespace(
        datamodule=ours if with_sampler else SimpleNamespace(batch_size=7),
        train_dataloader=loader,
        num_training_batches=3,
        accumulate_grad_batches=2,
        global_step=5,
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
    )
    config = SimpleNamespace(compile=False, gradient_checkpointing=False)
    module = SimpleNamespace(model=None, model_config=config, normalize=lambda images: images)
    callback.on_fit_start(trainer, module)
    engine = callback.engine
    places = []
    for index in range(3):
        callback.on_train_batch_start(trainer, module, (torch.zeros(2, 3, 4, 4), None), index)
        places.append(module.micro_batch)
    assert engine.told == ["fold (2, 3, 4, 4)", (True, False), (False, True), (True, True)]
    assert [(place.step, place.offset, place.loss_scale) for place in places] == [(5, 0, 1.0), (5, 2, 1.0), (5, 0, 2.0)]
    callback.on_fit_end(trainer, module)
    assert engine.told[-1] == "removed"
    assert callback.engine is None


def started(callback: GradientAccumulation, device: str, world_size: int = 1, **config: bool) -> SimpleNamespace:
    """The module, when a training on a device has begun."""
    trainer = SimpleNamespace(world_size=world_size, strategy=SimpleNamespace(root_device=torch.device(device)))
    model_config = SimpleNamespace(**{"compile": False, "gradient_checkpointing": False, **config})
    module = SimpleNamespace(model=torch.nn.Linear(2, 2), model_config=model_config, graphed_model=None)
    callback.on_fit_start(trainer, module)
    return module


def test_without_an_engine_nothing_is_cached(monkeypatch):
    monkeypatch.setattr("gn_transfer.training.accumulation.AccumulationEngine", None)
    callback = GradientAccumulation(4, cache_weights=False)
    module = started(callback, "cpu")
    assert callback.engine is None
    callback.on_exception(None, module, KeyboardInterrupt())


def test_on_a_single_gpu_the_model_is_replayed_instead():
    callback = GradientAccumulation(4)
    module = started(callback, "cuda")
    assert module.graphed_model.model is module.model
    assert callback.engine is None
    callback.on_fit_end(None, module)
    assert module.graphed_model is None


@pytest.mark.parametrize(
    ("world_size", "config"), [(2, {}), (1, {"compile": True}), (1, {"gradient_checkpointing": True})]
)
def test_what_cannot_be_replayed_has_the_engine(world_size, config):
    callback = GradientAccumulation(4)
    assert started(callback, "cuda", world_size, **config).graphed_model is None
    assert callback.engine is not None
    without = GradientAccumulation(4, cuda_graphs=False)
    assert started(without, "cuda").graphed_model is None


def test_an_exception_detaches_the_engine():
    callback = GradientAccumulation(4)
    module = started(callback, "cpu")
    assert type(module.model) is not torch.nn.Linear
    callback.on_exception(None, module, KeyboardInterrupt())
    assert callback.engine is None
    assert type(module.model) is torch.nn.Linear


def test_one_device_is_meant_where_none_is_said():
    config = SimpleNamespace(compile=False, gradient_checkpointing=False)
    assert GradientAccumulation(4).replays(config, torch.device("cuda"))
