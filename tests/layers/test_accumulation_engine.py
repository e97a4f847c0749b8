"""The accumulation engine: gradients and updates equal those of the plain computation, whatever happens."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gn_transfer.layers import AccumulationEngine, GroupNormAct, StdConv2d
from gn_transfer.layers.conv import HeldProducts

CHANNELS_LAST = torch.channels_last
COMPILER_WARNINGS = pytest.mark.filterwarnings(  # torch's own, while it traces
    "ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


class Net(nn.Module):
    """A stem, a branch that can be left out, a convolution used twice, and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = StdConv2d(3, 16, 3, padding=1, bias=False)
        self.norm = GroupNormAct(16, 4)
        self.narrow = StdConv2d(16, 32, 1, bias=False)
        self.shared = StdConv2d(32, 32, 3, padding=1, bias=False)
        self.branch = nn.Conv2d(16, 32, 1)
        self.norm2 = GroupNormAct(32, 16)
        self.head = nn.Linear(32, 5)
        self.checkpointing = False

    def block(self, x):
        return self.norm2(self.shared(self.shared(self.narrow(x)))).square()

    def forward(self, x, branch=True):
        x = self.norm(self.stem(x))
        y = (
            checkpoint(self.block, x, use_reentrant=self.checkpointing == "reentrant")
            if self.checkpointing
            else (self.block(x))
        )
        if branch:
            y = y + self.branch(x)
        return self.head(y.mean(dim=(2, 3)))


def make_net(seed=0):
    torch.manual_seed(seed)
    return Net()


def batches(n, batch_size=2):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(batch_size, 3, 7, 7, generator=generator).contiguous(memory_format=CHANNELS_LAST),
            torch.randint(0, 5, (batch_size,), generator=generator),
        )
        for _ in range(n)
    ]


def loss_of(model, batch, **kwargs):
    return F.cross_entropy(model(batch[0], **kwargs).float(), batch[1])


def backward_all(model, micro_batches, engine=None, dtype=None, forward=loss_of):
    """Forward and backward of each micro-batch; weighted differently, as sample-exact accumulation does."""
    for i, batch in enumerate(micro_batches):
        if engine is not None:
            engine.micro_batch(first=i == 0, last=i == len(micro_batches) - 1)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = forward(model, batch)
        (loss * (i + 1) / len(micro_batches)).backward()


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_equal_gradients(ours, plain, tolerance=1e-5):
    for name, expected in plain.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            assert (ours[name] - expected).norm() <= tolerance * expected.norm(), name


def compare(prepare=lambda model: None, steps=((4, {}),), make_optimizer=None, clip=None, **kwargs):
    """Train the same model with and without the engine; compare gradients before and weights after every step."""
    models = [make_net(), make_net()]
    optimizers = [make_optimizer(model.parameters()) if make_optimizer else None for model in models]
    for model in models:
        prepare(model)
    engine = AccumulationEngine(models[0])
    for n, more in steps:
        for model, engine_or_none in zip(models, (engine, None), strict=True):
            backward_all(model, batches(n), engine_or_none, **kwargs, **more)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
        assert_equal_gradients(gradients(models[0]), gradients(models[1]))
        for model, optimizer in zip(models, optimizers, strict=True):
            if optimizer:
                optimizer.step()
            model.zero_grad()
        for ours, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    return engine


@pytest.fixture
def count_standardizations(monkeypatch):
    """Count layer norms over filters: forward and backward."""
    from gn_transfer.layers import cached_weight

    counts = {"forward": 0, "backward": 0}

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(cached_weight, "_standardize", counted("forward", cached_weight._standardize))
    layer_norm_backward = torch.ops.aten.native_layer_norm_backward
    monkeypatch.setattr(torch.ops.aten, "native_layer_norm_backward", counted("backward", layer_norm_backward))
    return counts


# ---- equality with the plain computation ------------------------------------------------------------------------


def test_gradients_of_a_step():
    compare()


def test_steps_of_one_and_a_last_shorter_one():
    compare(steps=[(4, {}), (1, {}), (3, {})], make_optimizer=partial(torch.optim.SGD, lr=0.1))


def test_the_work_is_done_once(count_standardizations):
    model = make_net()
    backward_all(model, batches(4), AccumulationEngine(model))
    # stem, narrow and shared; in the last micro-batch shared is used twice and sends its two gradients one by one;
    # branch and head need no cast in float32
    assert count_standardizations == {"forward": 3, "backward": 4}


def test_clipping_and_weight_decay():
    compare(
        steps=[(3, {}), (3, {})],
        make_optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
        clip=0.05,
    )


def test_frozen_stages():
    def freeze(model):
        model.stem.requires_grad_(False)
        model.shared.requires_grad_(False)

    compare(freeze, steps=[(3, {}), (2, {})], make_optimizer=partial(torch.optim.SGD, lr=0.1))


def test_a_frozen_weight_is_standardized_once_for_all_steps(count_standardizations):
    model = make_net().requires_grad_(False)
    model.head.requires_grad_(True)
    engine = AccumulationEngine(model)
    for _ in range(3):
        backward_all(model, batches(2), engine)
    assert count_standardizations["forward"] == 3


def test_unfreezing_between_steps():
    models = [make_net(), make_net()]
    engine = AccumulationEngine(models[0])
    for frozen in (True, False):
        for model, engine_or_none in zip(models, (engine, None), strict=True):
            model.stem.requires_grad_(not frozen)
            backward_all(model, batches(2), engine_or_none)
    assert_equal_gradients(gradients(models[0]), gradients(models[1]))


@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradient_checkpointing(mode, dtype):
    models = [make_net(), make_net()]
    models[0].checkpointing = mode
    engines = [AccumulationEngine(model) for model in models]
    for model, engine in zip(models, engines, strict=True):
        backward_all(model, batches(3), engine, dtype)
    # against the engine without checkpointing (which other tests compare with plain): the same tensors, bit for bit,
    # but for the order of sums where a weight is used twice
    assert_equal_gradients(gradients(models[0]), gradients(models[1]), 1e-6 if dtype is None else 1e-2)


def test_several_forward_passes_in_one_micro_batch():
    compare(forward=lambda model, batch: loss_of(model, batch) + 0.5 * loss_of(model, (batch[0] + 1, batch[1])))


def test_several_backward_passes_in_one_micro_batch():
    def two_backwards(model, batch):
        loss_of(model, batch).backward()
        return loss_of(model, (batch[0] + 1, batch[1]))

    compare(forward=two_backwards)


def test_a_graph_that_is_kept():
    def keep(model, batch):
        loss = loss_of(model, batch)
        loss.backward(retain_graph=True)
        return loss

    compare(forward=keep)


def test_a_weight_that_the_last_micro_batch_does_not_use():
    seen = []

    def forward(model, batch):
        seen.append(1)
        return loss_of(model, batch, branch=len(seen) % 3 != 0)

    for dtype in (None, torch.bfloat16):
        models = [make_net(), make_net()]
        seen.clear()
        backward_all(models[0], batches(3), AccumulationEngine(models[0]), dtype, forward)
        assert models[0].branch.weight.grad is not None
        backward_all(models[1], batches(3), None, dtype, forward)
        assert_equal_gradients(gradients(models[0]), gradients(models[1]), 1e-5 if dtype is None else 2e-2)


def test_finish_delivers_when_the_last_micro_batch_has_no_backward():
    models = [make_net(), make_net()]
    engine = AccumulationEngine(models[0])
    for i, batch in enumerate(batches(2)):
        engine.micro_batch(first=i == 0, last=False)
        loss_of(models[0], batch).backward()
        loss_of(models[1], batch).backward()
    engine.micro_batch(first=False, last=True)
    engine.finish()
    engine.finish()
    assert_equal_gradients(gradients(models[0]), gradients(models[1]))


# ---- half precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("kind", ["ws", "plain"])
def test_bfloat16_is_not_worse_than_plain_autocast(memory_format, kind):
    def build():
        torch.manual_seed(0)
        conv = StdConv2d if kind == "ws" else nn.Conv2d
        layers = [conv(8, 32, 3, padding=1, bias=False), GroupNormAct(32, 8), conv(32, 32, 1, bias=False)]
        return nn.Sequential(*layers, GroupNormAct(32, 8), nn.Flatten(), nn.Linear(32 * 36, 5))

    torch.manual_seed(1)
    micro_batches = [
        (torch.randn(1, 8, 6, 6).contiguous(memory_format=memory_format), torch.tensor([i % 5])) for i in range(24)
    ]
    forward = lambda model, batch: F.cross_entropy(model(batch[0].to(model[0].weight.dtype)), batch[1])  # noqa: E731
    exact, plain, ours = build().double(), build(), build()
    backward_all(exact, micro_batches, forward=forward)
    backward_all(plain, micro_batches, None, torch.bfloat16, forward)
    backward_all(ours, micro_batches, AccumulationEngine(ours), torch.bfloat16, forward)
    errors = [
        [
            (a.grad.double() - e.grad).norm() / e.grad.norm()
            for a, e in zip(n.parameters(), exact.parameters(), strict=True)
        ]
        for n in (ours, plain)
    ]
    assert all(mine <= 1.2 * theirs for mine, theirs in zip(*errors, strict=True))
    assert sum(errors[0]) <= 1.02 * sum(errors[1])


def test_bfloat16_gradients_are_summed_in_float32():
    layer = nn.Linear(1, 1, bias=False)
    engine = AccumulationEngine(layer)
    for i in range(600):  # in bf16 a sum of ones stops at 256
        engine.micro_batch(first=i == 0, last=i == 599)
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(torch.ones(1, 1))
        loss.sum().backward()
    assert layer.weight.grad.item() == 600


def test_float16_gradients_stay_finite():
    model = make_net()
    backward_all(model, batches(3), AccumulationEngine(model), torch.float16)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_plain_float32_net_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(100, 2))
    engine = AccumulationEngine(model)
    engine.micro_batch(first=True, last=False)
    model(torch.randn(1, 3, 7, 7)).sum().backward()
    assert all(not weight._copies and not weight._gradients for weight in engine._weights)
    assert all(p.grad is not None for p in model.parameters())


# ---- interruptions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_reset", [True, False])
def test_an_exception_in_mid_step_leaves_nothing_behind(with_reset):
    models = [make_net(), make_net()]
    engine = AccumulationEngine(models[0])
    engine.micro_batch(first=True, last=False)
    loss_of(models[0], batches(1)[0]).backward()
    engine.micro_batch(first=False, last=False)
    with pytest.raises(RuntimeError, match="channels"):
        models[0](torch.randn(1, 4, 7, 7))
    if with_reset:
        engine.reset()
        assert "idle" in repr(engine)
    models[0].zero_grad()
    for model, engine_or_none in zip(models, (engine, None), strict=True):
        backward_all(model, batches(2), engine_or_none)
    assert_equal_gradients(gradients(models[0]), gradients(models[1]))


def test_an_exception_in_the_last_backward_leaves_nothing_behind():
    models = [make_net(), make_net()]
    engine = AccumulationEngine(models[0])
    fail = models[0].norm.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward_all(models[0], batches(1), engine)
    fail.remove()
    models[0].zero_grad()
    for model, engine_or_none in zip(models, (engine, None), strict=True):
        backward_all(model, batches(2), engine_or_none, forward=lambda model, batch: loss_of(model, batch))
        backward_all(
            model, batches(3), engine_or_none, forward=lambda model, batch: loss_of(model, batch, branch=False)
        )
    assert_equal_gradients(gradients(models[0]), gradients(models[1]))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_in_mid_step(context):
    models = [make_net(), make_net()]
    engine = AccumulationEngine(models[0])
    expected = models[1].eval()(batches(1)[0][0])
    models[1].train()
    for i, batch in enumerate(batches(3)):
        engine.micro_batch(first=i == 0, last=i == 2)
        loss_of(models[0], batch).backward()
        loss_of(models[1], batch).backward()
        models[0].eval()
        with context():
            torch.testing.assert_close(models[0](batches(1)[0][0]), expected)
        models[0].train()
    assert_equal_gradients(gradients(models[0]), gradients(models[1]))


def test_evaluation_in_float32_leaves_a_bfloat16_step_its_copies(count_standardizations):
    model = make_net()
    engine = AccumulationEngine(model)
    for i, batch in enumerate(batches(3)):
        engine.micro_batch(first=i == 0, last=i == 2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        model.eval()
        with torch.no_grad():
            model(batch[0])
        model.train()
    assert count_standardizations["forward"] == 3  # stem, narrow and shared, once each


def test_training_mode_without_gradient_after_inference_mode():
    """As when batch statistics are re-estimated: no tensor of inference mode may get into the step."""
    model = make_net()
    engine = AccumulationEngine(model)
    engine.micro_batch(first=True, last=False)
    with torch.inference_mode():
        model(batches(1)[0][0])
    loss_of(model, batches(1)[0]).backward()
    engine.micro_batch(first=False, last=True)
    loss_of(model, batches(1)[0]).backward()
    assert model.stem.weight.grad.norm() > 0


CHANGES = {
    "sgd": partial(torch.optim.SGD, lr=0.5),
    "sgd fused": partial(torch.optim.SGD, lr=0.5, momentum=0.9, fused=True),
    "sgd foreach": partial(torch.optim.SGD, lr=0.5, foreach=True),
    "adamw fused": partial(torch.optim.AdamW, lr=0.5, fused=True),
    "adam foreach": partial(torch.optim.Adam, lr=0.5, foreach=True),
}


@pytest.mark.parametrize("change", [*CHANGES, "load_state_dict", "new data", "copy_"])
def test_weights_changed_within_a_step_are_noticed(change):
    """The engine is not told of a new step, as when somebody else steps the optimizer."""
    models = [make_net(), make_net()]
    engine = AccumulationEngine(models[0])
    engine.micro_batch(first=True, last=False)
    other = make_net(seed=7).state_dict()
    for model in models:
        loss_of(model, batches(1)[0]).backward()
        engine.finish()
        if change in CHANGES:
            CHANGES[change](model.parameters()).step()
        elif change == "load_state_dict":
            model.load_state_dict(other)
        elif change == "copy_":
            with torch.no_grad():
                model.shared.weight.copy_(other["shared.weight"])
        else:
            model.shared.weight.data = other["shared.weight"].clone()
        model.zero_grad()
    engine.micro_batch(first=False, last=True)
    outputs = [model(batches(1)[0][0]) for model in models]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for model in models:
        loss_of(model, batches(1)[0]).backward()
    assert_equal_gradients(gradients(models[0]), gradients(models[1]))


def test_gradients_gathered_before_weights_changed_are_not_lost():
    models = [make_net(), make_net()]
    engine = AccumulationEngine(models[0])
    for i in range(2):
        engine.micro_batch(first=i == 0, last=i == 1)
        for model in models:
            loss_of(model, batches(1)[0]).backward()
            if i == 0:
                with torch.no_grad():
                    model.shared.weight.add_(
                        torch.linspace(0, 1, model.shared.weight.numel()).view_as(model.shared.weight)
                    )
    assert_equal_gradients(gradients(models[0]), gradients(models[1]))


def test_in_place_change_between_forward_and_backward_raises_as_in_torch():
    model = make_net()
    engine = AccumulationEngine(model)
    engine.micro_batch(first=True, last=True)
    loss = loss_of(model, batches(1)[0])
    with torch.no_grad():
        model.stem.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_data_edits_between_steps_are_noticed():
    model = make_net()
    engine = AccumulationEngine(model)
    for _ in range(2):
        engine.micro_batch(first=True, last=True)
        expected = make_plain_copy(model)(batches(1)[0][0])
        torch.testing.assert_close(model(batches(1)[0][0]), expected)
        model.stem.weight.data.mul_(2).add_(torch.randn_like(model.stem.weight))


def make_plain_copy(model):
    plain = make_net()
    plain.load_state_dict(model.state_dict())
    return plain


# ---- the model around it ------------------------------------------------------------------------------------------


def test_state_dict_copies_and_pickles_are_plain():
    model = make_net()
    keys = list(model.state_dict())
    engine = AccumulationEngine(model)
    engine.micro_batch(first=True, last=False)
    loss_of(model, batches(1)[0]).backward()
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.stem) is StdConv2d
        assert type(twin.branch) is nn.Conv2d
        assert type(twin.head) is nn.Linear
        assert not hasattr(twin.stem, "cached_weight")
        torch.testing.assert_close(twin(batches(1)[0][0]), model(batches(1)[0][0]))
        loss_of(twin, batches(1)[0]).backward()
        assert twin.stem.weight.grad is not None
    assert model.stem.weight.grad is None
    assert isinstance(model.stem, StdConv2d)
    with pytest.raises(RuntimeError, match="remove"):
        AccumulationEngine(model)
    engine.remove()
    assert type(model.stem) is StdConv2d
    assert list(model.state_dict()) == keys
    assert "1 Linear" in repr(AccumulationEngine(model))


def test_subclasses_are_left_alone():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(3, 4, 1))
    assert repr(AccumulationEngine(model)) == "AccumulationEngine(nothing; idle)"


def test_hooks_on_the_parameter_see_the_whole_gradient_once():
    models = [make_net(), make_net()]
    seen = []
    models[0].stem.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for model, engine in zip(models, (AccumulationEngine(models[0]), None), strict=True):
        backward_all(model, batches(4), engine)
    assert len(seen) == 1
    assert (seen[0] - models[1].stem.weight.grad).norm() <= 1e-5 * seen[0].norm()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weight_gradients_of_few_positions_are_held_and_computed_together(monkeypatch, dtype):
    held = []
    product = HeldProducts.product

    def counted(self, weight):
        pairs, result = len(self._products), product(self, weight)
        held.append((pairs, result is not None))
        return result

    monkeypatch.setattr(HeldProducts, "product", counted)
    torch.manual_seed(0)
    ours = nn.Sequential(StdConv2d(64, 256, 1, bias=False), GroupNormAct(256), nn.Conv2d(256, 64, 1, bias=False))
    ours = ours.to(memory_format=CHANNELS_LAST)
    plain, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
    micro_batches = [(torch.randn(1, 64, 3, 3).contiguous(memory_format=CHANNELS_LAST), None) for _ in range(8)]
    seen = []
    ours[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    forward = lambda model, batch: model(batch[0].to(model[0].weight.dtype)).square().mean()  # noqa: E731
    backward_all(ours, micro_batches, AccumulationEngine(ours), dtype, forward)
    assert max(pairs for pairs, computed in held if computed) > 1, "nothing was held"
    assert (1, False) in held
    backward_all(plain, micro_batches, None, dtype, forward)
    backward_all(exact, micro_batches, None, None, forward)
    assert len(seen) == 1
    assert torch.equal(seen[0], ours[0].weight.grad)
    for mine, theirs, true in zip(ours.parameters(), plain.parameters(), exact.parameters(), strict=True):
        errors = [(p.grad - true.grad).norm() / true.grad.norm() for p in (mine, theirs)]
        assert errors[0] <= (1e-5 if dtype is None else 1.2 * errors[1])


def compiled_step(model, engine, micro_batches, dtype=None, middle=lambda model: None):
    for i, batch in enumerate(micro_batches):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            engine.micro_batch(first=i == 0, last=i == len(micro_batches) - 1)
            loss = loss_of(model, batch)
        (loss * (i + 1) / len(micro_batches)).backward()
        if i == 0:
            middle(model)


@COMPILER_WARNINGS
def test_a_compiled_net_over_steps_of_several_lengths_with_evaluation_in_between():
    compiled, plain = make_net(), make_net()
    engine = AccumulationEngine(compiled, compiled=True)
    compiled.compile(backend="aot_eager")
    seen = []
    compiled.stem.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))

    def evaluate(model):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(batches(1)[0][0]), plain.eval()(batches(1)[0][0]))
        model.train(), plain.train()

    for n in (3, 1, 2):
        compiled_step(compiled, engine, batches(n), middle=evaluate)
        backward_all(plain, batches(n))
        assert_equal_gradients(gradients(compiled), gradients(plain))
        assert len(seen) == 1  # as DDP's hooks need it
        assert torch.equal(seen.pop(), compiled.stem.weight.grad)
        for model in (compiled, plain):
            torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()
            model.zero_grad()


@COMPILER_WARNINGS
def test_a_compiled_net_in_bfloat16_is_not_worse_than_plain_autocast():
    compiled, plain, exact = make_net(), make_net(), make_net().double()
    compiled.compile(backend="aot_eager")
    compiled_step(compiled, AccumulationEngine(compiled, compiled=True), batches(4), torch.bfloat16)
    backward_all(plain, batches(4), dtype=torch.bfloat16)
    backward_all(exact, [(images.double(), targets) for images, targets in batches(4)])
    ours, theirs = (
        sum((mine.grad - true.grad).norm() / true.grad.norm() for mine, true in zip(*models, strict=True))
        for models in ((compiled.parameters(), exact.parameters()), (plain.parameters(), exact.parameters()))
    )
    assert ours <= 1.05 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_laid_out_as_their_weights(dtype):
    """DDP warns where they are not, and copies."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), StdConv2d(8, 64, 1), nn.Conv2d(64, 16, 1)).to(memory_format=CHANNELS_LAST)
    engine = AccumulationEngine(model)
    different = []
    for layer in model:
        layer.weight.register_hook(
            lambda gradient, weight=layer.weight: different.append((weight.stride(), gradient.stride()))
        )
    for index in range(3):
        engine.micro_batch(first=index == 0, last=index == 2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(torch.randn(1, 3, 4, 4).contiguous(memory_format=CHANNELS_LAST))
        output.float().sum().backward()
    assert len(different) >= 3
    assert all(weight == gradient for weight, gradient in different)


def test_what_the_last_micro_batch_does_not_use_is_delivered_in_every_step():
    model = make_net()
    engine = AccumulationEngine(model)
    for _ in range(2):
        model.zero_grad()
        for i, batch in enumerate(batches(2)):
            engine.micro_batch(first=i == 0, last=i == 1)
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch, branch=i == 0)
            loss.backward()
        assert model.branch.weight.grad is not None


def test_a_step_after_one_whose_backward_was_interrupted():
    model, plain = make_net(), make_net()
    engine = AccumulationEngine(model)

    def interrupt(grad):
        raise KeyboardInterrupt

    engine.micro_batch(first=True, last=True)
    hook = model.norm.weight.register_hook(interrupt)  # its gradient comes behind those of the convolutions
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batches(1)[0])
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    hook.remove()
    model.zero_grad()
    for i, batch in enumerate(batches(2)):
        engine.micro_batch(first=i == 0, last=i == 1)
        for each in (model, plain):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(each, batch, branch=i == 0)
            loss.backward()
    assert_equal_gradients(gradients(model), gradients(plain), tolerance=0.02)


def test_a_frozen_weight_that_is_edited_is_read_anew_after_a_reset():
    model = make_net().requires_grad_(False)
    [(images, _)], engine = batches(1), AccumulationEngine(model)
    for _ in range(2):
        engine.micro_batch(first=True, last=True)
        torch.testing.assert_close(model(images), make_plain_copy(model)(images))
        model.stem.weight.data.add_(torch.randn_like(model.stem.weight))
        engine.reset()


@pytest.mark.parametrize("padding_mode", ["reflect", "circular"])
def test_padding_with_other_than_zeros(padding_mode):
    torch.manual_seed(0)
    how = {"padding": 1, "padding_mode": padding_mode}
    ours = nn.Sequential(StdConv2d(3, 8, 3, **how), nn.Conv2d(8, 4, 3, **how))
    plain = copy.deepcopy(ours)

    def forward(model, batch):
        return model(batch[0]).square().mean()

    backward_all(ours, batches(3), AccumulationEngine(ours), forward=forward)
    backward_all(plain, batches(3), forward=forward)
    assert_equal_gradients(gradients(ours), gradients(plain))


def test_optimizer_steps_are_counted_until_the_engine_is_removed():
    model = make_net()
    engine, optimizer = AccumulationEngine(model), torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert engine.optimizer_steps == 1
    engine.remove()
    optimizer.step()
    assert engine.optimizer_steps == 1


def test_the_engine_says_where_it_is():
    engine = AccumulationEngine(make_net())
    engine.micro_batch(first=True, last=False)
    assert repr(engine).endswith("; accumulating)")
    engine.micro_batch(first=False, last=True)
    assert repr(engine).endswith("; last micro-batch)")
    engine.remove()
    assert repr(engine) == "AccumulationEngine(nothing; idle)"
