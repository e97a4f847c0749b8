"""Frozen batch norms folded into convolutions: gradients are those of the plain computation, memory is less."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from gn_transfer.layers import AccumulationEngine, FrozenBatchNorm2d, FrozenBatchNormAct2d, conv, convert_norm
from gn_transfer.layers.conv import ByMatmul, by_matmul
from gn_transfer.layers.folded_norm import foldable_norms
from gn_transfer.layers.same_padding import Conv2dSame

CHANNELS_LAST = torch.channels_last


class Block(nn.Module):
    """Convolutions of several kinds in front of frozen norms: with a bias, depthwise, strided with "same" padding."""

    def __init__(self, channels=12):
        super().__init__()
        self.expand = nn.Conv2d(3, channels, 1, bias=False)
        self.norm1 = FrozenBatchNormAct2d(channels, act=nn.ReLU6(inplace=True))
        self.depthwise = Conv2dSame(channels, channels, 5, stride=2, groups=channels, bias=False)
        self.norm2 = FrozenBatchNormAct2d(channels)
        self.project = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm3 = FrozenBatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def features(self, x):
        return self.norm3(self.project(self.norm2(self.depthwise(self.norm1(self.expand(x))))))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def with_statistics(model, seed=0):
    """Statistics and affines as of a trained net, with gammas of zero and below."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.5, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                layer.weight.normal_(1, 0.5, generator=generator)[0] = 0
                layer.bias.normal_(0, 0.3, generator=generator)
    return model


def make_block(seed=0):
    torch.manual_seed(seed)
    return with_statistics(Block(), seed).train().to(memory_format=CHANNELS_LAST)


def batches(count, size=24, batch_size=1):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(batch_size, 3, size, size, generator=generator).contiguous(memory_format=CHANNELS_LAST),
            torch.randint(0, 5, (batch_size,), generator=generator),
        )
        for _ in range(count)
    ]


def engine_for(model, **kwargs):
    engine = AccumulationEngine(model)
    assert engine.fold_norms(batches(1, **kwargs)[0][0]) > 0
    return engine


def backward_all(model, micro_batches, engine=None, dtype=None):
    for i, (images, targets) in enumerate(micro_batches):
        if engine is not None:
            engine.micro_batch(first=i == 0, last=i == len(micro_batches) - 1)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(images).float(), targets)
        (loss * (i + 1) / len(micro_batches)).backward()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal_gradients(ours, plain, tolerance=1e-5):
    assert gradients(ours).keys() == gradients(plain).keys()
    for name, expected in gradients(plain).items():
        assert (gradients(ours)[name] - expected).norm() <= tolerance * max(expected.norm(), 1e-3), name


def test_gradients_and_steps_equal_the_plain_ones():
    ours, plain = make_block(), make_block()
    engine = engine_for(ours)
    assert repr(engine) == (
        "AccumulationEngine(1 Linear, 2 Conv2d, 2 FrozenBatchNormAct2d, 1 Conv2dSame, 1 FrozenBatchNorm2d; idle)"
    )
    for model, engine_or_none in ((ours, engine), (plain, None)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
        for count in (4, 1, 3):
            optimizer.zero_grad()
            backward_all(model, batches(count), engine_or_none)
            optimizer.step()
    assert_equal_gradients(ours, plain)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("backbone", "pairs"), [("tf_efficientnet_lite0", 17), ("resnet18", 2), ("vgg11_bn", 2)])
def test_nets_of_timm(backbone, pairs):
    """At 64 px; what stays plain has more weights than outputs."""
    torch.manual_seed(0)
    model = timm.create_model(backbone, num_classes=5)
    convert_norm(model, "bn_frozen")
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.5, 2.0)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    ours = model.to(torch.float64, memory_format=CHANNELS_LAST).train()  # in float32 a ReLU at zero may tip over
    plain = copy.deepcopy(ours)
    micro_batches = [(images.double(), targets) for images, targets in batches(2, size=64)]
    engine = AccumulationEngine(ours)
    assert engine.fold_norms(micro_batches[0][0]) == pairs
    backward_all(ours, micro_batches, engine)
    backward_all(plain, micro_batches)
    assert_equal_gradients(ours, plain, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_worse_than_plain_autocast(dtype):
    micro_batches, errors = batches(24), [0.0, 0.0]
    for seed in range(3):
        ours, plain, exact = make_block(seed), make_block(seed), make_block(seed)
        backward_all(ours, micro_batches, engine_for(ours), dtype)
        backward_all(plain, micro_batches, None, dtype)
        backward_all(exact, micro_batches)
        for index, model in enumerate((ours, plain)):
            for name, true in gradients(exact).items():
                errors[index] += ((gradients(model)[name] - true).norm() / true.norm()).item()
    assert errors[0] <= 1.02 * errors[1]


def test_a_convolution_by_matrix_products(monkeypatch):
    """In bf16 this 1x1 convolution is one, with the bias of the folded norm and an activation in place behind it."""
    plans = []
    monkeypatch.setattr(conv, "by_matmul", lambda *args: plans.append(by_matmul(*args)) or plans[-1])

    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), FrozenBatchNorm2d(64), nn.ReLU(inplace=True))
        return with_statistics(net).to(memory_format=CHANNELS_LAST)

    ours, plain = make(), make()
    engine = AccumulationEngine(ours)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 32, 6, 6, generator=generator).contiguous(memory_format=CHANNELS_LAST)
    assert engine.fold_norms(images[:1]) == 1
    for i in range(4):
        engine.micro_batch(first=i == 0, last=i == 3)
        with torch.autocast("cpu", torch.bfloat16):
            output = ours(images[i : i + 1])
        output.float().square().sum().backward()
        plain(images[i : i + 1]).square().sum().backward()
    assert_equal_gradients(ours, plain, 2e-2)
    assert ByMatmul(True, True, True) in plans


def saved_bytes(model, images):
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = model(images)
    return sum(saved.values()), output


def test_activations_are_kept_once():
    ours, plain = make_block(), make_block()
    images = batches(1, size=64)[0][0]
    engine = AccumulationEngine(ours)
    engine.fold_norms(images)
    engine.micro_batch(first=True, last=False)
    (mine, _), (theirs, _) = saved_bytes(ours, images), saved_bytes(plain, images)
    assert mine < 0.7 * theirs


def test_frozen_parameters():
    def freeze(model, names):
        for name in names:
            model.get_submodule(name).requires_grad_(False)

    for names in (["norm1", "norm2"], ["expand", "norm1"], ["expand"], ["project", "norm3", "head"]):
        ours, plain = make_block(), make_block()
        engine = engine_for(ours)
        freeze(ours, names), freeze(plain, names)
        for count in (2, 3):
            for model, engine_or_none in ((ours, engine), (plain, None)):
                model.zero_grad()
                backward_all(model, batches(count), engine_or_none)
            assert_equal_gradients(ours, plain)


def test_evaluation_within_a_step_and_statistics_that_change_between_steps():
    ours, plain = make_block(), make_block()
    engine = engine_for(ours)
    for step in range(2):
        for model in (ours, plain):
            with_statistics(model, seed=step)
            model.zero_grad()
        for i, (images, targets) in enumerate(batches(3)):
            engine.micro_batch(first=i == 0, last=i == 2)
            for model in (ours, plain):
                F.cross_entropy(model(images), targets).backward()
                model.eval()
            with torch.no_grad():
                torch.testing.assert_close(ours(images), plain(images))
            ours.train(), plain.train()
        assert_equal_gradients(ours, plain)


def test_weights_changed_within_a_step_keep_the_gradients_gathered_before():
    ours, plain = make_block(), make_block()
    engine = engine_for(ours)
    for i, (images, targets) in enumerate(batches(2)):
        engine.micro_batch(first=i == 0, last=i == 1)
        for model in (ours, plain):
            F.cross_entropy(model(images), targets).backward()
            if i == 0:
                with torch.no_grad():
                    model.expand.weight.mul_(1.5)
                    model.norm2.weight.add_(0.25)
    assert_equal_gradients(ours, plain)


def test_finish_without_a_last_backward():
    ours, plain = make_block(), make_block()
    engine = engine_for(ours)
    images, targets = batches(1)[0]
    engine.micro_batch(first=True, last=False)
    for model in (ours, plain):
        F.cross_entropy(model(images), targets).backward()
    assert ours.norm1.weight.grad is None
    engine.finish()
    assert_equal_gradients(ours, plain)


def test_hooks_on_parameters_see_the_whole_gradient_once():
    ours, plain = make_block(), make_block()
    seen = {}
    for name, parameter in ours.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.setdefault(name, []).append(p.grad.clone())
        )
    backward_all(ours, batches(3), engine_for(ours))
    backward_all(plain, batches(3))
    for name in ("expand.weight", "norm1.weight", "norm1.bias", "project.bias"):
        assert len(seen[name]) == 1
        torch.testing.assert_close(seen[name][0], gradients(plain)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    ours, plain = make_block(), make_block()
    engine = engine_for(ours)
    features = ours.features
    ours.features = partial(torch.utils.checkpoint.checkpoint, features, use_reentrant=use_reentrant)
    for model, engine_or_none in ((ours, engine), (plain, None)):
        micro_batches = [(images.clone().requires_grad_(), targets) for images, targets in batches(3)]
        backward_all(model, micro_batches, engine_or_none)
    assert_equal_gradients(ours, plain)


def test_who_looks_between_convolution_and_norm_sees_what_it_always_saw():
    ours, plain = make_block(), make_block()
    engine = engine_for(ours)
    engine.micro_batch(first=True, last=False)
    seen = []
    for model in (ours, plain):
        model.expand.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
        model(batches(1)[0][0])
    torch.testing.assert_close(*seen)


def test_copies_pickles_and_removal_are_plain():
    ours, plain = make_block(), make_block()
    engine = engine_for(ours)
    backward_all(ours, batches(2), engine)
    engine.micro_batch(first=True, last=False)
    images = batches(1)[0][0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(layer) for layer in twin.modules()] == [type(layer) for layer in plain.modules()]
        torch.testing.assert_close(twin(images), plain(images))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    engine.remove()
    assert [type(layer) for layer in ours.modules()] == [type(layer) for layer in plain.modules()]
    assert [vars(layer).keys() for layer in ours.modules()] == [vars(layer).keys() for layer in plain.modules()]


class OtherUses(nn.Module):
    """Convolutions whose output is read twice, returned, or changed, and layers that are used twice."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.norm = FrozenBatchNorm2d(3, affine=kind != "no affine")

    def forward(self, x):
        if self.kind == "layers used twice":
            return self.norm(self.conv(self.norm(self.conv(x))))
        y = self.conv(x)
        if self.kind == "read twice":
            return self.norm(y) + y
        if self.kind == "a view is read":
            return self.norm(y) + y.view(-1).sum()
        if self.kind == "returned":
            return self.norm(y), [y]
        if self.kind == "changed":
            return self.norm(y.add_(1))
        return self.norm(y)


@pytest.mark.parametrize(
    "kind", ["layers used twice", "read twice", "a view is read", "returned", "changed", "no affine"]
)
def test_a_convolution_that_somebody_else_reads_is_left_alone(kind):
    assert foldable_norms(OtherUses(kind), torch.randn(1, 3, 4, 4)) == []
    assert len(foldable_norms(OtherUses("plain"), torch.randn(1, 3, 4, 4))) == 1


def test_the_search_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert foldable_norms(model, torch.randn(2, 3, 4, 4, generator=torch.Generator())) == []
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def test_a_path_unlike_the_example_is_refused():
    model = OtherUses("plain")
    engine = AccumulationEngine(model)
    assert engine.fold_norms(torch.randn(1, 3, 4, 4)) == 1
    engine.micro_batch(first=True, last=True)
    model.kind = "changed"
    model.forward = lambda x: model.norm(model.conv(x) + 1)
    with pytest.raises(RuntimeError, match="do without fold_norms"):
        model(torch.randn(1, 3, 4, 4))


def test_folding_begins_anew_and_leaves_a_compiled_model_as_it_is():
    engine = AccumulationEngine(make_block())
    engine.micro_batch(first=True, last=False)
    assert engine.fold_norms(batches(1)[0][0]) > 0
    assert repr(engine).endswith("; idle)")
    assert AccumulationEngine(make_block(), compiled=True).fold_norms(batches(1)[0][0]) == 0


def test_after_a_reset_no_gradient_is_held_back():
    torch.manual_seed(0)
    model = with_statistics(nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), FrozenBatchNorm2d(64)))
    model = model.to(memory_format=CHANNELS_LAST)
    engine = AccumulationEngine(model)
    assert engine.fold_norms(torch.randn(1, 32, 6, 6).contiguous(memory_format=CHANNELS_LAST)) == 1
    image = torch.randn(1, 32, 2, 2).contiguous(memory_format=CHANNELS_LAST)
    engine.micro_batch(first=True, last=False)
    for _ in range(2):  # the second time outside of any step
        with torch.autocast("cpu", torch.bfloat16):
            output = model(image)
        output.float().sum().backward()
        engine.reset()
    assert model[0].weight.grad.norm() > 0
