"""Decode attention over paged keys and values in Triton: one program reads a part of one key-value head for all heads that share it.

Legend: B sequences, T tokens given for each, H heads, G key-value heads, R = H / G, K head dim, M value dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftc.dialect.paged_cache import QUANTISED
from ftc.kernels.splits import WIDEN, dot, merge, num_splits


@triton.jit
def paged_decode_kernel(
    q_ptr, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, table_ptr, cached_ptr, new_ptr, part_ptr, lse_ptr,
    scale, softcap, window, rows, num_tokens, groups, table_stride,
    k_block_stride, k_row_stride, k_head_stride, v_block_stride, v_row_stride, v_head_stride,
    ks_block_stride, ks_row_stride, ks_head_stride, vs_block_stride, vs_row_stride, vs_head_stride,
    BLOCK_SIZE: tl.constexpr, K: tl.constexpr, M: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    DIRECT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows (head x token) of group g and sequence b against its part of the tokens."""
    pid, split, splits = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    b, g = pid // groups, pid % groups
    had, added = tl.load(cached_ptr + b).to(tl.int32), tl.load(new_ptr + b).to(tl.int32)
    length = had + added
    first = 0
    if WINDOWED:
        first = tl.maximum(had - window + 1, 0) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(length - first, BLOCK_N), splits) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, length)

    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = row < rows
    step = row % num_tokens
    limit = tl.where(step < added, had + step + 1, 0)
    d, m, n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    query_row = pid * rows + row
    q = tl.load(q_ptr + query_row[:, None] * K + d[None, :], mask=row_ok[:, None] & (d < K)[None, :], other=0.0)

    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    for start in range(begin, end, BLOCK_N):
        position = start + n
        ok = position < end
        block = tl.load(table_ptr + b * table_stride + position // BLOCK_SIZE, mask=ok, other=0).to(tl.int64)
        offset = position % BLOCK_SIZE
        key_at = key_ptr + (block * k_block_stride + offset * k_row_stride + g * k_head_stride)[:, None] + d[None, :]
        value_at = value_ptr + (block * v_block_stride + offset * v_row_stride + g * v_head_stride)[:, None] + m[None, :]
        key = tl.load(key_at, mask=ok[:, None] & (d < K)[None, :], other=0.0)
        value = tl.load(value_at, mask=ok[:, None] & (m < M)[None, :], other=0.0)
        if SCALED:
            key_scale = tl.load(key_scale_ptr + block * ks_block_stride + offset * ks_row_stride + g * ks_head_stride, mask=ok, other=0.0)
            value_scale = tl.load(value_scale_ptr + block * vs_block_stride + offset * vs_row_stride + g * vs_head_stride, mask=ok, other=0.0)
            key, value = key.to(tl.float32) * key_scale[:, None], value.to(tl.float32) * value_scale[:, None]
        key, value = key.to(q.dtype), value.to(q.dtype)

        scores = dot(q, tl.trans(key), None, PRECISION, WIDEN) * scale
        if CAPPED:  # softcap tanh(x / softcap), by exp2: tanh(y) = 1 - 2 / (1 + e^2y)
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.885390081777927 / softcap))))
        seen = position[None, :] < limit[:, None]
        if WINDOWED:
            seen = seen & (position[None, :] + window >= limit[:, None])
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(now == float("-inf"), 0.0, now)
        keep = tl.exp2(highest - safe)
        weights = tl.exp2(scores - safe[:, None])
        total = total * keep + tl.sum(weights, 1)
        acc = dot(weights.to(q.dtype), value, acc * keep[:, None], PRECISION, WIDEN)
        highest = now

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    # part [B, splits, G rows, M]: what merge takes as the rows of a sequence is all its groups' rows
    out_row = ((b * splits + split) * groups + g) * rows + row
    if not DIRECT:
        tl.store(lse_ptr + out_row, tl.where(total == 0.0, float("-inf"), highest + tl.log2(total)), mask=row_ok)
    out_at = part_ptr + out_row[:, None] * M + m[None, :]
    tl.store(out_at, acc.to(part_ptr.dtype.element_ty), mask=row_ok[:, None] & (m < M)[None, :])


def supported(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether the kernel computes this: 16-bit or float32 queries up to 256 wide, and caches of any dtype the operator takes but float64."""
    floats = (torch.bfloat16, torch.float16, torch.float32)
    caches = all(cache.dtype in (*floats, *QUANTISED) and cache.stride(-1) == 1 for cache in (key_cache, value_cache))
    same = (key_cache.dtype in QUANTISED) == (value_cache.dtype in QUANTISED)
    return query.dtype in floats and caches and same and max(key_cache.shape[-1], value_cache.shape[-1]) <= 256


def paged_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, cached: Tensor, new: Tensor,
    key_scale: Tensor | None = None, value_scale: Tensor | None = None, *, scale: float, window: int | None = None,
    softcap: float | None = None, block_n: int | None = None, num_warps: int | None = None, num_stages: int | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of query [B, H, T, K] over what the caches hold, the new tokens written already; arguments as in ftc::paged_attention.

    Returns [B, H, T, M]. `block_n`, `num_warps`, `num_stages` and `splits` override what is chosen from the shapes.
    """
    batch, heads, num_tokens, width = query.shape
    block_size, groups, value_width = value_cache.shape[1:]
    rows = heads // groups * num_tokens
    block_r = max(16, min(64, triton.next_power_of_2(rows)))
    wide = query.dtype == torch.float32
    # H200, 32 heads on 8 of 128, 16 sequences of 8k: 136 us; with 64 tokens and 4 warps 158, with 128 and 4 warps 140.
    large = not wide and max(width, value_width) <= 128
    block_n = block_n or (32 if wide else 128 if large else 64)
    num_warps = num_warps or (8 if large else 4)
    blocks = triton.cdiv(rows, block_r)
    if splits is None:
        splits = num_splits(batch * groups * blocks, block_table.shape[1] * block_size, _slots(query.device))
    query = query.contiguous()
    out = query.new_empty(batch, heads, num_tokens, value_width)
    part = out if splits == 1 else query.new_empty(batch, splits, groups * rows, value_width, dtype=torch.float32)
    lse = query.new_empty(batch, splits, groups * rows, dtype=torch.float32)
    scaled = key_scale is not None
    key_scales, value_scales = (key_scale, value_scale) if scaled else (lse, lse)
    strides = (*key_scale.stride(), *value_scale.stride()) if scaled else (0,) * 6
    paged_decode_kernel[(blocks, batch * groups, splits)](
        query, key_cache, value_cache, key_scales, value_scales, block_table, cached, new, part, lse,
        scale, softcap or 1.0, window or 0, rows, num_tokens, groups, block_table.stride(0),
        *key_cache.stride()[:3], *value_cache.stride()[:3], *strides,
        BLOCK_SIZE=block_size, K=width, M=value_width, SCALED=scaled, CAPPED=softcap is not None, WINDOWED=window is not None,
        DIRECT=splits == 1, BLOCK_K=max(16, triton.next_power_of_2(width)), BLOCK_M=max(16, triton.next_power_of_2(value_width)),
        BLOCK_R=block_r, BLOCK_N=block_n, PRECISION="ieee" if wide else "tf32", WIDEN=WIDEN,
        num_warps=num_warps, num_stages=num_stages or (2 if wide else 3),
    )  # fmt: skip
    if splits > 1:
        merge(part, lse, out.view(batch, groups * rows, value_width))
    return out


def _slots(device: torch.device) -> int:
    """Programs that run at one time: shared memory and registers hold two to a multiprocessor, which also hides their loads."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
