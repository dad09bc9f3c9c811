"""Products of an expert's rows and its matrix inside a kernel, and what their launches share: tiles of work, descriptors, the order of programs.

The rows of an expert are gathered in the load: a row of `a` is read from where its token has it, so that no sorted copy of the tokens exists
(ScatterMoE, Tan et al. 2024, arXiv:2403.08245, section 3; SonicMoE, Guo et al. 2025, arXiv:2512.14080, section 4). Matrices, and rows that are
consecutive already, come by tensor descriptors (the copy engine of Hopper) where TMA holds: no addresses in registers.

Legend: S slots, T tiles, D model, F middle, E experts; BM, BN, BK the rows, columns and depth that a program multiplies at a time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ftc.kernels.splits import dot


@dataclass(frozen=True)
class Tile:
    """What one program computes: `rows` x `columns` of the result, `depth` at a time, in so many warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """The keywords of a launch."""
        sizes = {"BM": self.rows, "BN": self.columns, "BK": self.depth}
        return {**sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Tiles:
    """The tile of each kernel. `up`, `down`, `middle` and `tokens` go over the same order of rows, so theirs are equal."""

    up: Tile  # x W_gate_up^T, both halves: twice `columns`
    down: Tile  # h W_down^T
    middle: Tile  # backward to the middle of the experts: both of the products before, recomputed, and grad W_down
    tokens: Tile  # gradient of the tokens: (dg, du) W_gate_up
    matrices: Tile  # gradients of the matrices: `rows` x `columns` of one, `depth` slots at a time

    def __post_init__(self):
        rows = {tile.rows for tile in (self.up, self.down, self.middle, self.tokens)}
        if len(rows) != 1:
            raise ValueError(f"the tiles up, down, middle and tokens must have one number of rows, got {sorted(rows)}")

    @property
    def rows(self) -> int:
        return self.up.rows


def choose_tiles(dtype: torch.dtype, num_slots: int, num_experts: int) -> Tiles:
    """Tiles for Hopper: 128 rows where experts have as many, fewer where most of a tile would be empty (decoding).

    With 128 rows the products in 16 bits are 128 x 256 x 64 (two warpgroups of m64n256 or 2 x m64n128), which read the fewest bytes of shared
    memory a product: 3 stages take 144 KiB of its 227. The rows of `matrices` are found in its loop, by loads that Triton gives half of the stages:
    5 are the 3 of the others.
    """
    rows = max(16, min(128, triton.next_power_of_2(max(1, num_slots // num_experts))))
    if dtype == torch.float32:  # no tensor cores in full precision: registers hold a 64 x 64 tile
        tile = Tile(min(rows, 64), 64, 32, 4, 2)
        return Tiles(tile, tile, Tile(tile.rows, 32, 32, 4, 2), tile, Tile(64, 64, 32, 4, 2))
    if rows < 128:
        half, whole = Tile(rows, 64, 64, 4, 4), Tile(rows, 128, 64, 4, 4)
        return Tiles(half, whole, half, whole, Tile(128, 128, 64, 8, 5))
    half, whole = Tile(rows, 128, 64, 8, 3), Tile(rows, 256, 64, 8, 3)
    return Tiles(half, whole, half, whole, Tile(128, 256, 64, 8, 5))


def by_descriptor(matrix: Tensor, tile: Tile) -> bool:
    """Whether a contiguous matrix [E, .., ..] is read by descriptors: 16 bits, aligned rows, and no tile over the end of an expert's depth.

    In float32 the swizzled layout that descriptors write costs the products without tensor cores 4 KB of spilled registers a thread.
    """
    sizes, unit = matrix.shape[-2:], matrix.element_size()
    return unit == 2 and matrix.data_ptr() % 16 == 0 and all(size % tile.depth == 0 and size * unit % 16 == 0 for size in sizes)


def source(matrix: Tensor, tma: bool, rows: int, columns: int) -> Tensor | TensorDescriptor:
    """What a kernel reads [..., rows, columns] blocks of a contiguous matrix by, its leading dimensions flattened."""
    return TensorDescriptor.from_tensor(matrix.flatten(0, -2), [rows, columns]) if tma else matrix


@triton.jit
def place(pid, num_rows, num_columns, GROUP: tl.constexpr):
    """(row, column) of a program: GROUP rows at a time, rows first, so that those that run together share their columns' matrix in the L2."""
    group = pid // (GROUP * num_columns)
    first = group * GROUP
    size = tl.minimum(num_rows - first, GROUP)
    within = pid % (GROUP * num_columns)
    return first + within % size, within // size


@triton.jit
def block(a, row, end, column, width, TMA: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """a[row : row + R, column : column + C] of a matrix `width` wide; without TMA 0 from row `end` and column `width` on."""
    if TMA:
        values = a.load([row, column])
    else:
        r, c = row + tl.arange(0, R), column + tl.arange(0, C)
        values = tl.load(a + r.to(tl.int64)[:, None] * width + c[None, :], mask=(r < end)[:, None] & (c < width)[None, :], other=0.0)
    return values


@triton.jit
def gathered(a, row, ok, column, width, C: tl.constexpr):
    """a[row, column : column + C] for a vector of rows, 0 where not `ok` and from column `width` on."""
    c = column + tl.arange(0, C)
    return tl.load(a + row.to(tl.int64)[:, None] * width + c[None, :], mask=ok[:, None] & (c < width)[None, :], other=0.0)


@triton.jit
def product(
    a, row, ok, first, last, w, w_row, w_end, column, depth, width,
    GATHER: tl.constexpr, TMA: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BN] in float32 of rows of a [.., depth], gathered or `first` to `last`, and the matrix in rows w_row to w_end of w.

    TRANSPOSED: sum_k a[m, k] w[w_row + n, k], w [.., depth], `column` and `width` unused;
    else:       sum_k a[m, k] w[w_row + k, column + n], w [.., width].
    """
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, depth, BK):
        left = gathered(a, row, ok, k, depth, BK) if GATHER else block(a, first, last, k, depth, TMA, BM, BK)
        if TRANSPOSED:
            right = tl.trans(block(w, w_row, w_end, k, depth, TMA, BN, BK))
        else:
            right = block(w, w_row + k, w_end, column, width, TMA, BK, BN)
        acc = dot(left, right, acc, PRECISION, WIDEN)
    return acc


@triton.jit
def gate_and_up(
    x, token, ok, w, w_row, f, D, F,
    GATED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(x W_gate^T, x W_up^T) for columns f to f + BN, one load of the tokens for both; w_row is where the expert's W_gate_up [2F, D] begins.

    The second is the first for plain experts.
    """
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for k in range(0, D, BK):
        rows = gathered(x, token, ok, k, D, BK)
        gate = dot(rows, tl.trans(block(w, w_row + f, w_row + F, k, D, TMA, BN, BK)), gate, PRECISION, WIDEN)
        if GATED:
            up = dot(rows, tl.trans(block(w, w_row + F + f, w_row + 2 * F, k, D, TMA, BN, BK)), up, PRECISION, WIDEN)
    return gate, up if GATED else gate
