"""Plain PyTorch decoders, their presets, and readers and writers for checkpoint formats."""

assert __name__ == "ftc.models", f"import this package as ftc.models, not as {__name__}"

from ftc.models.checkpoints import blueprint, load, save  # noqa: E402

__all__ = ["blueprint", "load", "save"]
