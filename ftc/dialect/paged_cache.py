"""Pages of a key-value cache: which slot holds which token, writing and gathering (vLLM, Kwon et al. 2023, arXiv:2309.06180).

A cache is [num_blocks, block_size, ...]; token p of sequence b lies in block `block_table[b, p // block_size]` at offset
p % block_size. `cached[b]` tokens are there before a call, `new[b]` of the call's T tokens are added; the others are padding.
Nothing here waits for a CUDA device: checks of values run on CPU only, and padding is handled by arithmetic.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftc import kernels
from ftc.errors import FtcError

# Largest finite value of a quantised cache's dtype; a token's scale is its largest magnitude over this.
QUANTISED = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def check_shapes(op: str, block_table: Tensor, cached: Tensor, new: Tensor, batch: int) -> None:
    """Raise FtcError unless the table is [B, max_blocks] and the two counts [B], all of them int32 or int64."""
    for name, tensor, dims in (("block_table", block_table, 2), ("cached", cached, 1), ("new", new, 1)):
        if tensor.dim() != dims or tensor.shape[0] != batch:
            shape = f"[{batch}, max_blocks]" if dims == 2 else f"[{batch}]"
            raise FtcError(f"{op}: {name} has shape {list(tensor.shape)}; it must be {shape} for {batch} sequences")
        if tensor.dtype not in (torch.int32, torch.int64):
            raise FtcError(f"{op}: {name} is {tensor.dtype}; give torch.int32 or torch.int64")


def check_values(op: str, block_table: Tensor, cached: Tensor, new: Tensor, num_tokens: int, cache: Tensor) -> None:
    """Raise FtcError where a count is off, the cache of a sequence is full or a block does not exist. Does nothing on CUDA."""
    if block_table.device.type != "cpu":
        return
    num_blocks, block_size = cache.shape[:2]
    table = block_table.numpy()
    for b, (had, added) in enumerate(zip(cached.tolist(), new.tolist(), strict=True)):
        if had < 0 or not 0 <= added <= num_tokens:
            raise FtcError(
                f"{op}: sequence {b} has {had} tokens cached and {added} new; cached must be at least 0 and new between 0 and {num_tokens}"
            )
        used = -(-(had + added) // block_size)
        row = table[b, :used]
        lowest, highest = (int(row.min()), int(row.max())) if row.size else (0, 0)
        if highest >= num_blocks or lowest < -1:
            raise FtcError(
                f"{op}: sequence {b} names block {highest if highest >= num_blocks else lowest}; the cache has blocks 0 to {num_blocks - 1}"
            )
        if row.size < used or lowest == -1:
            blocks = int((table[b] < 0).argmax()) if (table[b] < 0).any() else table.shape[1]
            raise FtcError(
                f"{op}: cache full: sequence {b} needs {had + added} tokens ({had} cached and {added} new), its {blocks} blocks of "
                f"{block_size} hold {blocks * block_size}; give it more blocks"
            )


def write(cache: Tensor, tokens: Tensor, block_table: Tensor, cached: Tensor, new: Tensor) -> None:
    """Put the real ones of tokens [B, T, ...] into cache [num_blocks, block_size, ...], converted to its dtype; mutates `cache`."""
    if cache.dtype in QUANTISED:  # index_put knows no float8; the bits are what is moved
        cache, tokens = cache.view(torch.uint8), tokens.view(torch.uint8)
    batch, num_tokens = tokens.shape[:2]
    count, block_size = batch * num_tokens, cache.shape[1]
    if count == 0:
        return
    if cache.is_cuda and kernels.has_triton() and cache.stride(-1) == 1:
        from ftc.kernels.paged_write import paged_write

        return paged_write(cache, tokens, block_table, cached, new)
    if cache.device.type == "cpu":
        *source, block, offset = _places(block_table, cached, new, num_tokens, block_size)
        whole = len(block) == count
        values = tokens.reshape(count, *tokens.shape[2:]) if whole else tokens[tuple(source)]
        cache.index_put_((block, offset), values.to(cache.dtype))
        return
    flat = tokens.reshape(count, *tokens.shape[2:])
    step = torch.arange(num_tokens, device=tokens.device)
    valid = (step < new[:, None]).reshape(-1)
    # A padding token repeats the write of the first real one: the same value into the same slot, so no order matters.
    source = torch.where(valid, torch.arange(count, device=tokens.device), valid.to(torch.int32).argmax())
    sequence = source // num_tokens
    position = cached[sequence] + source % num_tokens
    column = (position // block_size).clamp_(max=max(block_table.shape[1] - 1, 0))
    block = block_table[sequence, column].clamp_(min=0).long()
    offset = (position % block_size).long()
    values = flat[source].to(cache.dtype)
    # No real token at all: every write puts back what is there.
    any_valid = valid.any().reshape([1] * values.dim())
    cache.index_put_((block, offset), torch.where(any_valid, values, cache[block, offset]))


def _places(block_table: Tensor, cached: Tensor, new: Tensor, num_tokens: int, block_size: int) -> list[Tensor]:
    """Sequence, token, block and offset of each real token, on the CPU: a few numpy calls cost a tenth of what as many of PyTorch's would."""
    sequence, step = np.nonzero(np.arange(num_tokens) < new.numpy()[:, None])
    position = cached.numpy()[sequence] + step
    block = block_table.numpy()[sequence, position // block_size].astype(np.int64)
    return [torch.from_numpy(part) for part in (sequence, step, block, (position % block_size).astype(np.int64))]


def gather(cache: Tensor, block_table: Tensor) -> Tensor:
    """All pages that the table names, [B, max_blocks * block_size, ...]; unused entries (-1) give block 0, to be masked."""
    return cache[block_table.clamp(min=0).long()].flatten(1, 2)


def sequence(cache: Tensor, blocks: list[int], begin: int, end: int) -> Tensor:
    """Slots begin to end of one sequence as [end - begin, ...]: a view where its blocks follow one another, else a copy."""
    size = cache.shape[1]
    low, high = begin // size, -(-end // size)
    blocks = blocks[low:high]
    if blocks == list(range(blocks[0], blocks[0] + len(blocks))) and cache.stride(0) == size * cache.stride(1):
        pages = cache[blocks[0] : blocks[0] + len(blocks)]
    else:
        bits = cache.view(torch.uint8) if cache.dtype in QUANTISED else cache
        pages = bits[torch.tensor(blocks)].view(cache.dtype)
    return pages.flatten(0, 1)[begin - low * size : end - low * size]


def spans(cached: Tensor, new: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """(first, last) int64 [B]: positions first <= p < last are seen by the one new token of each sequence, none where it is padding."""
    last = torch.where(new > 0, cached.long() + 1, 0)
    return (torch.zeros_like(last) if window is None else (last - window).clamp_(min=0)), last


def causal(num_new: int, num_slots: int, window: int | None) -> Tensor:
    """[T, S] for queries that are the last T of S slots."""
    query = torch.arange(num_slots - num_new, num_slots)[:, None]
    position = torch.arange(num_slots)
    allowed = position <= query
    return allowed if window is None else allowed & (query - position < window)


def visible(cached: Tensor, new: Tensor, num_tokens: int, num_slots: int, window: int | None) -> Tensor:
    """[B, T, S]: query t of sequence b may look at position p: p <= cached + t, within the window, and t is no padding."""
    step = torch.arange(num_tokens, device=cached.device)
    query = (cached[:, None] + step)[:, :, None]
    position = torch.arange(num_slots, device=cached.device)
    allowed = (position <= query) & (step < new[:, None])[:, :, None]
    return allowed if window is None else allowed & (query - position < window)


def quantise(tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """tokens [..., K] as (values in `dtype`, float32 scale [...]): the largest magnitude of a row becomes the largest value."""
    wide = tokens.float()
    scale = wide.abs().amax(-1).clamp_min(1e-12) / QUANTISED[dtype]
    values = wide / scale[..., None]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def attend(scores: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """softmax(scores) values where allowed, zero rows where nothing is; scores [..., T, S], values [..., S, M].

    What a slot held before it was written may be anything, NaN too: values of slots that nobody may see must be zero already.
    """
    scores = scores.masked_fill(~allowed, float("-inf"))
    highest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    return torch.matmul(weights, values) / total.masked_fill(total == 0, 1.0)


def fused(query: Tensor, keys: Tensor, values: Tensor, cached: Tensor, new: Tensor, scale: float, window: int | None) -> Tensor:
    """scaled_dot_product_attention of query [B, H, T, K] over gathered keys [B, G, S, K] and values [B, G, S, M]; padding rows are zero."""
    allowed_BTS = visible(cached, new, query.shape[2], keys.shape[2], window)
    unseen_B1S1 = ~allowed_BTS.any(1)[:, None, :, None]
    padding_BT1 = ~allowed_BTS.any(2, keepdim=True)
    out = F.scaled_dot_product_attention(
        query,
        keys.masked_fill(unseen_B1S1, 0.0),
        values.masked_fill(unseen_B1S1, 0.0),
        attn_mask=(allowed_BTS | padding_BT1)[:, None],
        scale=scale,
        enable_gqa=keys.shape[1] != query.shape[1],
    )
    return out.masked_fill(padding_BT1[:, None], 0.0)
