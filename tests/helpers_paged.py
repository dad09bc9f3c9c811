"""Drawn caches for the tests of paged attention: ragged sequences in shuffled or consecutive blocks, garbage where nothing was written."""

import math

import torch
from hypothesis import strategies as st

from ftc.dialect import fp8_latent

SIZES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "num_tokens": st.integers(1, 4),
        "block_size": st.sampled_from([1, 2, 4, 16]),
        "longest": st.integers(0, 40),
        "consecutive": st.booleans(),
        "seed": st.integers(0, 2**20),
    }
)


def table(generator, batch, num_tokens, block_size, longest, consecutive, ragged=True):
    """(block_table, cached, new, num_blocks): every sequence has blocks of its own, enough of them and sometimes more."""
    cached = torch.randint(0, longest + 1, (batch,), generator=generator, dtype=torch.int32)
    new = torch.randint(0, num_tokens + 1, (batch,), generator=generator, dtype=torch.int32)
    if not ragged:
        new.fill_(num_tokens)
    blocks = [max(1, math.ceil((c + n) / block_size)) for c, n in zip(cached.tolist(), new.tolist(), strict=True)]
    num_blocks = sum(blocks) + 3
    order = torch.arange(num_blocks) if consecutive else torch.randperm(num_blocks, generator=generator)
    block_table = torch.full((batch, max(blocks) + 1), -1, dtype=torch.int32)
    start = 1
    for b, count in enumerate(blocks):
        block_table[b, :count] = order[start : start + count]
        start += count
    return block_table, cached, new, num_blocks


def fill(cache, block_table, history):
    """Write history[b] [tokens, ...] into the first slots of each sequence; everything else becomes NaN where the dtype has it."""
    if cache.dtype.is_floating_point:
        cache.view(torch.uint8).fill_(0xFF)
    block_size = cache.shape[1]
    for b, tokens in enumerate(history):
        for position, token in enumerate(tokens):
            cache[int(block_table[b, position // block_size]), position % block_size] = token


def rows(cache, block_table, b, count):
    """The first `count` slots of sequence b, one after another."""
    block_size = cache.shape[1]
    return [cache[int(block_table[b, p // block_size]), p % block_size] for p in range(count)]


def error(result, expected):
    return ((result.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-3)).item()


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def key_value_case(seed, batch, num_tokens, block_size, longest, consecutive, groups, share, width, value_width, dtype, cache_dtype=None, ragged=True):
    """Inputs of the op by position, and the whole history of each sequence (old tokens, then the real new ones)."""
    generator = torch.Generator().manual_seed(seed)
    block_table, cached, new, num_blocks = table(generator, batch, num_tokens, block_size, longest, consecutive, ragged)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    query = draw(batch, groups * share, num_tokens, width)
    key, value = draw(batch, groups, num_tokens, width), draw(batch, groups, num_tokens, value_width)
    key_cache = torch.empty(num_blocks, block_size, groups, width, dtype=cache_dtype or dtype)
    value_cache = torch.empty(num_blocks, block_size, groups, value_width, dtype=cache_dtype or dtype)
    old = [(draw(int(c), groups, width), draw(int(c), groups, value_width)) for c in cached]
    if cache_dtype is None:
        fill(key_cache, block_table, [k for k, _ in old])
        fill(value_cache, block_table, [v for _, v in old])
    history = [
        (torch.cat([k, key[b, :, : new[b]].transpose(0, 1)]), torch.cat([v, value[b, :, : new[b]].transpose(0, 1)]))
        for b, (k, v) in enumerate(old)
    ]
    return [query, key, value, key_cache, value_cache, block_table, cached, new], history


def latent_case(seed, batch, num_tokens, block_size, longest, consecutive, groups, share, nope, rope, width, value_width, dtype, packed=False, ragged=True):
    """Inputs of the op by position, and the whole history of each sequence: its rows [latent | k_pe]."""
    generator = torch.Generator().manual_seed(seed)
    block_table, cached, new, num_blocks = table(generator, batch, num_tokens, block_size, longest, consecutive, ragged)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    q_nope, q_pe = draw(batch, groups * share, num_tokens, nope), draw(batch, groups * share, num_tokens, rope)
    latent, k_pe = draw(batch, num_tokens, width), draw(batch, num_tokens, rope)
    kv_b = draw(groups * (nope + value_width), width) * width**-0.5
    row = fp8_latent.row_bytes(width, rope) if packed else width + rope
    cache = torch.empty(num_blocks, block_size, row, dtype=torch.uint8 if packed else dtype)
    old = [(draw(int(c), width), draw(int(c), rope)) for c in cached]
    join = fp8_latent.pack if packed else lambda c, r: torch.cat([c, r], -1)
    fill(cache, block_table, [join(*pair) for pair in old])
    history = [torch.cat([join(*pair), join(latent[b, : new[b]], k_pe[b, : new[b]])]) for b, pair in enumerate(old)]
    return [q_nope, q_pe, latent, k_pe, kv_b, cache, block_table, cached, new], history
