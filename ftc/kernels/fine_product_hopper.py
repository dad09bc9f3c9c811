"""The fine-grained FP8 product written out for Hopper's warpgroup products, in Gluon (Triton's lower level, where layouts are explicit).

A partial sum over 128 of the depth has to be complete before it is scaled, and tensor cores stand still while the warps that wait for it scale
it. So several warpgroups share a program, each with its own 64 rows and its own pace: while one scales, another multiplies (DeepSeek-V3,
arXiv:2412.19437, section 3.3.2, "two WGMMA"). One more warp copies for all of them:

    copies   a_k [rows, 128], b_k [128, 128] and their scales into the next free of STAGES stages       (the copy engine; one warp asks)
    group w  partial = a_k[w] b_k'                                                                      (tensor cores)
             acc += s_k partial                                                                         (ordinary units)

A tile of 64 x 128 takes 64 registers a thread for acc and 64 for the partial sum. Programs stay for several tiles; copies run ahead over the end of
one tile into the next; results leave by the copy engine, while the other groups go on.

Two partial sums in turns in each warpgroup, the other way to keep tensor cores busy, is what ptxas serialises: it waits for every product on its own
where a partial sum is read while another is under way in a loop. Groups that start together seem to stay together: on an H200 a block took about as
long as both products and then the scaling. `staggered` makes a group wait for the one before it.

Legend: M rows of a, N rows of b, P depth filled up to a multiple of 128; BN columns of a tile, W warpgroups of 64 rows, k blocks of 128 of the depth.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ftc.float8.fine import BLOCK, is_by_block

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until Triton 3.6
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32, torch.float8_e4m3fn: gl.float8e4nv}
ROWS = 64  # of a warpgroup's product


SHARED_BYTES = 227 * 1024  # what a multiprocessor gives to its programs


@dataclass(frozen=True)
class HopperTile:
    """`groups` warpgroups of 64 rows x `columns` of the result, up to `stages` of copies ahead, `programs` side by side on a multiprocessor."""

    groups: int
    columns: int = 128
    stages: int = 6
    programs: int = 1
    band: int = 8  # rows of tiles that run together, whose columns the L2 holds
    staggered: bool = False  # a group starts on a block when the one before it has multiplied its own rows

    def __post_init__(self):
        if self.groups not in (1, 2, 3) or self.columns not in (64, 128):
            raise ValueError(f"a Hopper tile has 1 to 3 groups and 64 or 128 columns, got {self.groups} and {self.columns}")

    @property
    def rows(self) -> int:
        return ROWS * self.groups

    @property
    def launched_registers(self) -> int:
        """A thread's at the start, when the warpgroups that multiply and that of the copying warp have the same."""
        return min(255, 65536 // self.programs // (128 * (self.groups + 1)) // 8 * 8)

    @property
    def registers(self) -> int:
        """A thread's in a warpgroup that multiplies: what 24 in the copying warp's group leave, up to what instructions can name."""
        return min(240, (self.launched_registers * (self.groups + 1) - 24) // self.groups // 8 * 8)

    def fitting_stages(self, itemsize: int) -> int:
        """Stages that fit into shared memory beside a result of `itemsize` bytes a number. ValueError where not even two do."""
        result = self.rows * self.columns * itemsize
        stage = (self.rows + self.columns) * (BLOCK + 4) + 16 + 8 * self.groups
        most = (SHARED_BYTES // self.programs - 1024 - result) // stage
        if most < 2:
            raise ValueError(f"{self} leaves room for {most} stages beside a result of {itemsize} bytes a number; 2 are needed")
        return min(self.stages, most)


BY_BLOCK_TILE = HopperTile(2)
BY_TILE_TILE = HopperTile(2)


@gluon.jit
def _place(pid, high, wide, BAND: gl.constexpr):
    """(row, column) of a tile: BAND rows at a time, rows first."""
    group = pid // (BAND * wide)
    first = group * BAND
    size = gl.minimum(high - first, BAND)
    within = pid % (BAND * wide)
    return first + within % size, within // size


@gluon.jit
def _tile(tile, groups, sizes, GROUPED: gl.constexpr, BAND: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """(row m of a and column n of the result, row of b, row of the result, first block of the depth, how many, expert) of a tile."""
    M, N, blocks, num_experts = sizes
    expert_ptr, bound_ptr = groups
    high, wide = gl.cdiv(M, BM), gl.cdiv(N, BN)
    if GROUPED == 2:
        expert = tile // (high * wide)
        tile = tile % (high * wide)
    down, across = _place(tile, high, wide, BAND)
    m, n = down * BM, across * BN
    b_row, out_row, first, count = n, m, 0, blocks
    if GROUPED == 0:
        expert = 0
    if GROUPED == 1:
        expert = gl.load(expert_ptr + down)
        b_row = expert * N + n
        count = gl.where(expert < num_experts, blocks, 0)
    if GROUPED == 2:
        first = gl.load(bound_ptr + expert)
        count = gl.load(bound_ptr + expert + 1) - first
        out_row = expert * M + m
    return m, n, b_row, out_row, first, count, expert


@gluon.jit
def _num_tiles(sizes, GROUPED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    M, N, blocks, num_experts = sizes
    tiles = gl.cdiv(M, BM) * gl.cdiv(N, BN)
    return tiles * num_experts if GROUPED == 2 else tiles


@gluon.jit
def _copies(
    a, b, a_scales, b_scales, stages, groups, sizes,
    BY_BLOCK: gl.constexpr, GROUPED: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """The warp that copies: block after block of tile after tile, each into a stage that all groups have left."""
    a_tiles, b_tiles, a_scale_tiles, b_scale_tiles, ready, free, passed = stages
    ROWS: gl.constexpr = 64
    BYTES: gl.constexpr = (W * ROWS + BN) * BK + 4 * W * ROWS + (0 if BY_BLOCK else 4 * BN)
    M, N, blocks, num_experts = sizes
    stage, phase = 0, 1
    for tile in range(gl.program_id(0), _num_tiles(sizes, GROUPED, W * ROWS, BN), gl.num_programs(0)):
        m, n, b_row, out_row, first, count, expert = _tile(tile, groups, sizes, GROUPED, BAND, W * ROWS, BN)
        for k in range(first, first + count):
            bar = ready.index(stage)
            mbarrier.wait(free.index(stage), phase)
            mbarrier.expect(bar, BYTES)
            for w in gl.static_range(W):
                tma.async_copy_global_to_shared(a, [m + w * ROWS, k * BK], bar, a_tiles.index(stage * W + w))
                tma.async_copy_global_to_shared(a_scales, [k * M + m + w * ROWS], bar, a_scale_tiles.index(stage * W + w))
            tma.async_copy_global_to_shared(b, [b_row, k * BK], bar, b_tiles.index(stage))
            if not BY_BLOCK:
                tma.async_copy_global_to_shared(b_scales, [k * N + n], bar, b_scale_tiles.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _products(
    w: gl.constexpr, result, stages, groups, sizes,
    BIAS: gl.constexpr, BY_BLOCK: gl.constexpr, GROUPED: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGGERED: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: rows 64 w to 64 w + 64 of tile after tile."""
    out, out_tiles, b_scale_ptr, bias_ptr = result
    a_tiles, b_tiles, a_scale_tiles, b_scale_tiles, ready, free, passed = stages
    M, N, blocks, num_experts = sizes
    ROWS: gl.constexpr = 64
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    stage, phase = 0, 0
    out_tile = out_tiles.index(w)
    partial = gl.zeros([ROWS, BN], gl.float32, ACC)
    for tile in range(gl.program_id(0), _num_tiles(sizes, GROUPED, W * ROWS, BN), gl.num_programs(0)):
        m, n, b_row, out_row, first, count, expert = _tile(tile, groups, sizes, GROUPED, BAND, W * ROWS, BN)
        acc = gl.zeros([ROWS, BN], gl.float32, ACC)
        for k in range(first, first + count):
            if BY_BLOCK:
                scale = gl.load(b_scale_ptr + b_row // BK * blocks + k)
            mbarrier.wait(ready.index(stage), phase)
            if STAGGERED and w > 0:
                mbarrier.wait(passed.index(stage * W + w - 1), phase)
            running = warpgroup_mma(a_tiles.index(stage * W + w), b_tiles.index(stage).permute((1, 0)), partial, use_acc=False, is_async=True)
            rows = a_scale_tiles.index(stage * W + w).load(gl.SliceLayout(1, ACC))
            if not BY_BLOCK:
                columns = b_scale_tiles.index(stage).load(gl.SliceLayout(0, ACC))
            partial = warpgroup_mma_wait(num_outstanding=0, deps=(running,))
            _barrier()  # all of its threads have read the stage
            if STAGGERED and w < W - 1:
                mbarrier.arrive(passed.index(stage * W + w), count=1)
            mbarrier.arrive(free.index(stage), count=1)
            if BY_BLOCK:
                acc += partial * (rows * scale)[:, None]
            else:
                acc += (partial * rows[:, None]) * columns[None, :]
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        if BIAS:
            column = n + gl.arange(0, BN, layout=gl.SliceLayout(0, ACC))
            acc += gl.load(bias_ptr + expert * N + column, mask=(column < N) & (expert < num_experts), other=0.0).to(gl.float32)[None, :]
        if GROUPED != 1 or expert < num_experts:
            tma.store_wait(0)  # the result before has left
            _barrier()
            out_tile.store(acc.to(out.dtype))
            fence_async_shared()
            _barrier()
            tma.async_copy_shared_to_global(out, [out_row + w * ROWS, n], out_tile)
    tma.store_wait(0)


@gluon.jit
def fine_product_hopper_kernel(
    a, b, a_scales, b_scales, out, b_scale_ptr, bias_ptr, expert_ptr, bound_ptr, M, N, blocks, num_experts,
    BY_BLOCK: gl.constexpr, BIAS: gl.constexpr, GROUPED: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, REGISTERS: gl.constexpr, STAGGERED: gl.constexpr,
):  # fmt: skip
    """Tiles pid, pid + programs, ... of out [M, N] for `blocks` of the depth. a, b, a_scales [blocks M], b_scales [blocks N] and out are descriptors.

    Where BY_BLOCK, b_scales is not read and b_scale_ptr is [ceil(N / 128), blocks]. GROUPED, for the experts of a mixture:

    1   row tile t of a is multiplied by the matrix of expert_ptr[t] in b [experts N, P], or by none; N is a multiple of 128, bias [experts, N]
    2   expert e has the result's rows from e M on, a product over the blocks bound_ptr[e] to bound_ptr[e + 1]; M is a multiple of the tile's
    """
    ROWS: gl.constexpr = 64
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES * W, ROWS, BK], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, BN, BK], b.layout)
    a_scale_tiles = gl.allocate_shared_memory(gl.float32, [STAGES * W, ROWS], a_scales.layout)
    b_scale_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BN], b_scales.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [W, ROWS, BN], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    passed = gl.allocate_shared_memory(gl.int64, [STAGES * W, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=W)
        if STAGGERED:
            for w in gl.static_range(W):
                mbarrier.init(passed.index(stage * W + w), count=1)
    fence_async_shared()
    _barrier()

    stages = (a_tiles, b_tiles, a_scale_tiles, b_scale_tiles, ready, free, passed)
    result = (out, out_tiles, b_scale_ptr, bias_ptr)
    sizes = (M, N, blocks, num_experts)
    groups = (expert_ptr, bound_ptr)
    if W == 1:
        gl.warp_specialize(
            [
                (_products, (0, result, stages, groups, sizes, BIAS, BY_BLOCK, GROUPED, BAND, STAGES, W, BN, BK, STAGGERED)),
                (_copies, (a, b, a_scales, b_scales, stages, groups, sizes, BY_BLOCK, GROUPED, BAND, STAGES, W, BN, BK)),
            ],
            [1], [24],
        )  # fmt: skip
    elif W == 2:
        gl.warp_specialize(
            [
                (_products, (0, result, stages, groups, sizes, BIAS, BY_BLOCK, GROUPED, BAND, STAGES, W, BN, BK, STAGGERED)),
                (_products, (1, result, stages, groups, sizes, BIAS, BY_BLOCK, GROUPED, BAND, STAGES, W, BN, BK, STAGGERED)),
                (_copies, (a, b, a_scales, b_scales, stages, groups, sizes, BY_BLOCK, GROUPED, BAND, STAGES, W, BN, BK)),
            ],
            [4, 1], [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_products, (0, result, stages, groups, sizes, BIAS, BY_BLOCK, GROUPED, BAND, STAGES, W, BN, BK, STAGGERED)),
                (_products, (1, result, stages, groups, sizes, BIAS, BY_BLOCK, GROUPED, BAND, STAGES, W, BN, BK, STAGGERED)),
                (_products, (2, result, stages, groups, sizes, BIAS, BY_BLOCK, GROUPED, BAND, STAGES, W, BN, BK, STAGGERED)),
                (_copies, (a, b, a_scales, b_scales, stages, groups, sizes, BY_BLOCK, GROUPED, BAND, STAGES, W, BN, BK)),
            ],
            [4, 4, 1], [REGISTERS, REGISTERS, 24],
        )  # fmt: skip


def layout(dtype: torch.dtype, rows: int, columns: int) -> gl.NVMMASharedLayout:
    """How a tile of rows x columns lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], ELEMENTS[dtype])


SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout(matrix.dtype, rows, columns))


def product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32,
    tile: HopperTile | None = None,
) -> Tensor:  # fmt: skip
    """`ftc.float8.fine.product` for operands that are not empty and whose rows of the result are whole 16 bytes; `tile` overrides the one chosen."""
    out = torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    return _launch(a, a_scales, b, b_scales, bias, out, a.shape[0], b.shape[0], is_by_block(b, b_scales), NONE, None, 1, tile)


def rows_product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, expert_T: Tensor, num_experts: int, bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """[128 T, N]: rows of each 128 of a [128 T, P] times the matrix of expert_T [T] in b [E N, P] (blocks), bias [E, N]; see `fine_grouped`."""
    wide = b.shape[0] // num_experts
    out = torch.empty(a.shape[0], wide, dtype=dtype, device=a.device)
    return _launch(a, a_scales, b, b_scales, bias, out, a.shape[0], wide, True, ROW_TILES, expert_T, num_experts, BY_BLOCK_TILE)


def depth_product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bounds: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """[E, M, N]: for expert e a [M, 128 T] times b [N, 128 T] over blocks bounds[e] to bounds[e + 1], both by tiles; see `fine_grouped`."""
    out = torch.empty(num_experts * a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    _launch(a, a_scales, b, b_scales, None, out, a.shape[0], b.shape[0], False, DEPTH, bounds, num_experts, BY_TILE_TILE)
    return out.view(num_experts, a.shape[0], b.shape[0])


NONE, ROW_TILES, DEPTH = 0, 1, 2  # GROUPED of the kernel


def _launch(a, a_scales, b, b_scales, bias, out, high: int, wide: int, by_block: bool, grouped: int, groups, num_experts: int, tile) -> Tensor:
    tile, blocks = tile or (BY_BLOCK_TILE if by_block else BY_TILE_TILE), a.shape[1] // BLOCK
    tiles = triton.cdiv(high, tile.rows) * triton.cdiv(wide, tile.columns) * (num_experts if grouped == DEPTH else 1)
    running = torch.cuda.get_device_properties(a.device).multi_processor_count * tile.programs
    groups = a_scales if groups is None else groups  # not read
    fine_product_hopper_kernel[(min(running, tiles),)](
        _descriptor(a, ROWS, BLOCK), _descriptor(b, tile.columns, BLOCK),
        TensorDescriptor.from_tensor(a_scales.view(-1), [ROWS], SCALES), TensorDescriptor.from_tensor(b_scales.view(-1), [tile.columns], SCALES),
        _descriptor(out, ROWS, tile.columns), b_scales, a_scales if bias is None else bias, groups, groups, high, wide, blocks, num_experts,
        BY_BLOCK=by_block, BIAS=bias is not None, GROUPED=grouped, BAND=tile.band, STAGES=tile.fitting_stages(out.element_size()), W=tile.groups,
        BN=tile.columns, BK=BLOCK, REGISTERS=tile.registers, STAGGERED=tile.staggered, num_warps=4, maxnreg=tile.launched_registers,
    )  # fmt: skip
    return out
