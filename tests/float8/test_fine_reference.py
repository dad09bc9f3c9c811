"""Fine-grained FP8 in plain PyTorch: what a tile holds, what a product is, and what does not fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftc.errors import FtcError
from ftc.float8 import fine

SIZES = st.sampled_from([1, 5, 127, 128, 129, 260])
MATRICES = st.fixed_dictionaries({"rows": SIZES, "columns": SIZES, "seed": st.integers(0, 2**20), "power": st.booleans()})


def draw(rows, columns, seed=0, **_):
    """Rows of magnitudes from 1e-6 to 1e6, with zeros among their numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 10 ** (12 * torch.rand(rows, 1, generator=generator) - 6)
    return x * (torch.rand(rows, columns, generator=generator) > 0.1)


def quantised(x, by_block, power=False):
    return (fine.quantise_blocks if by_block else fine.quantise_tiles)(x, power)


def same(got, expected):
    return all(torch.equal(g.float(), e.float()) and g.dtype == e.dtype for g, e in zip(got, expected, strict=True))


@given(MATRICES, st.booleans())
def test_every_number_is_within_half_a_step_of_its_tile(case, by_block):
    x = draw(**case)
    values, scales = quantised(x, by_block, case["power"])
    assert values.shape == (x.shape[0], -(-x.shape[1] // 128) * 128) and scales.dtype == torch.float32
    back = fine.dequantise(values, scales, x.shape[1])
    unit = fine.dequantise(torch.ones_like(values.float()).to(values.dtype), scales, x.shape[1])
    # 3 bits of mantissa, and steps of 2^-9 below 2^-6; 1e-6 for the scale itself
    assert bool(((back - x).abs() <= torch.maximum(x.abs() * 2**-4, unit * 2**-10) * (1 + 1e-5)).all())
    assert not values[:, x.shape[1] :].float().any()


@given(MATRICES, st.booleans())
def test_the_largest_number_of_a_tile_is_kept(case, by_block):
    x = draw(**case)
    back = fine.dequantise(*quantised(x, by_block), x.shape[1])
    largest = x.abs().max()
    torch.testing.assert_close(back.abs().max(), largest, rtol=1e-6, atol=0)


@given(MATRICES, st.booleans())
def test_quantising_twice_is_quantising_once(case, by_block):
    x = draw(**case)
    once = quantised(x, by_block, case["power"])
    twice = quantised(fine.dequantise(*once, x.shape[1]), by_block, case["power"])
    if case["power"]:
        torch.testing.assert_close(fine.dequantise(*twice, x.shape[1]), fine.dequantise(*once, x.shape[1]), rtol=0, atol=0)
    else:
        assert torch.equal(twice[0].float(), once[0].float())
        torch.testing.assert_close(twice[1], once[1], rtol=1e-6, atol=0)


@given(MATRICES, st.booleans())
def test_scales_are_powers_of_two_where_asked_and_no_smaller_than_needed(case, by_block):
    x = draw(**case)
    (_, free), (_, power) = quantised(x, by_block), quantised(x, by_block, True)
    assert bool((torch.frexp(power)[0] == 0.5).all())
    assert bool((power >= free).all()) and bool((power < 2 * free).all())


def test_a_scale_that_is_a_power_of_two_already_stays():
    for magnitude, scale in ((448.0, 1.0), (448.0 * 2**-3, 2**-3), (449.0 * 2**-3, 2**-2), (447.0, 1.0)):
        assert fine.quantise_tiles(torch.full((1, 128), magnitude), True)[1].item() == scale


@given(MATRICES)
def test_tiles_do_not_see_each_other(case):
    x = draw(**case)
    spoiled = x.clone()
    spoiled[0, 0] = 1e30
    before, after = fine.quantise_tiles(x), fine.quantise_tiles(spoiled)
    assert torch.equal(before[0].float()[:, 128:], after[0].float()[:, 128:]) and torch.equal(before[1][1:], after[1][1:])
    assert torch.equal(before[0].float()[1:], after[0].float()[1:]) and after[1][0, 0] > before[1][0, 0]


@given(MATRICES)
def test_turned_blocks_are_the_same_numbers(case):
    x = draw(**case)
    blocks = fine.quantise_blocks(x, case["power"])
    turned = fine.turn_blocks(*blocks, x.shape[1])
    assert torch.equal(fine.dequantise(*turned, x.shape[0]), fine.dequantise(*blocks, x.shape[1]).t())
    assert same(turned, fine.quantise_blocks(x.t(), case["power"]))


@given(MATRICES)
def test_tiles_turned_are_tiles_of_what_they_stand_for(case):
    x = draw(**case)
    tiles = fine.quantise_tiles(x, case["power"])
    assert same(fine.turn_tiles(*tiles, x.shape[1], case["power"]), fine.quantise_tiles(fine.dequantise(*tiles, x.shape[1]).t(), case["power"]))


@given(st.tuples(SIZES, SIZES, SIZES), st.booleans(), st.booleans(), st.integers(0, 2**20))
def test_a_product_is_that_of_the_numbers_its_operands_stand_for(sizes, by_block, biased, seed):
    rows, columns, depth = sizes
    a, b = fine.quantise_tiles(draw(rows, depth, seed)), quantised(draw(columns, depth, seed + 1), by_block)
    bias = torch.randn(columns) if biased else None
    # the scales' own products are float32 in dequantise, so the dense form is spelled in float64
    left = a[0].double() * a[1].double().t().repeat_interleave(128, 1)
    spread = b[1].repeat_interleave(128, 0)[:columns] if by_block else b[1].t()
    right = b[0].double() * spread.double().repeat_interleave(128, 1)
    expected = left @ right.t() + (0 if bias is None else bias.double())
    size = left.abs() @ right.abs().t() + (0 if bias is None else bias.abs().double())
    assert bool(((fine.product(*a, *b, bias, torch.float64) - expected).abs() <= 1e-12 * size).all())
    assert bool(((fine.product(*a, *b, bias).double() - expected).abs() <= 1e-5 * size).all())


def test_scales_of_another_block_are_noticed():
    a, b = fine.quantise_tiles(draw(40, 300)), fine.quantise_blocks(draw(200, 300, 1))
    right = fine.product(*a, *b)
    for wrong in (fine.product(a[0], a[1].flip(0), *b), fine.product(a[0], a[1].roll(1, 1), *b), fine.product(*a, b[0], b[1].flip(1)), fine.product(*a, b[0], b[1].flip(0))):
        assert (wrong - right).norm() > 0.01 * right.norm()


def test_zeros_give_zeros():
    a, b = fine.quantise_tiles(torch.zeros(3, 200)), fine.quantise_blocks(torch.zeros(5, 200))
    assert torch.equal(fine.product(*a, *b), torch.zeros(3, 5))
    assert bool(torch.isfinite(a[1].reciprocal()).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_every_result_that_reads_its_tile_and_no_other(bad):
    x, weight = draw(6, 300), draw(4, 300, 1)
    x[2, 130] = bad
    for power in (False, True):
        tiles = fine.quantise_tiles(x, power)
        out = fine.product(*tiles, *fine.quantise_blocks(weight))
        assert bool(out[2].isnan().all()) and bool(torch.isfinite(out[[0, 1, 3, 4, 5]]).all())
        with pytest.raises(FtcError, match="x holds infinities or NaN in 1 of 18"):
            fine.require_finite(tiles[1], "x")


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 3e38])
def test_magnitudes_at_the_ends_of_float32_stay_finite(magnitude):
    x = torch.full((2, 130), magnitude)
    back = fine.dequantise(*fine.quantise_tiles(x), 130)
    assert bool(torch.isfinite(back).all())
    assert magnitude < fine.SMALLEST or torch.allclose(back, x, rtol=1e-6)


def tensorwise(x):
    """x in e4m3 with one scale, and back."""
    scale = x.abs().max() / fine.LARGEST
    return (x / scale).to(fine.VALUES).float() * scale


@pytest.mark.parametrize(("outliers", "most"), [("none", 1.0), ("channels", 0.8), ("one", 0.4)])
def test_the_error_of_a_product_is_less_than_with_one_scale(outliers, most):
    """Ratios of errors to float32, median of 9 draws; for one number of 1e5 of median magnitudes, as its own error outweighs all others in a norm."""
    ratios = []
    for seed in range(9):
        generator = torch.Generator().manual_seed(seed)
        x, weight = torch.randn(256, 512, generator=generator), torch.randn(256, 512, generator=generator)
        if outliers == "channels":
            x[:, torch.randperm(512, generator=generator)[:4]] *= 30
        elif outliers == "one":
            x[seed, 7 * seed] = 1e5
        exact = x @ weight.t()
        got = fine.product(*fine.quantise_tiles(x), *fine.quantise_blocks(weight)) - exact
        other = tensorwise(x) @ tensorwise(weight).t() - exact
        size = (lambda error: error.abs().median()) if outliers == "one" else torch.linalg.vector_norm
        ratios.append((size(got) / size(other)).item())
    assert sorted(ratios)[4] <= most


def test_operands_that_do_not_fit_are_named():
    a, b = fine.quantise_tiles(torch.randn(3, 200)), fine.quantise_blocks(torch.randn(300, 200))
    with pytest.raises(ValueError, match=r"\[3, 256\].*\[300, 384\]"):
        fine.product(*a, *fine.quantise_blocks(torch.randn(300, 300)))
    with pytest.raises(ValueError, match=r"need scales \[1, 2\] \(blocks\) or \[2, 3\] \(tiles\); got \[3, 2\]"):
        fine.product(a[0], a[1].t(), *b)
    with pytest.raises(ValueError, match="by tiles"):
        fine.product(*b, *b)
    with pytest.raises(ValueError, match=r"bias of a fine product is \[300\], got \[3\]"):
        fine.product(*a, *b, torch.randn(3))
    with pytest.raises(ValueError, match="matrix of floats"):
        fine.quantise_tiles(torch.ones(3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="float32"):
        fine.product(a[0].float(), a[1], *b)
