"""The Triton kernels in Triton's interpreter, against the operators' definitions in float64.

The interpreter has to be chosen before triton is imported: the tests below the line run in a process of their own, which one test
outside starts. What only a device can show (compiled code, shared memory, speed) is `benchmarks/latent_decode.py --check`.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which builds of torch for CUDA bring")

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"

if not INSIDE:

    def test_kernels_equal_their_definitions_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-x", __file__]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert " passed" in done.stdout and "skipped" not in done.stdout

else:
    from helpers_paged import SIZES, TOLERANCE, error, key_value_case, latent_case
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from ftc.dialect import paged_attention, paged_cache, paged_latent_attention
    from ftc.kernels.latent_decode import Tile, latent_decode
    from ftc.kernels.latent_decode import supported as latent_supported
    from ftc.kernels.paged_decode import paged_decode
    from ftc.kernels.paged_decode import supported as paged_supported
    from ftc.kernels.paged_write import paged_write
    from ftc.kernels.splits import merge, num_splits

    DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])

    @given(SIZES, DTYPES, st.sampled_from([None, 1, 2, 5]), st.booleans(), st.integers(1, 40), st.sampled_from([12, 64, 132]), st.sampled_from([2, 16]))
    def test_latent_decode(sizes, dtype, splits, packed, heads, width, rope):
        """With W_UK and W_UV the identity the operator is the kernel's own function."""
        shapes = {"groups": 1, "share": heads, "nope": width, "rope": rope, "width": width, "value_width": width}
        inputs, _ = latent_case(**sizes, **shapes, dtype=dtype, packed=packed)
        q, q_pe, latent, k_pe, _, cache, table, cached, new = inputs
        assert latent_supported(q, cache, width)
        paged_latent_attention.write(latent, k_pe, cache, table, cached, new)
        result = latent_decode(q, q_pe, cache, table, cached, new, 0.1, tile=Tile(16, 16, 4, 1), splits=splits)
        eye = torch.eye(width, dtype=torch.float64).repeat(2, 1)
        wide = [x.double() for x in (q, q_pe, latent, k_pe)]
        expected = paged_latent_attention.reference(
            *wide, eye, cache if packed else cache.double(), table, cached, new, groups=1, scale=0.1
        )
        assert result.dtype == dtype and error(result, expected) <= TOLERANCE[dtype]

    @settings(max_examples=40)
    @given(
        SIZES, DTYPES, st.sampled_from([None, 1, 2, 5]), st.sampled_from([None, None, torch.int8, torch.float8_e4m3fn]),
        st.integers(1, 3), st.sampled_from([1, 3, 20]), st.sampled_from([8, 20]), st.sampled_from([4, 16]),
        st.sampled_from([None, 1, 19]), st.sampled_from([None, 2.0]),
    )  # fmt: skip
    def test_paged_decode(sizes, dtype, splits, cache_dtype, groups, share, width, value_width, window, softcap):
        shapes = {"groups": groups, "share": share, "width": width, "value_width": value_width}
        inputs, _ = key_value_case(**sizes, **shapes, dtype=dtype)
        query, key, value, *caches, table, cached, new = inputs
        paged_attention.write(key, value, *caches, table, cached, new)
        scales = [None, None]
        if cache_dtype is not None:
            caches, scales = map(list, zip(*(paged_cache.quantise(cache.nan_to_num(), cache_dtype) for cache in caches), strict=True))
        assert paged_supported(query, *caches)
        options = {"scale": 0.4, "window": window, "softcap": softcap}
        result = paged_decode(query, *caches, table, cached, new, *scales, block_n=16, splits=splits, **options)
        wide = [x.double() for x in (query, key, value)]
        if cache_dtype is None:
            expected = paged_attention.reference(*wide, *(c.double() for c in caches), table, cached, new, **options)
        else:  # the definition writes again what is there, and must find the same: read the dequantised values as a plain cache
            plain = [c.double() * s.double()[..., None] for c, s in zip(caches, scales, strict=True)]
            nothing = [x[:, :, :0] for x in wide]
            expected = _attend_only(wide[0], nothing, plain, table, cached, new, options)
        assert result.dtype == dtype and error(result, expected) <= TOLERANCE[dtype]

    def _attend_only(query, nothing, caches, table, cached, new, options):
        """The definition over caches that hold the new tokens already: each query as a call of its own that writes its stored key again."""
        out = torch.zeros(*query.shape[:3], caches[1].shape[3], dtype=query.dtype)
        block_size = caches[0].shape[1]
        for b in range(query.shape[0]):
            for t in range(int(new[b])):
                position = int(cached[b]) + t
                slot = (int(table[b, position // block_size]), position % block_size)
                key, value = (cache[slot][None, :, None] for cache in caches)
                one = (cached[b : b + 1] + t, torch.ones(1, dtype=torch.int32))
                out[b : b + 1, :, t : t + 1] = paged_attention.reference(
                    query[b : b + 1, :, t : t + 1], key, value, *(c.clone() for c in caches), table[b : b + 1], *one, **options
                )
        return out

    @given(SIZES, st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]), st.sampled_from([(), (3,), (2, 5), (2, 700)]))
    def test_paged_write_equals_the_plain_write(sizes, dtype, row):
        inputs, _ = key_value_case(**sizes, groups=1, share=1, width=4, value_width=4, dtype=torch.float32)
        cache_shape, (table, cached, new) = inputs[3].shape[:2], inputs[5:]
        generator = torch.Generator().manual_seed(sizes["seed"])
        tokens = torch.randn(sizes["batch"], sizes["num_tokens"], *(row or (1,)), generator=generator)
        # float32 tokens are converted to the cache's bfloat16; the interpreter truncates where devices round, so no bits are lost here
        tokens = tokens.bfloat16().float() if dtype == torch.bfloat16 else (tokens * 20).to(dtype)
        cache = torch.randn(*cache_shape, *(row or (1,)), generator=generator).to(dtype)
        plain = cache.clone()
        paged_cache.write(plain, tokens, table, cached, new)
        paged_write(cache, tokens, table, cached, new)
        assert torch.equal(cache.view(torch.uint8), plain.view(torch.uint8))

    @given(st.integers(0, 2**20), st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.sampled_from([1, 16, 130]))
    def test_merging_parts_equals_one_softmax(seed, batch, splits, rows, width):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(batch, splits, rows, 7, generator=generator) * 4
        values = torch.randn(batch, splits, 7, width, generator=generator)
        scores[torch.rand(batch, splits, rows, generator=generator) < 0.3] = float("-inf")  # parts that saw nothing
        part = torch.softmax(scores, -1).nan_to_num() @ values
        out = torch.empty(batch, rows, width)
        merge(part, torch.logsumexp(scores, -1) / torch.log(torch.tensor(2.0)), out)
        whole = scores.transpose(1, 2).flatten(2)
        expected = torch.softmax(whole.double(), -1).nan_to_num() @ values.double().flatten(1, 2)
        assert error(out, expected) <= 1e-5

    @given(st.integers(1, 4096), st.integers(1, 2**18), st.sampled_from([8, 108, 132, 264]))
    def test_splits_fill_the_device_and_keep_parts_long(programs, capacity, slots):
        splits = num_splits(programs, capacity, slots)
        assert 1 <= splits <= max(1, capacity // 128)
        whole = -(-programs // slots)  # waves without splitting
        assert -(-programs * splits // slots) / splits <= whole
        if programs * 2 <= slots and capacity >= 1024:
            assert splits > 1

    def test_what_the_kernels_do_not_compute_is_declined():
        q = torch.zeros(1, 2, 1, 16)
        assert not latent_supported(q.double(), torch.zeros(2, 4, 20), 16)
        assert not latent_supported(q, torch.zeros(2, 4, 16 + 4 + 6, dtype=torch.uint8), 16)  # rows of 26 bytes: scales are not aligned
        assert not paged_supported(q, torch.zeros(2, 4, 1, 16, dtype=torch.float64), torch.zeros(2, 4, 1, 16))
        assert not paged_supported(q, torch.zeros(2, 4, 1, 512), torch.zeros(2, 4, 1, 16))
