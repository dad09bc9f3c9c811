"""ftc::paged_attention: writes new keys and values into a paged cache and attends to all that it then holds.

Legend: B sequences, T tokens given for each, H heads, G key-value heads, R = H / G, K head dim, M value dim, S slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ftc import kernels
from ftc.dialect import paged_cache
from ftc.dialect.library import LIBRARY
from ftc.dialect.paged_cache import QUANTISED
from ftc.errors import FtcError
from ftc.kernels import cpu_decode

LIBRARY.define(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor block_table, "
    "Tensor cached, Tensor new, Tensor(c!)? key_scale=None, Tensor(d!)? value_scale=None, *, float scale, SymInt? window=None, "
    "float? softcap=None) -> Tensor"
)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cached: Tensor,
    new: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition in plain PyTorch: query t of sequence b attends to positions p <= cached[b] + t (and nearer than `window`).

    query [B, H, T, K], key [B, G, T, K], value [B, G, T, M], G divides H; key_cache [num_blocks, block_size, G, K] and value_cache
    [num_blocks, block_size, G, M] in a floating dtype, or in float8_e4m3fn or int8 with float32 scales [num_blocks, block_size, G]
    (one scale a token and head: largest magnitude / 448 or / 127); block_table [B, max_blocks] (-1: unused), cached [B] tokens already
    in the cache, new [B] how many of the T tokens are real. Mutates the caches and their scales: the first new[b] tokens go to positions
    cached[b], cached[b] + 1, ...; the others are padding, whose output rows are zero. Scores are scaled, then bounded by `softcap` as in
    ftc::softcap_attention; computed in float32 at least. Returns [B, H, T, M] in the dtype of query. On CPU raises FtcError before any
    write for a block that does not exist or a sequence whose blocks are full; on CUDA values are not looked at, which would wait.
    """
    _begin(query, key, value, key_cache, value_cache, block_table, cached, new, key_scale, value_scale, window, softcap)
    wide = torch.promote_types(query.dtype, torch.float32)
    num_groups, num_tokens = key.shape[1], query.shape[2]
    keys_BSGK = _read(key_cache, key_scale, block_table, wide)
    values_BSGM = _read(value_cache, value_scale, block_table, wide)
    allowed_BTS = paged_cache.visible(cached, new, num_tokens, keys_BSGK.shape[1], window)
    seen_BS11 = allowed_BTS.any(1)[:, :, None, None]
    keys_BSGK, values_BSGM = keys_BSGK.masked_fill(~seen_BS11, 0.0), values_BSGM.masked_fill(~seen_BS11, 0.0)
    query_BGRTK = query.to(wide).unflatten(1, (num_groups, -1))
    scores = torch.matmul(query_BGRTK, keys_BSGK.permute(0, 2, 3, 1)[:, :, None]) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    out = paged_cache.attend(scores, values_BSGM.transpose(1, 2)[:, :, None], allowed_BTS[:, None, None])
    return out.flatten(1, 2).to(query.dtype)


def _begin(query, key, value, key_cache, value_cache, block_table, cached, new, key_scale, value_scale, window, softcap) -> None:
    """Check everything, then write."""
    _check(query, key, value, key_cache, value_cache, block_table, cached, new, key_scale, value_scale, window, softcap)
    paged_cache.check_values("paged_attention", block_table, cached, new, query.shape[2], key_cache)
    write(key, value, key_cache, value_cache, block_table, cached, new, key_scale, value_scale)


def write(key, value, key_cache, value_cache, block_table, cached, new, key_scale=None, value_scale=None) -> None:
    """Put the real new keys and values into their slots, quantised where the caches are."""
    for tokens, cache, scales in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
        tokens = tokens.transpose(1, 2)
        if cache.dtype in QUANTISED:
            tokens, scale = paged_cache.quantise(tokens, cache.dtype)
            paged_cache.write(scales, scale, block_table, cached, new)
        paged_cache.write(cache, tokens, block_table, cached, new)


def _read(cache: Tensor, scales: Tensor | None, block_table: Tensor, dtype: torch.dtype) -> Tensor:
    if cache.dtype not in QUANTISED:
        return paged_cache.gather(cache, block_table).to(dtype)
    values = paged_cache.gather(cache.view(torch.uint8), block_table).view(cache.dtype).float()
    return (values * paged_cache.gather(scales, block_table)[..., None]).to(dtype)


def _check(query, key, value, key_cache, value_cache, block_table, cached, new, key_scale, value_scale, window, softcap) -> None:
    op = "paged_attention"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise FtcError(f"{op}: query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} must be [B, heads, T, width]")
    batch, heads, num_tokens, width = query.shape
    groups = key.shape[1]
    if key.shape[0] != batch or key.shape[2] != num_tokens or key.shape[3] != width or value.shape[:3] != key.shape[:3]:
        raise FtcError(
            f"{op}: query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not fit; give query [B, H, T, K], "
            "key [B, G, T, K] and value [B, G, T, M]"
        )
    if groups == 0 or heads % groups:
        raise FtcError(f"{op}: {heads} heads cannot share {groups} key-value heads; their number must divide {heads}")
    for name, cache, tokens, scales in (("key", key_cache, key, key_scale), ("value", value_cache, value, value_scale)):
        if cache.dim() != 4 or cache.shape[2] != groups or cache.shape[3] != tokens.shape[3]:
            raise FtcError(
                f"{op}: {name}_cache {list(cache.shape)} must be [num_blocks, block_size, {groups}, {tokens.shape[3]}]"
            )
        if cache.dtype in QUANTISED:
            if scales is None or scales.shape != cache.shape[:3] or scales.dtype != torch.float32:
                given = None if scales is None else f"{scales.dtype} {list(scales.shape)}"
                raise FtcError(f"{op}: a {cache.dtype} cache needs {name}_scale as torch.float32 {list(cache.shape[:3])}, got {given}")
        elif not cache.dtype.is_floating_point or scales is not None:
            raise FtcError(
                f"{op}: {name}_cache is {cache.dtype}{' with a scale' if scales is not None else ''}; give a floating dtype without a "
                "scale, or float8_e4m3fn or int8 with one"
            )
    if key_cache.shape[:2] != value_cache.shape[:2]:
        raise FtcError(f"{op}: key_cache {list(key_cache.shape)} and value_cache {list(value_cache.shape)} differ in their blocks")
    paged_cache.check_shapes(op, block_table, cached, new, batch)
    if window is not None and isinstance(window, int) and window < 1:
        raise FtcError(f"{op}: window {window} must be at least one token, or None")
    if softcap is not None and softcap <= 0:
        raise FtcError(f"{op}: softcap {softcap} must be positive, or None")


def _cpu(
    query, key, value, key_cache, value_cache, block_table, cached, new, key_scale=None, value_scale=None, *, scale, window=None, softcap=None,
):  # fmt: skip
    """The compiled kernel for a decode step; otherwise one fused call a sequence, which reads its pages in place where they are in order."""
    inputs = (query, key, value, key_cache, value_cache, block_table, cached, new, key_scale, value_scale)
    if cpu_decode.supported(query, key_cache, value_cache):
        _begin(*inputs, window, softcap)
        span = paged_cache.spans(cached, new, window)
        return cpu_decode.decode(query, key_cache, value_cache, block_table, *span, scale=scale, softcap=softcap)
    if softcap is not None:
        return reference(*inputs, scale=scale, window=window, softcap=softcap)
    _begin(*inputs, window, softcap)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for b, (blocks, had, added) in enumerate(zip(block_table.tolist(), cached.tolist(), new.tolist(), strict=True)):
        if added == 0:
            continue
        begin, end = (0 if window is None else max(0, had - window + 1)), had + added
        keys, values = (
            _slots(cache, scales, blocks, begin, end, query.dtype).transpose(0, 1)[None]
            for cache, scales in ((key_cache, key_scale), (value_cache, value_scale))
        )
        from_start = had == 0 and window is None
        mask = None if from_start or added == 1 else paged_cache.causal(added, end - begin, window)
        out[b : b + 1, :, :added] = F.scaled_dot_product_attention(
            query[b : b + 1, :, :added], keys, values, attn_mask=mask, is_causal=from_start, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
        )
    return out


def _slots(cache: Tensor, scales: Tensor | None, blocks: list[int], begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Slots begin to end of one sequence, [end - begin, G, width] in `dtype`."""
    values = paged_cache.sequence(cache, blocks, begin, end)
    if cache.dtype in QUANTISED:
        values = values.float() * paged_cache.sequence(scales, blocks, begin, end)[..., None]
    return values.to(dtype)


def _cuda(
    query, key, value, key_cache, value_cache, block_table, cached, new, key_scale=None, value_scale=None, *, scale, window=None, softcap=None,
):  # fmt: skip
    """The Triton kernel for a decode step; for prefill one fused call over gathered pages. Never waits for the device."""
    inputs = (query, key, value, key_cache, value_cache, block_table, cached, new, key_scale, value_scale)
    if kernels.decodes(query):
        from ftc.kernels.paged_decode import paged_decode, supported

        if supported(query, key_cache, value_cache):
            _begin(*inputs, window, softcap)
            return paged_decode(
                query, key_cache, value_cache, block_table, cached, new, key_scale, value_scale, scale=scale, window=window, softcap=softcap
            )
    if softcap is not None:
        return reference(*inputs, scale=scale, window=window, softcap=softcap)
    _begin(*inputs, window, softcap)
    keys, values = (_read(c, s, block_table, query.dtype) for c, s in ((key_cache, key_scale), (value_cache, value_scale)))
    return paged_cache.fused(query, keys.transpose(1, 2), values.transpose(1, 2), cached, new, scale, window)


def _fake(
    query, key, value, key_cache, value_cache, block_table, cached, new, key_scale=None, value_scale=None, *, scale, window=None, softcap=None,
):  # fmt: skip
    _check(query, key, value, key_cache, value_cache, block_table, cached, new, key_scale, value_scale, window, softcap)
    return query.new_empty(*query.shape[:3], value.shape[3])


LIBRARY.impl("paged_attention", reference, "CompositeExplicitAutograd")
LIBRARY.impl("paged_attention", _cpu, "CPU")
LIBRARY.impl("paged_attention", _cuda, "CUDA")
torch.library.register_fake("ftc::paged_attention", _fake)
