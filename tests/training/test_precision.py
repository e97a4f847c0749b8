import pytest
import torch

from gn_transfer.config import ConfigError
from gn_transfer.training import precision


@pytest.mark.parametrize(
    ("mode", "device", "bf16", "expected"),
    [
        ("auto", "cpu", True, "bf16-mixed"),
        ("auto", "cpu", False, "32-true"),
        ("auto", "cuda", False, "16-mixed"),
        ("auto", "mps", False, "32-true"),
        ("bf16", "cpu", False, "bf16-mixed"),
        ("fp32", "cuda", True, "32-true"),
        ("fp16", "cuda", True, "16-mixed"),
    ],
)
def test_resolve_precision(monkeypatch, mode, device, bf16, expected):
    monkeypatch.setattr(precision, "has_bf16", lambda _: bf16)
    assert precision.resolve_precision(mode, device) == expected


def test_fp16_without_cuda_is_refused():
    with pytest.raises(ConfigError, match=r"fp16 needs a CUDA device.*this run is on cpu"):
        precision.resolve_precision("fp16", "cpu")


def test_auto_accelerator_without_a_gpu_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert precision.device_type("auto") == "cpu"
    assert precision.device_type("cpu") == "cpu"
