"""ftc::paged_latent_attention: attention over a paged cache of latents (DeepSeek-V2 report, 2024, equations 9 to 19 and section 2.1.2).

    scores = scale (q_nope [W_UK c] + q_pe k_pe) = scale ((W_UK' q_nope) c + q_pe k_pe)          out = softmax(scores) [W_UV c] = W_UV (softmax(scores) c)

The left sides are the expanded form: keys and values of all cached tokens are computed, H (N + M) numbers a token. The right sides are
the absorbed form: every head reads the latents themselves, L + E numbers a token. For few queries the absorbed form does less work.

Legend: B sequences, T tokens given for each, H heads, G groups of heads that share keys and values, R = H / G, L latent, N part of a
head without RoPE, E part with RoPE, M value dim, S slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ftc import kernels
from ftc.dialect import fp8_latent, paged_cache
from ftc.dialect.library import LIBRARY
from ftc.errors import FtcError
from ftc.kernels import cpu_decode

LIBRARY.define(
    "paged_latent_attention(Tensor q_nope, Tensor q_pe, Tensor latent, Tensor k_pe, Tensor kv_b, Tensor(a!) cache, Tensor block_table, "
    "Tensor cached, Tensor new, *, int groups, float scale, int absorb_up_to=0) -> Tensor"
)


def reference(
    q_nope: Tensor,
    q_pe: Tensor,
    latent: Tensor,
    k_pe: Tensor,
    kv_b: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cached: Tensor,
    new: Tensor,
    *,
    groups: int,
    scale: float,
    absorb_up_to: int = 0,
) -> Tensor:
    """The definition in plain PyTorch: writes the new latents, then attends to all that the cache holds up to each query.

    q_nope [B, H, T, N] (N may be 0), q_pe [B, H, T, E] and k_pe [B, T, E] rotated already, latent [B, T, L], kv_b [G (N + M), L], group
    by group [W_UK; W_UV]; head h reads group h // (H / G). cache [num_blocks, block_size, L + E] in a floating dtype, latent first, or
    uint8 rows of `ftc.dialect.fp8_latent`; block_table, cached, new and the errors as in ftc::paged_attention. Mutates `cache`. Absorbed
    where T <= absorb_up_to, else expanded; both are one function in real arithmetic, and W_UQ W_UK is never formed. Softmax and sums in
    float32 at least. Returns [B, H, T, M] in the dtype of the queries, zero for padding.
    """
    _begin(q_nope, q_pe, latent, k_pe, kv_b, cache, block_table, cached, new, groups)
    wide = torch.promote_types(q_pe.dtype, torch.float32)
    latent_BSL, k_pe_BSE = read(paged_cache.gather(cache, block_table), latent.shape[-1], k_pe.shape[-1], wide)
    num_tokens = q_pe.shape[2]
    allowed_BTS = paged_cache.visible(cached, new, num_tokens, latent_BSL.shape[1], None)
    seen_BS1 = allowed_BTS.any(1)[:, :, None]
    latent_BSL, k_pe_BSE = latent_BSL.masked_fill(~seen_BS1, 0.0), k_pe_BSE.masked_fill(~seen_BS1, 0.0)
    w_uk_GNL, w_uv_GML = split_kv_b(kv_b.to(wide), groups, q_nope.shape[-1])
    q_nope_BGRTN, q_pe_BGRTE = (q.to(wide).unflatten(1, (groups, -1)) for q in (q_nope, q_pe))
    allowed = allowed_BTS[:, None, None]
    rotated = torch.matmul(q_pe_BGRTE, k_pe_BSE.transpose(1, 2)[:, None, None])
    if num_tokens <= absorb_up_to:
        query_BGRTL = torch.matmul(q_nope_BGRTN, w_uk_GNL[:, None])
        scores = torch.matmul(query_BGRTL, latent_BSL.transpose(1, 2)[:, None, None]) + rotated
        mixed_BGRTL = paged_cache.attend(scores * scale, latent_BSL[:, None, None], allowed)
        out = torch.matmul(mixed_BGRTL, w_uv_GML.transpose(1, 2)[:, None])
    else:
        keys_BGSN = torch.matmul(latent_BSL[:, None], w_uk_GNL.transpose(1, 2))
        values_BGSM = torch.matmul(latent_BSL[:, None], w_uv_GML.transpose(1, 2))
        scores = torch.matmul(q_nope_BGRTN, keys_BGSN.transpose(2, 3)[:, :, None]) + rotated
        out = paged_cache.attend(scores * scale, values_BGSM[:, :, None], allowed)
    return out.flatten(1, 2).to(q_pe.dtype)


def _begin(q_nope, q_pe, latent, k_pe, kv_b, cache, block_table, cached, new, groups) -> None:
    """Check everything, then write."""
    _check(q_nope, q_pe, latent, k_pe, kv_b, cache, block_table, cached, new, groups)
    paged_cache.check_values("paged_latent_attention", block_table, cached, new, q_pe.shape[2], cache)
    write(latent, k_pe, cache, block_table, cached, new)


def split_kv_b(kv_b: Tensor, groups: int, nope: int) -> tuple[Tensor, Tensor]:
    """kv_b [G (N + M), L] as views W_UK [G, N, L] and W_UV [G, M, L]."""
    weights = kv_b.unflatten(0, (groups, -1))
    return weights[:, :nope], weights[:, nope:]


def write(latent: Tensor, k_pe: Tensor, cache: Tensor, block_table: Tensor, cached: Tensor, new: Tensor) -> None:
    """Put the real new latents and rotated keys into their slots, packed where the cache is uint8."""
    rows = fp8_latent.pack(latent, k_pe) if cache.dtype == torch.uint8 else torch.cat([latent, k_pe], -1)
    paged_cache.write(cache, rows, block_table, cached, new)


def read(rows: Tensor, latent: int, rope: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cache rows [..., width] as (latent [..., L], k_pe [..., E]) in `dtype`."""
    if rows.dtype == torch.uint8:
        return fp8_latent.unpack(rows, latent, rope, dtype)
    c, k_pe = rows.to(dtype).split([latent, rope], -1)
    return c, k_pe


def _check(q_nope, q_pe, latent, k_pe, kv_b, cache, block_table, cached, new, groups) -> None:
    op = "paged_latent_attention"
    if q_nope.dim() != 4 or q_pe.dim() != 4 or q_nope.shape[:3] != q_pe.shape[:3]:
        raise FtcError(f"{op}: q_nope {list(q_nope.shape)} and q_pe {list(q_pe.shape)} must be [B, H, T, N] and [B, H, T, E]")
    batch, heads, num_tokens, rope = q_pe.shape
    if list(latent.shape[:-1]) != [batch, num_tokens] or list(k_pe.shape) != [batch, num_tokens, rope]:
        raise FtcError(
            f"{op}: latent {list(latent.shape)} and k_pe {list(k_pe.shape)} must be [{batch}, {num_tokens}, L] and [{batch}, {num_tokens}, {rope}]"
        )
    if groups < 1 or heads % groups or kv_b.dim() != 2 or kv_b.shape[0] % groups or kv_b.shape[1] != latent.shape[-1]:
        raise FtcError(
            f"{op}: kv_b {list(kv_b.shape)} and {heads} heads do not fit {groups} groups and a latent of {latent.shape[-1]}; give kv_b as "
            "[groups * (N + M), L] with groups dividing the heads"
        )
    if kv_b.shape[0] // groups <= q_nope.shape[-1]:
        raise FtcError(f"{op}: kv_b {list(kv_b.shape)} leaves no value beside {q_nope.shape[-1]} rows of W_UK in each of {groups} groups")
    packed = cache.dtype == torch.uint8
    width = fp8_latent.row_bytes(latent.shape[-1], rope) if packed else latent.shape[-1] + rope
    if cache.dim() != 3 or cache.shape[2] != width or not (packed or cache.dtype.is_floating_point):
        raise FtcError(
            f"{op}: cache {cache.dtype} {list(cache.shape)} must be [num_blocks, block_size, {latent.shape[-1] + rope}] in a floating dtype, "
            f"or [num_blocks, block_size, {fp8_latent.row_bytes(latent.shape[-1], rope)}] in torch.uint8"
        )
    paged_cache.check_shapes(op, block_table, cached, new, batch)


def absorb(q_nope: Tensor, w_uk_GNL: Tensor) -> Tensor:
    """W_UK' q_nope: [B, H, T, N] to [B, H, T, L]."""
    return _by_group(q_nope, w_uk_GNL)


def leave(mixed: Tensor, w_uv_GML: Tensor) -> Tensor:
    """W_UV times attention's mean of latents: [B, H, T, L] to [B, H, T, M]."""
    return _by_group(mixed, w_uv_GML.transpose(1, 2))


def _by_group(x: Tensor, weight_GIO: Tensor) -> Tensor:
    """x [B, H, T, I] times each head's group's weight [G, I, O]: one product a group, where broadcasting would copy weights for each head."""
    batch, heads, num_tokens, width = x.shape
    groups = weight_GIO.shape[0]
    out = torch.bmm(x.unflatten(1, (groups, -1)).transpose(0, 1).reshape(groups, batch * heads // groups * num_tokens, width), weight_GIO)
    return out.view(groups, batch, heads // groups, num_tokens, out.shape[-1]).transpose(0, 1).reshape(batch, heads, num_tokens, out.shape[-1])


def expand(latent_BSL: Tensor, k_pe_BSE: Tensor, w_uk_GNL: Tensor, w_uv_GML: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, G, S, N + E] and values [B, G, S, M] of all slots."""
    groups = w_uk_GNL.shape[0]
    keys = torch.matmul(latent_BSL[:, None], w_uk_GNL.transpose(1, 2))
    return torch.cat([keys, k_pe_BSE[:, None].expand(-1, groups, -1, -1)], -1), torch.matmul(latent_BSL[:, None], w_uv_GML.transpose(1, 2))


def _cpu(q_nope, q_pe, latent, k_pe, kv_b, cache, block_table, cached, new, *, groups, scale, absorb_up_to=0):
    """The compiled kernel for an absorbed decode step; otherwise sequence by sequence, pages in place where they are in order."""
    _begin(q_nope, q_pe, latent, k_pe, kv_b, cache, block_table, cached, new, groups)
    w_uk_GNL, w_uv_GML = split_kv_b(kv_b.to(q_pe.dtype), groups, q_nope.shape[-1])
    absorbed, width = q_pe.shape[2] <= absorb_up_to, latent.shape[-1]
    query = torch.cat([absorb(q_nope, w_uk_GNL) if absorbed else q_nope, q_pe], -1)
    if absorbed and cpu_decode.supported(query, cache):
        rows = cache[:, :, None]
        span = paged_cache.spans(cached, new, None)
        mixed = cpu_decode.decode(query, rows, rows, block_table, *span, scale=scale, value_width=width)
        return leave(mixed, w_uv_GML)
    out = q_pe.new_zeros(*q_pe.shape[:3], w_uv_GML.shape[1])
    for b, (blocks, had, added) in enumerate(zip(block_table.tolist(), cached.tolist(), new.tolist(), strict=True)):
        if added == 0:
            continue
        slots = paged_cache.sequence(cache, blocks, 0, had + added)
        q = query[b : b + 1, :, :added]
        if absorbed:
            mixed = _in_latent_space(q[0], slots, width, q_pe.shape[-1], scale)
            out[b : b + 1, :, :added] = leave(mixed[None], w_uv_GML)
            continue
        keys, values = expand(*(part[None] for part in read(slots, width, q_pe.shape[-1], q_pe.dtype)), w_uk_GNL, w_uv_GML)
        mask = None if had == 0 or added == 1 else paged_cache.causal(added, had + added, None)
        out[b : b + 1, :, :added] = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=had == 0, scale=scale, enable_gqa=q.shape[1] != groups
        )
    return out


def _in_latent_space(query_HTC: Tensor, slots: Tensor, width: int, rope: int, scale: float) -> Tensor:
    """Attention of one sequence's last T tokens to its slots, [H, T, L]: two plain products, since all heads share the latents."""
    heads, num_tokens = query_HTC.shape[:2]
    c, r = read(slots, width, rope, query_HTC.dtype)
    keys = slots if slots.dtype == query_HTC.dtype else torch.cat([c, r], -1)
    scores = torch.mm(query_HTC.flatten(0, 1), keys.t()).mul_(scale).to(torch.promote_types(query_HTC.dtype, torch.float32))
    if num_tokens > 1:
        scores.unflatten(0, (heads, -1)).masked_fill_(~paged_cache.causal(num_tokens, len(slots), None), float("-inf"))
    return torch.mm(torch.softmax(scores, -1).to(c.dtype), c).unflatten(0, (heads, -1))


def _cuda(q_nope, q_pe, latent, k_pe, kv_b, cache, block_table, cached, new, *, groups, scale, absorb_up_to=0):
    """The Triton kernel for an absorbed decode step; otherwise one fused call over gathered pages. Never waits for the device."""
    _begin(q_nope, q_pe, latent, k_pe, kv_b, cache, block_table, cached, new, groups)
    w_uk_GNL, w_uv_GML = split_kv_b(kv_b.to(q_pe.dtype), groups, q_nope.shape[-1])
    absorbed = q_pe.shape[2] <= absorb_up_to
    width = latent.shape[-1]
    if absorbed and kernels.decodes(q_pe):
        from ftc.kernels.latent_decode import latent_decode, supported

        if supported(q_pe, cache, width):
            return leave(latent_decode(absorb(q_nope, w_uk_GNL), q_pe, cache, block_table, cached, new, scale), w_uv_GML)
    c, r = read(paged_cache.gather(cache, block_table), width, k_pe.shape[-1], q_pe.dtype)
    if absorbed:
        query, keys = torch.cat([absorb(q_nope, w_uk_GNL), q_pe], -1), torch.cat([c, r], -1)[:, None]
        return leave(paged_cache.fused(query, keys, c[:, None], cached, new, scale, None), w_uv_GML)
    keys, values = expand(c, r, w_uk_GNL, w_uv_GML)
    return paged_cache.fused(torch.cat([q_nope, q_pe], -1), keys, values, cached, new, scale, None)


def _fake(q_nope, q_pe, latent, k_pe, kv_b, cache, block_table, cached, new, *, groups, scale, absorb_up_to=0):
    _check(q_nope, q_pe, latent, k_pe, kv_b, cache, block_table, cached, new, groups)
    return q_pe.new_empty(*q_pe.shape[:3], kv_b.shape[0] // groups - q_nope.shape[-1])


LIBRARY.impl("paged_latent_attention", reference, "CompositeExplicitAutograd")
LIBRARY.impl("paged_latent_attention", _cpu, "CPU")
LIBRARY.impl("paged_latent_attention", _cuda, "CUDA")
torch.library.register_fake("ftc::paged_latent_attention", _fake)
