"""The latent decode kernel written out for Hopper's warpgroup products, in Gluon (Triton's lower level, where layouts are explicit).

Triton's own layout for two products in a row gives all warps to the rows: with 64 rows the second warpgroup computes the first one's
scores again, and a quarter of all products are done twice. Here the two warpgroups share the scores (64 tokens each) and the sums (256
columns each); weights cross over through shared memory, in the place of the rotated keys, which are done with by then. Fewer than 64
tokens a warpgroup would wait for shared memory: a product of 64 x 16 by 16 x 32 reads as much as it has time for by half.

A tile is 128 tokens in four parts. Each part's place is filled again while the sums over those after it are still running.
Shared memory: 72 KiB queries and 144 KiB tile of an H100's 227 KiB.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS, TOKENS, NUM_WARPS = 64, 128, 8
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until Triton 3.6


@gluon.jit
def _rows_at(table_at, start, end, block_stride, row_stride, BLOCK_SIZE: gl.constexpr, COUNT: gl.constexpr, COPY: gl.constexpr):
    """Where COUNT rows begin, in units; past the end the last token again, whose weights are zero."""
    n = gl.arange(0, COUNT, layout=gl.SliceLayout(1, COPY))
    position = gl.minimum(start + n, end - 1)
    return gl.load(table_at + position // BLOCK_SIZE) * block_stride + (position % BLOCK_SIZE) * row_stride


@gluon.jit
def _copy_rows(target, source_ptr, at, UNIT: gl.constexpr, WIDTH: gl.constexpr, COPY: gl.constexpr):
    """Start copying rows of WIDTH numbers, those of `at`, into shared memory."""
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(target, source_ptr + (at.to(gl.int64) * UNIT)[:, None] + column[None, :])


@gluon.jit
def latent_decode_hopper_kernel(
    q_ptr, q_pe_ptr, c_ptr, k_pe_ptr, table_ptr, cached_ptr, new_ptr, part_ptr, lse_ptr,
    qk_scale, rows, num_tokens, table_stride, block_stride, row_stride,
    UNIT: gl.constexpr, BLOCK_SIZE: gl.constexpr, L: gl.constexpr, E: gl.constexpr, DIRECT: gl.constexpr,
    ROWS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """One program: ROWS rows (head x token) of sequence b against its part of the tokens, as `latent_decode_kernel`."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    HALF: gl.constexpr = TOKENS // 2
    PART: gl.constexpr = TOKENS // 4
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HALF, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, L // 2, 16])
    COPY_C: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    COPY_E: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BY_PART: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)  # 32 columns, a part, stay together

    b, split, splits = gl.program_id(1).to(gl.int64), gl.program_id(2), gl.num_programs(2)
    had, added = gl.load(cached_ptr + b).to(gl.int32), gl.load(new_ptr + b).to(gl.int32)
    length = had + added
    share = gl.cdiv(gl.cdiv(length, TOKENS), splits) * TOKENS
    begin = split * share
    end = gl.minimum(begin + share, length)
    first_row = gl.program_id(0) * ROWS
    table_at = table_ptr + b * table_stride

    highest = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    total = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, SCORES))
    acc = gl.full([ROWS, L], 0.0, gl.float32, layout=SUMS)
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    step = row % num_tokens
    limit = gl.minimum(gl.where(step < added, had + step + 1, 0), end)
    n = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, SCORES))

    if begin < end:
        c = gl.allocate_shared_memory(dtype, [TOKENS, L], SHARED)
        k_pe = gl.allocate_shared_memory(dtype, [TOKENS, E], SHARED)
        weights_tile = k_pe._reinterpret(dtype, [ROWS, TOKENS], BY_PART)  # the same memory: scores are done with it before weights come
        c0, c1 = c.slice(0, PART, dim=0), c.slice(PART, PART, dim=0)
        c2, c3 = c.slice(2 * PART, PART, dim=0), c.slice(3 * PART, PART, dim=0)
        at0 = _rows_at(table_at, begin, end, block_stride, row_stride, BLOCK_SIZE, PART, COPY_C)
        at1 = _rows_at(table_at, begin + PART, end, block_stride, row_stride, BLOCK_SIZE, PART, COPY_C)
        at2 = _rows_at(table_at, begin + 2 * PART, end, block_stride, row_stride, BLOCK_SIZE, PART, COPY_C)
        at3 = _rows_at(table_at, begin + 3 * PART, end, block_stride, row_stride, BLOCK_SIZE, PART, COPY_C)
        at_pe = _rows_at(table_at, begin, end, block_stride, row_stride, BLOCK_SIZE, TOKENS, COPY_E)
        _copy_rows(c0, c_ptr, at0, UNIT, L, COPY_C)
        _copy_rows(c1, c_ptr, at1, UNIT, L, COPY_C)
        _copy_rows(c2, c_ptr, at2, UNIT, L, COPY_C)
        _copy_rows(c3, c_ptr, at3, UNIT, L, COPY_C)
        _copy_rows(k_pe, k_pe_ptr, at_pe, UNIT, E, COPY_E)
        async_copy.commit_group()

        query_row = b * rows + first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY_C))
        pe_row = b * rows + first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY_E))
        l = gl.arange(0, L, layout=gl.SliceLayout(0, COPY_C))
        e = gl.arange(0, E, layout=gl.SliceLayout(0, COPY_E))
        row_ok, pe_ok = query_row < (b + 1) * rows, pe_row < (b + 1) * rows
        q = gl.allocate_shared_memory(dtype, [ROWS, L], SHARED)
        q.store(gl.load(q_ptr + query_row[:, None] * L + l[None, :], mask=row_ok[:, None], other=0.0))
        q_pe = gl.allocate_shared_memory(dtype, [ROWS, E], SHARED)
        q_pe.store(gl.load(q_pe_ptr + pe_row[:, None] * E + e[None, :], mask=pe_ok[:, None], other=0.0))

        for start in range(begin, end, TOKENS):
            async_copy.wait_group(0)
            fence_async_shared()
            _barrier()
            scores = gl.full([ROWS, TOKENS], 0.0, gl.float32, layout=SCORES)
            scores = warpgroup_mma(q_pe, k_pe.permute((1, 0)), scores, use_acc=False, is_async=True)
            scores = warpgroup_mma(q, c.permute((1, 0)), scores, is_async=True)
            # While the scores are on their way: where the next tile's rows are.
            after = start + TOKENS
            at0 = _rows_at(table_at, after, end, block_stride, row_stride, BLOCK_SIZE, PART, COPY_C)
            at1 = _rows_at(table_at, after + PART, end, block_stride, row_stride, BLOCK_SIZE, PART, COPY_C)
            at2 = _rows_at(table_at, after + 2 * PART, end, block_stride, row_stride, BLOCK_SIZE, PART, COPY_C)
            at3 = _rows_at(table_at, after + 3 * PART, end, block_stride, row_stride, BLOCK_SIZE, PART, COPY_C)
            at_pe = _rows_at(table_at, after, end, block_stride, row_stride, BLOCK_SIZE, TOKENS, COPY_E)
            scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))

            scores = gl.where((start + n)[None, :] < limit[:, None], scores * qk_scale, float("-inf"))
            now = gl.maximum(highest, gl.max(scores, 1))  # the barriers of this maximum also end all reading of k_pe
            safe = gl.where(now == float("-inf"), 0.0, now)
            keep = gl.exp2(highest - safe)
            weights = gl.exp2(scores - safe[:, None])
            total = total * keep + gl.sum(weights, 1)
            highest = now
            weights_tile.store(weights.to(dtype))
            acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, SUMS))[:, None]
            fence_async_shared()
            _barrier()
            acc = warpgroup_mma(weights_tile.slice(0, PART, dim=1), c0, acc, is_async=True)
            acc = warpgroup_mma(weights_tile.slice(PART, PART, dim=1), c1, acc, is_async=True)
            acc = warpgroup_mma(weights_tile.slice(2 * PART, PART, dim=1), c2, acc, is_async=True)
            acc = warpgroup_mma(weights_tile.slice(3 * PART, PART, dim=1), c3, acc, is_async=True)
            total = warpgroup_mma_wait(num_outstanding=3, deps=(total,))  # c0 is read to its end
            _barrier()
            if after < end:
                _copy_rows(c0, c_ptr, at0, UNIT, L, COPY_C)
            total = warpgroup_mma_wait(num_outstanding=2, deps=(total,))
            _barrier()
            if after < end:
                _copy_rows(c1, c_ptr, at1, UNIT, L, COPY_C)
            total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
            _barrier()
            if after < end:
                _copy_rows(c2, c_ptr, at2, UNIT, L, COPY_C)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            _barrier()
            if after < end:
                _copy_rows(c3, c_ptr, at3, UNIT, L, COPY_C)
                _copy_rows(k_pe, k_pe_ptr, at_pe, UNIT, E, COPY_E)
            async_copy.commit_group()

    sums = gl.convert_layout(gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, SUMS))
    acc = acc / sums[:, None]
    if not DIRECT:
        lse = gl.where(total == 0.0, float("-inf"), highest + gl.log2(total))
        gl.store(lse_ptr + (b * splits + split) * rows + row, lse, mask=row < rows)
    out_row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    column = gl.arange(0, L, layout=gl.SliceLayout(0, SUMS))
    out_at = part_ptr + ((b * splits + split) * rows + out_row)[:, None] * L + column[None, :]
    gl.store(out_at, acc.to(part_ptr.dtype.element_ty), mask=(out_row < rows)[:, None])
