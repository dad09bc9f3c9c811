"""A decode step on the CPU: `cpu_decode.cpp`, compiled when first asked for, where a C++ compiler is there.

Pages are read in place, each once for all heads; PyTorch's fused attention would want them gathered, and a key-value head read again by
every head that shares it. The library needs nothing but the compiler (about 2 s, once a machine: it is kept in the user's cache folder)
and PyTorch's own OpenMP. FTC_CPU_KERNELS=0 turns it off; without it the operators use `ftc.dialect`'s plain paths.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
# No -ffast-math: the exponential rounds by adding and subtracting a constant.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ftc" / "kernels"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def build(compiler: str, folder: Path) -> Path:
    """The compiled library in `folder`, named by source, compiler, flags and processor; RuntimeError with the compiler's words."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join([SOURCE.read_text(), version, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    library = folder / f"cpu_decode-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / library.name
        done = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{compiler} could not compile {SOURCE}:\n{done.stderr[-2000:]}")
        os.replace(made, library)  # whole or not there: another process may be looking
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it is turned off or cannot be built (a warning then says why, once)."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if os.environ.get("FTC_CPU_KERNELS") == "0" or compiler is None:
        return None
    try:
        loaded = ctypes.CDLL(str(build(compiler, _cache_folder())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(f"decoding on the CPU without the compiled kernel, which is slower: {error}", stacklevel=2)
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
