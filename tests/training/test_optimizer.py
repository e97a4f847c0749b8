from copy import deepcopy

import pytest
import torch
from torch import nn

from gn_transfer.training.optimizer import create_optimizer, parameter_groups
from gn_transfer.training.schedules import warmup_constant, warmup_cosine


def test_warmup_then_cosine_by_hand():
    assert [warmup_cosine(step, 6, 2) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert warmup_cosine(4, 6, 2) == pytest.approx(0.5)
    assert warmup_cosine(6, 6, 2) == warmup_cosine(9, 6, 2) == 0.0


def test_without_warmup():
    assert warmup_cosine(0, 10, 0) == warmup_constant(0, 10, 0) == 1.0
    assert [warmup_constant(step, 10, 4) for step in (0, 3, 9)] == [0.25, 1.0, 1.0]


def named(**shapes):
    return [(name.replace("_", "."), nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


def test_norms_and_biases_are_not_decayed():
    groups = parameter_groups(
        named(conv_weight=(4, 3, 3, 3), norm_weight=(4,), fc_weight=(2, 4), fc_bias=(2,)),
        lr=0.1,
        head="fc",
        weight_decay=0.01,
    )
    assert [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("backbone/decay", 0.1, 0.01, 1),
        ("backbone/no_decay", 0.1, 0.0, 1),
        ("head/decay", 0.1, 0.01, 1),
        ("head/no_decay", 0.1, 0.0, 1),
    ]


def test_layer_decay_and_head_rate():
    groups = parameter_groups(
        named(stem_weight=(1, 1), body_weight=(1, 1), fc_weight=(1, 1)),
        lr=1.0,
        head="fc",
        head_lr=5.0,
        layer_decay=0.5,
        depths={"stem.weight": 0, "body.weight": 2, "fc.weight": 3},
    )
    assert [g["lr"] for g in groups] == [0.25, 1.0, 5.0]


def test_frozen_parameters_are_left_out():
    parameters = named(a_weight=(1, 1), b_weight=(1, 1))
    parameters[0][1].requires_grad_(False)
    [group] = parameter_groups(parameters, lr=1.0, head="fc")
    assert group["params"] == [parameters[1][1]]


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam"])
def test_optimizers_are_fused_and_step(name):
    parameter = nn.Parameter(torch.ones(3, 3))
    optimizer = create_optimizer(name, parameter_groups([("w", parameter)], lr=0.1, head="fc"), momentum=0.9)
    assert optimizer.defaults["fused"]
    parameter.sum().backward()
    optimizer.step()
    assert (parameter < 1).all()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_saved_in_another_memory_layout_continues_the_same_run(name):
    """A run that began on one device may go on where another layout is faster; fused kernels do not notice."""
    start, gradients = torch.randn(8, 4, 3, 3), torch.randn(2, 8, 4, 3, 3)

    def optimizer_of(weight):
        return create_optimizer(name, parameter_groups([("w", weight)], lr=0.1, head="fc"), momentum=0.9)

    def step(optimizer, weight, gradient):
        weight.grad = gradient.clone(memory_format=torch.preserve_format).to(memory_format=layout_of[weight])
        optimizer.step()

    layout_of = {}
    first, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    layout_of[first] = torch.contiguous_format
    optimizer = optimizer_of(first)
    step(optimizer, first, gradients[0])

    with torch.no_grad():
        other.copy_(first)
    other.data = other.data.to(memory_format=torch.channels_last)
    layout_of[other] = torch.channels_last
    resumed = optimizer_of(other)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    step(optimizer, first, gradients[1])
    step(resumed, other, gradients[1])
    torch.testing.assert_close(other.detach().contiguous(), first.detach())
