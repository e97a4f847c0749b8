"""Freeze the backbone in the first epochs, while the new head learns; freeze batch norms for good."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gn_transfer.config import ConfigError, check_range
from gn_transfer.layers.freeze import freeze_batch_norm


class BackboneFreezing(Callback):
    """Train the head alone in the first epochs.

    A frozen backbone stays in evaluation mode, so that running statistics do not change either. Freezing follows from
    the epoch alone, so a resumed run does what it would have done.

    Args:
        epochs: First epochs in which the head alone learns. 0 disables it.
    """

    def __init__(self, epochs: int = 0) -> None:
        check_range("freezing.epochs", epochs, low=0)
        self.epochs = epochs
        self._frozen = False

    @property
    def enabled(self) -> bool:
        """Whether there is anything to do."""
        return self.epochs > 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse several devices.

        Raises:
            ConfigError: DDP cannot unfreeze parameters.
        """
        if stage == "fit" and trainer.world_size > 1:
            raise ConfigError(
                f"freezing.epochs={self.epochs}: DDP cannot unfreeze parameters during a training; train the head on "
                "one device first, or set it to 0."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Freeze or unfreeze by the number of the epoch."""
        frozen = trainer.current_epoch < self.epochs
        self._set(pl_module, frozen=frozen)
        if frozen and pl_module.model.training:  # Lightning switches the module to training after each validation
            pl_module.model.eval()
            pl_module.model.get_submodule(pl_module.head).train()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze: what trains next has an optimizer for all parameters."""
        self._set(pl_module, frozen=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unfreeze, for a training that begins again."""
        self._set(pl_module, frozen=False)

    def _set(self, pl_module: Any, *, frozen: bool) -> None:
        if frozen == self._frozen:
            return
        self._frozen = frozen
        for name, parameter in pl_module.model.named_parameters():
            if not name.startswith(f"{pl_module.head}."):
                parameter.requires_grad_(not frozen)
        if not frozen:
            pl_module.model.train()


class FreezeBatchNorm(Callback):
    """Freeze the batch norms of a LightningModule of your own; ``model.train()`` does not undo it.

    For our own modules, ``model.norm: bn_frozen`` does the same. Callbacks are set up before ``configure_model``: call
    :func:`gn_transfer.layers.freeze_batch_norm` there where that builds the model.

    Args:
        affine: Whether scale and shift still learn.
    """

    def __init__(self, affine: bool = True) -> None:
        self.affine = affine

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the batch norms before the optimizer is made; their parameters stay the same objects."""
        freeze_batch_norm(pl_module, affine=self.affine)
