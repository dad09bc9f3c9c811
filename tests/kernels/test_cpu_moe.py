"""The compiled mixture of experts of the CPU against the definition: sizes around its blocks, threads, crowded experts, few tokens."""

import shutil
import subprocess

import pytest
import torch
from helpers_moe import CASES, NAMES, TOLERANCE, assert_equal, draw, with_gradients
from hypothesis import given
from hypothesis import strategies as st

from ftc.dialect import moe
from ftc.kernels import cpp_library, cpu_moe

pytestmark = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
SIZE = dict(seed=0, tokens=50, experts=5, top_k=2, width=33, middle=17, activation="silu", gated=True, bias=True, dropped=True, weight_on_input=False)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def results(tensors, options, seed=0):
    """`forward` and `backward` of the kernel, as `with_gradients` names them."""
    assert cpu_moe.supported(*tensors)
    with torch.no_grad():
        out = cpu_moe.forward(*tensors, *options.values())
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
        want = [t is not None for t in (tensors[0], *tensors[2:])]
        found = cpu_moe.backward(grad, *tensors, *options.values(), want)
    return {"out": out, **{n: g for n, g, w in zip(NAMES[1:], found, want, strict=True) if w}}


@given(
    seed=st.integers(0, 2**20),
    tokens=st.sampled_from([11, 12, 13, 100]),
    width=st.sampled_from([15, 16, 31, 32, 33, 64, 100]),
    middle=st.sampled_from([15, 17, 32, 48, 65]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    weight_on_input=st.booleans(),
)
def test_sizes_around_the_blocks_of_its_products(dtype, **case):
    tensors, options = draw(**SIZE | case, dtype=dtype)
    assert_equal(results(tensors, options), with_gradients(moe.definition, tensors, options), TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [511, 512, 513, 1100])
def test_sums_longer_than_a_panel(tokens):
    """One expert with more rows, and a width of more columns, than one panel is deep."""
    tensors, options = draw(**SIZE | {"tokens": tokens, "experts": 1, "top_k": 1, "width": 520, "middle": 9})
    assert_equal(results(tensors, options), with_gradients(moe.definition, tensors, options), 1e-12)


@pytest.mark.parametrize("experts", [1, 2, 9])
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_threads_change_no_bit(two_threads, experts, weight_on_input):
    """Crowded experts are computed by all threads, the others one a thread; no sum depends on who makes it."""
    case = SIZE | {"tokens": 200, "experts": experts, "weight_on_input": weight_on_input}
    tensors, options = draw(**case, dtype=torch.float32)
    both = results(tensors, options)
    torch.set_num_threads(1)
    assert_equal(both, results(tensors, options), 0.0)
    assert_equal(both, with_gradients(moe.definition, tensors, options), 1e-5)


@given(**CASES, dtype=st.sampled_from(list(cpu_moe.KINDS)))
def test_few_tokens_equal_the_definition(dtype, **case):
    tensors, options = draw(**case, dtype=dtype)
    with torch.no_grad():
        got = cpu_moe.few(*tensors, *options.values())
        exact = [t if t is None or not t.is_floating_point() else t.double() for t in tensors]
        expected = moe.definition(*exact, **options)
    assert got.dtype == dtype
    assert_equal({"out": got.double()}, {"out": expected}, {torch.bfloat16: 1e-2}.get(dtype, TOLERANCE[dtype]))


def test_few_tokens_on_two_threads(two_threads):
    tensors, options = draw(**SIZE | {"tokens": 6, "width": 70, "middle": 80}, dtype=torch.float32)
    with torch.no_grad():
        both = cpu_moe.few(*tensors, *options.values())
        torch.set_num_threads(1)
        assert torch.equal(both, cpu_moe.few(*tensors, *options.values()))


@pytest.mark.parametrize("activation", cpu_moe.ACTIVATIONS)
def test_activations_at_their_ends(activation):
    """Middles from -200 to 200: no overflow, and the same value and slope as PyTorch's."""
    tensors, options = draw(**SIZE | {"activation": activation, "width": 16, "experts": 2, "bias": False, "dropped": False}, dtype=torch.float32)
    tensors = tuple(t if i != 0 else (t.detach() * 100).requires_grad_() for i, t in enumerate(tensors))
    assert_equal(results(tensors, options), with_gradients(moe.definition, tensors, options), 1e-5)


def test_what_it_does_not_compute():
    tensors, _ = draw(**SIZE, dtype=torch.float32)
    x, indices, weights, *experts = tensors
    assert cpu_moe.supported(*tensors) and cpu_moe.supported(x, indices, weights.bfloat16(), *experts)
    assert not cpu_moe.supported(x, indices, weights.double(), *experts)
    assert not cpu_moe.supported(x.double(), indices, weights, *experts)
    assert not cpu_moe.supported(*(t if t is indices else t.bfloat16() for t in tensors))
    assert not cpu_moe.supported(x, indices, weights, experts[0].double(), *experts[1:])
    assert not cpu_moe.few_supported(*tensors)  # 100 rows for 5 experts
    assert cpu_moe.few_supported(x[:7], indices[:7], weights[:7], *experts)


def test_turned_off_it_is_not_there(monkeypatch):
    tensors, options = draw(**SIZE, dtype=torch.float32)
    cpu_moe.library.cache_clear()
    try:
        monkeypatch.setenv("FTC_CPU_KERNELS", "0")
        assert cpu_moe.library() is None and not cpu_moe.supported(*tensors)
        assert_equal(with_gradients(torch.ops.ftc.fused_moe, tensors, options), with_gradients(moe.definition, tensors, options), 1e-5)
    finally:
        cpu_moe.library.cache_clear()


def test_source_compiles_without_warnings_for_a_processor_without_wide_vectors(tmp_path):
    flags = [flag for flag in cpp_library.FLAGS if flag not in ("-march=native", "-O3")]
    compiler = shutil.which("g++") or shutil.which("clang++")
    command = [compiler, *flags, "-O1", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", str(cpu_moe.SOURCE), "-o", str(tmp_path / "x.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_changed_header_is_compiled_anew(tmp_path):
    source, header = tmp_path / "a.cpp", tmp_path / "b.h"
    source.write_text('#include "b.h"\nextern "C" int number() { return NUMBER; }\n')
    built = []
    for number in (1, 2, 1):
        header.write_text(f"#define NUMBER {number}\n")
        built.append(cpp_library.build(source, shutil.which("g++") or shutil.which("clang++"), tmp_path / "cache"))
    assert built[0] == built[2] != built[1]
