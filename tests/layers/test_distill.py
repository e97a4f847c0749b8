"""Distillation without labels: the student nears the teacher, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from gn_transfer.config import ConfigError
from gn_transfer.layers import convert_norm
from gn_transfer.layers.distill import distill


def teacher_and_student() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    teacher = nn.Sequential(body, nn.Linear(8, 2))
    body[1].running_mean.normal_()
    body[1].running_var.uniform_(0.5, 2)
    student = copy.deepcopy(teacher)
    convert_norm(student, "gn", num_groups=2)
    return teacher, student


def features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model[0](images)


def test_the_student_nears_the_teacher():
    teacher, student = teacher_and_student()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    head = student[1].weight.clone()
    images, unseen = torch.randn(2, 16, 3, 12, 12)
    student.train()
    student[0][3].weight.requires_grad_(False)

    def error() -> float:
        with torch.no_grad():
            expected = features(teacher.eval(), unseen)
            return float((features(student, unseen) - expected).square().mean() / expected.var())

    first = error()
    steps = []
    done = distill(
        student,
        teacher,
        images,
        samples=120,
        features=features,
        stages=["0.2"],
        lr=0.02,
        advance=lambda: steps.append(1),
    )
    assert error() < 0.5 * first
    assert (done.samples, len(steps)) == (120, 15)
    assert done.after < 0.5 * done.before
    assert student.training
    assert not student[0][3].weight.requires_grad
    assert all(parameter.grad is None for parameter in student.parameters())
    assert torch.equal(student[1].weight, head)
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())
    assert not student[0][2]._forward_hooks


def test_it_is_the_same_for_the_same_seed():
    images = torch.randn(6, 3, 12, 12)
    found = []
    for seed in (0, 0, 1):
        teacher, student = teacher_and_student()
        distill(student, teacher, images, samples=10, features=features, seed=seed)
        found.append(student[0][0].weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_images_may_be_few_but_not_none():
    teacher, student = teacher_and_student()
    with pytest.raises(ConfigError, match="distillation needs images; got 0 images"):
        distill(student, teacher, torch.empty(0, 3, 12, 12), samples=8, features=features)
    with pytest.raises(ConfigError, match="samples=0"):
        distill(student, teacher, torch.randn(2, 3, 12, 12), samples=0, features=features)
    with pytest.raises(ConfigError, match="features that are not finite"):
        distill(student, teacher, torch.full((2, 3, 12, 12), torch.nan), samples=8, features=features)
