"""Products of two float8 matrices: by the device's float8 units, or emulated in float32.

    emulated       mm(float32(a) / s_a, float32(b) / s_b), rounded once: what torchao computes with `emulate=True`
    scaled_mm      torch._scaled_mm, as torchao calls it
    auto           scaled_mm on CUDA from compute capability 8.9 on, emulated on the CPU; an error on older CUDA devices

torch._scaled_mm exists on the CPU as well, and is slower there than a float32 product; it is used where it is asked for.
"""

import functools

import torch
from torch import Tensor

from ftc.errors import FtcError, nearest
from ftc.float8.cast import Scaled
from ftc.float8.recipes import MULTIPLE

WAYS = ("auto", "emulated", "scaled_mm")


def way_for(device: torch.device, products: str) -> str:
    """"emulated" or "scaled_mm" for what was asked; FtcError for a device that has neither by itself, or a name that there is not."""
    if products not in WAYS:
        raise FtcError(f"float8 products = {products!r} is not known; {nearest(products, WAYS)}")
    if products != "auto":
        return products
    if device.type != "cuda":
        return "emulated"
    if not _has_units(device.index):
        raise FtcError(f"{torch.cuda.get_device_name(device)} has no float8 units (compute capability 8.9 or more); products = \"emulated\" computes in float32")
    return "scaled_mm"


@functools.cache
def _has_units(index: int | None) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 9)


def multiply(a: Scaled, b: Scaled, dtype: torch.dtype, products: str, fast: bool = False) -> Tensor:
    """a [M, K] times b [K, N], both scaled along K or as a whole, in `dtype`. `fast`: fewer bits in the sums on Hopper.

    FtcError for sizes that torch._scaled_mm cannot take: K and N must be multiples of 16.
    """
    if way_for(a.data.device, products) == "emulated":
        return torch.mm(a.float(), b.float()).to(dtype)
    return _scaled_mm(a, b, dtype, fast)


def multiply_over_tokens(a: Scaled, b: Scaled, dtype: torch.dtype, products: str) -> Tensor:
    """`multiply` where K counts tokens, any number of them: up to the next multiple of 16 the float8 units are given zeros."""
    if way_for(a.data.device, products) == "scaled_mm" and (rest := -a.data.shape[1] % MULTIPLE):
        a, b = Scaled(_padded(a.data.t(), rest).t(), a.scale), Scaled(_padded(b.data, rest), b.scale)
    return multiply(a, b, dtype, products)


def _padded(data: Tensor, rows: int) -> Tensor:
    """`data` [M, N] with so many rows of zeros below; by bytes, as float8 has no pad on every device."""
    return torch.nn.functional.pad(data.view(torch.uint8), (0, 0, 0, rows)).view(data.dtype)


def check_sizes(k: int, n: int) -> None:
    """FtcError where torch._scaled_mm has no product of [M, k] and [k, n]."""
    if k % MULTIPLE or n % MULTIPLE:
        raise FtcError(f"a float8 product of [M, {k}] and [{k}, {n}] needs sizes in multiples of {MULTIPLE}; leave this product in high precision")


def _scaled_mm(a: Scaled, b: Scaled, dtype: torch.dtype, fast: bool) -> Tensor:
    check_sizes(a.data.shape[1], b.data.shape[1])
    a_data = a.data if _row_major(a.data) else a.data.contiguous()
    b_data = b.data.t().contiguous().t() if _row_major(b.data) else b.data
    a_scale, b_scale = a.scale, b.scale
    if a_scale.dim() != b_scale.dim():  # one by rows, the other as a whole: both by rows
        a_scale = a_scale.repeat(a_data.shape[0]).reshape(-1, 1) if a_scale.dim() < 2 else a_scale
        b_scale = b_scale.repeat(b_data.shape[1]).reshape(1, -1) if b_scale.dim() < 2 else b_scale
    a_inverse, b_inverse, after = a_scale.reciprocal(), b_scale.reciprocal(), None
    by_rows = a_scale.dim() == 2
    if by_rows and not fast:  # the row-scaled kernel is slow without fast sums: scales go on the result of the plain one
        after, a_inverse = a_inverse * b_inverse, a_inverse.new_ones(())
        b_inverse = a_inverse
    made = torch.bfloat16 if by_rows and dtype in (torch.float32, torch.float16) else dtype  # what the kernel can write
    out = torch._scaled_mm(a_data, b_data, scale_a=a_inverse, scale_b=b_inverse, out_dtype=made, use_fast_accum=fast)
    if after is not None:
        out = out.mul_(after)
    return out.to(dtype)


def _row_major(data: Tensor) -> bool:
    return data.stride(0) > data.stride(1) and data.stride(1) == 1
