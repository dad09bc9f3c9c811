"""The compiled decode step of the CPU against the definitions: shapes, parts, pages, threads, and life without a compiler."""

import shutil
import subprocess
import warnings

import pytest
import torch
from helpers_paged import TOLERANCE, error
from hypothesis import given
from hypothesis import strategies as st

from ftc.dialect import fp8_latent, paged_attention, paged_latent_attention
from ftc.kernels import cpp_library, cpu_decode

compiled = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def caches(seed, batch, longest, block_size, *rows):
    """Ragged sequences in shuffled blocks of caches with the given row shapes; one sequence is padding, one has nothing cached."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    cached = torch.randint(0, longest + 1, (batch,), generator=generator, dtype=torch.int32)
    new = torch.ones_like(cached)
    if batch > 2:
        cached[0], new[1] = 0, 0
    blocks = longest // block_size + 1
    table = torch.randperm(batch * blocks, generator=generator).view(batch, blocks).to(torch.int32)
    return draw, [draw(batch * blocks, block_size, *row) for row in rows], table, cached, new


CASES = {
    "seed": st.integers(0, 2**20),
    "batch": st.integers(1, 4),
    "longest": st.sampled_from([3, 63, 64, 500, 1400]),
    "block_size": st.sampled_from([1, 16, 48, 256]),
}


@compiled
@given(
    **CASES,
    groups=st.integers(1, 3),
    share=st.sampled_from([1, 2, 3, 4, 5, 8, 17, 33]),
    width=st.sampled_from([8, 16, 20, 64]),
    value_width=st.sampled_from([5, 16, 48, 64]),
    window=st.sampled_from([None, 1, 100]),
    softcap=st.sampled_from([None, 1.5]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)
def test_keys_and_values_equal_the_definition(seed, batch, longest, block_size, groups, share, width, value_width, window, softcap, dtype):
    draw, pages, table, cached, new = caches(seed, batch, longest, block_size, (groups, width), (groups, value_width))
    query, key, value = draw(batch, groups * share, 1, width) * 2, draw(batch, groups, 1, width), draw(batch, groups, 1, value_width)
    query, key, value, *pages = (x.to(dtype) for x in (query, key, value, *pages))
    assert cpu_decode.supported(query, *pages)
    options = {"scale": width**-0.5, "window": window, "softcap": softcap}
    expected = paged_attention.reference(
        query.double(), key.double(), value.double(), *(p.double() for p in pages), table, cached, new, **options
    )
    result = torch.ops.ftc.paged_attention(query, key, value, *pages, table, cached, new, **options)
    assert result.dtype == dtype and error(result, expected) <= TOLERANCE[dtype]


@compiled
@given(
    **CASES,
    heads=st.sampled_from([1, 4, 6, 16, 32, 40]),
    width=st.sampled_from([6, 48, 192]),
    rope=st.sampled_from([2, 16]),
    form=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
)
def test_latents_equal_the_definition(seed, batch, longest, block_size, heads, width, rope, form):
    draw, (cache,), table, cached, new = caches(seed, batch, longest, block_size, (width + rope,))
    inputs = [draw(batch, heads, 1, 8), draw(batch, heads, 1, rope), draw(batch, 1, width), draw(batch, 1, rope), draw(heads * 12, width) / width]
    options = {"groups": heads, "scale": 0.3, "absorb_up_to": 1}
    cache = fp8_latent.pack(cache[..., :width], cache[..., width:]) if form == torch.uint8 else cache.to(form)
    inputs = [x.to(form) if form == torch.bfloat16 else x for x in inputs]
    assert cpu_decode.supported(inputs[1], cache)
    exact = cache.clone() if form == torch.uint8 else cache.double()
    expected = paged_latent_attention.reference(*(x.double() for x in inputs), exact, table, cached, new, **options)
    result = torch.ops.ftc.paged_latent_attention(*inputs, cache, table, cached, new, **options)
    # In bfloat16 the absorbed query and the mean of latents are rounded on their way through kv_b.
    assert result.dtype == inputs[1].dtype and error(result, expected) <= TOLERANCE[result.dtype]


@compiled
def test_threads_change_nothing_but_rounding(two_threads):
    _, (keys, values), table, cached, _ = caches(0, 3, 5000, 64, (4, 32), (4, 32))
    query, first, last = torch.randn(3, 8, 1, 32), torch.zeros(3, dtype=torch.int64), cached.long()
    both = cpu_decode.decode(query, keys, values, table, first, last, scale=0.2)
    torch.set_num_threads(1)
    assert error(both, cpu_decode.decode(query, keys, values, table, first, last, scale=0.2)) <= 1e-6


@compiled
def test_weights_far_apart_neither_overflow_nor_vanish():
    keys = torch.zeros(4, 64, 1, 16)
    keys.view(256, 16)[:, 0] = torch.linspace(-80, 80, 256)
    values = torch.randn(4, 64, 1, 16)
    query = torch.zeros(1, 1, 1, 16)
    query[..., 0] = 5.0
    table, first, last = torch.arange(4, dtype=torch.int32)[None], torch.tensor([0]), torch.tensor([256])
    expected = torch.softmax(keys.view(256, 16)[:, 0].double() * 5, 0) @ values.view(256, 16).double()
    assert error(cpu_decode.decode(query, keys, values, table, first, last, scale=1.0).flatten(), expected) <= 1e-5


def test_without_a_compiler_the_plain_path_gives_the_same(monkeypatch, tmp_path):
    draw, pages, table, cached, new = caches(1, 3, 100, 16, (2, 16), (2, 16))
    inputs = [draw(3, 4, 1, 16), draw(3, 2, 1, 16), draw(3, 2, 1, 16)]
    with_kernel = torch.ops.ftc.paged_attention(*inputs, *pages, table, cached, new, scale=0.25)
    cpu_decode.library.cache_clear()
    try:
        monkeypatch.setenv("FTC_CPU_KERNELS", "0")
        assert cpu_decode.library() is None and not cpu_decode.supported(inputs[0], *pages)
        assert error(torch.ops.ftc.paged_attention(*inputs, *pages, table, cached, new, scale=0.25), with_kernel) <= 1e-5
        cpu_decode.library.cache_clear()
        monkeypatch.delenv("FTC_CPU_KERNELS")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("CXX", shutil.which("false"))
        with pytest.warns(UserWarning, match="without the compiled kernel"):
            assert cpu_decode.library() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cpu_decode.library() is None  # said once
    finally:
        cpu_decode.library.cache_clear()


@compiled
def test_source_compiles_without_warnings_for_a_processor_without_wide_vectors(tmp_path):
    flags = [flag for flag in cpp_library.FLAGS if flag != "-march=native"]
    compiler = shutil.which("g++") or shutil.which("clang++")
    command = [compiler, *flags, "-Wall", "-Wextra", "-Wno-psabi", "-Werror", str(cpu_decode.SOURCE), "-o", str(tmp_path / "x.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@compiled
def test_every_e4m3_value_is_read_as_pytorch_reads_it():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes % 128 != 127]  # NaN
    cache = fp8_latent.pack(torch.ones(1, 1, 16), torch.zeros(1, 1, 2)).repeat(1, 16, 1)  # a block of 16 rows of latent 16 and rope 2
    cache[0, :, :16] = torch.nn.functional.pad(codes, (0, 2)).view(16, 16)
    latent, _ = fp8_latent.unpack(cache, 16, 2, torch.float32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    for row in range(16):
        first = torch.tensor([row])
        out = cpu_decode.decode(
            torch.zeros(1, 1, 1, 18), cache[:, :, None], cache[:, :, None], table, first, first + 1, scale=1.0, value_width=16
        )
        assert torch.equal(out.flatten(), latent[0, row])
