"""The Triton kernels compiled for an H100 without one: they build, keep within its shared memory and use its warpgroup products."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, which builds of torch for CUDA bring")

SHARED_BYTES = 227 * 1024  # what a program can have on compute capability 9.0
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float8_e4m3fn: "*fp8e4nv"}


def compiled(kernel, source_class, pointers, constants, divisible, num_warps, num_stages=2):
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    types = {name: pointers.get(name, "fp32" if name in ("qk_scale", "scale", "softcap") else "i32") for name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    by_place = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in [*pointers, *divisible]}
    source = source_class(kernel, signature, by_place, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": num_stages})


def latent_pointers(cache_dtype, direct):
    cache = TYPES[cache_dtype]
    pointers = {"q_ptr": "*bf16", "q_pe_ptr": "*bf16", "c_ptr": cache, "k_pe_ptr": "*bf16", "part_ptr": "*bf16" if direct else "*fp32"}
    return {**pointers, "lse_ptr": "*fp32", "table_ptr": "*i32", "cached_ptr": "*i32", "new_ptr": "*i32"}


LATENT = {"BLOCK_SIZE": 64, "L": 512, "E": 64, "num_tokens": 1}
STRIDES = ["rows", "table_stride"]


@pytest.mark.parametrize("direct", [True, False])
def test_hopper_latent_kernel_fits_and_shares_its_scores(direct):
    pytest.importorskip("triton.experimental.gluon")
    from triton.experimental.gluon._runtime import GluonASTSource

    from ftc.kernels import latent_decode_hopper as hopper

    constants = {**LATENT, "UNIT": 16, "DIRECT": direct, "ROWS": hopper.ROWS, "TOKENS": hopper.TOKENS}
    pointers = latent_pointers(torch.bfloat16, direct)
    kernel = compiled(hopper.latent_decode_hopper_kernel, GluonASTSource, pointers, constants, [*STRIDES, "block_stride"], hopper.NUM_WARPS)
    assert kernel.metadata.shared <= SHARED_BYTES
    text = kernel.asm["ptx"]
    # 36 products of depth 16 for the scores and 4 for the sums: half of the tokens and half of the columns to each warpgroup.
    assert text.count("wgmma.mma_async.sync.aligned.m64n32k16") == 36 and text.count("wgmma.mma_async.sync.aligned.m64n256k16") == 4
    assert "cp.async.cg.shared.global" in text and "st.local" not in text


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_some_latent_tile_fits(cache_dtype):
    from triton.compiler import ASTSource

    from ftc.kernels import latent_decode as plain

    packed = cache_dtype == torch.float8_e4m3fn
    units = {"C_UNIT": 16, "S_UNIT": 4, "K_UNIT": 8} if packed else {"C_UNIT": 16, "S_UNIT": 16, "K_UNIT": 16}
    tile = plain.tiles(128, 512, torch.bfloat16)[0]
    constants = {
        **LATENT, **units, "GROUP": 128, "PACKED": packed, "DIRECT": False, "BLOCK_L": 512, "BLOCK_E": 64, "BLOCK_R": tile.rows,
        "BLOCK_N": tile.tokens, "PRECISION": "tf32", "WIDEN": False,
    }  # fmt: skip
    pointers = {**latent_pointers(cache_dtype, False), "scale_ptr": "*fp32" if packed else "*bf16"}
    kernel = compiled(
        plain.latent_decode_kernel, ASTSource, pointers, constants, [*STRIDES, "c_block_stride"], tile.num_warps, tile.num_stages
    )
    assert kernel.metadata.shared <= SHARED_BYTES and "wgmma" in kernel.asm["ptx"]
