"""Scales at their limits: zeros, the largest and smallest numbers, and numbers that are not finite, which are never silently lost."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import ftc.dialect  # noqa: F401
from ftc.float8.cast import to_float8, watching
from ftc.float8.linear import pack, unpack
from ftc.float8.recipes import RECIPES, Cast

CASTS = sorted({c for r in RECIPES.values() for c in (r.x, r.weight, r.grad, r.weight_for_dx)}, key=str)
few = settings(deadline=None, max_examples=40, phases=[Phase.explicit, Phase.generate])


@few
@given(cast=st.sampled_from(CASTS), seed=st.integers(0, 99), exponent=st.integers(-120, 120), rows=st.integers(1, 40), columns=st.integers(1, 40))
def test_a_cast_is_as_near_as_its_format_allows_at_every_magnitude(cast, seed, exponent, rows, columns):
    torch.manual_seed(seed)
    x = torch.randn(rows, columns) * 2.0**exponent
    scaled = to_float8(x, cast)
    assert bool(torch.isfinite(scaled.data.float()).all()) and bool(torch.isfinite(scaled.scale).all())
    largest = x.abs().max() if cast.over is None else x.abs().amax(cast.over, keepdim=True)
    half = 2.0**-4 if cast.dtype == torch.float8_e4m3fn else 2.0**-3  # half a step of 3 or 2 bits
    smallest = largest * 2.0**-14 if cast.dtype == torch.float8_e4m3fn else largest * 2.0**-28  # below, steps are of one size
    error = (scaled.float().double() - x.double()).abs()
    if float(largest.min()) > 1e-12:  # below the least amax there is one scale for all
        assert bool((error <= half * torch.maximum(x.abs(), smallest) * 1.001).all())


@pytest.mark.parametrize("recipe", [*RECIPES])
def test_zeros_give_zeros(recipe):
    x, w = torch.zeros(4, 32, requires_grad=True), torch.zeros(16, 32, requires_grad=True)
    out = torch.ops.ftc.float8_linear(x, w, None, recipe)
    out.backward(torch.zeros_like(out))
    assert not out.any() and not x.grad.any() and not w.grad.any()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
@pytest.mark.parametrize("recipe", [*RECIPES])
def test_what_is_not_finite_stays_so_and_is_recorded(recipe, value):
    x = torch.randn(4, 32)
    x[2, 5] = value
    x.requires_grad_()
    with watching() as events:
        out = torch.ops.ftc.float8_linear(x, torch.randn(16, 32), None, recipe)
    assert not bool(torch.isfinite(out[2]).any())
    if RECIPES[recipe].x.over == -1:
        assert bool(torch.isfinite(out[[0, 1, 3]]).all())
    assert [event.what for event in events] == ["x"] and events[0].shape == (4, 32) and "holds" in str(events[0])
    with watching() as gradients:
        out.backward(torch.ones_like(out))
    assert not bool(torch.isfinite(x.grad).all()) or not gradients


def test_nothing_is_recorded_outside_or_of_finite_numbers():
    x = torch.randn(4, 32)
    with watching() as events:
        torch.ops.ftc.float8_linear(x, torch.randn(16, 32))
    torch.ops.ftc.float8_linear(x * float("inf"), torch.randn(16, 32))
    assert not events


@few
@given(width=st.integers(1, 300), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_inputs_of_a_gate_come_back_within_half_a_step(width, seed, dtype):
    torch.manual_seed(seed)
    x = (torch.randn(2, 3, width) * 10.0 ** torch.randint(-3, 4, (2, 3, 1))).to(dtype)
    data, scale = pack(x)
    assert data.shape == (6, width) and scale.shape == (6, -(-width // 128)) and data.dtype == torch.float8_e4m3fn
    back = unpack(data, scale, x.shape, dtype)
    assert back.dtype == dtype and back.shape == x.shape
    tiles = torch.nn.functional.pad(x.float().reshape(6, -1), (0, -width % 128)).view(6, -1, 128).abs().amax(2)
    least = (tiles * 2.0**-14).repeat_interleave(128, 1)[:, :width].reshape(x.shape)
    assert bool(((back.float() - x.float()).abs() <= 0.07 * torch.maximum(x.float().abs(), least)).all())


def test_casts_are_data():
    assert Cast(torch.float8_e4m3fn) == RECIPES["tensorwise"].x and len(CASTS) == 5
