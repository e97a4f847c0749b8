"""Fine-tune a ResNet on your own pictures at batch size 1-4: GN+WS against BN by one switch."""

__version__ = "0.1.0"
