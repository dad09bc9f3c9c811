"""Recipes of float8 training: which operand of which of the three products of a linear layer is cast how.

    y  = x W^T            operands  x, weight
    dx = g W              operands  grad, weight_for_dx
    dW = g^T x            operands  grad_for_dw, x_for_dw         (None: the operands as they came, in high precision)

    tensorwise            one scale a tensor; x and W in e4m3, g in e5m2                (Micikevicius et al. 2022, arXiv:2209.05433)
    rowwise               one scale a row along the summed dimension, a power of two, e4m3 for all three
    rowwise_with_gw_hp    as rowwise, W for dx under one scale, dW in high precision
    fine                  1x128 tiles of x and g, 128x128 blocks of W, e4m3              (DeepSeek-V3, arXiv:2412.19437, 3.3.2): `ftc.float8.fine`

The first three are torchao's recipes of these names, bit by bit.
"""

from dataclasses import dataclass

import torch

from ftc.errors import FtcError, nearest

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # torch._scaled_mm takes inner and last sizes in multiples of 16 bytes
BLOCK = 128  # of the fine-grained recipe


@dataclass(frozen=True)
class Cast:
    """How a matrix becomes float8. `over`: what shares a scale: the whole matrix (None), or all along dimension 0 or -1."""

    dtype: torch.dtype
    over: int | None = None
    power_of_two: bool = False

    @property
    def scaling(self) -> str:
        """In words, for reports."""
        return "one scale" if self.over is None else ("a scale a row" if self.over == -1 else "a scale a column")


@dataclass(frozen=True)
class Recipe:
    """See the module's docstring. `fast`: the forward product adds up in fewer bits on Hopper (`use_fast_accum`), as in torchao."""

    name: str
    x: Cast
    weight: Cast
    grad: Cast
    weight_for_dx: Cast
    x_for_dw: Cast | None
    grad_for_dw: Cast | None
    fast: bool = True

    @property
    def weight_needs(self) -> int:
        """Different float8 copies of a weight that a step needs."""
        return len({self.weight, self.weight_for_dx})


_ROW, _COLUMN = Cast(E4M3, -1, True), Cast(E4M3, 0, True)
RECIPES = {
    "tensorwise": Recipe("tensorwise", Cast(E4M3), Cast(E4M3), Cast(E5M2), Cast(E4M3), Cast(E4M3), Cast(E5M2)),
    "rowwise": Recipe("rowwise", _ROW, _ROW, _ROW, _COLUMN, _COLUMN, _COLUMN),
    "rowwise_with_gw_hp": Recipe("rowwise_with_gw_hp", _ROW, _ROW, _ROW, Cast(E4M3, None, True), None, None),
}
FINE = "fine"
NAMES = (*RECIPES, FINE)


def recipe_of(name: str) -> Recipe:
    """The recipe called `name`; FtcError where there is none, or where it is "fine", whose casts are no `Cast`."""
    if name not in RECIPES:
        raise FtcError(f"there is no float8 recipe {name!r}; {nearest(name, NAMES)}")
    return RECIPES[name]
