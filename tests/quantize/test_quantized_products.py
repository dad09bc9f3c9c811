"""The operators: fast paths against the definition, experts and embeddings against dequantised ones, gradients straight through."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ftc.dialect  # noqa: F401
from ftc.dialect.quantized_linear import linear, rounded_rows
from ftc.kernels import cpu_quantized
from ftc.quantize.formats import Format, Quantised

WEIGHTS = ["fp8-row", "fp8-tensor", "fp8-block", "int8-row", "int8-g16", "int8-g16-zero", "int4-g32", "int4-g6-symmetric"]
EXPERTS = ["fp8-row", "int8-row", "int4-g8", "fp8-row-dynamic"]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(format, weight, x, bias=None, scale=None):
    stored = format.nearest(weight)
    return (x, stored.data, stored.scale, stored.zero, bias, scale, format.dtype, format.block(weight.shape), weight.shape[1], format.activations)


@given(
    name=st.sampled_from(WEIGHTS), rows=st.integers(1, 18), outs=st.integers(1, 140), columns=st.integers(1, 150), bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_product_is_its_definition(name, rows, outs, columns, bias, dtype, seed):
    format, weight, x = Format.named(name), normal(outs, columns, seed=seed, dtype=dtype), normal(2, rows, columns, seed=seed + 1, dtype=dtype)[:1]
    given_bias = normal(outs, seed=seed + 2, dtype=dtype) if bias else None
    with torch.no_grad():
        made = torch.ops.ftc.quantized_linear(*arguments(format, weight, x, given_bias))
        wide = arguments(format, weight, x, given_bias)
        exact = linear(x.double(), *wide[1:4], None if given_bias is None else given_bias.double(), *wide[5:])
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert made.dtype == dtype and float((made.double() - exact).abs().max()) <= bound * max(float(exact.abs().max()), 1e-3)


@pytest.mark.skipif(cpu_quantized.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["fp8-row", "int8-row", "int4-g32", "int8-g16"])
def test_a_decode_step_reads_the_codes_in_place(name):
    format, weight = Format.named(name), normal(32, 64)
    _, *rest = arguments(format, weight, normal(1, 64))
    few, many = (cpu_quantized.supported(normal(n, 64), *rest[:3], format.dtype, rest[6], "none") for n in (1, 200))
    assert few and not many


@pytest.mark.parametrize("name", ["fp8-row-dynamic", "fp8-tensor-dynamic", "fp8-block-dynamic", "fp8-row-static", "fp8-block-static", "fp8-row", "int8-row", "int4-g32"])
def test_gradients_go_straight_through_to_x_and_bias(name):
    format, weight = Format.named(name), normal(32, 48)
    x, bias, scale = normal(3, 48, seed=1).requires_grad_(), normal(32, seed=2).requires_grad_(), torch.tensor([0.01])
    args = arguments(format, weight, x, bias, scale if format.activations == "static" else None)
    out = torch.ops.ftc.quantized_linear(*args)
    grad = normal(3, 32, seed=3)
    found = torch.autograd.grad(out, (x, bias), grad)
    dense = format.weights_only().decode(Quantised(*args[1:4]), 48, torch.float32)
    assert torch.allclose(found[0], grad @ dense, atol=1e-5) and torch.allclose(found[1], grad.sum(0), atol=1e-6)
    rounded = x if format.activations == "none" else rounded_rows(x.detach(), args[7], args[5])
    assert torch.allclose(out, rounded @ dense.mT + bias, atol=2e-4)


def test_a_static_scale_saturates_and_says_nothing_else():
    weight, x = torch.eye(16), torch.full((1, 16), 100.0)
    made = torch.ops.ftc.quantized_linear(*arguments(Format.named("fp8-row-static"), weight, x, None, torch.tensor([0.1])))
    assert torch.allclose(made, torch.full((1, 16), 44.8), rtol=1e-2)


def test_weights_that_were_cast_away_are_an_error():
    args = list(arguments(Format.named("fp8-row"), normal(16, 16), normal(2, 16)))
    args[1] = args[1].to(torch.bfloat16)
    with pytest.raises(ValueError, match="quantise again"):
        torch.ops.ftc.quantized_linear(*args)


def test_an_input_of_another_width_is_an_error():
    with pytest.raises(ValueError, match="16 columns"):
        torch.ops.ftc.quantized_linear(*arguments(Format.named("int8-row"), normal(16, 16), normal(2, 15)))


@settings(max_examples=10)
@given(name=st.sampled_from(["fp8-row", "int8-row", "int4-g8", "fp8-block", "int8-tensor"]), seed=st.integers(0, 99), columns=st.integers(2, 21))
def test_rows_of_a_quantised_table_are_rows_of_the_dequantised(name, seed, columns):
    format, table = Format.named(name), normal(11, columns, seed=seed)
    stored, ids = format.nearest(table), torch.randint(0, 11, (2, 3), generator=torch.Generator().manual_seed(seed))
    made = torch.ops.ftc.quantized_embedding(ids, stored.data, stored.scale, stored.zero, format.dtype, format.block(table.shape), columns, torch.float32)
    assert torch.equal(made, format.decode(stored, columns, torch.float32)[ids])


@settings(max_examples=10)
@given(name=st.sampled_from(EXPERTS), seed=st.integers(0, 99), gated=st.booleans(), bias=st.booleans(), on_input=st.booleans())
def test_experts_are_dequantised_experts_and_so_are_their_gradients(name, seed, gated, bias, on_input):
    format, (n, d, e, f) = Format.named(name), (5, 16, 3, 16)
    gate_up, down = normal(e, 2 * f if gated else f, d, seed=seed), normal(e, d, f, seed=seed + 1)
    x, weights = normal(n, d, seed=seed + 2).requires_grad_(), normal(n, 2, seed=seed + 3).sigmoid().requires_grad_()
    indices = torch.stack([torch.randperm(e + 1, generator=torch.Generator().manual_seed(seed + i))[:2] for i in range(n)])  # e stands for none
    biases = (normal(e, gate_up.shape[1], seed=seed + 4), normal(e, d, seed=seed + 5)) if bias else (None, None)
    stored = [format.nearest(m) for m in (gate_up, down)]
    options = {"activation": "silu", "constants": [], "weight_on_input": on_input}
    made = torch.ops.ftc.quantized_moe(
        x, indices, weights, stored[0].data, stored[0].scale, stored[0].zero, stored[1].data, stored[1].scale, stored[1].zero, *biases, format.dtype,
        format.block(gate_up.shape), format.block(down.shape), f, format.activations, **options,
    )  # fmt: skip
    dense = [format.weights_only().decode(s, m.shape[-1], torch.float32) for s, m in zip(stored, (gate_up, down), strict=True)]
    expected = torch.ops.ftc.moe(x, indices, weights, *dense, *biases, **options)
    exact = format.activations == "none"
    assert torch.allclose(made, expected, atol=1e-5 if exact else 0.15 * float(expected.detach().abs().max()))
    if exact:
        grad = normal(n, d, seed=seed + 6)
        for a, b in zip(torch.autograd.grad(made, (x, weights), grad), torch.autograd.grad(expected, (x, weights), grad), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


INTERPRETED = """
import torch
from ftc.kernels import skinny_fp8 as S
for rows, outs, columns, plan in [(1, 64, 512, (64, 1)), (3, 128, 1024, (64, 4)), (20, 96, 300, (64, 1)), (5, 70, 520, (64, 2))]:
    torch.manual_seed(rows)
    x, w = (torch.randn(n, columns).to(torch.float8_e4m3fn) for n in (rows, outs))
    by_row, scale, bias = torch.rand(rows, 1), torch.rand(outs, 1), torch.randn(outs)
    S.tuned[outs, columns, max(16, S.triton.next_power_of_2(rows))] = plan
    exact = (x.float() @ w.float().T) * by_row * scale.T
    for by, added in ((by_row, None), (by_row, bias), (by_row[:1], bias)):
        wanted = exact / by_row * by + (0 if added is None else added)
        for _ in range(2):  # the counters are left at zero
            assert float((S.product(x, by, w, scale, added, torch.float32) - wanted).abs().max()) < 1e-5 * float(exact.abs().max())
print("as defined")
"""


@pytest.mark.slow
def test_the_skinny_kernel_is_its_definition():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("as defined"), done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(("padded", "split", "even"), [(16, 4, True), (64, 1, True), (64, 8, False)])
def test_the_skinny_kernel_builds_for_hopper_within_its_shared_memory(padded, split, even):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ftc.kernels import skinny_fp8

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    names = skinny_fp8._skinny.arg_names
    constants = {"HAS_BIAS": True, "BLOCK_M": padded, "BLOCK_F": 64, "BLOCK_K": 256, "SPLIT": split, "EVEN": even}
    types = {"w_ptr": "*fp8e4nv", "x_ptr": "*fp8e4nv", "sw_ptr": "*fp32", "sx_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16", "part_ptr": "*fp32", "count_ptr": "*i32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in [*types, "F", "K"]}
    source = ASTSource(skinny_fp8._skinny, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 4 if padded <= 32 else 3})
    assert kernel.metadata.shared <= 227 * 1024
    assert "wgmma" in kernel.asm["ptx"] or "mma.sync" in kernel.asm["ptx"]
