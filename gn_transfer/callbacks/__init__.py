"""What happens around the training step."""

from gn_transfer.callbacks.accumulation import GradientAccumulation, micro_batches_per_window
from gn_transfer.callbacks.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, read_checkpoint
from gn_transfer.callbacks.early_stopping import OptionalEarlyStopping
from gn_transfer.callbacks.figures import TrainingPictures, ValidationFigures, training_sheet
from gn_transfer.callbacks.ema import WeightAverage
from gn_transfer.callbacks.figures import ValidationFigures
from gn_transfer.callbacks.predictions import PicturePredictions
from gn_transfer.callbacks.precision import MixedPrecision, device_type, resolve_precision
from gn_transfer.callbacks.progress import EpochLines, ProgressBar, Throughput, peak_memory_mib
from gn_transfer.callbacks.record import RunRecord

__all__ = [
    "AtomicCheckpointIO",
    "BestCheckpoint",
    "EpochLines",
    "GradientAccumulation",
    "LastCheckpoint",
    "MixedPrecision",
    "OptionalEarlyStopping",
    "PicturePredictions",
    "ProgressBar",
    "RunRecord",
    "Throughput",
    "TrainingPictures",
    "ValidationFigures",
    "WeightAverage",
    "device_type",
    "micro_batches_per_window",
    "peak_memory_mib",
    "read_checkpoint",
    "resolve_precision",
    "training_sheet",
]
