"""The product of fine-grained FP8 in Triton: partial sums over 128 of the depth on tensor cores, scaled and added up in float32.

`ftc.float8.fine.product` with a by 1 x 128 tiles and b by 128 x 128 blocks (forward, input gradient) or by 1 x 128 tiles (weight gradient). The
tensor cores of Hopper add FP8 products with some 14 bits, so a sum over the whole depth would lose what float32 keeps: DeepSeek-V3
(arXiv:2412.19437), section 3.3.2, promotes every 128 terms, and that is where the scales come in as well.

Here is the kernel for all sizes and devices; on Hopper, `fine_product_hopper` overlaps the promotion with the next partial sum.

Legend: M rows of a, N rows of b, P depth filled up to a multiple of 128; BM, BN rows and columns of a program's tile.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftc.float8.fine import BLOCK, check_product, is_by_block
from ftc.kernels.grouped_product import Tile, block, place, source
from ftc.kernels.splits import WIDEN, dot

GROUP = 16  # rows of tiles that run together: 2,048 rows of a and the columns under way stay in the L2
TILE = Tile(128, 128, BLOCK, 8, 4)


@triton.jit
def fine_product_kernel(
    a, b, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, M, N, P,
    BY_BLOCK: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: BM x BN of out [M, N]. b_scale is [ceil(N / 128), P / 128] where BY_BLOCK, else [P / 128, N]."""
    down, across = place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m, n = down * BM + tl.arange(0, BM), across * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, P // BK):
        left = block(a, down * BM, M, k * BK, P, TMA, BM, BK)
        right = block(b, across * BN, N, k * BK, P, TMA, BN, BK)
        part = dot(left, tl.trans(right), None, "tf32", WIDEN)
        rows = tl.load(a_scale_ptr + k * M + m, mask=m < M, other=0.0)
        if BY_BLOCK and BN <= BK:
            acc += part * (rows * tl.load(b_scale_ptr + (across * BN // BK).to(tl.int64) * (P // BK) + k))[:, None]
        else:
            at = (n // BK).to(tl.int64) * (P // BK) + k if BY_BLOCK else k * N + n
            acc += part * rows[:, None] * tl.load(b_scale_ptr + at, mask=n < N, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32, tile: Tile | None = None
) -> Tensor:  # fmt: skip
    """`ftc.float8.fine.product` on CUDA, `dtype` of 16 or 32 bits; `tile` for the portable kernel, else Hopper has its own."""
    check_product(a, a_scales, b, b_scales, bias)
    high, wide, depth = a.shape[0], b.shape[0], a.shape[1]
    if 0 in (high, wide, depth):
        out = torch.zeros(high, wide, dtype=dtype, device=a.device)
        return out if bias is None else out + bias.to(dtype)
    if tile is None and on_hopper(a.device) and wide * dtype.itemsize % 16 == 0:
        from ftc.kernels import fine_product_hopper

        return fine_product_hopper.product(a, a_scales, b, b_scales, bias, dtype)
    out, tile = torch.empty(high, wide, dtype=dtype, device=a.device), tile or TILE
    tma = a.is_cuda and torch.cuda.get_device_capability(a.device)[0] >= 9
    fine_product_kernel[(triton.cdiv(high, tile.rows) * triton.cdiv(wide, tile.columns),)](
        source(a, tma, tile.rows, BLOCK), source(b, tma, tile.columns, BLOCK), a_scales, b_scales, a_scales if bias is None else bias, out,
        high, wide, depth,
        BY_BLOCK=is_by_block(b, b_scales), BIAS=bias is not None, TMA=tma, WIDEN=WIDEN, GROUP=GROUP, **tile.options,
    )  # fmt: skip
    return out


@functools.cache
def on_hopper(device: torch.device) -> bool:
    """Whether `device` is of compute capability 9 and this Triton has Gluon, in which its kernel is written."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        import triton.experimental.gluon  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True
