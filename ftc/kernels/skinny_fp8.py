"""FP8 times FP8 for few rows: what a decode step multiplies, bound by reading the weights once.

    out[m, f] = sx[m] sw[f] sum_k x[m, k] W[f, k] + bias[f]            x [M, K], W [F, K] e4m3, sx [M, 1] or [1, 1], sw [F, 1] or [1, 1] float32

Rows of W lie along the tensor core's long side (its 64 rows), rows of x along the short one, so that one row does not pay for 64. Columns are divided over
SPLIT programs where F alone gives too few; the last one to arrive adds what the others left, in one order always, and nothing has to be zeroed or launched after.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftc.dialect.library import LIBRARY

MOST_ROWS = 64  # above it `torch._scaled_mm` has work enough
_BLOCK_K = 256
tuned: dict[tuple[int, int, int], tuple[int, int]] = {}  # (F, K, padded rows) -> (BLOCK_F, SPLIT) where somebody measured
_scratch: dict[tuple, tuple[Tensor, Tensor]] = {}


@triton.jit
def _skinny(
    w_ptr, x_ptr, sw_ptr, sx_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, M, F, K, sw_stride, sx_stride,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(1)
    f = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    m = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_F, BLOCK_M), dtype=tl.float32)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT)
    for step in range(part * steps, (part + 1) * steps):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        if EVEN:
            w = tl.load(w_ptr + f[:, None].to(tl.int64) * K + k[None, :])
            x = tl.load(x_ptr + m[None, :] * K + k[:, None], mask=m[None, :] < M, other=0.0)
        else:
            w = tl.load(w_ptr + f[:, None].to(tl.int64) * K + k[None, :], mask=(f[:, None] < F) & (k[None, :] < K), other=0.0)
            x = tl.load(x_ptr + m[None, :] * K + k[:, None], mask=(m[None, :] < M) & (k[:, None] < K), other=0.0)
        acc = tl.dot(w, x, acc)
    last = True
    if SPLIT > 1:
        places = (tile * SPLIT + part) * (BLOCK_F * BLOCK_M) + tl.arange(0, BLOCK_F)[:, None] * BLOCK_M + m[None, :]
        tl.store(part_ptr + places, acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel", scope="gpu")
        last = arrived == SPLIT - 1
        if last:
            acc = tl.zeros((BLOCK_F, BLOCK_M), dtype=tl.float32)
            for other in range(SPLIT):
                there = (tile * SPLIT + other) * (BLOCK_F * BLOCK_M) + tl.arange(0, BLOCK_F)[:, None] * BLOCK_M + m[None, :]
                acc += tl.load(part_ptr + there, cache_modifier=".cg")
            tl.store(count_ptr + tile, 0)
    if last:
        scale = tl.load(sw_ptr + f * sw_stride, mask=f < F, other=0.0)[:, None] * tl.load(sx_ptr + m * sx_stride, mask=m < M, other=0.0)[None, :]
        acc *= scale
        if HAS_BIAS:
            acc += tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + m[None, :] * F + f[:, None], acc.to(out_ptr.dtype.element_ty), mask=(m[None, :] < M) & (f[:, None] < F))


def plan(rows: int, columns: int, count: int, processors: int) -> tuple[int, int]:
    """(rows of W a program, programs that share the columns) for W [rows, columns] and x of `count` rows: about two programs a processor."""
    padded = max(16, triton.next_power_of_2(count))
    if (rows, columns, padded) in tuned:
        return tuned[rows, columns, padded]
    steps, tiles = triton.cdiv(columns, _BLOCK_K), triton.cdiv(rows, 64)
    split = next((s for s in (8, 7, 4, 2) if steps % s == 0 and steps // s >= 2 and tiles * s <= 3 * processors), 1)
    return 64, split


def product(x: Tensor, by_row: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, out: torch.dtype) -> Tensor:
    """x e4m3 [M, K] and data e4m3 [F, K], both contiguous, scales as in the module's docstring; [M, F] in `out`. Mutates nothing."""
    (count, columns), rows = x.shape, data.shape[0]
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    block, split = plan(rows, columns, count, processors)
    padded, tiles = max(16, triton.next_power_of_2(count)), triton.cdiv(rows, block)
    made = torch.empty(count, rows, dtype=out, device=x.device)
    parts, counts = _workspace(x.device, tiles * split * block * padded if split > 1 else 1, tiles)
    _skinny[(tiles, split)](
        data, x, scale, by_row, data if bias is None else bias, made, parts, counts, count, rows, columns, int(scale.numel() > 1), int(by_row.numel() > 1),
        HAS_BIAS=bias is not None, BLOCK_M=padded, BLOCK_F=block, BLOCK_K=_BLOCK_K, SPLIT=split, EVEN=rows % block == 0 and columns % (_BLOCK_K * split) == 0,
        num_warps=4, num_stages=4 if padded <= 32 else 3,
    )  # fmt: skip
    return made


def _workspace(device: torch.device, parts: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Partial sums and the counters of who has arrived, which the kernel leaves at zero; of the current stream, kept."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _scratch.get((device, stream))
    if found is None or found[0].numel() < parts or found[1].numel() < tiles:
        size, count = (parts, tiles) if found is None else (max(parts, found[0].numel()), max(tiles, found[1].numel()))
        found = _scratch[device, stream] = (torch.empty(size, dtype=torch.float32, device=device), torch.zeros(count, dtype=torch.int32, device=device))
    return found


def reserve(device: torch.device, parts: int = 1 << 24, tiles: int = 1 << 14) -> None:
    """Take the workspace before a CUDA graph is captured, so that it is not part of the graph's own memory."""
    _workspace(device, parts, tiles)


LIBRARY.define("skinny_fp8(Tensor x, Tensor by_row, Tensor data, Tensor scale, Tensor? bias, ScalarType out) -> Tensor")


def _few_or_many(x: Tensor, by_row: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, out: torch.dtype) -> Tensor:
    if 0 < x.shape[0] <= MOST_ROWS:
        return product(x, by_row, data, scale, bias, out)
    return torch._scaled_mm(x, data.t(), by_row, scale.t(), bias, out_dtype=out, use_fast_accum=True)


LIBRARY.impl("skinny_fp8", _few_or_many, "CUDA")
torch.library.register_fake("ftc::skinny_fp8", lambda x, by_row, data, scale, bias, out: x.new_empty(x.shape[0], data.shape[0], dtype=out))
