"""A decoder without weights, to be filled from a file."""

import torch
from ftc.models.decoder import Decoder, DecoderConfig
from torch.overrides import TorchFunctionMode


class _WithoutDrawing(TorchFunctionMode):
    """Leaves out the in-place drawing of initial weights.

    On the meta device it would draw nothing, but import PyTorch's decompositions: 3.6 s and 150 MB (torch 2.13).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "fill_", "zero_"):
            return args[0] if args else kwargs["tensor"]  # torch.nn.init passes its tensor by name
        return func(*args, **(kwargs or {}))


def meta_decoder(config: DecoderConfig) -> Decoder:
    """The module tree on the meta device: names and shapes, no memory."""
    with torch.device("meta"), _WithoutDrawing():
        return Decoder(config)
