"""Stop when validation no longer improves, if asked to."""

from __future__ import annotations

from typing import Any

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
        # Lightning's default is the end of the epoch, where all validations but the last one would be passed over.
        super().__init__("val/acc1", mode="max", patience=patience or 1, check_on_train_epoch_end=False)
        self.enabled = patience is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a run that goes on from the checkpoint of its last epoch, as it would have stopped there."""
        if self.enabled and self.wait_count >= self.patience:
            trainer.should_stop = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting, with the patience of this call."""
        super().load_state_dict({**state_dict, "patience": self.patience})
