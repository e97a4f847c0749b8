"""The accumulation engine under Hugging Face's Trainer.

    python examples/hugging_face_trainer.py

The Trainer knows which micro-batch is the last of a step; the engine is told before the forward pass.
"""

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models import resnet18
from transformers import Trainer, TrainingArguments

from gn_transfer.layers import AccumulationEngine, convert_norm


class Model(nn.Module):
    """A model as the Trainer takes it: it computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = convert_norm(resnet18(num_classes=3), "gn_ws", skip={"fc"})

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute loss and logits."""
        logits = self.backbone(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Images(Dataset[dict[str, Any]]):
    """Eight random images."""

    def __init__(self) -> None:
        self.pixels = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Give an image and its class."""
        return {"pixel_values": self.pixels[index], "labels": index % 3}


class AccumulatingTrainer(Trainer):
    """Announce every micro-batch to an engine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engine, self.begins = AccumulationEngine(self.model), True

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Compute the gradients of a micro-batch."""
        last = self.accelerator.sync_gradients
        self.engine.micro_batch(first=self.begins, last=last)
        self.begins = last
        return super().training_step(model, inputs, *args, **kwargs)


def main(trainer_class: type[Trainer] = AccumulatingTrainer) -> dict[str, Tensor]:
    """Train one epoch: two optimizer steps of four images, one at a time."""
    torch.manual_seed(0)
    model = Model()
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            num_train_epochs=1,
            learning_rate=0.01,
            optim="sgd",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = trainer_class(model=model, args=options, train_dataset=Images())
        print(f"loss {trainer.train().training_loss:.4f}")
    if isinstance(trainer, AccumulatingTrainer):
        trainer.engine.remove()
    return model.state_dict()


if __name__ == "__main__":
    main()
