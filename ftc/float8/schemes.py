"""The three products of a linear layer by recipe: how operands are made, what of x is kept for dW, and how they are multiplied.

A scheme has `of_x` (the operand of y), `y`, `of_x_for_dw`, `dx_and_dw`; an operand is a few tensors, what they mean is the scheme's own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.float8.cast import Scaled, to_float8
from ftc.float8.products import multiply, multiply_over_tokens
from ftc.float8.recipes import FINE, Cast, Recipe, recipe_of

Operand = tuple[Tensor, ...]


@dataclass(frozen=True)
class ByScale:
    """torchao's recipes: a matrix has one scale, or a scale for each row or column. Operands (data, scale), or (x,) in high precision."""

    recipe: Recipe
    products: str

    @property
    def keeps_float8(self) -> bool:
        """Whether dW reads x in float8."""
        return self.recipe.x_for_dw is not None

    def of_x(self, x: Tensor, for_dw: bool) -> tuple[Operand, Operand | None]:
        """x [N, D] as the operand of y and, where asked for, as that of dW."""
        first = _tensors(to_float8(x, self.recipe.x, "x"))
        if not for_dw:
            return first, None
        return first, (first if self.recipe.x_for_dw == self.recipe.x else self.of_x_for_dw(x))

    def of_x_for_dw(self, x: Tensor) -> Operand:
        """x [N, D] as the operand of dW."""
        return (x,) if self.recipe.x_for_dw is None else _tensors(to_float8(x, self.recipe.x_for_dw, "x"))

    def y(self, x: Operand, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, F] in `dtype`."""
        return multiply(Scaled(*x), weight_operand(weight, self.recipe.weight).t(), dtype, self.products, self.recipe.fast)

    def dx_and_dw(self, grad: Tensor, weight: Tensor, x: Operand | None, want_x: bool) -> tuple[Tensor | None, Tensor | None]:
        """Gradients for grad [N, F]: that of x where wanted, that of W [F, D] where the operand x is given."""
        dx = dw = None
        rows = to_float8(grad, self.recipe.grad, "gradient") if want_x else None
        if want_x:
            dx = multiply(rows, weight_operand(weight, self.recipe.weight_for_dx), grad.dtype, self.products)
        if x is not None and self.recipe.grad_for_dw is None:
            dw = torch.mm(grad.t(), x[0])
        elif x is not None:
            same = rows is not None and self.recipe.grad_for_dw == self.recipe.grad
            columns = rows if same else to_float8(grad, self.recipe.grad_for_dw, "gradient")
            dw = multiply_over_tokens(columns.t(), Scaled(*x), grad.dtype, self.products)
        return dx, dw


@dataclass(frozen=True)
class ByTile:
    """DeepSeek-V3's fine-grained recipe by the operators of `ftc.dialect.fine_linear`. Operands (values, scales)."""

    keeps_float8 = True

    def of_x(self, x: Tensor, for_dw: bool) -> tuple[Operand, Operand | None]:
        if not for_dw:
            return tuple(torch.ops.ftc.fine_tiles(x)), None
        values, scales, *turned = torch.ops.ftc.fine_tiles_both(x)
        return (values, scales), tuple(turned)

    def of_x_for_dw(self, x: Tensor) -> Operand:
        return tuple(torch.ops.ftc.fine_tiles(x.t()))

    def y(self, x: Operand, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.ops.ftc.fine_product(*x, *torch.ops.ftc.fine_blocks(weight), dtype=dtype)

    def dx_and_dw(self, grad: Tensor, weight: Tensor, x: Operand | None, want_x: bool) -> tuple[Tensor | None, Tensor | None]:
        ops, dx, dw = torch.ops.ftc, None, None
        if want_x and x is not None:
            values, scales, *columns = ops.fine_tiles_both(grad)
        elif want_x:
            values, scales = ops.fine_tiles(grad)
        else:
            columns = ops.fine_tiles(grad.t())
        if want_x:
            dx = ops.fine_product(values, scales, *ops.fine_blocks(weight, True), dtype=grad.dtype)
        if x is not None:
            dw = ops.fine_product(*columns, *x, dtype=weight.dtype)
        return dx, dw


def scheme_of(recipe: str, products: str) -> ByScale | ByTile:
    """The scheme of a recipe; FtcError where there is none of that name."""
    return ByTile() if recipe == FINE else ByScale(recipe_of(recipe), products)


def weight_operand(weight: Tensor, cast: Cast) -> Scaled:
    """A weight [F, D] in float8: cast here, or gathered so (`ftc.float8.all_gather`)."""
    ready = getattr(weight, "ftc_float8", None)
    return to_float8(weight, cast, "weight") if ready is None else ready(cast)


def _tensors(scaled: Scaled) -> Operand:
    return scaled.data, scaled.scale
