"""A decode step on the CPU: `cpu_decode.cpp`, compiled when first asked for, where a C++ compiler is there.

Pages are read in place, each once for all heads; PyTorch's fused attention would want them gathered, and a key-value head read again by
every head that shares it. `cpp_library` builds it (about 2 s, once a machine); without it the operators use `ftc.dialect`'s plain paths.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ftc.kernels import cpp_library

SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it is turned off or cannot be built (a warning then says why, once)."""
    loaded = cpp_library.load(SOURCE)
    if loaded is None:
        return None
    loaded.ftc_decode.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_float, ctypes.c_float, ctypes.c_int]
    loaded.ftc_decode.restype = None
    return loaded


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # `Kind` in the source; uint8 is rows of ftc.dialect.fp8_latent


def supported(query: Tensor, *caches: Tensor) -> bool:
    """Whether the kernel computes this: one query a sequence in float32 or bfloat16, a cache of those or of packed latents, and the library."""
    plain = all(t.device.type == "cpu" and t.stride(-1) == 1 and t.dtype == caches[0].dtype for t in caches)
    dtypes = caches[0].dtype in KINDS and query.dtype in (torch.float32, torch.bfloat16)
    return plain and dtypes and query.shape[2] == 1 and query.shape[0] > 0 and library() is not None


def decode(
    query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, first: Tensor, last: Tensor, *, scale: float, softcap: float | None = None,
    value_width: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of query [B, H, 1, D] to the positions first[b] <= p < last[b] of paged keys [num_blocks, block_size, G, D] and values [.., M].

    Keys and values may be views of one cache; packed latents are given as both, with `value_width` their L. first and last int64 [B].
    Returns [B, H, 1, M] in the dtype of query, computed in float32; a sequence of no positions gives zeros.
    """
    batch, heads, _, width = query.shape
    block_size, groups = values.shape[1:3]
    value_width = value_width or values.shape[3]
    wide, block_table = query.float().contiguous(), block_table.to(torch.int32).contiguous()
    out = wide.new_empty(batch, heads, 1, value_width)
    sizes = (ctypes.c_int64 * 8)(batch, heads, groups, width, value_width, block_size, block_table.shape[1], KINDS[keys.dtype])
    strides = (ctypes.c_int64 * 6)(*(stride * cache.itemsize for cache in (keys, values) for stride in cache.stride()[:3]))
    tensors = (wide, keys, values, block_table, first, last, out)
    library().ftc_decode(*(t.data_ptr() for t in tensors), sizes, strides, scale, softcap or 0.0, torch.get_num_threads())
    return out.to(query.dtype)
