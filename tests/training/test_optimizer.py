from copy import deepcopy

import pytest
import torch
from torch import nn

from gn_transfer.config import ConfigError
from gn_transfer.training.classification import RegularizationConfig
from gn_transfer.training.optimizer import OptimizerConfig, create_optimizer, parameter_groups
from gn_transfer.training.schedules import bit_samples, warmup_constant, warmup_cosine, warmup_staircase


def test_warmup_then_cosine_by_hand():
    assert [warmup_cosine(step, 6, 2) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert warmup_cosine(4, 6, 2) == pytest.approx(0.5)
    assert warmup_cosine(6, 6, 2) == warmup_cosine(9, 6, 2) == warmup_cosine(2, 2, 1) == 0.0


def test_without_warmup():
    assert warmup_cosine(0, 10, 0) == warmup_constant(0, 10, 0) == 1.0
    assert [warmup_constant(step, 10, 4) for step in (0, 3, 9)] == [0.25, 1.0, 1.0]


def test_the_rule_of_bit_by_hand():
    assert [bit_samples(images) // 512 for images in (1, 19_999, 20_000, 499_999, 500_000)] == [
        500,
        500,
        10_000,
        10_000,
        20_000,
    ]
    assert [warmup_staircase(step, 10, 2) for step in (0, 1, 2, 3)] == [0.5, 1.0, 1.0, 1.0]
    assert [warmup_staircase(step, 10, 2) for step in (4, 5, 6, 8)] == pytest.approx([0.1, 0.1, 0.01, 0.001])


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


def test_momentum_is_that_of_sgd_by_hand():
    parameter = nn.Parameter(torch.tensor([[1.0]]))
    groups = parameter_groups([("w", parameter)], lr=0.1, head="fc", weight_decay=0.5)
    optimizer = create_optimizer("sgd", groups, momentum=0.9)
    for _ in range(2):
        parameter.grad = torch.tensor([[2.0]])
        optimizer.step()
    # 1: the gradient is 2 + 0.5 * 1, the weight 0.75. 2: 2 + 0.5 * 0.75, and 0.9 of what was moved before.
    assert parameter.item() == pytest.approx(0.75 - 0.1 * (0.9 * 2.5 + 2.375))


def test_betas_of_adam():
    [weight] = [nn.Parameter(torch.ones(1, 1))]
    optimizer = create_optimizer("adamw", parameter_groups([("w", weight)], lr=0.1, head="fc"), momentum=0.8)
    assert optimizer.defaults["betas"] == (0.8, 0.999)


def test_a_head_that_does_not_learn():
    config, model = OptimizerConfig(lr=0.1, head_lr=0.0, layer_decay=0.5), nn.Module()
    model.body, model.fc = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = config.create_optimizer(model, "fc", {"body.weight": 0, "body.bias": 0, "fc.weight": 1})
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "backbone/no_decay": 0.1,
        "head/no_decay": 0.0,
    }


def test_warmup_is_a_share_of_all_steps():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    scheduler = OptimizerConfig(warmup_fraction=0.21, schedule="constant").create_scheduler(optimizer, 10)
    rates = []
    for _ in range(4):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2 / 3, 4 / 3, 2, 2])


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


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_gradients_are_clipped_to_a_norm_above_zero(norm):
    with pytest.raises(ConfigError, match=r"optimizer\.clip_norm"):
        OptimizerConfig(clip_norm=norm)
    OptimizerConfig(clip_norm=1.0)


def test_defaults_are_those_of_the_documentation():
    config = OptimizerConfig()
    assert (config.name, config.weight_decay, config.head_lr, config.clip_norm) == ("sgd", 0.0, None, None)
    assert (config.lr, config.momentum, config.schedule) == (0.01, 0.9, "cosine")
    optimizer = config.create_optimizer(nn.Linear(2, 2), "fc", None)
    assert optimizer.defaults["fused"]


@pytest.mark.parametrize(("name", "left"), [("adamw", 0.95), ("adam", 0.9)])
def test_adamw_decays_the_weight_and_adam_the_gradient(name, left):
    weight = nn.Parameter(torch.ones(1, 1))
    groups = parameter_groups([("w", weight)], lr=0.1, head="fc", weight_decay=0.5)
    weight.grad = torch.zeros(1, 1)
    create_optimizer(name, groups, momentum=0.9).step()
    assert weight.item() == pytest.approx(left)


def test_an_optimizer_that_is_not_to_be_fused():
    groups = parameter_groups(named(w=(1, 1)), lr=0.1, head="fc")
    assert not create_optimizer("sgd", groups, momentum=0.9, fused=False).defaults["fused"]


def test_layers_learn_alike_and_nothing_decays_where_nothing_is_said():
    parameters = named(stem_weight=(1, 1), body_weight=(1, 1))
    [group] = parameter_groups(parameters, lr=1.0, head="fc", depths={"stem.weight": 0, "body.weight": 2})
    assert (group["lr"], group["weight_decay"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("lr", (0.0, -0.1, 1000.5)),
        ("head_lr", (-0.1, 1000.5)),
        ("momentum", (-0.1, 1.0)),
        ("weight_decay", (-0.1, 1000.5)),
        ("layer_decay", (0.0, 1.1)),
        ("warmup_fraction", (-0.1, 1.0)),
    ],
)
def test_numbers_out_of_range(key, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"optimizer\.{key}={value} is out of range"):
            OptimizerConfig(**{key: value})
    for regularization in ({"mixup": 1000.5}, {"cutmix": 1000.5}):
        with pytest.raises(ConfigError, match=r"is out of range; use a number in \[0, 1000\]"):
            RegularizationConfig(**regularization)
    OptimizerConfig(lr=1000.0, head_lr=1000.0, weight_decay=1000.0)
    RegularizationConfig(mixup=1000.0, cutmix=1000.0)
