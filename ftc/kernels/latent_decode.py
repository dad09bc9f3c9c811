"""Decode attention over a paged cache of latents, absorbed form, in Triton.

All heads read the same latents, so a tile of tokens is loaded once and serves as keys of a block of heads and, its first L columns, as
their values: H x (2 (L + E) + 2 L) products a token for (L + E) numbers read. With 128 heads and 512 + 64 in bfloat16 that is 242 flops a
byte, close to where an H100 (about 266) or H200 (about 183) turns from bandwidth to matrix rate. 64 heads x 512 float32 sums fill
half of a multiprocessor's registers, and their queries 72 KiB of its shared memory beside two tiles of 64 tokens: one program each.

Legend: B sequences, T tokens given for each, H heads, L latent, E rotated part.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftc.dialect import fp8_latent
from ftc.kernels.splits import WIDEN, dot, merge, num_splits

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """Rows (head x token) and cached tokens of a tile, and how Triton runs it."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


@triton.jit
def latent_decode_kernel(
    q_ptr, q_pe_ptr, c_ptr, scale_ptr, k_pe_ptr, table_ptr, cached_ptr, new_ptr, part_ptr, lse_ptr,
    qk_scale, rows, num_tokens, table_stride,
    c_block_stride, c_row_stride, s_block_stride, s_row_stride, k_block_stride, k_row_stride,
    C_UNIT: tl.constexpr, S_UNIT: tl.constexpr, K_UNIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, L: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, DIRECT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows of sequence b against its part of the tokens; part and lse as `merge_kernel` reads them."""
    b, split, splits = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    had, added = tl.load(cached_ptr + b).to(tl.int32), tl.load(new_ptr + b).to(tl.int32)
    length = had + added
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, length)

    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = row < rows
    step = row % num_tokens
    limit = tl.where(step < added, had + step + 1, 0)  # positions below it are seen; padding sees nothing
    SCALES: tl.constexpr = (BLOCK_L + GROUP - 1) // GROUP
    l, e, n, s = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N), tl.arange(0, SCALES)
    query_row = b * rows + row
    q = tl.load(q_ptr + query_row[:, None] * L + l[None, :], mask=row_ok[:, None] & (l < L)[None, :], other=0.0)
    q_pe = tl.load(q_pe_ptr + query_row[:, None] * E + e[None, :], mask=row_ok[:, None] & (e < E)[None, :], other=0.0)

    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
    for start in range(begin, end, BLOCK_N):
        position = start + n
        ok = position < end
        block = tl.load(table_ptr + b * table_stride + position // BLOCK_SIZE, mask=ok, other=0).to(tl.int64)
        offset = position % BLOCK_SIZE
        c_at = c_ptr + ((block * c_block_stride + offset * c_row_stride) * C_UNIT)[:, None] + l[None, :]
        k_pe_at = k_pe_ptr + ((block * k_block_stride + offset * k_row_stride) * K_UNIT)[:, None] + e[None, :]
        c = tl.load(c_at, mask=ok[:, None] & (l < L)[None, :], other=0.0)
        k_pe = tl.load(k_pe_at, mask=ok[:, None] & (e < E)[None, :], other=0.0)
        if PACKED:
            scale_at = scale_ptr + ((block * s_block_stride + offset * s_row_stride) * S_UNIT)[:, None] + s[None, :]
            scale = tl.load(scale_at, mask=ok[:, None] & (s * GROUP < L)[None, :], other=0.0)
            by_group = tl.reshape(c.to(tl.float32), [BLOCK_N, SCALES, BLOCK_L // SCALES]) * scale[:, :, None]
            c = tl.reshape(by_group, [BLOCK_N, BLOCK_L])
        c, k_pe = c.to(q.dtype), k_pe.to(q.dtype)

        scores = dot(q_pe, tl.trans(k_pe), None, PRECISION, WIDEN)
        scores = dot(q, tl.trans(c), scores, PRECISION, WIDEN)
        scores = tl.where(position[None, :] < limit[:, None], scores * qk_scale, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(now == float("-inf"), 0.0, now)
        keep = tl.exp2(highest - safe)
        weights = tl.exp2(scores - safe[:, None])
        total = total * keep + tl.sum(weights, 1)
        acc = acc * keep[:, None]
        acc = dot(weights.to(q.dtype), c, acc, PRECISION, WIDEN)
        highest = now

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_row = (b * splits + split) * rows + row
    if not DIRECT:
        tl.store(lse_ptr + out_row, tl.where(total == 0.0, float("-inf"), highest + tl.log2(total)), mask=row_ok)
    out_at = part_ptr + out_row[:, None] * L + l[None, :]
    tl.store(out_at, acc.to(part_ptr.dtype.element_ty), mask=row_ok[:, None] & (l < L)[None, :])


def tiles(rows: int, latent: int, dtype: torch.dtype) -> list[Tile]:
    """Tiles to try, best first: the first that fits the device's shared memory is taken."""
    block_r = max(16, min(64, triton.next_power_of_2(rows)))
    if dtype == torch.float32:
        wide = latent > 128
        return [Tile(16, 16 if wide else 32, 4, 2), Tile(16, 16, 4, 1)]
    if latent <= 128:
        return [Tile(block_r, 64, 4, 3), Tile(block_r, 32, 4, 2)]
    warps = 8 if block_r >= 32 else 4
    # H200, 128 heads, 512 + 64, 64 sequences of 8k: 615 us with 64 tokens, 824 us with 32; FP8 rows, 16 sequences: 191 and 252 us.
    return [Tile(block_r, 64, warps, 2), Tile(block_r, 32, warps, 2), Tile(16, 32, 4, 2), Tile(16, 16, 4, 1)]


def supported(q: Tensor, cache: Tensor, latent: int) -> bool:
    """Whether the kernel computes this: 16-bit or float32 queries and floating cache, or FP8 rows whose parts are aligned."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or cache.stride(-1) != 1:
        return False
    if cache.dtype == torch.uint8:
        return latent % 4 == 0 and cache.shape[-1] % 4 == 0 and all(s % 4 == 0 for s in (*cache.stride()[:2], cache.storage_offset()))
    return cache.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _views(cache: Tensor, latent: int) -> tuple[Tensor, Tensor, Tensor]:
    """(latent, scales, rotated keys) as views of the cache that share its slots."""
    if cache.dtype != torch.uint8:
        return cache[..., :latent], cache, cache[..., latent:]
    scales = fp8_latent.num_groups(latent)
    latents = cache[..., :latent].view(torch.float8_e4m3fn)
    return latents, cache.view(torch.float32)[..., latent // 4 :], cache.view(torch.bfloat16)[..., latent // 2 + 2 * scales :]


_TOO_LARGE: set[tuple] = set()  # tiles that did not fit this device's shared memory


def _unit(view: Tensor) -> int:
    """Largest power of two up to 16 that divides the strides of blocks and rows: Triton vectorises by what it can prove."""
    return math.gcd(16, *view.stride()[:2])


def latent_decode(
    q: Tensor, q_pe: Tensor, cache: Tensor, block_table: Tensor, cached: Tensor, new: Tensor, scale: float,
    tile: Tile | None = None, splits: int | None = None, hopper: bool | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale (q c + q_pe k_pe)) c over what `cache` holds of each sequence, the new tokens written already.

    q [B, H, T, L] (W_UK absorbed) and q_pe [B, H, T, E] of one dtype; cache, block_table, cached, new as in ftc::paged_latent_attention.
    Returns [B, H, T, L] in the dtype of q. `tile`, `splits` and `hopper` (the kernel for that generation) override what is chosen from
    the shapes and the device.
    """
    rows, latent = q.shape[1] * q.shape[2], q.shape[3]
    q, q_pe = q.contiguous(), q_pe.to(q.dtype).contiguous()
    inputs = (q, q_pe, cache, block_table, cached, new, scale)
    if hopper is None:
        hopper = tile is None and _hopper_computes(q, q_pe, cache, rows)
    if hopper:
        from ftc.kernels.latent_decode_hopper import NUM_WARPS, ROWS, TOKENS

        return _launch(*inputs, Tile(ROWS, TOKENS, NUM_WARPS, 1), splits, hopper=True)
    candidates = tiles(rows, latent, q.dtype) if tile is None else [tile]
    for candidate in candidates:
        key = (candidate, latent, q.dtype, cache.dtype, q.device)
        if tile is None and key in _TOO_LARGE:
            continue
        try:
            return _launch(*inputs, candidate, splits)
        except triton.runtime.errors.OutOfResources:  # raised before anything runs; what a tile needs only Triton's compiler knows
            if candidate is candidates[-1]:
                raise
            _TOO_LARGE.add(key)
    raise AssertionError("the smallest tile was marked as too large")


def _hopper_computes(q: Tensor, q_pe: Tensor, cache: Tensor, rows: int) -> bool:
    """Whether `latent_decode_hopper` takes this: 16 bits throughout, DeepSeek's sizes, and more rows than half of its tile."""
    sizes = q.shape[-1] in (256, 512) and q_pe.shape[-1] == 64 and rows > 32
    aligned = math.gcd(8, *cache.stride()[:2], cache.storage_offset()) == 8  # rows are copied 16 bytes at a time
    plain = q.dtype == cache.dtype and q.dtype in (torch.bfloat16, torch.float16) and aligned
    return sizes and plain and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9 and _has_gluon()


@functools.cache
def _has_gluon() -> bool:
    """Gluon came with Triton 3.4 and had Hopper's warpgroup products in this form from 3.5 on."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 5)


def _launch(q, q_pe, cache, block_table, cached, new, scale, tile, splits, hopper=False) -> Tensor:
    batch, heads, num_tokens, latent = q.shape
    rows, rope = heads * num_tokens, q_pe.shape[-1]
    blocks = triton.cdiv(rows, tile.rows)
    if splits is None:
        splits = num_splits(batch * blocks, block_table.shape[1] * cache.shape[1], _slots(q.device))
    out = torch.empty_like(q)
    part = out if splits == 1 else torch.empty(batch, splits, rows, latent, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, splits, rows, dtype=torch.float32, device=q.device)
    views = _views(cache, latent)
    units = [_unit(view) for view in views]
    strides = [stride // unit for view, unit in zip(views, units, strict=True) for stride in view.stride()[:2]]
    c, scales, k_pe = views
    grid, common = (blocks, batch, splits), (rows, num_tokens, block_table.stride(0))
    if hopper:
        from ftc.kernels.latent_decode_hopper import latent_decode_hopper_kernel

        latent_decode_hopper_kernel[grid](
            q, q_pe, c, k_pe, block_table, cached, new, part, lse, scale * LOG2_E, *common, *strides[:2],
            UNIT=units[0], BLOCK_SIZE=cache.shape[1], L=latent, E=rope, DIRECT=splits == 1, ROWS=tile.rows, TOKENS=tile.tokens,
            num_warps=tile.num_warps,
        )  # fmt: skip
    else:
        latent_decode_kernel[grid](
            q, q_pe, c, scales, k_pe, block_table, cached, new, part, lse, scale * LOG2_E, *common, *strides, *units,
            BLOCK_SIZE=cache.shape[1], L=latent, E=rope, GROUP=fp8_latent.GROUP, PACKED=cache.dtype == torch.uint8, DIRECT=splits == 1,
            BLOCK_L=max(16, triton.next_power_of_2(latent)), BLOCK_E=max(16, triton.next_power_of_2(rope)), BLOCK_R=tile.rows,
            BLOCK_N=tile.tokens, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", WIDEN=WIDEN,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    if splits > 1:
        merge(part, lse, out.view(batch, rows, latent))
    return out


def _slots(device: torch.device) -> int:
    """Programs that run at one time: a tile takes a whole multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
