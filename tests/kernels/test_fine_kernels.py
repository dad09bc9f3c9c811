"""Kernels of fine-grained FP8: in Triton's interpreter against the plain PyTorch reference, and compiled for an H100 without one.

The interpreter has to be chosen before triton is imported: the tests below the line run in a process of their own, which one test outside starts.
It has no warpgroup products and no Gluon: what the Hopper kernel computes only a device can show, `benchmarks/fine_product.py --check`.
"""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton, which builds of torch for CUDA bring")

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
SHARED_BYTES = 227 * 1024  # what a program can have on compute capability 9.0

if not INSIDE:

    @pytest.mark.slow
    def test_kernels_equal_the_reference_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-x", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert " passed" in done.stdout and "skipped" not in done.stdout

    def compiled(kernel, source_class, types, constants, **options):
        """`kernel` for compute capability 9.0; `types` names those of pointers and descriptors, other arguments are 32-bit sizes."""
        from triton.backends.compiler import GPUTarget

        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        by_place = {(names.index(name),): value for name, value in constants.items()}
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name] == "i32" or signature[name].startswith("*")}
        return triton.compile(source_class(kernel, signature, by_place, aligned), target=GPUTarget("cuda", 90, 32), options=options)

    def tool(name: str, kernel, *arguments: str) -> str:
        """What NVIDIA's `name` says of a compiled kernel."""
        path = triton.knobs.nvidia.cuobjdump.path.replace("cuobjdump", name)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            return subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True).stdout

    def spilled_bytes(kernel) -> int:
        return int(re.search(r"STACK:(\d+)", tool("cuobjdump", kernel, "-res-usage"))[1])

    DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}

    def hopper_kernel(tile, by_block, dtype, grouped):
        pytest.importorskip("triton.experimental.gluon")
        from triton.experimental.gluon._runtime import GluonASTSource

        from ftc.float8.fine import BLOCK, VALUES
        from ftc.kernels import fine_product_hopper as hopper

        matrix = lambda name, dtype, rows, columns: f"tensordesc<{name}[{rows}, {columns}],{hopper.layout(dtype, rows, columns)!r}>"  # noqa: E731
        types = {
            "a": matrix("fp8e4nv", VALUES, hopper.ROWS, BLOCK), "b": matrix("fp8e4nv", VALUES, tile.columns, BLOCK),
            "out": matrix(DTYPES[dtype], dtype, hopper.ROWS, tile.columns), "a_scales": f"tensordesc<fp32[{hopper.ROWS}],{hopper.SCALES!r}>",
            "b_scales": f"tensordesc<fp32[{tile.columns}],{hopper.SCALES!r}>", "b_scale_ptr": "*fp32", "bias_ptr": "*bf16",
            **dict.fromkeys(["expert_ptr", "bound_ptr"], "*i32"),
        }  # fmt: skip
        constants = {
            "BY_BLOCK": by_block, "BIAS": by_block, "GROUPED": grouped, "BAND": tile.band, "STAGES": tile.fitting_stages(dtype.itemsize), "W": tile.groups,
            "BN": tile.columns, "BK": BLOCK, "REGISTERS": tile.registers, "STAGGERED": tile.staggered,
        }  # fmt: skip
        options = {"num_warps": 4, "maxnreg": tile.launched_registers}
        return compiled(hopper.fine_product_hopper_kernel, GluonASTSource, types, constants, **options)

    @pytest.mark.parametrize("staggered", [False, True])
    @pytest.mark.parametrize(("by_block", "dtype", "grouped"), [(True, torch.bfloat16, 1), (False, torch.float32, 2)])
    def test_the_hopper_kernel_fits_and_its_products_run_together(by_block, dtype, grouped, staggered):
        from ftc.kernels import fine_product_hopper as hopper

        tile = hopper.BY_BLOCK_TILE if by_block else hopper.BY_TILE_TILE
        tile = dataclasses.replace(tile, staggered=staggered)
        kernel = hopper_kernel(tile, by_block, dtype, grouped)
        assert kernel.metadata.shared <= SHARED_BYTES and spilled_bytes(kernel) == 0
        code = tool("nvdisasm", kernel, "-c")
        # Each group: four products of depth 32 in a row and one wait. Where ptxas finds a partial sum read too early it waits after each.
        assert len(re.findall(r"QGMMA\.64x128x32\.F32\.E4M3\.E4M3", code)) == 4 * tile.groups
        assert len(re.findall(r"WARPGROUP\.DEPBAR", code)) == tile.groups
        assert code.count("UTMALDG.2D") == tile.groups + 1 and code.count("UTMALDG.1D") == tile.groups + (not by_block)
        assert code.count("UTMASTG.2D") == tile.groups

    def test_tiles_that_cannot_be_are_refused():
        from ftc.kernels.fine_product_hopper import HopperTile

        with pytest.raises(ValueError, match="got 4 and 128"):
            HopperTile(4)
        with pytest.raises(ValueError, match="got 2 and 256"):
            HopperTile(2, 256)
        with pytest.raises(ValueError, match="room for 0 stages"):
            HopperTile(3, 128, programs=2).fitting_stages(4)

    def test_the_other_kernels_compile_for_an_h100():
        from triton.compiler import ASTSource

        from ftc.float8.fine import BLOCK
        from ftc.kernels import fine_product, fine_quantise

        tile = fine_product.TILE
        pointers = {"a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
        for by_block in (True, False):
            types = {**pointers, "a": f"tensordesc<fp8e4nv[{tile.rows}, 128]>", "b": f"tensordesc<fp8e4nv[{tile.columns}, 128]>"}
            constants = {"BY_BLOCK": by_block, "BIAS": True, "TMA": True, "WIDEN": False, "GROUP": 16, "BM": tile.rows, "BN": tile.columns, "BK": BLOCK}
            kernel = compiled(fine_product.fine_product_kernel, ASTSource, types, constants, num_warps=tile.num_warps, num_stages=tile.num_stages)
            assert kernel.metadata.shared <= SHARED_BYTES and spilled_bytes(kernel) == 0
            assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in kernel.asm["ptx"]
        values = {"x_ptr": "*bf16", "value_ptr": "*fp8e4nv", "turned_ptr": "*i32"} | dict.fromkeys(("x_scale_ptr", "scale_ptr", "turned_scale_ptr"), "*fp32")
        shared = {"WIDEN": False, "BLOCK": BLOCK}
        made = [compiled(fine_quantise.tiles_kernel, ASTSource, values, {**shared, "POWER": True, "ROWS": fine_quantise.ROWS}, num_warps=4)]
        for scaled, by_block, straight, turned in ((False, False, True, True), (True, False, False, True), (False, True, False, True)):
            types = {**values, "x_ptr": "*fp8e4nv" if scaled else "*bf16"}
            constants = {**shared, "POWER": False, "SCALED": scaled, "BY_BLOCK": by_block, "STRAIGHT": straight, "TURNED": turned}
            made.append(compiled(fine_quantise.square_kernel, ASTSource, types, constants, num_warps=8, maxnreg=fine_quantise.REGISTERS))
        for kernel in made:
            assert spilled_bytes(kernel) <= 192 and "cvt.rn.satfinite.e4m3x2.f32" in kernel.asm["ptx"]

else:
    from hypothesis import Phase, given, settings
    from hypothesis import strategies as st

    from ftc.float8 import fine
    from ftc.kernels import fine_product, fine_quantise
    from ftc.kernels.grouped_product import Tile

    SMALL = Tile(32, 64, 128, 4, 1)
    WIDE = Tile(16, 256, 128, 4, 1)  # columns of two blocks
    SIZES = st.sampled_from([1, 20, 128, 200])

    def draw(rows, columns, seed, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).mul(3).exp()
        return (x * (torch.rand(rows, columns, generator=generator) > 0.1)).to(dtype)

    def same(got, expected):
        """Equal numbers; the interpreter's rounding loses the sign of zeros."""
        return all(g.shape == e.shape and g.dtype == e.dtype and torch.equal(g.float(), e.float()) for g, e in zip(got, expected, strict=True))

    @settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
    @given(SIZES, SIZES, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**20))
    def test_quantising_gives_the_references_bits(rows, columns, power, dtype, seed):
        x = draw(rows, columns, seed, dtype)
        tiles, blocks = fine.quantise_tiles(x, power), fine.quantise_blocks(x, power)
        assert same(fine_quantise.tiles(x, power), tiles)
        assert same(fine_quantise.tiles_both(x, power), (*tiles, *fine.quantise_tiles(x.t(), power)))
        assert same(fine_quantise.turn_tiles(*tiles, columns, power), fine.turn_tiles(*tiles, columns, power))
        assert same(fine_quantise.blocks(x, False, power), blocks)
        assert same(fine_quantise.blocks(x, True, power), fine.turn_blocks(*blocks, columns))

    @settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
    @given(SIZES, SIZES, SIZES, st.booleans(), st.booleans(), st.sampled_from([SMALL, WIDE]), st.integers(0, 2**20))
    def test_products_are_the_references(rows, columns, depth, by_block, biased, tile, seed):
        a, b = draw(rows, depth, seed), draw(columns, depth, seed + 1)
        first, second = fine.quantise_tiles(a), (fine.quantise_blocks if by_block else fine.quantise_tiles)(b)
        bias = draw(1, columns, seed + 2)[0] if biased else None
        got, expected = fine_product.product(*first, *second, bias, tile=tile), fine.product(*first, *second, bias, torch.float64)
        size = a.abs().double() @ b.abs().double().t() + (0 if bias is None else bias.abs())
        assert got.dtype == torch.float32 and bool(((got - expected).abs() <= 1e-5 * size + 1e-30).all())
        torch.testing.assert_close(fine_product.product(*first, *second, bias, torch.float16, tile), got.half(), rtol=2e-3, atol=1e-7)

    def test_not_finite_numbers_stay_so():
        x = draw(40, 300, 0)
        x[3, 140], x[7, 1] = float("nan"), float("inf")
        expected = ~torch.isfinite(fine.quantise_tiles(x)[1])
        assert expected.sum() == 2
        for power in (False, True):
            for _, scales in (fine_quantise.tiles(x, power), fine_quantise.tiles_both(x, power)[:2]):
                assert torch.equal(~torch.isfinite(scales), expected)
            assert not bool(torch.isfinite(fine_quantise.blocks(x, False, power)[1][0, :2]).any())
            assert torch.equal(~torch.isfinite(fine_quantise.tiles_both(x, power)[3]), ~torch.isfinite(fine.quantise_tiles(x.t())[1]))

    @pytest.mark.parametrize("sizes", [(0, 5, 7), (5, 0, 7), (5, 7, 0)])
    def test_empty_operands(sizes):
        rows, columns, depth = sizes
        first, second = fine_quantise.tiles(torch.randn(rows, depth)), fine_quantise.blocks(torch.randn(columns, depth), False)
        bias = torch.randn(columns)
        got = fine_product.product(*first, *second, bias)
        assert torch.equal(got, bias.expand(rows, columns))
        assert fine_quantise.tiles_both(torch.randn(rows, depth))[2].shape == (depth, -(-rows // 128) * 128)

    def rows_product(a, a_scales, b, b_scales, expert_T, num_experts, bias, dtype):
        """By the reference; tiles without an expert hold NaN, so that whoever reads them is found out."""
        high, blocks = b.shape[0] // num_experts, b_scales.shape[0] // num_experts
        out = torch.full((a.shape[0], high), float("nan"), dtype=dtype)
        for tile, e in enumerate(expert_T.tolist()):
            if e < num_experts:
                span = slice(tile * 128, tile * 128 + 128)
                second = b[e * high : (e + 1) * high], b_scales[e * blocks : (e + 1) * blocks]
                out[span] = fine.product(a[span], a_scales[:, span], *second, None if bias is None else bias[e], dtype)
        return out

    def depth_product(a, a_scales, b, b_scales, bounds, num_experts, dtype):
        found = []
        for e in range(num_experts):
            first, last = bounds[e].item(), bounds[e + 1].item()
            columns = slice(first * 128, last * 128)
            found.append(fine.product(a[:, columns], a_scales[first:last], b[:, columns], b_scales[first:last], dtype=dtype))
        return torch.stack(found)

    @settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
    @given(
        st.sampled_from([(1, 1, 1), (9, 3, 2), (140, 2, 2), (40, 5, 1)]), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.4, 2.0]),
        st.integers(0, 2**20),
    )  # fmt: skip
    def test_all_experts_in_one_launch_is_expert_by_expert(sizes, gated, biased, on_input, dropped, seed):
        from ftc.dialect import float8_moe
        from ftc.kernels import fine_grouped

        (tokens, experts, share), generator = sizes, torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        indices = torch.stack([torch.randperm(experts, generator=generator)[:share] for _ in range(tokens)])
        indices[torch.rand(tokens, share, generator=generator) < dropped] = experts
        tensors = [normal(tokens, 128), normal(tokens, share), normal(experts, 256 if gated else 128, 128) * 0.1, normal(experts, 128, 128) * 0.1]
        tensors += [normal(experts, tensors[2].shape[1]), normal(experts, 128)] if biased else [None, None]
        products, options = fine_grouped.Products(rows_product, depth_product), ("silu", [], on_input)
        got = fine_grouped.forward(tensors[0], indices, *tensors[1:], *options, products)
        names = {"activation": "silu", "weight_on_input": on_input, "recipe": "fine"}
        expected = float8_moe.definition(tensors[0], indices, *tensors[1:], **names)
        grad, want = normal(tokens, 128), [t is not None for t in tensors]
        got += fine_grouped.backward(grad, *got[1:], indices, *tensors[1:], *options, want, products)
        expected += float8_moe.gradients(grad, *expected[1:], indices, *tensors[1:], *options, "fine", want)
        for g, e in zip(got, expected, strict=True):
            assert g.shape == e.shape and g.dtype == e.dtype
            # A number on the border between two FP8 values may fall to either side: a few, and by a step.
            assert (g.float() - e.float()).norm() <= 2e-3 * e.float().norm()

    def test_kernels_that_are_not_the_definition_are_refused(monkeypatch):
        from ftc.errors import FtcFailure
        from ftc.kernels import fine_grouped

        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this device")
        wrong = lambda a, s, b, t, bounds, *rest: depth_product(a, s, b, t, torch.cat([bounds[:1], bounds[:-1]]), *rest)  # noqa: E731
        monkeypatch.setattr(fine_grouped, "hopper_products", lambda: fine_grouped.Products(rows_product, wrong))
        with pytest.raises(FtcFailure, match=r"on this device: gate_up by [^,]*, down by [^,]* of the norm"):  # and by these only
            fine_grouped.prove.__wrapped__(torch.device("cpu"))
