"""Freeze BatchNorm in your own training, so that ``model.train()`` does not undo it.

Evaluation mode is not enough: every ``model.train()`` wakes the batch norms up, and Lightning calls it after each
validation. Parameters that do not learn are not enough either: the running statistics still move. A frozen batch norm
normalizes by its running statistics whatever the mode is.

    python examples/freeze_batch_norm.py
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from gn_transfer import FreezeBatchNorm
from gn_transfer.layers import freeze_batch_norm

IMAGES, TARGETS = torch.randn(6, 3, 64, 64), torch.tensor([0, 1, 2, 0, 1, 2])


def plain_loop(*, affine: bool) -> dict[str, torch.Tensor]:
    """Train at batch size 1; with ``affine=False`` scale and shift are frozen as well."""
    model = freeze_batch_norm(resnet18(num_classes=3), affine=affine)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.01)
    model.train()  # changes nothing
    for image, target in zip(IMAGES, TARGETS, strict=True):
        F.cross_entropy(model(image[None]), target[None]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


class Classifier(L.LightningModule):
    """A module of your own, with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.model = resnet18(num_classes=3)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Compute the loss."""
        images, targets = batch
        return F.cross_entropy(self.model(images), targets)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Validate: after it, Lightning calls ``train()``."""
        self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train what learns."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def in_lightning() -> dict[str, torch.Tensor]:
    """Train with the callback."""
    module = Classifier()
    loader = DataLoader(TensorDataset(IMAGES, TARGETS), batch_size=1)
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=[FreezeBatchNorm()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)
    return module.model.state_dict()


if __name__ == "__main__":
    for name, state in (("plain loop", plain_loop(affine=True)), ("Lightning", in_lightning())):
        print(f"{name}: running means moved by {state['bn1.running_mean'].abs().max():.1f}")
