"""Which part of an image decided: Grad-CAM, by Captum."""

from __future__ import annotations

from pathlib import Path

import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from gn_transfer.demo.heat_map import Explain, HeatMap, scaled
from gn_transfer.inference.image_source import Pixels
from gn_transfer.inference.load import load_for_training


def grad_cam(folder: Path) -> Explain:
    """Explain by Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) at the last feature map of the model.

    Args:
        folder: A bundle that classifies images, with its weights.

    Returns:
        The explanation; it runs the model forward and backward once.
    """
    task = load_for_training(folder).eval()
    assert task.model is not None
    model = task.model
    cam: LayerGradCam | None = None

    def explain(square_HWC: Pixels, number: int) -> HeatMap:
        nonlocal cam
        images = task.normalize(torch.from_numpy(square_HWC.transpose(2, 0, 1).copy())[None]).requires_grad_()
        cam = cam or LayerGradCam(model, last_feature_map(model, images))
        importance: Tensor = cam.attribute(images, target=number, relu_attributions=True)
        return scaled(importance[0, 0].detach().numpy(), len(square_HWC))

    return explain


def last_feature_map(model: nn.Module, images: Tensor) -> nn.Module:
    """Find the last layer whose output still has a height and a width.

    Args:
        model: In evaluation mode.
        images: Normalized, shape ``(B, 3, H, W)``.
    """
    found: list[nn.Module] = []

    def remember(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            found.append(layer)

    leaves = [layer for layer in model.modules() if not list(layer.children())]
    handles = [leaf.register_forward_hook(remember) for leaf in leaves]
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[-1]
