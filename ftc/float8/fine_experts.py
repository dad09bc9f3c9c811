"""What a mixture of experts multiplies by in FP8: one form a recipe, which casts rows, picks those of an expert, and has the three products.

    form              rows are cast                      matrices                                 rows for the matrix's gradient
    fine              by 1 x 128 tiles                   by 128 x 128 blocks                      by 128 x 1 tiles
    rowwise           by one scale a row                 by one scale a row of the depth          by one scale a column
    tensorwise        by one scale for all of them       by one scale an expert                   by one scale

Tokens are cast once and picked by their bytes: a token that goes to 8 experts is cast and kept once. A routing weight on the input multiplies the
scale, not the bytes. For the gradient of a matrix tokens are read back and cast again, in the order and grouping of the expert's rows; so that this
rounds next to nothing a second time, their scales are powers of two (error of that gradient on Gaussian numbers: 0.99 of tensorwise FP8's, else 1.19).

Legend: R rows, C columns, O columns of a result, B scales along the depth (1 but for fine), S rows picked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.errors import FtcError, nearest
from ftc.float8 import fine
from ftc.float8.cast import Scaled, to_float8
from ftc.float8.products import multiply, multiply_over_tokens
from ftc.float8.recipes import FINE, RECIPES, Cast, Recipe


@dataclass(frozen=True)
class Rows:
    """Matrix [R, C = width] in float8: `values` [R, C, filled up where fine] and `scales` [B, R] that its numbers are multiplied by."""

    values: Tensor
    scales: Tensor
    width: int

    def take(self, index: Tensor) -> "Rows":
        """Rows `index` [S]; by bytes, which every device can index."""
        return Rows(self.values.view(torch.uint8)[index].view(self.values.dtype), self.scales[:, index], self.width)

    def times(self, weight: Tensor) -> "Rows":
        """Row by row times `weight` [R]."""
        return Rows(self.values, self.scales * weight.float(), self.width)


class FineForm:
    """Fine-grained FP8: the operators of `ftc.dialect.fine_linear`."""

    def cast_tokens(self, rows: Tensor, what: str) -> Rows:
        return Rows(*torch.ops.ftc.fine_tiles(rows, True), rows.shape[1])

    def cast(self, rows: Tensor, what: str) -> Rows:
        return Rows(*torch.ops.ftc.fine_tiles(rows), rows.shape[1])

    cast_gradient = cast

    def read(self, rows: Rows) -> Tensor:
        """float32 [R, C]."""
        return fine.dequantise(rows.values, rows.scales, rows.width)

    def forward(self, rows: Rows, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[R, O]: rows times matrix [O, C], transposed, plus bias."""
        return torch.ops.ftc.fine_product(rows.values, rows.scales, *torch.ops.ftc.fine_blocks(matrix), bias, dtype=dtype)

    def backward(self, rows: Rows, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """[R, C]: rows [R, O] times matrix [O, C]."""
        return torch.ops.ftc.fine_product(rows.values, rows.scales, *torch.ops.ftc.fine_blocks(matrix, True), dtype=dtype)

    def outer(self, grad: Tensor, rows: Rows | Tensor, dtype: torch.dtype) -> Tensor:
        """[O, C]: sum over R of grad [R, O] and rows [R, C], tokens as they were cast or numbers of any floating dtype."""
        if isinstance(rows, Rows):
            turned = torch.ops.ftc.fine_turn(rows.values, rows.scales, rows.width, True)
        else:
            turned = torch.ops.ftc.fine_tiles(rows.t().contiguous())
        return torch.ops.ftc.fine_product(*torch.ops.ftc.fine_tiles(grad.t().contiguous()), *turned, dtype=dtype)


@dataclass(frozen=True)
class ScaledForm:
    """The casts of `recipe`, product by product."""

    recipe: Recipe

    def cast(self, rows: Tensor, what: str) -> Rows:
        return self._cast(rows, self.recipe.x, what)

    cast_tokens = cast

    def cast_gradient(self, rows: Tensor, what: str) -> Rows:
        return self._cast(rows, self.recipe.grad, what)

    def _cast(self, rows: Tensor, cast: Cast, what: str) -> Rows:
        scaled = to_float8(rows, cast, what)
        if not rows.is_cuda and not torch.isfinite(scaled.scale.reciprocal()).all():
            raise FtcError(f"{what} holds infinities or NaN; nothing was multiplied")
        return Rows(scaled.data, scaled.scale.reciprocal().expand(rows.shape[0], 1).t(), rows.shape[1])

    def read(self, rows: Rows) -> Tensor:
        return rows.values.float() * rows.scales.t()

    def _product(self, rows: Rows, matrix: Scaled, dtype: torch.dtype) -> Tensor:
        return multiply(Scaled(rows.values, rows.scales.t().reciprocal()), matrix, dtype, "auto", self.recipe.fast)

    def forward(self, rows: Rows, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        out = self._product(rows, to_float8(matrix, self.recipe.weight, "weight").t(), dtype)
        return out if bias is None else out + bias.to(dtype)

    def backward(self, rows: Rows, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        return self._product(rows, to_float8(matrix, self.recipe.weight_for_dx, "weight"), dtype)

    def outer(self, grad: Tensor, rows: Rows | Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.read(rows) if isinstance(rows, Rows) else rows
        if self.recipe.x_for_dw is None:
            return torch.mm(grad.t(), rows.to(grad.dtype)).to(dtype)
        second = to_float8(rows, self.recipe.x_for_dw, "rows")
        return multiply_over_tokens(to_float8(grad, self.recipe.grad_for_dw, "grad").t(), second, dtype, "auto")


def form_of(recipe: str) -> FineForm | ScaledForm:
    """The form of a recipe's products; FtcError for a recipe that there is not."""
    if recipe == FINE:
        return FineForm()
    if recipe not in RECIPES:
        raise FtcError(f"ftc::float8_moe has no recipe {recipe!r}; {nearest(recipe, [*RECIPES, FINE])}")
    return ScaledForm(RECIPES[recipe])
