"""Replayed forward and backward passes against plain ones. Most of it needs a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_transfer.backbones.create import create_backbone
from gn_transfer.layers import GraphedModel, GroupNorm, StdConv2d

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Noted(nn.Module):
    """A small model that counts its plain forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = StdConv2d(3, 8, 3)
        self.norm = GroupNorm(8, 4)
        self.head = nn.Linear(8, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def gradients(model: nn.Module, run, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Accumulated over the inputs."""
    model.zero_grad()
    for x in inputs:
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            loss = run(x).float().square().mean()
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def images(count: int, batch: int = 1, size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, size, size, generator=generator).cuda() for _ in range(count)]


def test_on_a_cpu_the_model_itself_runs():
    model = Noted().train()
    graphed = GraphedModel(model)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(graphed(x), model(x))
    assert model.calls == 2
    assert repr(graphed) == "GraphedModel(plain)"


class Captured:
    """Stands for a graph on a CPU."""

    def __init__(self, model: nn.Module, input: Tensor) -> None:
        self.model, self.shape = model, input.shape

    def takes(self, input: Tensor) -> bool:
        return input.shape == self.shape

    def __call__(self, input: Tensor) -> Tensor:
        return self.model(input)


class CapturedOnCpu(GraphedModel):
    """Notes what it captures."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.batches: list[int] = []

    def _applies(self, input: Tensor) -> bool:
        return True

    def _capture(self, input: Tensor) -> Captured:
        self.batches.append(len(input))
        return Captured(self.model, input)


def test_a_second_input_in_a_row_of_another_shape_is_captured():
    """A run may begin with the last, smaller micro-batch of an epoch."""
    graphed = CapturedOnCpu(Noted().train())
    for batch in (1, 4, 4, 4, 1, 4, 4):
        graphed(torch.randn(batch, 3, 8, 8))
    assert graphed.batches == [1, 4]


def test_what_changes_a_step_is_captured_anew():
    model = Noted().train()
    graphed = CapturedOnCpu(model)
    x = torch.randn(1, 3, 8, 8)

    def captures(change) -> int:
        before = len(graphed.batches)
        change()
        for _ in range(2):
            graphed(x)
        return len(graphed.batches) - before

    assert captures(lambda: None) == 1
    assert captures(lambda: None) == 0
    assert captures(lambda: model.conv.weight.requires_grad_(False)) == 1
    assert captures(lambda: model.norm.eval()) == 1
    assert captures(lambda: setattr(model.head.weight, "data", model.head.weight.data.clone())) == 1
    assert captures(graphed.reset) == 1


@needs_gpu
@pytest.mark.parametrize("norm", ["gn_ws", "gn", "ln", "in", "bn", "bn_frozen"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_accumulated_gradients_are_those_of_the_plain_model(norm, dtype):
    torch.manual_seed(0)
    plain = create_backbone("resnetv2_18", norm=norm, num_classes=5).model.cuda().train()
    model = copy.deepcopy(plain)
    graphed = GraphedModel(model)
    inputs = images(3, batch=2)
    for _ in range(2):  # the second step starts from grad=None, as the first
        expected, found = gradients(plain, plain, inputs, dtype), gradients(model, graphed, inputs, dtype)
        assert graphed.failure is None
        assert len(expected) == len(found) > 50
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()) + 1e-9)
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name  # running statistics saw each image once


@needs_gpu
def test_the_model_itself_runs_only_for_the_capture():
    model = Noted().cuda().train()
    graphed = GraphedModel(model)
    for x in images(5):
        graphed(x).sum().backward()
    assert model.calls == 4  # three to warm up, one to capture


@needs_gpu
def test_what_is_not_captured_runs_plainly():
    model = Noted().cuda().train()
    graphed = GraphedModel(model)
    graphed(images(1)[0]).sum().backward()
    calls = model.calls
    graphed(images(1, batch=2)[0]).sum().backward()  # another shape
    with torch.no_grad():
        graphed(images(1)[0])
    hook = model.head.register_forward_hook(lambda *_: None)
    graphed(images(1)[0]).sum().backward()
    hook.remove()
    model.eval()
    graphed(images(1)[0])
    model.train()
    assert model.calls == calls + 4


@needs_gpu
def test_plain_and_replayed_micro_batches_add_up():
    plain = Noted().cuda().train()
    model = copy.deepcopy(plain)
    graphed = GraphedModel(model)
    gradients(model, graphed, images(1))
    for inputs in ([*images(2), *images(1, batch=3)], [*images(1, batch=3), *images(2)]):
        for a, b in zip(gradients(plain, plain, inputs), gradients(model, graphed, inputs), strict=True):
            torch.testing.assert_close(b, a)


@needs_gpu
def test_a_parameter_that_begins_to_learn_is_captured():
    model = Noted().cuda().train()
    model.conv.weight.requires_grad_(False)
    graphed = GraphedModel(model)
    graphed(images(1)[0]).sum().backward()
    assert model.conv.weight.grad is None
    model.conv.weight.requires_grad_(True)
    plain = copy.deepcopy(model)
    for a, b in zip(gradients(plain, plain, images(2)), gradients(model, graphed, images(2)), strict=True):
        torch.testing.assert_close(b, a)


@needs_gpu
def test_a_frozen_backbone_is_replayed():
    """As the callback freezes it: all but the head is in evaluation."""
    model = Noted().cuda().eval()
    model.head.train()
    for part in (model.conv, model.norm):
        part.requires_grad_(False)
    plain = copy.deepcopy(model)
    graphed = GraphedModel(model)
    for a, b in zip(gradients(plain, plain, images(3)), gradients(model, graphed, images(3)), strict=True):
        torch.testing.assert_close(b, a)
    assert model.calls == 4


@needs_gpu
def test_a_parameter_that_is_reached_another_way_is_not_lost():
    class Hidden(Noted):
        def __init__(self) -> None:
            super().__init__()
            self.again = [self.head.weight]

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return F.linear(self.conv(x).mean((2, 3)), self.again[0])

    model = Hidden().cuda().train()
    plain = copy.deepcopy(model)
    plain.again = [plain.head.weight]
    graphed = GraphedModel(model)
    with pytest.warns(UserWarning, match="not registered as its own"):
        found = gradients(model, graphed, images(2))
    for a, b in zip(gradients(plain, plain, images(2)), found, strict=True):
        torch.testing.assert_close(b, a)


@needs_gpu
def test_weights_that_an_optimizer_changed_are_used():
    plain = Noted().cuda().train()
    model = copy.deepcopy(plain)
    graphed = GraphedModel(model)
    for net, run in ((plain, plain), (model, graphed)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
        for _ in range(4):
            gradients(net, run, images(2))
            optimizer.step()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b, a)


@needs_gpu
def test_dropout_is_another_one_each_time():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 1)).cuda().train()
    graphed = GraphedModel(model)
    x = torch.ones(1, 3, 2, 2, device="cuda")
    outputs = set()
    for _ in range(8):
        output = graphed(x)
        output.sum().backward()
        outputs.add(output.item())
    assert graphed.failure is None
    assert len(outputs) > 2


@needs_gpu
def test_the_capture_takes_no_random_numbers():
    model = Noted().cuda().train()
    torch.manual_seed(3)
    expected = torch.randn(2, device="cuda")
    torch.manual_seed(3)
    GraphedModel(model)(images(1)[0]).sum().backward()
    assert torch.equal(torch.randn(2, device="cuda"), expected)


@needs_gpu
def test_a_second_forward_before_the_backward_is_refused():
    graphed = GraphedModel(Noted().cuda().train())
    first = graphed(images(1)[0])
    second = graphed(images(1)[0])
    second.sum().backward()
    with pytest.raises(RuntimeError, match="ran again before this backward"):
        first.sum().backward()


@needs_gpu
def test_a_model_that_cannot_be_captured_runs_plainly():
    class Asks(Noted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > 1e9 else super().forward(x) * 2

    model = Asks().cuda().train()
    graphed = GraphedModel(model)
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="runs without CUDA graphs"):
        graphed(images(1)[0])
    torch.randn(2, device="cuda")  # random numbers still come
    for a, b in zip(gradients(plain, plain, images(2)), gradients(model, graphed, images(2)), strict=True):
        torch.testing.assert_close(b, a)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_of_half_precision_has_statistics_of_float32(dtype):
    x = (torch.randn(2, 32, 9, 9, device="cuda") * 3 + 50).to(dtype)
    norm = GroupNorm(32, 4, device="cuda")
    output = norm(x)
    assert output.dtype == dtype
    exact_output = F.group_norm(x.double(), 4)
    torch.testing.assert_close(output.double(), exact_output, rtol=2**-8, atol=2**-8)
