"""Few rows times quantised weights on the CPU: `cpu_quantized.cpp`, compiled when first asked for, where a C++ compiler is there.

A decode step by dequantising writes and reads a weight in float32 besides reading its codes; here the codes are all that memory gives. Without the kernel, for
more rows, and for blocks of 128 x 128 the operators dequantise and multiply (`ftc.dialect.quantized_linear.linear`).
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ftc.dialect.library import LIBRARY
from ftc.kernels import cpp_library

SOURCE = Path(__file__).with_suffix(".cpp")
MOST_ROWS = 16  # above it one dequantised weight serves enough rows
_KINDS = {"fp8": 0, "int8": 1, "int4": 2}
_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it is turned off or cannot be built (a warning then says why, once)."""
    loaded = cpp_library.load(SOURCE)
    if loaded is None:
        return None
    loaded.ftc_quantized.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int, ctypes.c_int]
    loaded.ftc_quantized.restype = None
    return loaded


def supported(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, dtype: str, block: Sequence[int], activations: str) -> bool:
    """Whether the kernel computes this: a few rows in float32 or bfloat16 on the CPU that take no gradient, weights alone quantised, by row, tensor or
    group. While a graph is traced only a number of rows that is no symbol counts."""
    if activations != "none" or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or x.shape[-1] == 0:
        return False
    rows = x.numel() // x.shape[-1]
    # From some 4 rows on, bfloat16 units multiply faster by INT8 made bfloat16 than float32 units by INT8.
    most = 4 if dtype == "int8" and x.dtype == torch.bfloat16 else MOST_ROWS
    if not isinstance(rows, int) or not 0 < rows <= most or (torch.is_grad_enabled() and x.requires_grad):
        return False
    by_row = block[0] == 1 and (dtype != "int4" or block[1] % 2 == 0)
    return (by_row or scale.numel() == 1) and data.dtype == _DTYPES[dtype] and data.is_contiguous() and scale.is_contiguous() and library() is not None


def call(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, dtype: str, block: Sequence[int], width: int) -> Tensor:
    """`linear`; through the operator where somebody listens (tracing, fakes), directly otherwise: the way through the dispatcher costs microseconds."""
    plain = not torch._C._len_torch_dispatch_stack() and type(x) in (Tensor, torch.nn.Parameter) and not torch._is_functional_tensor(x)
    return (linear if plain else torch.ops.ftc.cpu_quantized)(x, data, scale, zero, bias, dtype, block, width)


def linear(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, dtype: str, block: Sequence[int], width: int) -> Tensor:
    """`ftc.dialect.quantized_linear.linear` of what `supported` says; computed in float32, returned in the dtype of x."""
    wide = x.reshape(-1, width).float().contiguous()
    out, groups = wide.new_empty(wide.shape[0], data.shape[0]), scale.shape[-1]
    group = width if groups == 1 else block[1]
    sizes = (ctypes.c_int64 * 7)(wide.shape[0], data.shape[0], width, group, groups, data.shape[1], int(scale.shape[0] > 1))
    scale, bias = scale.float(), None if bias is None else bias.float()
    pointers = (None if t is None else t.data_ptr() for t in (wide, data, scale, zero, bias, out))
    library().ftc_quantized(*pointers, sizes, _KINDS[dtype], torch.get_num_threads())
    return out.to(x.dtype).reshape(*x.shape[:-1], data.shape[0])


LIBRARY.define(
    "cpu_quantized(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? bias, str dtype, int[] block, int width) -> Tensor"
)
LIBRARY.impl("cpu_quantized", linear, "CPU")
torch.library.register_fake("ftc::cpu_quantized", lambda x, data, scale, zero, bias, dtype, block, width: x.new_empty(*x.shape[:-1], data.shape[0]))
