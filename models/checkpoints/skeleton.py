"""Models without weights, to be filled from a file or by sharding."""

import contextlib
from collections.abc import Iterator

import torch
from ftc.models.decoder import Decoder, DecoderConfig
from ftc.models.moe import Router
from torch import nn
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
    """The module tree with its parameters on the meta device: names and shapes, no memory; selection biases are real, zeros."""
    with torch.device("meta"), _WithoutDrawing():
        model = Decoder(config)
    for router in model.modules():
        if isinstance(router, Router) and router.config.selection_bias:
            router.e_score_correction_bias = torch.zeros(router.config.num_experts)
    return model


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside get their parameters on the meta device, drawn by nobody; buffers are real, as computed."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = registered
    try:
        with _WithoutDrawing():
            yield
    finally:
        nn.Module.register_parameter = register
