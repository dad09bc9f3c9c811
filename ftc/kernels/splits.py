"""Attention split over the sequence (flash-decoding, Dao et al. 2023): how many parts, and the kernel that merges them.

Each part leaves its own softmax average and log2 of its sum of exponentials (`lse`); their weighted mean is the whole:

    out = sum_i 2^(lse_i - m) out_i / sum_i 2^(lse_i - m),    m = max_i lse_i
"""

import triton
import triton.language as tl

# A part shorter than this costs more in launching and merging than its parallel work gains.
SHORTEST_PART = 128


def num_splits(programs: int, capacity: int, slots: int, shortest: int = SHORTEST_PART) -> int:
    """Parts for each of `programs` (sequence, head block) pairs, so that whole waves of `slots` running programs are filled.

    `capacity` is the longest a sequence can be, from the block table's shape: real lengths are on the device, and reading them would
    wait for it. Time in units of one whole sequence is waves / parts, plus what a further part costs to start and to merge.
    """
    most = max(1, min(capacity // shortest, -(-4 * slots // programs)))
    cost = {parts: -(-programs * parts // slots) / parts * (1 + 0.003 * parts) for parts in range(1, most + 1)}
    return min(cost, key=cost.get)


# Triton's interpreter, in which the tests run, multiplies the bits of bfloat16 as integers: there products are formed in float32.
WIDEN = bool(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a b + acc in float32; `acc` may be None."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def merge_kernel(
    part_ptr, lse_ptr, out_ptr, rows, splits, width,
    BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """part [B, splits, rows, width] float32, lse [B, splits, rows] -> out [B, rows, width]; one program a row and slice of width."""
    row, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    highest = float("-inf")
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + (b * splits + s) * rows + row, mask=s < splits, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(lse, 0))
    highest = tl.where(highest == float("-inf"), 0.0, highest)  # a padding row: all its parts are empty
    acc = tl.zeros([BLOCK_W], tl.float32)
    total = 0.0
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + (b * splits + s) * rows + row, mask=s < splits, other=float("-inf"))
        weight = tl.exp2(lse - highest)
        total += tl.sum(weight, 0)
        mask = (weight > 0)[:, None] & (column < width)[None, :]
        part = tl.load(part_ptr + ((b * splits + s) * rows + row)[:, None] * width + column[None, :], mask=mask, other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + (b * rows + row) * width + column, acc.to(out_ptr.dtype.element_ty), mask=column < width)


def merge(part, lse, out) -> None:
    """Launch `merge_kernel`; part [B, splits, rows, width], lse [B, splits, rows], out [B, rows, width] contiguous."""
    batch, splits, rows, width = part.shape
    block_w = min(128, triton.next_power_of_2(width))
    grid = (rows, batch, triton.cdiv(width, block_w))
    merge_kernel[grid](part, lse, out, rows, splits, width, BLOCK_S=min(16, triton.next_power_of_2(splits)), BLOCK_W=block_w, num_warps=2)
