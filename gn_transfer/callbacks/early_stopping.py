"""Stop when validation no longer improves, if asked to."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from gn_transfer.config import ConfigError


class OptionalEarlyStopping(EarlyStopping):
    """Stop early by validation accuracy; off by default.

    Args:
        patience: Validations without a better val/acc1 after which the run stops; null never stops.
        min_delta: What counts as better, in accuracy.
    """

    def __init__(self, patience: int | None = None, min_delta: float = 0.0) -> None:
        if patience is not None and patience < 1:
            raise ConfigError(f"early_stopping.patience={patience}: use 1 or more, or null to never stop early.")
        super().__init__("val/acc1", mode="max", patience=patience or 1, min_delta=min_delta)
        self.enabled = patience is not None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge a validation, where early stopping was asked for."""
        if self.enabled:
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the validation has been judged."""
