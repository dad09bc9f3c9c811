"""`ftc::fine_linear`: a linear layer whose three products run in fine-grained FP8 (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).

    fine_linear(x, W, b)  is about  linear(x, W, b)         the mathematics is in `ftc.float8.fine`

Composite: one node in a captured graph; AOTAutograd sees the operators it is made of, the gradients of the input and of the weight as products of
their own, so that a pipeline can put the second off:

    fine_tiles(x)                  1 x 128 tiles: (values, scales)
    fine_tiles_both(x)             tiles of x and of x^T, x read once
    fine_turn(values, scales)      tiles of x as tiles of x^T
    fine_blocks(W, turned)         128 x 128 blocks of W or W^T
    fine_product(a, b)             a b^T in the dtype asked for

Kept for the backward pass is the FP8 copy of x that the weight gradient reads, tiles of x^T, made from x itself while x is read for the forward
product. DeepSeek-V3 keeps the forward's tiles and casts them again (`requantise`): as many bytes, one more pass, and two roundings, which on
Gaussian numbers makes the error of the weight gradient 1.19 of tensorwise FP8's where it is 0.97 here (0.99 with `power_of_two` scales).
W itself is kept, not an FP8 copy: it is there anyway, and a copy would stand once for each microbatch under way.
On CUDA these are the kernels of `ftc.kernels.fine_quantise` and `fine_product`, else the plain PyTorch of `ftc.float8.fine`. An infinity or NaN is
an FtcError on the CPU; on CUDA, where looking would wait for the device, it makes every result that reads its tile NaN.
"""

import torch
from torch import Tensor

from ftc.dialect.library import LIBRARY, composite
from ftc.errors import FtcError
from ftc.float8 import fine
from ftc.kernels import has_triton

BLOCK = fine.BLOCK


def _on_device(x: Tensor) -> bool:
    """Whether the Triton kernels run; FtcError on a CUDA device that has no FP8 products."""
    if not x.is_cuda:
        return False
    if not has_triton() or torch.cuda.get_device_capability(x.device) < (8, 9):
        raise FtcError(f"fine-grained FP8 on CUDA needs Triton and compute capability 8.9 or more; this is {torch.cuda.get_device_name(x.device)}")
    return True


def _tiles(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x [R, C] as (values e4m3 [R, P], scales [P / 128, R])."""
    if _on_device(x):
        from ftc.kernels import fine_quantise

        return fine_quantise.tiles(x, power_of_two)
    return _finite(fine.quantise_tiles(x, power_of_two), "a matrix")


def _tiles_both(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [R, C] by tiles of a row, and its transpose by tiles of a row: (values, scales, values [C, R filled up], scales [.., C])."""
    if _on_device(x):
        from ftc.kernels import fine_quantise

        return fine_quantise.tiles_both(x, power_of_two)
    return *_finite(fine.quantise_tiles(x, power_of_two), "a matrix"), *fine.quantise_tiles(x.t(), power_of_two)


def _blocks(weight: Tensor, turned: bool = False, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """weight [R, C], or where `turned` its transpose, as (values e4m3, scales of 128 x 128 blocks)."""
    if _on_device(weight):
        from ftc.kernels import fine_quantise

        return fine_quantise.blocks(weight, turned, power_of_two)
    values, scales = _finite(fine.quantise_blocks(weight, power_of_two), "a weight")
    return fine.turn_blocks(values, scales, weight.shape[1]) if turned else (values, scales)


def _turn(values: Tensor, scales: Tensor, width: int, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Tiles of [R, C = width] as tiles of the transpose: (values [C, R filled up], scales [.., C])."""
    if _on_device(values):
        from ftc.kernels import fine_quantise

        return fine_quantise.turn_tiles(values, scales, width, power_of_two)
    return fine.turn_tiles(values, scales, width, power_of_two)


def _product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """a [M, P] by tiles times b [N, P] by blocks or tiles, transposed, plus bias: [M, N] in `dtype`."""
    if _on_device(a):
        from ftc.kernels import fine_product

        return fine_product.product(a, a_scales, b, b_scales, bias, dtype)
    return fine.product(a, a_scales, b, b_scales, bias, dtype)


def _finite(found: tuple[Tensor, Tensor], what: str) -> tuple[Tensor, Tensor]:
    fine.require_finite(found[1], what)
    return found


def _like(rows, columns, scales, x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty (values [rows, columns filled up], scales)."""
    return x.new_empty(rows, fine.num_blocks(columns) * BLOCK, dtype=fine.VALUES), x.new_empty(*scales, dtype=torch.float32)


def _tiles_fake(x, power_of_two=False):
    rows, columns = x.shape
    return _like(rows, columns, (fine.num_blocks(columns), rows), x)


def _tiles_both_fake(x, power_of_two=False):
    return *_tiles_fake(x), *_tiles_fake(x.t())


def _blocks_fake(weight, turned=False, power_of_two=False):
    rows, columns = reversed(weight.shape) if turned else weight.shape
    return _like(rows, columns, (fine.num_blocks(rows), fine.num_blocks(columns)), weight)


def _turn_fake(values, scales, width, power_of_two=False):
    rows = values.shape[0]
    return _like(width, rows, (fine.num_blocks(rows), width), values)


def _product_fake(a, a_scales, b, b_scales, bias=None, *, dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


for _schema, _function, _fake in (
    ("fine_tiles(Tensor x, bool power_of_two=False) -> (Tensor, Tensor)", _tiles, _tiles_fake),
    ("fine_tiles_both(Tensor x, bool power_of_two=False) -> (Tensor, Tensor, Tensor, Tensor)", _tiles_both, _tiles_both_fake),
    ("fine_blocks(Tensor weight, bool turned=False, bool power_of_two=False) -> (Tensor, Tensor)", _blocks, _blocks_fake),
    ("fine_turn(Tensor values, Tensor scales, SymInt width, bool power_of_two=False) -> (Tensor, Tensor)", _turn, _turn_fake),
    (
        "fine_product(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? bias=None, *, ScalarType dtype) -> Tensor",
        _product, _product_fake,
    ),
):  # fmt: skip
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_schema.split("(")[0], _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ftc::{_schema.split('(')[0]}", _fake)


class _FineLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, power_of_two, requantise):
        ops, want_weight = torch.ops.ftc, ctx.needs_input_grad[1]
        if want_weight and not requantise:
            values, scales, *kept = ops.fine_tiles_both(x, power_of_two)
        else:
            values, scales = ops.fine_tiles(x, power_of_two)
            kept = [values, scales] if want_weight else []
        ctx.save_for_backward(weight, *kept)
        ctx.options, ctx.dtypes = (power_of_two, requantise), (x.dtype, None if bias is None else bias.dtype)
        return ops.fine_product(values, scales, *ops.fine_blocks(weight, False, power_of_two), bias, dtype=x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        ops, (weight, *kept) = torch.ops.ftc, ctx.saved_tensors
        (x_dtype, bias_dtype), (power, requantise) = ctx.dtypes, ctx.options
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if want_x and want_weight:
            rows, row_scales, columns, column_scales = ops.fine_tiles_both(grad, power)
        elif want_x:
            rows, row_scales = ops.fine_tiles(grad, power)
        elif want_weight:
            columns, column_scales = ops.fine_tiles(grad.t(), power)
        if want_x:
            dx = ops.fine_product(rows, row_scales, *ops.fine_blocks(weight, True, power), dtype=x_dtype)
        if want_weight:
            kept = ops.fine_turn(*kept, weight.shape[1], power) if requantise else kept
            dw = ops.fine_product(columns, column_scales, *kept, dtype=weight.dtype)
        if want_bias:
            db = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(bias_dtype)
        return dx, dw, db, None, None


@composite("fine_linear(Tensor x, Tensor weight, Tensor? bias=None, *, bool power_of_two=False, bool requantise=False) -> Tensor")
def fine_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, power_of_two: bool = False, requantise: bool = False
) -> Tensor:  # fmt: skip
    """x [..., D], weight [F, D], bias [F], of any floating dtypes and sizes; [..., F] in the dtype of x.

    `power_of_two`: scales are powers of two. `requantise`: see the module. Differentiable once in all three; mutates nothing. FtcError for shapes
    that do not fit and, on the CPU, for numbers that are not finite.
    """
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"x {list(x.shape)}, weight {list(weight.shape)}" + ("" if bias is None else f", bias {list(bias.shape)}")
        raise FtcError(f"ftc::fine_linear takes x [..., D], weight [F, D], bias [F]; got {shapes}")
    out = _FineLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, power_of_two, requantise)
    return out.reshape(*x.shape[:-1], weight.shape[0])
