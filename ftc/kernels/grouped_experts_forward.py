"""Kernels of a mixture of experts, forward: tokens to the middle of their experts, the middle to each slot's result, results to tokens.

    up:    h_r = act(g) u,  [g; u] = W_gate_up[e] x[token_r] + b_gate_up[e]        rows r in the sorted order, h [S, F] the only thing stored
    down:  y[slot_r] = W_down[e] h_r + b_down[e]                                   in the slot's own place
    sum:   out_n = sum_j w[n, j] y[n, j]                                           float32, in the order of j: the same bits in every run

Legend: N tokens, K experts a token, S = N K slots, D model, F middle, E experts, T tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftc.kernels.expert_activations import middle
from ftc.kernels.expert_order import Order
from ftc.kernels.grouped_product import Tile, by_descriptor, gate_and_up, place, product, source
from ftc.kernels.splits import WIDEN

# Rows of tiles that run together: 16 of 128 rows are the 2,048 slots of a few experts, whose columns' matrices the L2 holds.
GROUP = 16


@triton.jit
def up_kernel(
    x, w, bias_ptr, weight_ptr, token_ptr, slot_ptr, bounds_ptr, expert_ptr, row_ptr, h_ptr,
    alpha, limit, num_tiles, num_experts, D, F,
    NAME: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ON_INPUT: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: BN columns of h for the rows of one tile."""
    tile, column = place(tl.program_id(0), num_tiles, tl.cdiv(F, BN), GROUP)
    e = tl.load(expert_ptr + tile)
    if e == num_experts:
        return
    row = tl.load(row_ptr + tile) + tl.arange(0, BM)
    ok = row < tl.load(bounds_ptr + e + 1)
    token = tl.load(token_ptr + row, mask=ok, other=0)
    width = 2 * F if GATED else F
    f = column * BN + tl.arange(0, BN)
    g, u = gate_and_up(x, token, ok, w, e * width, column * BN, D, F, GATED, TMA, PRECISION, WIDEN, BM, BN, BK)
    if ON_INPUT:
        weight = tl.load(weight_ptr + tl.load(slot_ptr + row, mask=ok, other=0), mask=ok, other=0.0).to(tl.float32)
        g, u = g * weight[:, None], u * weight[:, None]
    if BIAS:
        g += tl.load(bias_ptr + e * width + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
        if GATED:
            u += tl.load(bias_ptr + e * width + F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    h = middle(g, u, alpha, limit, NAME, GATED)
    tl.store(h_ptr + row.to(tl.int64)[:, None] * F + f[None, :], h.to(h_ptr.dtype.element_ty), mask=ok[:, None] & (f < F)[None, :])


@triton.jit
def slots_kernel(
    a, w, bias_ptr, slot_ptr, bounds_ptr, expert_ptr, row_ptr, y_ptr,
    num_tiles, num_experts, depth, width,
    TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: BN columns of y [S, width] = a [S, depth] W[e]^T + b for the rows of one tile, stored to their slots.

    W[e] is [width, depth] where TRANSPOSED (down) and else [depth, width] (the gradient of the tokens).
    """
    tile, column = place(tl.program_id(0), num_tiles, tl.cdiv(width, BN), GROUP)
    e = tl.load(expert_ptr + tile)
    if e == num_experts:
        return
    first, last = tl.load(row_ptr + tile), tl.load(bounds_ptr + e + 1)
    row = first + tl.arange(0, BM)
    ok = row < last
    n = column * BN + tl.arange(0, BN)
    high = width if TRANSPOSED else depth
    w_row = e * high + (column * BN if TRANSPOSED else 0)
    y = product(
        a, row, ok, first, last, w, w_row, e * high + high, column * BN, depth, width,
        False, TMA, TRANSPOSED, PRECISION, WIDEN, BM, BN, BK,
    )  # fmt: skip
    if BIAS:
        y += tl.load(bias_ptr + e * width + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    slot = tl.load(slot_ptr + row, mask=ok, other=0).to(tl.int64)
    tl.store(y_ptr + slot[:, None] * width + n[None, :], y.to(y_ptr.dtype.element_ty), mask=ok[:, None] & (n < width)[None, :])


@triton.jit
def sum_kernel(
    y_ptr, index_ptr, weight_ptr, out_ptr, num_experts, width,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of one token; slots that were dropped hold nothing and are not read."""
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(K):  # unrolled: all its loads are in flight together
        slot = n * K + j
        e = tl.load(index_ptr + slot)
        kept = (e >= 0) & (e < num_experts)
        y = tl.load(y_ptr + slot * width + column, mask=kept & (column < width), other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weight_ptr + slot).to(tl.float32)
        acc += y
    tl.store(out_ptr + n * width + column, acc.to(out_ptr.dtype.element_ty), mask=column < width)


def shared_options(x: Tensor) -> dict:
    """The constants every product takes: full precision in float32, and how the interpreter multiplies."""
    return {"PRECISION": "ieee" if x.dtype == torch.float32 else "tf32", "WIDEN": WIDEN, "GROUP": GROUP}


def up(x, order: Order, weights, gate_up, bias, activation: str, constants: list[float], on_input: bool, width: int, tile: Tile) -> Tensor:
    """h [S, F] in the order's rows, for x [N, D] and gate_up [E, 2F or F, D]; rows of dropped slots are left as they were allocated."""
    experts, high, depth = gate_up.shape
    h = x.new_empty(order.slot_S.shape[0], width)
    tma = by_descriptor(gate_up, tile)
    alpha, limit = constants or (0.0, 0.0)
    grid = (order.num_tiles * triton.cdiv(width, tile.columns),)
    up_kernel[grid](
        x, source(gate_up, tma, tile.columns, tile.depth), gate_up if bias is None else bias, weights,
        order.token_S, order.slot_S, order.bounds, order.expert_T, order.row_T, h,
        alpha, limit, order.num_tiles, experts, depth, width,
        NAME=activation, GATED=high != width, BIAS=bias is not None, ON_INPUT=on_input, TMA=tma, **shared_options(x), **tile.options,
    )  # fmt: skip
    return h


def slots(a, order: Order, matrix, bias, transposed: bool, tile: Tile) -> Tensor:
    """y [S, width] with each slot in its own place, for rows a [S, depth] in the order; dropped slots are left as they were allocated.

    The last tile of an expert also multiplies rows after it, the next expert's or ones that hold nothing; their results are not stored."""
    experts = matrix.shape[0]
    depth, width = (matrix.shape[2], matrix.shape[1]) if transposed else matrix.shape[1:]
    y = a.new_empty(a.shape[0], width)
    tma = by_descriptor(matrix, tile)
    blocks = (tile.columns, tile.depth) if transposed else (tile.depth, tile.columns)
    grid = (order.num_tiles * triton.cdiv(width, tile.columns),)
    slots_kernel[grid](
        source(a, tma, tile.rows, tile.depth), source(matrix, tma, *blocks), matrix if bias is None else bias,
        order.slot_S, order.bounds, order.expert_T, order.row_T, y,
        order.num_tiles, experts, depth, width,
        TRANSPOSED=transposed, BIAS=bias is not None, TMA=tma, **shared_options(a), **tile.options,
    )  # fmt: skip
    return y


def sum_slots(y, indices, weights, num_experts: int, out_dtype: torch.dtype) -> Tensor:
    """out [N, width] in `out_dtype`: the sum of a token's slots in y [N K, width], weighed by `weights` [N, K] unless that is None."""
    (num_tokens, share), width = indices.shape, y.shape[1]
    out = y.new_empty(num_tokens, width, dtype=out_dtype)
    # 1024 columns: 8 a thread, one 16-byte load for each slot
    columns = min(1024, triton.next_power_of_2(width))
    sum_kernel[(num_tokens, triton.cdiv(width, columns))](
        y, indices, indices if weights is None else weights, out, num_experts, width,
        K=share, WEIGHTED=weights is not None, BLOCK=columns, num_warps=4,
    )  # fmt: skip
    return out
