"""Writing new tokens into a paged cache in Triton: one launch, padding left out, nothing read back."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def paged_write_kernel(
    tokens_ptr, cache_ptr, table_ptr, cached_ptr, new_ptr, num_tokens, width, inner,
    b_stride, t_stride, outer_stride, table_stride, block_stride, row_stride, cache_outer_stride,
    BLOCK_SIZE: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: up to BLOCK_W of the outer x inner numbers of token t of sequence b, where it is a real one."""
    pid = tl.program_id(0).to(tl.int64)
    b, t = pid // num_tokens, pid % num_tokens
    if t < tl.load(new_ptr + b):
        position = tl.load(cached_ptr + b).to(tl.int64) + t
        block = tl.load(table_ptr + b * table_stride + position // BLOCK_SIZE).to(tl.int64)
        w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        outer, column = w // inner, w % inner
        value = tl.load(tokens_ptr + b * b_stride + t * t_stride + outer * outer_stride + column, mask=w < width)
        slot = cache_ptr + block * block_stride + (position % BLOCK_SIZE) * row_stride
        tl.store(slot + outer * cache_outer_stride + column, value.to(cache_ptr.dtype.element_ty), mask=w < width)


def paged_write(cache: Tensor, tokens: Tensor, block_table: Tensor, cached: Tensor, new: Tensor) -> None:
    """Put the real ones of tokens [B, T, ...] into cache [num_blocks, block_size, ...], converted to its dtype; mutates `cache`."""
    if cache.dtype.itemsize == 1:  # packed and quantised values are moved as bits
        cache, tokens = cache.view(torch.uint8), tokens.view(torch.uint8)
    batch, num_tokens = tokens.shape[:2]
    if cache.dim() == 3:
        cache, tokens = cache[:, :, None], tokens[:, :, None]
    outer, inner = cache.shape[2:]
    if tokens.stride(-1) != 1:
        tokens = tokens.contiguous()
    if batch * num_tokens == 0:
        return
    block_w = min(1024, triton.next_power_of_2(outer * inner))
    paged_write_kernel[(batch * num_tokens, triton.cdiv(outer * inner, block_w))](
        tokens, cache, block_table, cached, new, num_tokens, outer * inner, inner,
        *tokens.stride()[:3], block_table.stride(0), *cache.stride()[:3],
        BLOCK_SIZE=cache.shape[1], BLOCK_W=block_w, num_warps=4,
    )  # fmt: skip
