"""The latent decode kernel written out for Hopper's warpgroup products, in Gluon (Triton's lower level, where layouts are explicit).

Triton's own layout for two products in a row gives all warps to the rows: with 64 rows the second warpgroup computes the first one's
scores again, and a quarter of all products are done twice. Here the two warpgroups share the scores (32 tokens each) and the sums (256
columns each); weights cross over through shared memory. One tile of 64 tokens is read while another is worked on:

    scores_j = q c_j'   (tensor cores; the tile after it starts on its way as soon as the sums of j - 1 are done)
    weights_j           (ordinary units)
    sums += weights_j c_j   (tensor cores; still running when scores_j+1 are asked for)

Shared memory: 72 KiB queries, 2 x 72 KiB tiles, 8 KiB weights of an H100's 227 KiB. Tiles of 128 tokens in two or four parts, each filled
again as soon as it is done with, took the same time to 4% (H200; 64 sequences of 8k: 374 to 385 us, one of 64k: 68 to 72 us): what their
wider products gain is lost in waiting for tokens.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS, TOKENS, NUM_WARPS = 64, 64, 8
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until Triton 3.6


@gluon.jit
def _copy_tile(c_ptr, k_pe_ptr, c_tile, k_pe_tile, c_at, k_pe_at, COPY_C: gl.constexpr, COPY_E: gl.constexpr, L: gl.constexpr, E: gl.constexpr):
    """Start the copies of one tile whose rows begin at c_at and k_pe_at (in elements)."""
    l = gl.arange(0, L, layout=gl.SliceLayout(0, COPY_C))
    e = gl.arange(0, E, layout=gl.SliceLayout(0, COPY_E))
    async_copy.async_copy_global_to_shared(c_tile, c_ptr + c_at[:, None] + l[None, :])
    async_copy.async_copy_global_to_shared(k_pe_tile, k_pe_ptr + k_pe_at[:, None] + e[None, :])
    async_copy.commit_group()


@gluon.jit
def _row_at(table_at, start, end, block_stride, row_stride, BLOCK_SIZE: gl.constexpr, UNIT: gl.constexpr, TOKENS: gl.constexpr, COPY: gl.constexpr):
    """Where the rows of a tile begin, in elements; past the end the last token again, whose weights are zero."""
    n = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, COPY))
    position = gl.minimum(start + n, end - 1)
    block = gl.load(table_at + position // BLOCK_SIZE).to(gl.int64)
    return (block * block_stride + (position % BLOCK_SIZE) * row_stride) * UNIT


@gluon.jit
def latent_decode_hopper_kernel(
    q_ptr, q_pe_ptr, c_ptr, k_pe_ptr, table_ptr, cached_ptr, new_ptr, part_ptr, lse_ptr,
    qk_scale, rows, num_tokens, table_stride, block_stride, row_stride,
    UNIT: gl.constexpr, BLOCK_SIZE: gl.constexpr, L: gl.constexpr, E: gl.constexpr, DIRECT: gl.constexpr,
    ROWS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """One program: ROWS rows (head x token) of sequence b against its part of the tokens, as `latent_decode_kernel`."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, TOKENS // 2, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, L // 2, 16])
    COPY_C: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    COPY_E: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

    b, split, splits = gl.program_id(1).to(gl.int64), gl.program_id(2), gl.num_programs(2)
    had, added = gl.load(cached_ptr + b).to(gl.int32), gl.load(new_ptr + b).to(gl.int32)
    length = had + added
    share = gl.cdiv(gl.cdiv(length, TOKENS), splits) * TOKENS
    begin = split * share
    end = gl.minimum(begin + share, length)
    first_row = gl.program_id(0) * ROWS
    table_at = table_ptr + b * table_stride

    highest = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    totals = gl.full([ROWS, TOKENS], 0.0, gl.float32, layout=SCORES)  # added up across tokens at the end: it would stop all warps
    acc = gl.full([ROWS, L], 0.0, gl.float32, layout=SUMS)
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    step = row % num_tokens
    limit = gl.where(step < added, had + step + 1, 0)
    n = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, SCORES))

    if begin < end:
        tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, L], SHARED)
        pe_tiles = gl.allocate_shared_memory(dtype, [2, TOKENS, E], SHARED)
        weights_tile = gl.allocate_shared_memory(dtype, [ROWS, TOKENS], SHARED)
        c_at = _row_at(table_at, begin, end, block_stride, row_stride, BLOCK_SIZE, UNIT, TOKENS, COPY_C)
        pe_at = _row_at(table_at, begin, end, block_stride, row_stride, BLOCK_SIZE, UNIT, TOKENS, COPY_E)
        _copy_tile(c_ptr, k_pe_ptr, tiles.index(0), pe_tiles.index(0), c_at, pe_at, COPY_C, COPY_E, L, E)
        c_at = _row_at(table_at, begin + TOKENS, end, block_stride, row_stride, BLOCK_SIZE, UNIT, TOKENS, COPY_C)
        pe_at = _row_at(table_at, begin + TOKENS, end, block_stride, row_stride, BLOCK_SIZE, UNIT, TOKENS, COPY_E)

        query_row = b * rows + first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY_C))
        pe_row = b * rows + first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY_E))
        l = gl.arange(0, L, layout=gl.SliceLayout(0, COPY_C))
        e = gl.arange(0, E, layout=gl.SliceLayout(0, COPY_E))
        row_ok, pe_ok = query_row < (b + 1) * rows, pe_row < (b + 1) * rows
        q = gl.allocate_shared_memory(dtype, [ROWS, L], SHARED)
        q.store(gl.load(q_ptr + query_row[:, None] * L + l[None, :], mask=row_ok[:, None], other=0.0))
        q_pe = gl.allocate_shared_memory(dtype, [ROWS, E], SHARED)
        q_pe.store(gl.load(q_pe_ptr + pe_row[:, None] * E + e[None, :], mask=pe_ok[:, None], other=0.0))

        buffer = 0
        for start in range(begin, end, TOKENS):
            c, k_pe = tiles.index(buffer), pe_tiles.index(buffer)
            async_copy.wait_group(0)
            fence_async_shared()
            _barrier()
            scores = gl.full([ROWS, TOKENS], 0.0, gl.float32, layout=SCORES)
            scores = warpgroup_mma(q_pe, k_pe.permute((1, 0)), scores, use_acc=False, is_async=True)
            scores = warpgroup_mma(q, c.permute((1, 0)), scores, is_async=True)
            _copy_tile(c_ptr, k_pe_ptr, tiles.index(1 - buffer), pe_tiles.index(1 - buffer), c_at, pe_at, COPY_C, COPY_E, L, E)
            c_at = _row_at(table_at, start + 2 * TOKENS, end, block_stride, row_stride, BLOCK_SIZE, UNIT, TOKENS, COPY_C)
            pe_at = _row_at(table_at, start + 2 * TOKENS, end, block_stride, row_stride, BLOCK_SIZE, UNIT, TOKENS, COPY_E)
            scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))

            scores = gl.where((start + n)[None, :] < limit[:, None], scores * qk_scale, float("-inf"))
            scores = gl.where((start + n)[None, :] < end, scores, float("-inf"))
            now = gl.maximum(highest, gl.max(scores, 1))
            safe = gl.where(now == float("-inf"), 0.0, now)
            keep = gl.exp2(highest - safe)
            weights = gl.exp2(scores - safe[:, None])
            totals = totals * keep[:, None] + weights
            highest = now
            weights_tile.store(weights.to(dtype))
            acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, SUMS))[:, None]
            fence_async_shared()
            _barrier()
            acc = warpgroup_mma(weights_tile, c, acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            buffer = 1 - buffer
        async_copy.wait_group(0)

    total = gl.sum(totals, 1)
    sums = gl.convert_layout(gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, SUMS))
    acc = acc / sums[:, None]
    if not DIRECT:
        lse = gl.where(total == 0.0, float("-inf"), highest + gl.log2(total))
        gl.store(lse_ptr + (b * splits + split) * rows + row, lse, mask=row < rows)
    out_row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    column = gl.arange(0, L, layout=gl.SliceLayout(0, SUMS))
    out_at = part_ptr + ((b * splits + split) * rows + out_row)[:, None] * L + column[None, :]
    gl.store(out_at, acc.to(part_ptr.dtype.element_ty), mask=(out_row < rows)[:, None])
