"""Fine-grained FP8 in plain PyTorch: one scale for every 1 x 128 tile of an activation and every 128 x 128 block of a weight.

DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437), section 3.3.2. Everything is e4m3. A product adds up 128 terms of the depth in FP8, then the
partial sum is scaled and added in float32 (there: "promotion to CUDA cores"):

    y[m, n] = sum_k  s_a[k, m] s_b[n // 128, k]  sum_{j in block k} a[m, j] b[n, j]          forward, input gradient
    y[m, n] = sum_k  s_a[k, m] s_b[k, n]         sum_{j in block k} a[m, j] b[n, j]          weight gradient

    scale = max |x| / 448,   value = e4m3(x / scale)

A linear layer y = x W^T has three such products, each along the last dimension of both operands:

    y  [T, F] = x  [T, D] . W   [F, D]     x by tiles of a row, W by blocks
    dx [T, D] = dy [T, F] . W^T [D, F]     dy by tiles of a row, the blocks of W turned over
    dW [F, D] = dy^T [F, T] . x^T [D, T]   both by tiles of a column; for x either cast from x itself, or as DeepSeek-V3 has it read back from
                                           the forward's tiles and quantised again (`turn_tiles`)

Values are stored with their last dimension filled with zeros to a multiple of 128, so that products need no special last block.
Scales of tiles stand as [blocks, rows]: a product reads those of consecutive rows together.

Legend: R rows, C columns, P columns filled up to a multiple of 128, T tokens, D features in, F features out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ftc.errors import FtcError

BLOCK = 128  # elements of a tile, and side of a block
LARGEST = 448.0  # largest finite e4m3 value
# The float32 below 1 / 448. A product and not a quotient: CUDA takes a quotient by a number for a product with its reciprocal, in other bits than the
# CPU's, and in kernels it costs less. Below and not above: 448 times a power of two then has that power as its scale.
STEP = 0.002232142724096775
SMALLEST = 2.0**-100  # magnitudes below count as this one: the scale of zeros, and no scale so small that its inverse overflows
VALUES = torch.float8_e4m3fn


def num_blocks(size: int) -> int:
    """Blocks of 128 that cover `size`."""
    return -(-size // BLOCK)


def scale_of(largest: Tensor, power_of_two: bool = False) -> Tensor:
    """float32 scales for the magnitudes `largest`; `power_of_two`: the next power of two above, which loses nothing when taken out again."""
    scale = largest.float().clamp_min(SMALLEST) * STEP
    if not power_of_two:
        return scale
    mantissa, exponent = torch.frexp(scale)
    return torch.where(torch.isfinite(scale), torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int()), scale)


def quantise_tiles(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x [R, C] of any floating dtype as (values e4m3 [R, P], scales float32 [P / 128, R]), a scale for each 1 x 128 tile.

    A tile that holds an infinity or NaN becomes NaN as a whole, and so does every result that reads it.
    """
    tiles = _filled(x).unflatten(1, (-1, BLOCK))
    scale = scale_of(tiles.abs().amax(2), power_of_two)
    return (tiles * scale.reciprocal()[..., None]).to(VALUES).flatten(1), scale.t().contiguous()


def quantise_blocks(weight: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """weight [R, C] of any floating dtype as (values e4m3 [R, P], scales float32 [ceil(R / 128), P / 128]); not finite as `quantise_tiles`."""
    rows = weight.shape[0]
    filled = F.pad(_filled(weight), (0, 0, 0, num_blocks(rows) * BLOCK - rows))
    blocks = filled.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale = scale_of(blocks.abs().amax((1, 3)), power_of_two)
    return (blocks * scale.reciprocal()[:, None, :, None]).to(VALUES).flatten(2).flatten(0, 1)[:rows].contiguous(), scale


def turn_blocks(values: Tensor, scales: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The transpose of [R, C = width] by blocks, the same numbers: (values [C, R filled up], scales [ceil(C / 128), ceil(R / 128)])."""
    turned = values[:, :width].t()
    return _filled(turned.float()).to(VALUES), scales.t().contiguous()


def turn_tiles(values: Tensor, scales: Tensor, width: int, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """The transpose of [R, C = width] by tiles, read back and quantised again by tiles along R: (values [C, R filled up], scales [.., C])."""
    return quantise_tiles(dequantise(values, scales, width).t(), power_of_two)


def is_by_block(values: Tensor, scales: Tensor) -> bool:
    """Whether `scales` belong to 128 x 128 blocks of `values` [R, P] and not to 1 x 128 tiles. ValueError if to neither."""
    rows, blocks = values.shape[0], values.shape[1] // BLOCK
    if values.shape[1] % BLOCK or scales.shape not in ((num_blocks(rows), blocks), (blocks, rows)):
        wanted = f"{[num_blocks(rows), blocks]} (blocks) or {[blocks, rows]} (tiles)"
        raise ValueError(f"values {list(values.shape)} in e4m3, filled up to a multiple of 128, need scales {wanted}; got {list(scales.shape)}")
    return scales.shape == (num_blocks(rows), blocks)


def dequantise(values: Tensor, scales: Tensor, width: int) -> Tensor:
    """float32 [R, width] of values [R, P] with scales of either kind."""
    if is_by_block(values, scales):
        spread = scales.repeat_interleave(BLOCK, 0)[: values.shape[0]]
    else:
        spread = scales.t()
    return (values.float() * spread.repeat_interleave(BLOCK, 1))[:, :width]


def product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:  # fmt: skip
    """[M, N] in `dtype`: a [M, P] by tiles times b [N, P] by blocks or by tiles, transposed, plus bias [N].

    Sums are float32 (float64 where `dtype` is), scaled after every 128 terms. ValueError for operands that do not fit.
    """
    check_product(a, a_scales, b, b_scales, bias)
    wide = torch.promote_types(dtype, torch.float32)
    by_block, high = is_by_block(b, b_scales), b.shape[0]
    out = torch.zeros(a.shape[0], high, dtype=wide, device=a.device)
    for k in range(a.shape[1] // BLOCK):
        span = slice(k * BLOCK, (k + 1) * BLOCK)
        columns = b_scales[:, k].repeat_interleave(BLOCK)[:high] if by_block else b_scales[k]
        partial = a[:, span].to(wide) @ b[:, span].to(wide).t()
        out += partial * a_scales[k].to(wide)[:, None] * columns.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(dtype)


def check_product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor | None) -> None:
    """ValueError where the operands of `product` do not fit."""
    if a.shape[1] != b.shape[1] or a.dtype != VALUES or b.dtype != VALUES:
        raise ValueError(f"a fine product takes e4m3 values [M, P] and [N, P], got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}")
    if is_by_block(a, a_scales) and a.shape[0] != 1:
        raise ValueError(f"the first operand of a fine product has scales by tiles {[a.shape[1] // BLOCK, a.shape[0]]}, got {list(a_scales.shape)}")
    is_by_block(b, b_scales)
    if bias is not None and bias.shape != b.shape[:1]:
        raise ValueError(f"the bias of a fine product is [{b.shape[0]}], got {list(bias.shape)}")


def require_finite(scales: Tensor, what: str) -> None:
    """FtcError where a scale is not finite: `what` held an infinity or NaN, or more than a scale can express. Reads the device."""
    if not torch.isfinite(scales).all():
        broken = int((~torch.isfinite(scales)).sum())
        raise FtcError(f"{what} holds infinities or NaN in {broken} of {scales.numel()} FP8 tiles or blocks; nothing was multiplied")


def _filled(x: Tensor) -> Tensor:
    """x [R, C] in float32 with zeros to the next multiple of 128 columns."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"FP8 by tiles takes a matrix of floats, got {x.dtype} {list(x.shape)}")
    return F.pad(x.float(), (0, num_blocks(x.shape[1]) * BLOCK - x.shape[1]))
