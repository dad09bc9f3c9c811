"""Kernels of a mixture of experts, backward: only the tokens and their routing are kept, the rest is found again tile by tile.

With g', u' the products of a row before its bias, and for a weight w on the output (on the input):

    dh' = W_down[e]^T grad[token]                dh = w dh'                   (dh')
    dw  = <dh', h> + <b_down[e], grad[token]>    (<dg, g'> + <du, u'>)        one pass, in which no row's result is needed:
                                                                              SonicMoE, arXiv:2512.14080, section 3.2
    dW_down[e]    = sum_r grad[token_r] (w h)_r^T    (h_r)
    dW_gate_up[e] = sum_r [dg; du]_r x[token_r]^T    ((w [dg; du])_r)
    dx_n          = sum_j W_gate_up[e]^T [dg; du]    (w [dg; du])

Legend: N tokens, K experts a token, S = N K slots, D model, F middle, E experts, T tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftc.kernels.expert_activations import middle, middle_backward
from ftc.kernels.expert_order import Order
from ftc.kernels.grouped_experts_forward import shared_options
from ftc.kernels.grouped_product import Tile, by_descriptor, gate_and_up, gathered, place, product, source
from ftc.kernels.splits import dot


@triton.jit
def piece(values, i: tl.constexpr, PARTS: tl.constexpr):
    """The columns [i C / PARTS, (i + 1) C / PARTS) of values [R, C], which are registers of the threads that hold the whole; PARTS 1, 2 or 4."""
    if PARTS > 1:
        R: tl.constexpr = values.shape[0]
        C: tl.constexpr = values.shape[1]
        left, right = tl.split(tl.permute(tl.reshape(values, [R, 2, C // 2]), [0, 2, 1]))
        values = piece(left if i < PARTS // 2 else right, i % (PARTS // 2), PARTS // 2)
    return values


@triton.jit
def finish(
    g_raw, u_raw, dh, weight, row, ok, start, bias_ptr, h_ptr, pre_grad_ptr, bias_part_ptr, alpha, limit, F,
    NAME: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ON_INPUT: tl.constexpr,
    WANT_H: tl.constexpr, WANT_PRE: tl.constexpr, WANT_BIAS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """From g', u' and dh' of columns start to start + C: stores h and its gradients, returns the rows' shares of dw."""
    width = 2 * F if GATED else F
    f = start + tl.arange(0, C)
    kept = ok[:, None] & (f < F)[None, :]
    g, u = g_raw.to(tl.float32), u_raw.to(tl.float32)
    if ON_INPUT:
        g, u = g * weight[:, None], u * weight[:, None]
    if BIAS:
        g += tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
        if GATED:
            u += tl.load(bias_ptr + F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    h = middle(g, u, alpha, limit, NAME, GATED)
    part = dh * h
    if not ON_INPUT:
        dh, h = dh * weight[:, None], h * weight[:, None]
    if WANT_H:
        tl.store(h_ptr + row.to(tl.int64)[:, None] * F + f[None, :], h.to(h_ptr.dtype.element_ty), mask=kept)
    dg, du = middle_backward(g, u, dh, alpha, limit, NAME, GATED)
    if WANT_BIAS:
        tl.store(bias_part_ptr + f, tl.sum(tl.where(kept, dg, 0.0), 0), mask=f < F)
        if GATED:
            tl.store(bias_part_ptr + F + f, tl.sum(tl.where(kept, du, 0.0), 0), mask=f < F)
    if ON_INPUT:
        part = dg * g_raw.to(tl.float32)
        if GATED:
            part += du * u_raw.to(tl.float32)
        dg, du = dg * weight[:, None], du * weight[:, None]
    if WANT_PRE:
        pre_grad = pre_grad_ptr + row.to(tl.int64)[:, None] * width + f[None, :]
        tl.store(pre_grad, dg.to(pre_grad_ptr.dtype.element_ty), mask=kept)
        if GATED:
            tl.store(pre_grad + F, du.to(pre_grad_ptr.dtype.element_ty), mask=kept)
    return tl.sum(tl.where(kept, part, 0.0), 1)


@triton.jit
def middle_backward_kernel(
    x, grad, w_up, w_down, bias_ptr, weight_ptr, token_ptr, slot_ptr, bounds_ptr, expert_ptr, row_ptr,
    h_ptr, pre_grad_ptr, weight_part_ptr, bias_part_ptr,
    alpha, limit, num_tiles, num_experts, num_slots, D, F,
    NAME: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ON_INPUT: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
    WANT_H: tl.constexpr, WANT_PRE: tl.constexpr, WANT_WEIGHT: tl.constexpr, WANT_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: for BN columns of the middle and the rows of one tile, what the matrices' and tokens' gradients are products of.

    h [S, F] is weighed as dW_down takes it, pre_grad [S, 2F] as dW_gate_up and dx take it; weight_part [column tiles, S] and
    bias_part [T, 2F], float32, are sums over the program's columns and rows.
    """
    tile, column = place(tl.program_id(0), num_tiles, tl.cdiv(F, BN), GROUP)
    e = tl.load(expert_ptr + tile)
    if e == num_experts:
        return
    row = tl.load(row_ptr + tile) + tl.arange(0, BM)
    ok = row < tl.load(bounds_ptr + e + 1)
    token = tl.load(token_ptr + row, mask=ok, other=0)
    width = 2 * F if GATED else F
    g_raw, u_raw = gate_and_up(x, token, ok, w_up, e * width, column * BN, D, F, GATED, TMA, PRECISION, WIDEN, BM, BN, BK)
    # In the dtype of the tokens, as the experts' result has it: half of the registers while the next product runs.
    g_raw, u_raw = g_raw.to(h_ptr.dtype.element_ty), u_raw.to(h_ptr.dtype.element_ty)
    dh = product(
        grad, token, ok, 0, 0, w_down, e * D, e * D + D, column * BN, D, F, True, TMA, False, PRECISION, WIDEN, BM, BN, BK
    )  # fmt: skip
    weight = tl.load(weight_ptr + tl.load(slot_ptr + row, mask=ok, other=0), mask=ok, other=0.0).to(tl.float32)
    part = tl.zeros([BM], tl.float32)
    # 32 columns at a time: with all 128 at once the compiler spills 888 bytes a thread, with 32 none to 32.
    PARTS: tl.constexpr = (BN + 31) // 32
    for i in tl.static_range(PARTS):
        part += finish(
            piece(g_raw, i, PARTS), piece(u_raw, i, PARTS), piece(dh, i, PARTS), weight, row, ok, column * BN + i * (BN // PARTS),
            bias_ptr + e * width, h_ptr, pre_grad_ptr, bias_part_ptr + tile.to(tl.int64) * width, alpha, limit, F,
            NAME, GATED, BIAS, ON_INPUT, WANT_H, WANT_PRE, WANT_BIAS, BN // PARTS,
        )  # fmt: skip
    if WANT_WEIGHT:
        tl.store(weight_part_ptr + column.to(tl.int64) * num_slots + row, part, mask=ok)


@triton.jit
def matrices_kernel(
    a, b, token_ptr, bounds_ptr, out_ptr, high, wide,
    GATHER_A: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: [BM, BN] of out[e] [high, wide] = sum over the rows of e of a_r b_r^T; `a` or else `b` is gathered by token."""
    per_expert = tl.cdiv(high, BM) * tl.cdiv(wide, BN)
    e = tl.program_id(0) // per_expert
    high_tile, wide_tile = place(tl.program_id(0) % per_expert, tl.cdiv(high, BM), tl.cdiv(wide, BN), GROUP)
    m, n = high_tile * BM, wide_tile * BN
    first, last = tl.load(bounds_ptr + e), tl.load(bounds_ptr + e + 1)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(first, last, BK):
        row = start + tl.arange(0, BK)
        ok = row < last
        token = tl.load(token_ptr + row, mask=ok, other=0)
        left = gathered(a, token if GATHER_A else row, ok, m, high, BM)
        right = gathered(b, row if GATHER_A else token, ok, n, wide, BN)
        acc = dot(tl.trans(left), right, acc, PRECISION, WIDEN)
    m += tl.arange(0, BM)
    n += tl.arange(0, BN)
    out = out_ptr + (e.to(tl.int64) * high + m)[:, None] * wide + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < high)[:, None] & (n < wide)[None, :])


@triton.jit
def weights_kernel(
    part_ptr, grad, bias_ptr, token_ptr, slot_ptr, bounds_ptr, expert_ptr, row_ptr, out_ptr,
    num_parts, num_experts, num_slots, D,
    BIAS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of the weights of one tile's slots, from its parts and, where BIAS, the bias of the result."""
    tile = tl.program_id(0)
    e = tl.load(expert_ptr + tile)
    if e == num_experts:
        return
    row = tl.load(row_ptr + tile) + tl.arange(0, BM)
    ok = row < tl.load(bounds_ptr + e + 1)
    acc = tl.zeros([BM], tl.float32)
    for part in range(0, num_parts):
        acc += tl.load(part_ptr + tl.cast(part, tl.int64) * num_slots + row, mask=ok, other=0.0)
    if BIAS:
        token = tl.load(token_ptr + row, mask=ok, other=0)
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            bias = tl.load(bias_ptr + e * D + d, mask=d < D, other=0.0).to(tl.float32)
            acc += tl.sum(gathered(grad, token, ok, start, D, BLOCK).to(tl.float32) * bias[None, :], 1)
    slot = tl.load(slot_ptr + row, mask=ok, other=0)
    tl.store(out_ptr + slot, acc.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def bias_kernel(
    a, weight_ptr, token_ptr, slot_ptr, bounds_ptr, out_ptr, width,
    GATHER: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of out[e] = sum of rows bounds[e] to bounds[e + 1] of a, gathered by token and weighed by slot if asked."""
    e, start = tl.program_id(0), tl.program_id(1) * BLOCK
    first, last = tl.load(bounds_ptr + e), tl.load(bounds_ptr + e + 1)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for at in range(first, last, ROWS):
        row = at + tl.arange(0, ROWS)
        ok = row < last
        token = tl.load(token_ptr + row, mask=ok, other=0) if GATHER else row
        values = gathered(a, token, ok, start, width, BLOCK).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + tl.load(slot_ptr + row, mask=ok, other=0), mask=ok, other=0.0)
            values *= weight.to(tl.float32)[:, None]
        acc += values
    column = start + tl.arange(0, BLOCK)
    out = out_ptr + e.to(tl.int64) * width + column
    tl.store(out, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=column < width)


def middle_of(
    grad, x, order: Order, weights, gate_up, down, bias, activation, constants, on_input, want: dict[str, bool], tile: Tile
) -> dict[str, Tensor | None]:  # fmt: skip
    """Launch `middle_backward_kernel`; `want` names which of "h", "pre", "weight" and "bias" to fill, the others are None."""
    (experts, high, depth), width = gate_up.shape, down.shape[2]
    num_slots, parts = order.slot_S.shape[0], triton.cdiv(width, tile.columns)
    float32 = {"dtype": torch.float32}
    shapes = {"h": ((num_slots, width), {}), "pre": ((num_slots, high), {})}
    shapes |= {"weight": ((parts, num_slots), float32), "bias": ((order.num_tiles, high), float32)}
    found = {name: x.new_empty(shape, **options) if want[name] else None for name, (shape, options) in shapes.items()}
    tma = by_descriptor(gate_up, tile) and by_descriptor(down, tile)
    alpha, limit = constants or (0.0, 0.0)
    middle_backward_kernel[(order.num_tiles * parts,)](
        x, grad, source(gate_up, tma, tile.columns, tile.depth), source(down, tma, tile.depth, tile.columns),
        gate_up if bias is None else bias, weights,
        order.token_S, order.slot_S, order.bounds, order.expert_T, order.row_T,
        *(x if tensor is None else tensor for tensor in found.values()),
        alpha, limit, order.num_tiles, experts, num_slots, depth, width,
        NAME=activation, GATED=high != width, BIAS=bias is not None, ON_INPUT=on_input, TMA=tma,
        **{f"WANT_{name.upper()}": wanted for name, wanted in want.items()}, **shared_options(x), **tile.options,
    )  # fmt: skip
    return found


def matrices(a, b, gather_a: bool, order: Order, out: Tensor, tile: Tile) -> Tensor:
    """Fill out [E, high, wide] with each expert's sum of a_r b_r^T; experts without rows get zeros."""
    experts, high, wide = out.shape
    grid = (experts * triton.cdiv(high, tile.rows) * triton.cdiv(wide, tile.columns),)
    matrices_kernel[grid](a, b, order.token_S, order.bounds, out, high, wide, GATHER_A=gather_a, **shared_options(a), **tile.options)
    return out


def weights_gradient(part, grad, bias, order: Order, weights, num_experts: int, tile: Tile) -> Tensor:
    """Gradient [N, K] of the weights; 0 for dropped slots. `bias` [E, D] is that of the result, None where weights are on the input."""
    out = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    weights_kernel[(order.num_tiles,)](
        part, grad, grad if bias is None else bias, order.token_S, order.slot_S, order.bounds, order.expert_T, order.row_T, out,
        part.shape[0], num_experts, part.shape[1], grad.shape[1], BIAS=bias is not None, BM=tile.rows, BLOCK=64, num_warps=4,
    )  # fmt: skip
    return out


def bias_gradient(a, bounds, order: Order, weights, gather: bool, out: Tensor) -> Tensor:
    """Fill out [E, width] with each expert's sum of the rows of a, weighed by `weights` [N, K] unless that is None."""
    experts, width = out.shape
    columns = min(128, triton.next_power_of_2(width))
    bias_kernel[(experts, triton.cdiv(width, columns))](
        a, a if weights is None else weights, order.token_S, order.slot_S, bounds, out, width,
        GATHER=gather, WEIGHTED=weights is not None, ROWS=16, BLOCK=columns, num_warps=4,
    )  # fmt: skip
    return out
