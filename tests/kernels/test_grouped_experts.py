"""The kernels of a mixture of experts: in Triton's interpreter against the definition in float64, and compiled for an H100 without one.

The interpreter has to be chosen before triton is imported: the tests below the line run in a process of their own, which one test
outside starts. What only a device can show is `benchmarks/moe_gpu.py`.
"""

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

    def test_kernels_equal_the_definition_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-x", __file__]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert " passed" in done.stdout and "skipped" not in done.stdout

    def compiled(kernel, pointers, constants, tile):
        """`kernel` for compute capability 9.0 with `tile`; `pointers` names types, other arguments are sizes or int32 arrays."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        constants = {**{name: value for name, value in tile.options.items() if name in kernel.arg_names}, **constants}
        sizes = ("num_tiles", "num_experts", "num_slots", "D", "F", "depth", "width", "high", "wide", "num_parts", "programs", "share")
        names = kernel.arg_names
        kinds = {**dict.fromkeys(sizes, "i32"), "alpha": "fp32", "limit": "fp32", **pointers, **dict.fromkeys(constants, "constexpr")}
        signature = {name: kinds.get(name, "*i32") for name in names}
        by_place = {(names.index(name),): value for name, value in constants.items()}
        divisible = [name for name in names if signature[name].startswith("*") or (name in sizes[2:9] and name not in constants)]
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
        source = ASTSource(kernel, signature, by_place, aligned)
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    def spilled_bytes(kernel) -> int:
        """Bytes of stack a thread uses, which for these kernels are registers that did not fit."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        return int(re.search(r"STACK:(\d+)", usage)[1])

    def check(kernel, instruction: str, descriptors: bool, most_spilled: int = 0):
        text = kernel.asm["ptx"]
        assert kernel.metadata.shared <= SHARED_BYTES and f"wgmma.mma_async.sync.aligned.{instruction}" in text
        assert ("cp.async.bulk.tensor.2d" in text) == descriptors
        assert spilled_bytes(kernel) <= most_spilled

    @pytest.mark.parametrize(("name", "descriptors"), [("silu", True), ("clamped_swish", False)])
    def test_kernels_fit_an_h100_and_use_its_products(name, descriptors):
        """bfloat16 at the sizes of a training step: no spilled registers, but for a few in the kernel that holds three products."""
        from ftc.kernels import grouped_experts_backward as backward
        from ftc.kernels import grouped_experts_forward as forward
        from ftc.kernels.grouped_product import choose_tiles

        tiles = choose_tiles(torch.bfloat16, 65536, 64)
        shared = {"PRECISION": "tf32", "WIDEN": False, "GROUP": forward.GROUP}
        half = dict.fromkeys(["x", "grad", "a", "b", "bias_ptr", "h_ptr", "pre_grad_ptr", "y_ptr", "out_ptr"], "*bf16")
        pointers = {**half, **dict.fromkeys(["weight_ptr", "weight_part_ptr", "bias_part_ptr"], "*fp32")}
        matrix = lambda rows, columns: f"tensordesc<bf16[{rows}, {columns}]>" if descriptors else "*bf16"  # noqa: E731
        biased = name == "clamped_swish"
        experts = {**shared, "TMA": descriptors, "BIAS": biased}
        gated = {**experts, "NAME": name, "GATED": True, "ON_INPUT": False}

        tile = tiles.up
        check(compiled(forward.up_kernel, {**pointers, "w": matrix(tile.columns, tile.depth)}, gated, tile), "m64n128k16", descriptors)
        for tile, transposed in ((tiles.down, True), (tiles.tokens, False)):
            blocks = (tile.columns, tile.depth) if transposed else (tile.depth, tile.columns)
            types = {**pointers, "a": matrix(tile.rows, tile.depth), "w": matrix(*blocks)}
            check(compiled(forward.slots_kernel, types, {**experts, "TRANSPOSED": transposed}, tile), "m64n256k16", descriptors)
        tile = tiles.middle
        types = {**pointers, "w_up": matrix(tile.columns, tile.depth), "w_down": matrix(tile.depth, tile.columns)}
        wanted = {"WANT_H": True, "WANT_PRE": True, "WANT_WEIGHT": True, "WANT_BIAS": biased}
        check(compiled(backward.middle_backward_kernel, types, {**gated, **wanted}, tile), "m64n128k16", descriptors, most_spilled=128)
        for gather in (True, False):
            check(compiled(backward.matrices_kernel, pointers, {**shared, "GATHER_A": gather}, tiles.matrices), "m64n256k16", False)

    def test_the_small_kernels_compile_for_an_h100():
        """Those that order slots, sum them and find the gradients of weights and biases; sizes of 1 are constants to the compiler."""
        from ftc.kernels import expert_order as order
        from ftc.kernels import grouped_experts_backward as backward
        from ftc.kernels import grouped_experts_forward as forward
        from ftc.kernels.grouped_product import Tile

        tile = Tile(128, 64, 64, 4, 3)
        pointers = {**dict.fromkeys(["y_ptr", "grad", "bias_ptr", "a"], "*bf16"), **dict.fromkeys(["weight_ptr", "part_ptr"], "*fp32"), "index_ptr": "*i64"}
        reduced = {**pointers, "out_ptr": "*bf16"}
        for kernel, types, constants in (
            (order.count_kernel, pointers, {"SLOTS": order.SLOTS, "BLOCK_E": 256}),
            (order.count_kernel, pointers, {"SLOTS": order.SLOTS, "BLOCK_E": 2, "num_experts": 1, "num_slots": 1}),
            (order.rows_kernel, pointers, {"SLOTS": order.SLOTS}),
            (order.rows_kernel, pointers, {"SLOTS": order.SLOTS, "num_experts": 1, "num_slots": 1, "share": 1}),
            (order.tiles_kernel, pointers, {"ROWS": 128, "BLOCK_E": 256}),
            (order.tiles_kernel, pointers, {"ROWS": 128, "BLOCK_E": 2, "num_experts": 1, "programs": 1, "num_tiles": 1}),
            (forward.sum_kernel, reduced, {"K": 8, "WEIGHTED": True, "BLOCK": 1024}),
            (forward.sum_kernel, reduced, {"K": 1, "WEIGHTED": False, "BLOCK": 1, "num_experts": 1, "width": 1}),
            (backward.weights_kernel, reduced, {"BIAS": True, "BLOCK": 64}),
            (backward.weights_kernel, reduced, {"BIAS": False, "BLOCK": 64, "num_parts": 1, "num_experts": 1, "num_slots": 1}),
            (backward.bias_kernel, reduced, {"GATHER": True, "WEIGHTED": True, "ROWS": 16, "BLOCK": 128}),
            (backward.bias_kernel, {**reduced, "a": "*fp32"}, {"GATHER": False, "WEIGHTED": False, "ROWS": 16, "BLOCK": 128}),
        ):
            kernel = compiled(kernel, types, constants, tile)
            assert kernel.metadata.shared <= 4096 and spilled_bytes(kernel) == 0

else:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from ftc.dialect import moe
    from ftc.kernels import grouped_experts
    from ftc.kernels.expert_order import expert_order
    from ftc.kernels.grouped_product import Tile, Tiles, by_descriptor, choose_tiles

    SMALL = Tile(16, 16, 16, 4, 1)
    TILES = Tiles(SMALL, SMALL, SMALL, SMALL, SMALL)
    PIECES = Tile(16, 64, 16, 4, 1)  # the columns of the middle in two pieces
    WIDE = Tiles(SMALL, PIECES, PIECES, SMALL, Tile(32, 16, 16, 4, 1))
    # (forward, gradients) as a share of the largest value; 16 bits beside float64, where the interpreter truncates and devices round
    TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float16: (4e-3, 8e-3), torch.bfloat16: (3e-2, 6e-2)}
    CLAMP = [1.7, 0.6]

    def case(
        num_tokens=9, experts=4, share=2, width=32, inner=16, gated=True, biased=False, dropped=0.2, used=None, dtype=torch.float32, seed=0
    ):
        """The tensors of ftc::moe as [x, weights, gate_up, down, gate_up_bias, down_bias] and indices; only the first `used` experts get tokens."""
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        share = min(share, used or experts)
        indices = torch.stack([torch.randperm(used or experts, generator=generator)[:share] for _ in range(num_tokens)])
        indices[torch.rand(num_tokens, share, generator=generator) < dropped] = experts
        high = inner * (2 if gated else 1)
        tensors = [draw(num_tokens, width), draw(num_tokens, share), draw(experts, high, width) * width**-0.5, draw(experts, width, inner) * inner**-0.5]
        tensors += [draw(experts, high), draw(experts, width)] if biased else [None, None]
        return [None if tensor is None else tensor.to(dtype) for tensor in tensors], indices

    def options_of(activation, on_input=False):
        return {"activation": activation, "constants": CLAMP if activation == moe.CLAMPED else [], "weight_on_input": on_input}

    def doubled(tensors):
        return [None if tensor is None else tensor.double() for tensor in tensors]

    def error(got, expected) -> float:
        return ((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()

    def run_forward(tensors, indices, options, tiles=TILES):
        return grouped_experts.forward(tensors[0], indices, *tensors[1:], *options.values(), tiles)

    def run_backward(grad, tensors, indices, options, want=None, tiles=TILES):
        want = want or [tensor is not None for tensor in tensors]
        return grouped_experts.backward(grad, tensors[0], indices, *tensors[1:], *options.values(), want, tiles)

    def check_both(tensors, indices, options, tiles=TILES):
        """Forward and all gradients equal the definition's in float64 within TOLERANCE."""
        dtype = tensors[0].dtype
        got, wide = run_forward(tensors, indices, options, tiles), doubled(tensors)
        expected = moe.definition(wide[0], indices, *wide[1:], **options)
        grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        want = [tensor is not None for tensor in tensors]
        gradients = run_backward(grad, tensors, indices, options, want, tiles)
        expected_gradients = moe.gradients(grad.double(), wide, indices, options, want)
        assert got.dtype == dtype and error(got, expected) <= TOLERANCE[dtype][0]
        for tensor, found, right in zip(tensors, gradients, expected_gradients, strict=True):
            if tensor is None:
                assert found.numel() == 0
            else:
                assert found.shape == tensor.shape and found.dtype == tensor.dtype
                assert error(found, right) <= TOLERANCE[dtype][1]

    SIZES = st.fixed_dictionaries(
        {
            "num_tokens": st.sampled_from([1, 3, 11, 40]), "experts": st.integers(1, 4), "share": st.integers(1, 3),
            "width": st.sampled_from([5, 16, 33]), "inner": st.sampled_from([3, 16, 20]), "gated": st.booleans(), "biased": st.booleans(),
            "dropped": st.sampled_from([0.0, 0.3]), "seed": st.integers(0, 2**20),
        }
    )  # fmt: skip

    @settings(max_examples=12)
    @given(SIZES, st.booleans(), st.booleans())
    def test_drawn_sizes(sizes, clamped, on_input):
        tensors, indices = case(**sizes)
        check_both(tensors, indices, options_of(moe.CLAMPED if clamped and sizes["gated"] else "silu", on_input))

    @pytest.mark.parametrize(("activation", "gated"), [*((name, gated) for name in moe.GATES for gated in (True, False)), (moe.CLAMPED, True)])
    def test_every_activation(activation, gated):
        tensors, indices = case(num_tokens=5, experts=2, share=1, inner=12, width=16, gated=gated, biased=True)
        check_both(tensors, indices, options_of(activation))

    @pytest.mark.parametrize("on_input", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_sixteen_bits_by_descriptors(dtype, on_input):
        tensors, indices = case(num_tokens=20, width=48, inner=32, biased=True, dtype=dtype)
        tensors[1] = tensors[1].float()  # routers weigh in float32
        assert by_descriptor(tensors[2], SMALL) and by_descriptor(tensors[3], SMALL)
        check_both(tensors, indices, options_of("silu", on_input))

    def test_columns_in_pieces():
        tensors, indices = case(num_tokens=7, experts=2, inner=72, biased=True)
        check_both(tensors, indices, options_of(moe.CLAMPED), WIDE)

    def test_experts_without_tokens_get_no_gradient():
        tensors, indices = case(num_tokens=6, experts=5, used=2, biased=True)
        check_both(tensors, indices, options_of("silu"))
        gradients = run_backward(torch.ones_like(tensors[0]), tensors, indices, options_of("silu"))
        assert all(torch.equal(gradient[2:], torch.zeros_like(gradient[2:])) for gradient in gradients[2:])

    def test_all_slots_dropped():
        tensors, indices = case(num_tokens=3, dropped=2.0, biased=True)
        assert torch.equal(run_forward(tensors, indices, options_of("silu")), torch.zeros_like(tensors[0]))
        gradients = run_backward(torch.ones_like(tensors[0]), tensors, indices, options_of("silu"))
        assert all(torch.equal(gradient, torch.zeros_like(tensor)) for gradient, tensor in zip(gradients, tensors, strict=True))

    @pytest.mark.parametrize("shape", [{"num_tokens": 0}, {"share": 0}])
    def test_nothing_to_route(shape):
        tensors, indices = case(num_tokens=3)
        tokens, share = shape.get("num_tokens", 3), shape.get("share", 2)
        tensors[:2], indices = [tensors[0][:tokens], tensors[1][:tokens, :share]], indices[:tokens, :share]
        out = run_forward(tensors, indices, options_of("silu"))
        assert out.shape == tensors[0].shape and not out.any()
        for tensor, gradient in zip(tensors[:4], run_backward(out, tensors, indices, options_of("silu")), strict=False):
            assert gradient.shape == tensor.shape and not gradient.any()

    def test_only_wanted_gradients_are_computed_and_are_the_same():
        tensors, indices = case(num_tokens=5, biased=True, width=16)
        grad, options = torch.ones_like(tensors[0]), options_of("silu")
        whole = run_backward(grad, tensors, indices, options)
        for wanted in range(6):
            some = run_backward(grad, tensors, indices, options, [i == wanted for i in range(6)])
            assert torch.equal(some[wanted], whole[wanted])
            assert all(some[i].numel() == 0 for i in range(6) if i != wanted)

    def test_operands_that_are_not_contiguous():
        tensors, indices = case(num_tokens=5, biased=True, width=16)
        strided = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in tensors]
        assert not any(tensor.is_contiguous() for tensor in strided)
        grad, options = torch.ones_like(tensors[0]).T.contiguous().T, options_of("silu")
        other = indices.T.contiguous().T
        assert torch.equal(run_forward(strided, other, options), run_forward(tensors, indices, options))
        for found, right in zip(run_backward(grad, strided, other, options), run_backward(grad.contiguous(), tensors, indices, options), strict=True):
            assert torch.equal(found, right)

    @given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 4, 16]), st.integers(0, 2**20))
    def test_tiles_hold_each_kept_slot_once_and_one_expert_each(num_tokens, experts, share, rows, seed):
        _, indices = case(num_tokens, experts, share, width=1, inner=1, dropped=0.3, seed=seed)
        order = expert_order(indices, experts, rows)
        seen = []
        for tile in range(order.num_tiles):
            expert, first = int(order.expert_T[tile]), int(order.row_T[tile])
            if expert < experts:
                assert order.tile_bounds[expert] <= tile < order.tile_bounds[expert + 1]
                slots = order.slot_S[first : min(first + rows, int(order.bounds[expert + 1]))]
                assert len(slots) > 0 and (indices.flatten()[slots] == expert).all()
                seen += slots.tolist()
            else:
                assert expert == experts and tile >= order.tile_bounds[experts]
        assert sorted(seen) == torch.where(indices.flatten() < experts)[0].tolist()
        assert torch.equal(order.token_S, order.slot_S // indices.shape[1])

    @given(st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 2**20), st.integers(1, 512))
    def test_chosen_tiles_are_no_taller_than_experts_need(dtype, num_slots, experts):
        tiles = choose_tiles(dtype, num_slots, experts)
        assert 16 <= tiles.rows <= 128 and (tiles.rows == 16 or tiles.rows < 2 * max(1, num_slots / experts))

    def test_tiles_of_different_heights_are_refused():
        with pytest.raises(ValueError, match="one number of rows"):
            Tiles(SMALL, SMALL, SMALL, Tile(32, 16, 16, 4, 1), SMALL)

    def test_what_the_kernels_do_not_compute_is_declined():
        (x, weights, gate_up, down, *_), _ = case()
        assert grouped_experts.supported(x, gate_up, down, weights)
        assert grouped_experts.supported(x.bfloat16(), gate_up.bfloat16(), down.bfloat16(), weights)
        assert not grouped_experts.supported(x.double(), gate_up.double(), down.double(), weights)
        assert not grouped_experts.supported(x.bfloat16(), gate_up, down, weights)
