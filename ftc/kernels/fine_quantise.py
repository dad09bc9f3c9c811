"""Quantising to fine-grained FP8 in Triton: the same bits as `ftc.float8.fine`, each matrix read once.

    tiles_kernel     rows of 128 columns, a scale each                                  activations, forward
    square_kernel    a square of 128 x 128: by rows, and turned over by columns         gradients (both), weights (one scale for the square),
                                                                                        activations read back from FP8 (by columns only)

A turned square goes through shared memory, so that reads and writes both follow memory. What is not finite spoils its tile, as in the reference.

Legend: R rows, C columns, P columns filled up to a multiple of 128.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftc.float8.fine import BLOCK, SMALLEST, STEP, VALUES, num_blocks
from ftc.kernels.splits import WIDEN

ROWS = 32  # rows of one program of `tiles_kernel`: 8 KiB of bfloat16
REGISTERS = 128  # a thread's in `square_kernel`: two programs of 256 threads side by side, one reads while the other computes
STEP_, SMALLEST_ = tl.constexpr(STEP), tl.constexpr(SMALLEST)


@triton.jit
def largest_of(x, AXIS: tl.constexpr):
    """The largest magnitude along AXIS, NaN where there is one: among bits of what is not negative NaN is the largest."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), AXIS).to(tl.float32, bitcast=True)


@triton.jit
def larger(a, b):
    """The larger of two magnitudes, NaN where either is."""
    return tl.maximum(tl.abs(a).to(tl.int32, bitcast=True), tl.abs(b).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(largest, POWER: tl.constexpr):
    """(scale, 1 / scale), both rounded to nearest as PyTorch rounds; POWER: the next power of two above."""
    scale = tl.where(largest < SMALLEST_, SMALLEST_, largest) * STEP_
    if POWER:  # a mantissa that is not zero carries into the exponent
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(largest < float("inf"), scale, largest)
    return scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def to_e4m3(x, WIDEN: tl.constexpr):
    """x in e4m3, to nearest even; Triton's interpreter truncates, so there x is rounded before."""
    if WIDEN:
        bits = tl.abs(x).to(tl.int32, bitcast=True)
        unit = tl.exp2(tl.maximum((bits >> 23) - 127, -6).to(tl.float32) - 3.0)
        x = ((x / unit + 12582912.0) - 12582912.0) * unit
    return x.to(tl.float8e4nv)


@triton.jit
def tiles_kernel(
    x_ptr, value_ptr, scale_ptr, R, C, P,
    POWER: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS x 128 of x [R, C] to values [R, P] and scales [P / 128, R]."""
    row, block = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0)
    column = block * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + at * C + column[None, :], mask=(row < R)[:, None] & (column < C)[None, :], other=0.0).to(tl.float32)
    scale, inverse = scale_of(largest_of(x, 1), POWER)
    tl.store(value_ptr + at * P + column[None, :], to_e4m3(x * inverse[:, None], WIDEN), mask=(row < R)[:, None])
    tl.store(scale_ptr + block.to(tl.int64) * R + row, scale, mask=row < R)


@triton.jit
def rows_of(x_ptr, x_scale_ptr, first, column, R, C, x_stride, scale_at, SCALED: tl.constexpr):
    """Rows first[:, None] of x in float32, 0 from row R and column C on."""
    at, there = first.to(tl.int64)[:, None] * x_stride + column[None, :], (first < R)[:, None] & (column < C)[None, :]
    x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(x_scale_ptr + scale_at + first, mask=first < R, other=0.0)[:, None]
    return x


@triton.jit
def store_rows(x, inverse, value_ptr, first, column, R, P, WIDEN: tl.constexpr):
    """x times `inverse` of each row in e4m3, to rows `first` of values [R, P]."""
    tl.store(value_ptr + first.to(tl.int64)[:, None] * P + column[None, :], to_e4m3(x * inverse[:, None], WIDEN), mask=(first < R)[:, None])


@triton.jit
def store_own_rows(x, value_ptr, scale_ptr, scale_at, first, column, R, P, POWER: tl.constexpr, WIDEN: tl.constexpr):
    """`store_rows` with a scale for each row, which is stored too."""
    scale, inverse = scale_of(largest_of(x, 1), POWER)
    tl.store(scale_ptr + scale_at + first, scale, mask=first < R)
    store_rows(x, inverse, value_ptr, first, column, R, P, WIDEN)


@triton.jit
def byte(x, inverse, SHIFT: tl.constexpr, WIDEN: tl.constexpr):
    """x times `inverse` of each column in e4m3, as a byte of a 32-bit word."""
    return to_e4m3(x * inverse[None, :], WIDEN).to(tl.uint8, bitcast=True).to(tl.int32) << SHIFT


@triton.jit
def square_kernel(
    x_ptr, x_scale_ptr, value_ptr, scale_ptr, turned_ptr, turned_scale_ptr, R, C, P, x_stride, turned_words,
    SCALED: tl.constexpr, BY_BLOCK: tl.constexpr, STRAIGHT: tl.constexpr, TURNED: tl.constexpr,
    POWER: tl.constexpr, WIDEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: 128 x 128 of x [R, C], rows `x_stride` apart, the third axis of programs one matrix after the other.

    SCALED: x is e4m3 with scales [.., R] of its tiles. BY_BLOCK: one scale for the square, scale [ceil(R / 128), P / 128] and turned_scale its
    transpose; else a row each, scale [P / 128, R], and turned over a column each, turned_scale [ceil(R / 128), C].
    STRAIGHT writes values [R, P], TURNED turned [C, 4 turned_words], with zeros where either is filled up.

    Four rows are held apart, so that their numbers of one column are made one 32-bit word before they are turned over: by single bytes that was 2.5
    times slower than the memory on an H200.
    """
    block, down = tl.program_id(0), tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    blocks = tl.num_programs(0) * tl.num_programs(1)
    x_ptr += matrix * R * x_stride
    value_ptr += matrix * R * P
    turned_ptr += matrix * C * turned_words
    scale_ptr += matrix * blocks
    turned_scale_ptr += matrix * blocks
    i, column = tl.arange(0, BLOCK // 4), block * BLOCK + tl.arange(0, BLOCK)
    r0 = down * BLOCK + 4 * i
    r1, r2, r3 = r0 + 1, r0 + 2, r0 + 3
    at = block.to(tl.int64) * R
    x0, x1 = rows_of(x_ptr, x_scale_ptr, r0, column, R, C, x_stride, at, SCALED), rows_of(x_ptr, x_scale_ptr, r1, column, R, C, x_stride, at, SCALED)
    x2, x3 = rows_of(x_ptr, x_scale_ptr, r2, column, R, C, x_stride, at, SCALED), rows_of(x_ptr, x_scale_ptr, r3, column, R, C, x_stride, at, SCALED)
    if BY_BLOCK or TURNED:
        by_column = largest_of(larger(larger(x0, x1), larger(x2, x3)), 0)
    if BY_BLOCK:
        scale, inverse = scale_of(tl.zeros([1], tl.float32) + largest_of(by_column, 0), POWER)
        one = tl.arange(0, 1)
        if STRAIGHT:
            tl.store(scale_ptr + down * (P // BLOCK) + block + one, scale)
            store_rows(x0, inverse, value_ptr, r0, column, R, P, WIDEN)
            store_rows(x1, inverse, value_ptr, r1, column, R, P, WIDEN)
            store_rows(x2, inverse, value_ptr, r2, column, R, P, WIDEN)
            store_rows(x3, inverse, value_ptr, r3, column, R, P, WIDEN)
        if TURNED:
            tl.store(turned_scale_ptr + block * tl.num_programs(1) + down + one, scale)
    else:
        if STRAIGHT:
            store_own_rows(x0, value_ptr, scale_ptr, at, r0, column, R, P, POWER, WIDEN)
            store_own_rows(x1, value_ptr, scale_ptr, at, r1, column, R, P, POWER, WIDEN)
            store_own_rows(x2, value_ptr, scale_ptr, at, r2, column, R, P, POWER, WIDEN)
            store_own_rows(x3, value_ptr, scale_ptr, at, r3, column, R, P, POWER, WIDEN)
        if TURNED:
            scale, inverse = scale_of(by_column, POWER)
            tl.store(turned_scale_ptr + down.to(tl.int64) * C + column, scale, mask=column < C)
    if TURNED:
        words = byte(x0, inverse, 0, WIDEN) | byte(x1, inverse, 8, WIDEN) | byte(x2, inverse, 16, WIDEN) | byte(x3, inverse, 24, WIDEN)
        to = turned_ptr + column.to(tl.int64)[:, None] * turned_words + (down * (BLOCK // 4) + i)[None, :]
        tl.store(to, tl.trans(words), mask=(column < C)[:, None])


def _values(rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.empty(rows, num_blocks(columns) * BLOCK, dtype=VALUES, device=like.device)


def _scales(high: int, wide: int, like: Tensor) -> Tensor:
    return torch.empty(high, wide, dtype=torch.float32, device=like.device)


def tiles(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`ftc.float8.fine.quantise_tiles` of x [R, C]; copies x where its rows are not contiguous."""
    rows, columns = x.shape
    values, scales = _values(rows, columns, x), _scales(num_blocks(columns), rows, x)
    if values.numel():
        grid = (num_blocks(columns), triton.cdiv(rows, ROWS))
        tiles_kernel[grid](x.contiguous(), values, scales, rows, columns, values.shape[1], POWER=power_of_two, WIDEN=WIDEN, ROWS=ROWS, BLOCK=BLOCK, num_warps=4)
    return values, scales


def _square(x, x_scales, out, turned, rows: int, columns: int, by_block: bool, power_of_two: bool, matrices: int = 1) -> None:
    """Launch `square_kernel`; `out` and `turned` are (values, scales) or None; more than one of `matrices` only where `by_block`."""
    if rows == 0 or columns == 0:
        return
    (values, scales), (turned_values, turned_scales) = out or (x, x), turned or (x, x)
    words = turned_values.view(torch.int32) if turned else x
    square_kernel[(num_blocks(columns), num_blocks(rows), matrices)](
        x, x if x_scales is None else x_scales, values, scales, words, turned_scales,
        rows, columns, num_blocks(columns) * BLOCK, x.shape[-1], words.shape[-1],
        SCALED=x_scales is not None, BY_BLOCK=by_block, STRAIGHT=out is not None, TURNED=turned is not None,
        POWER=power_of_two, WIDEN=WIDEN, BLOCK=BLOCK, num_warps=8, maxnreg=REGISTERS,
    )  # fmt: skip


def tiles_both(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [R, C] by tiles of a row and, turned over, by tiles of a column: values [R, P], scales, values [C, R filled up], scales."""
    rows, columns = x.shape
    out = _values(rows, columns, x), _scales(num_blocks(columns), rows, x)
    turned = _values(columns, rows, x), _scales(num_blocks(rows), columns, x)
    _square(x.contiguous(), None, out, turned, rows, columns, False, power_of_two)
    return *out, *turned


def turned(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """The transpose of x [R, C] by tiles: values [C, R filled up], scales [ceil(R / 128), C]."""
    rows, columns = x.shape
    out = _values(columns, rows, x), _scales(num_blocks(rows), columns, x)
    _square(x.contiguous(), None, None, out, rows, columns, False, power_of_two)
    return out


def turn_tiles(values: Tensor, scales: Tensor, width: int, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`ftc.float8.fine.turn_tiles`."""
    rows = values.shape[0]
    turned = _values(width, rows, values), _scales(num_blocks(rows), width, values)
    _square(values, scales, None, turned, rows, width, False, power_of_two)
    return turned


def blocks(weight: Tensor, turned: bool, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`ftc.float8.fine.quantise_blocks` of weight [R, C], or where `turned` the same numbers transposed."""
    rows, columns = weight.shape
    high, wide = (columns, rows) if turned else (rows, columns)
    out = _values(high, wide, weight), _scales(num_blocks(high), num_blocks(wide), weight)
    _square(weight.contiguous(), None, None if turned else out, out if turned else None, rows, columns, True, power_of_two)
    return out


def stacked_blocks_turned(matrices: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """matrices [E, R, C], each transposed by blocks: values [E C, R filled up], scales [E ceil(C / 128), ceil(R / 128)]."""
    count, rows, columns = matrices.shape
    out = _values(count * columns, rows, matrices), _scales(count * num_blocks(columns), num_blocks(rows), matrices)
    _square(matrices.contiguous(), None, None, out, rows, columns, True, power_of_two, count)
    return out
