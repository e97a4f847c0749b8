"""Fine-tune a ResNet on your own pictures at batch size 1-4: GN+WS against BN by one switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gn_transfer.bundle import Bundle, Prediction, load_bundle

__all__ = ["Bundle", "Prediction", "load_bundle"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:  # on first use: `gn-transfer --help` must not pay for onnxruntime
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gn_transfer import bundle

    return getattr(bundle, name)
