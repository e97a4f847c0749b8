"""Stop when validation no longer improves, if asked to."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer, callbacks

from gn_transfer.config import ConfigError


class EarlyStopping(callbacks.EarlyStopping):
    """Stop early by the validation metric. Off by default.

    Args:
        patience: Validations without a better metric after which the run stops. null never stops.
    """

    def __init__(self, patience: int | None = None) -> None:
        if patience is not None and patience < 1:
            raise ConfigError(f"early_stopping.patience={patience}: use 1 or more, or null to never stop early.")
        super().__init__("val/acc1", mode="max", patience=patience or 1)
        self.enabled = patience is not None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the validation has been judged."""
