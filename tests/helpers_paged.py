"""Drawn caches for the tests of paged attention: ragged sequences in shuffled or consecutive blocks, garbage where nothing was written."""

import math

import torch
from hypothesis import strategies as st

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
