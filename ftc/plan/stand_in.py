"""Random parameters and inputs in the place of those that a program has no memory for, and its regions called in another way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_leaves

from ftc.capture.program import Captured, Program


@dataclass
class Call:
    """A region's call as it was seen: tensors' sizes, dtypes and whether a gradient comes back."""

    args: tuple
    kwargs: dict[str, Any]
    outputs: Any


@contextlib.contextmanager
def called_through(program: Program, make: Callable[[str], Callable]) -> Iterator[None]:
    """Regions called through `make(name)`; their own hooks stand aside."""
    before = {region: region.around for region in program.regions}
    for region in before:
        region.around = make(region.name)
    try:
        yield
    finally:
        for region, around in before.items():
            region.around = around


@contextlib.contextmanager
def standing_in(module: Captured, device: torch.device, real: bool) -> Iterator[dict[str, Tensor]]:
    """Random parameters in the module's place: matrices of variance 1 / columns, vectors of ones. Yields them by name."""
    made: dict[int, Tensor] = {}
    names: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in made:
            shape, dtype = parameter.shape, module.dtype_of(parameter)
            if not parameter.is_floating_point():
                value = torch.zeros(shape, dtype=dtype, device=device)
            elif real and len(shape) > 1:
                value = torch.randn(shape, dtype=dtype, device=device).mul_(shape[-1] ** -0.5)
            else:
                value = torch.ones(shape, dtype=dtype, device=device)
            made[id(parameter)] = value.requires_grad_(parameter.requires_grad)
        names[name] = made[id(parameter)]
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if buffer.device.type == "meta":
            names[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
        elif buffer.device != device:
            names[name] = buffer.to(device)
    with _reparametrize_module(module, names):
        yield names


def real_like(value: Any, device: torch.device) -> Any:
    """A tensor of the same size with values: normal floats, zeros of integers, True of booleans."""
    if not isinstance(value, Tensor):
        return value
    shape = [int(size) for size in value.shape]
    if value.is_floating_point():
        return torch.randn(shape, dtype=value.dtype, device=device).requires_grad_(value.requires_grad)
    return torch.ones(shape, dtype=value.dtype, device=device) if value.dtype is torch.bool else torch.zeros(shape, dtype=value.dtype, device=device)


def gradable(outputs: Any) -> list[Tensor]:
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
