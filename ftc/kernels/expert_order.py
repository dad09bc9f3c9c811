"""The order in which a grouped product goes over the slots of a routing: sorted by expert, cut into tiles of one expert each.

A slot is one (token, expert) pair, n K + j for the j-th expert of token n. Sorted, the slots of an expert are consecutive rows, and a tile is up
to `rows` of them, so that a program multiplies by one expert's matrix only. How many tiles there are is known on the device alone; an upper
bound is launched, for reading the number would wait for the device:

    sum_e ceil(c_e / rows) <= (S + E (rows - 1)) / rows

Legend: N tokens, K experts a token, S = N K slots, E experts, T tiles launched.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """What the kernels read of a routing; all int32 on the device of `indices`. Rows from `bounds[E]` on are dropped slots."""

    slot_S: Tensor  # the slot in each row
    token_S: Tensor  # and its token
    bounds: Tensor  # [E + 1]: expert e has the rows bounds[e] to bounds[e + 1]
    expert_T: Tensor  # expert of each tile, E for tiles beyond the last
    row_T: Tensor  # first row of each tile
    tile_bounds: Tensor  # [E + 1]: expert e has the tiles tile_bounds[e] to tile_bounds[e + 1]

    @property
    def num_tiles(self) -> int:
        return self.row_T.shape[0]


@triton.jit
def experts_of(index_ptr, slot, num_slots, num_experts):
    """Expert of each slot, E where there is none."""
    e = tl.load(index_ptr + slot, mask=slot < num_slots, other=-1)
    return tl.where((e >= 0) & (e < num_experts), e, num_experts).to(tl.int32)


@triton.jit
def count_kernel(index_ptr, count_ptr, num_slots, num_experts, SLOTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """count [E + 1, programs]: one program counts the experts of SLOTS slots."""
    b, programs = tl.program_id(0), tl.num_programs(0)
    e = experts_of(index_ptr, b * SLOTS + tl.arange(0, SLOTS), num_slots, num_experts)
    bins = tl.arange(0, BLOCK_E)
    tl.store(count_ptr + bins * programs + b, tl.histogram(e, BLOCK_E), mask=bins <= num_experts)


@triton.jit
def rows_kernel(index_ptr, end_ptr, slot_ptr, token_ptr, num_slots, num_experts, share, SLOTS: tl.constexpr):
    """One program puts SLOTS slots where the running counts `end` say, those of one expert in their own order."""
    b, programs = tl.program_id(0), tl.num_programs(0)
    slot = b * SLOTS + tl.arange(0, SLOTS)
    e = experts_of(index_ptr, slot, num_slots, num_experts)
    same_before = (e[:, None] == e[None, :]) & (slot[:, None] > slot[None, :])
    cell = e * programs + b
    row = tl.load(end_ptr + cell - 1, mask=cell > 0, other=0) + tl.sum(same_before.to(tl.int32), 1)
    tl.store(slot_ptr + row, slot, mask=slot < num_slots)
    tl.store(token_ptr + row, slot // share, mask=slot < num_slots)


@triton.jit
def tiles_kernel(
    end_ptr, bounds_ptr, expert_ptr, row_ptr, tile_bounds_ptr, programs, num_experts, num_tiles, ROWS: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """One program an expert, which writes its bounds and its tiles; that of "expert" E writes the tiles beyond the last."""
    e = tl.program_id(0)
    other = tl.arange(0, BLOCK_E)
    first = tl.load(end_ptr + other * programs - 1, mask=(other > 0) & (other <= num_experts), other=0)
    last = tl.load(end_ptr + (other + 1) * programs - 1, mask=other < num_experts, other=0)
    count = tl.where(other < num_experts, tl.cdiv(last - first, ROWS), 0)
    start = tl.sum(tl.where(other < e, count, 0), 0)
    mine = tl.sum(tl.where(other == e, count, 0), 0)
    row = tl.sum(tl.where(other == e, first, 0), 0)
    tl.store(bounds_ptr + e, row)
    tl.store(tile_bounds_ptr + e, start)
    mine = tl.where(e < num_experts, mine, num_tiles - start)
    for tile in range(0, mine, BLOCK_E):
        tile += other
        tl.store(expert_ptr + start + tile, tl.zeros_like(tile) + e, mask=tile < mine)
        tl.store(row_ptr + start + tile, row + tile * ROWS, mask=tile < mine)


# Slots that one program of `count_kernel` and `rows_kernel` sees: 128 are compared with 128.
SLOTS = 128


def expert_order(indices: Tensor, num_experts: int, rows: int) -> Order:
    """The order of `indices` [N, K] (int64, contiguous, E where a token was dropped) in tiles of `rows`, found without waiting for the device.

    A counting sort in four launches: torch.sort with what has to follow it takes some fifteen.
    """
    num_slots, share = indices.numel(), indices.shape[1]
    programs, num_tiles = triton.cdiv(num_slots, SLOTS), (num_slots + num_experts * (rows - 1)) // rows
    empty = lambda *shape: torch.empty(shape, dtype=torch.int32, device=indices.device)  # noqa: E731
    counts = empty(num_experts + 1, programs)
    block = triton.next_power_of_2(num_experts + 1)
    count_kernel[(programs,)](indices, counts, num_slots, num_experts, SLOTS=SLOTS, BLOCK_E=block, num_warps=4)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    order = Order(empty(num_slots), empty(num_slots), empty(num_experts + 1), empty(num_tiles), empty(num_tiles), empty(num_experts + 1))
    rows_kernel[(programs,)](indices, ends, order.slot_S, order.token_S, num_slots, num_experts, share, SLOTS=SLOTS, num_warps=4)
    tiles_kernel[(num_experts + 1,)](
        ends, order.bounds, order.expert_T, order.row_T, order.tile_bounds, programs, num_experts, num_tiles,
        ROWS=rows, BLOCK_E=block, num_warps=1,
    )  # fmt: skip
    return order
