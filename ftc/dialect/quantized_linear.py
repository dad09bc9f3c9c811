"""`ftc::quantized_linear` and `ftc::quantized_embedding`: products whose weights are stored in 8 or 4 bits, with a scale for each block.

    W[r, c] = (data[r, c] - zero[b]) scale[b],       b the block of (r, c): [1, D] a row, [F, D] all, [128, 128], or [1, g] a group of g columns
    quantized_linear(x) = Q(x) W^T + bias            Q the identity, or FP8 with a scale a token, a tensor or 128 columns

dtype        data                                            zero
"fp8"        float8_e4m3fn [F, D]                            none
"int8"       int8 [F, D]                                     none, or int8 beside the scale
"int4"       uint8 [F, ceil(D / 2)], low nibble first         none, or int8 beside the scale

The last block of a row may be ragged: D need not be a multiple of g. `torchao` is the oracle of the numbers (Float8Tensor, Int8Tensor,
IntxUnpackedToInt8Tensor). The linear and the embedding are composite and dissolve under torch.compile; gradients go to x and bias alone, straight through Q.

Legend: N tokens, D columns, F rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ftc.dialect.library import composite
from ftc.errors import nearest
from ftc.kernels import has_triton

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
LIMITS = {"int8": (-128, 127), "int4": (-8, 7)}
FP8_LARGEST = 448.0  # largest finite e4m3 value
SMALLEST_SCALE = 1e-12  # a row of zeros has a scale too
FP8_COLUMNS = 128  # activations beside blocks of 128 x 128 weights: one scale for so many columns (DeepSeek-V3, arXiv:2412.19437, section 3.3)
ACTIVATIONS = ("none", "dynamic", "static")


def pack_int4(codes: Tensor) -> Tensor:
    """Codes -8..7 [..., D] of any dtype as uint8 [..., ceil(D / 2)]: column 2i in the low nibble of byte i, a missing last one as 0."""
    codes = F.pad(codes.to(torch.int32), (0, codes.shape[-1] % 2)) & 15
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)


def unpack_int4(data: Tensor, width: int) -> Tensor:
    """The inverse of `pack_int4`: int8 [..., width]."""
    low, high = data & 15, data >> 4
    codes = torch.stack([low, high], -1).flatten(-2)[..., :width].to(torch.int8)
    return torch.where(codes > 7, codes - 16, codes)


def spread(scale: Tensor, block: Sequence[int], rows: int, columns: int) -> Tensor:
    """One number a block [..., R, C] as one for each element [..., rows, columns], broadcast where a block is a whole row or column."""
    if scale.shape[-2] > 1 and block[0] > 1:
        scale = scale.repeat_interleave(block[0], -2)[..., :rows, :]
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(block[1], -1)[..., :columns]
    return scale


def dequantize(data: Tensor, scale: Tensor, zero: Tensor | None, dtype: str, block: Sequence[int], width: int, out: torch.dtype) -> Tensor:
    """The weights [..., F, width] in `out` that data, scale and zero stand for. Computed in float32, integers in `out`, as torchao does."""
    _check_data(data, dtype)
    rows = data.shape[-2]
    wide = out if out == torch.float64 or dtype != "fp8" else torch.float32
    codes = (unpack_int4(data, width) if dtype == "int4" else data).to(wide)
    if zero is not None:
        codes = codes - spread(zero, block, rows, width).to(wide)
    return (codes * spread(scale, block, rows, width)).to(out)


def _check_data(data: Tensor, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"there is no quantised dtype {dtype!r}; {nearest(dtype, DTYPES)}")
    if data.dtype != DTYPES[dtype] and data.dtype != torch.float64:  # which proofs lift FP8 to, and which holds codes and scales alike
        raise ValueError(f"weights quantised to {dtype} are {DTYPES[dtype]}, these are {data.dtype}: .to(dtype) or .half() on the program casts them away; quantise again")


def quantize_rows(x: Tensor, block: Sequence[int], input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [N, D] as (float8_e4m3fn [N, D], float32 scale): [N, 1] beside rows, [1, 1] beside whole tensors or where `input_scale` is given (expanded
    to [N, 1] beside rows), [N, ceil(D / 128)] beside blocks of 128 x 128. Values past a static scale saturate at +-448."""
    if block[0] == FP8_COLUMNS and block[1] == FP8_COLUMNS:
        width = x.shape[1]
        parts = F.pad(x, (0, -width % FP8_COLUMNS)).unflatten(1, (-1, FP8_COLUMNS))
        scale = _scale(parts, -1) if input_scale is None else input_scale.float().expand(parts.shape[:2])
        return _to_fp8(parts, scale[..., None]).flatten(1)[:, :width], scale
    rowwise = block[0] == 1
    if input_scale is not None:
        scale = input_scale.float().reshape(1, 1).expand(x.shape[0] if rowwise else 1, 1)
    else:
        scale = _scale(x, -1)[:, None] if rowwise else _scale(x.reshape(1, -1), -1)[:, None]
    return _to_fp8(x, scale), scale.contiguous()


def _scale(x: Tensor, dim: int) -> Tensor:
    """amax / 448, divided in the dtype of x and kept in float32, as torchao does (float64 stays)."""
    found = x.abs().amax(dim) / FP8_LARGEST if x.numel() else x.new_zeros(x.shape[:dim])
    return (found if x.dtype == torch.float64 else found.float()).clamp_min(SMALLEST_SCALE)


def _to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)


def rounded_rows(x: Tensor, block: Sequence[int], input_scale: Tensor | None) -> Tensor:
    """What FP8 leaves of x [N, D], in the dtype of x."""
    codes, scale = quantize_rows(x, block, input_scale)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = scale if scale.shape[1] == 1 else scale.repeat_interleave(FP8_COLUMNS, 1)[:, : x.shape[1]]
    return (codes.to(wide) * scale).to(x.dtype)


def takes_scaled_mm(x: Tensor, data: Tensor, block: Sequence[int]) -> bool:
    """Whether `torch._scaled_mm` computes a product with FP8 activations: a scale a row or one for all, 16 divides both sizes, bfloat16 on CUDA."""
    if block[0] == FP8_COLUMNS and block[1] == FP8_COLUMNS:
        return False
    sizes = data.shape[0] % 16 == 0 and data.shape[1] % 16 == 0
    return sizes and data.dtype == torch.float8_e4m3fn and (x.dtype == torch.bfloat16 if x.is_cuda else x.dtype in (torch.bfloat16, torch.float32))


def linear(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, input_scale: Tensor | None, dtype: str, block: Sequence[int],
    width: int, activations: str = "none",
) -> Tensor:  # fmt: skip
    """The definition. x [..., D] of any floating dtype, data [F, D] (int4 [F, ceil(D / 2)]), scale and zero a number a block, input_scale float32 [1]
    for `activations` "static", `block` [rows, columns] of a scale, `width` D. Returns [..., F] in the dtype of x; mutates nothing.
    ValueError for sizes and dtypes that do not fit."""
    if x.shape[-1] != width:
        raise ValueError(f"ftc::quantized_linear: x is {list(x.shape)}, its weights have {width} columns")
    _check_data(data, dtype)
    if activations != "none":
        return _with_fp8_rows(x, data, scale, zero, bias, input_scale, block)
    if dtype == "int8" and block[0] == 1 and scale.shape[-1] == 1 and zero is None:
        out = F.linear(x, data.to(x.dtype)) * scale.to(x.dtype).flatten()
        return out if bias is None else out + bias
    out = F.linear(x, dequantize(data, scale, zero, dtype, block, width, x.dtype), bias if dtype != "fp8" else None)
    return out if bias is None or dtype != "fp8" else out + bias


def _with_fp8_rows(x, data, scale, zero, bias, input_scale, block) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and x.requires_grad:  # straight through the rounding
        rounded = rows + (rounded_rows(rows.detach(), block, input_scale) - rows).detach()
    elif takes_scaled_mm(rows, data, block):
        codes, by_row = quantize_rows(rows, block, input_scale)
        if rows.is_cuda and has_triton():
            from ftc.kernels import skinny_fp8  # noqa: F401  registers the operator, which takes few rows itself and gives many to _scaled_mm

            return torch.ops.ftc.skinny_fp8(codes, by_row, data, scale, bias, rows.dtype).reshape(*x.shape[:-1], data.shape[0])
        added = bias if rows.dtype != torch.float32 else None  # _scaled_mm adds no bias in float32
        found = torch._scaled_mm(codes, data.t(), by_row, scale.t(), added, out_dtype=rows.dtype, use_fast_accum=True)
        found = found if bias is None or added is not None else found + bias
        return found.reshape(*x.shape[:-1], data.shape[0])
    else:
        rounded = rounded_rows(rows, block, input_scale)
    out = F.linear(rounded, dequantize(data, scale, zero, "fp8", block, x.shape[-1], x.dtype), bias)
    return out.reshape(*x.shape[:-1], data.shape[0])


@composite(
    "quantized_linear(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? bias, Tensor? input_scale, str dtype, int[] block, int width, "
    "str activations='none') -> Tensor"
)
def quantized_linear(x, data, scale, zero, bias, input_scale, dtype, block, width, activations="none"):
    """`linear`, by the fastest path there is for these tensors (`ftc.kernels.cpu_quantized` says which)."""
    from ftc.kernels import cpu_quantized

    _check_data(data, dtype)
    if x.shape[-1] == width and cpu_quantized.supported(x, data, scale, zero, dtype, block, activations):
        return cpu_quantized.call(x, data, scale, zero, bias, dtype, block, width)
    return linear(x, data, scale, zero, bias, input_scale, dtype, block, width, activations)


@composite("quantized_embedding(Tensor ids, Tensor data, Tensor scale, Tensor? zero, str dtype, int[] block, int width, ScalarType out) -> Tensor")
def quantized_embedding(ids, data, scale, zero, dtype, block, width, out):
    """Rows of a quantised table [V, D] in `out`: ids [...] give [..., D]. Blocks of one row each: only the rows that are read are dequantised."""
    if block[0] != 1:
        return dequantize(data, scale, zero, dtype, block, width, out)[ids]
    flat = ids.reshape(-1)
    parts = (data.view(torch.uint8) if data.dtype == torch.float8_e4m3fn else data)[flat]
    rows = dequantize(parts.view(data.dtype), scale[flat], None if zero is None else zero[flat], dtype, block, width, out)
    return rows.reshape(*ids.shape, width)
