"""Gradients that are zero in real arithmetic: rounding may differ between two graphs, a value may not."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.rewrite.certificate import BOUNDS, _errors


def errors_of(found: torch.Tensor, truth: torch.Tensor, largest: float) -> float:
    """The gradient error of one weight beside another whose gradient is `largest` and right."""
    other = torch.full((3,), largest, dtype=torch.float64)
    return _errors([], [], {"q": found, "v": other.to(found.dtype)}, {"q": truth, "v": other})[1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), exponent=st.integers(-8, 8), dtype=st.sampled_from([torch.float32, torch.float64]), roundings=st.floats(0, 60))
def test_rounding_of_a_gradient_that_is_zero_is_no_error(seed, exponent, dtype, roundings):
    largest = 10.0**exponent
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(5, generator=generator, dtype=torch.float64) * 2 - 1
    truth = noise * 16 * torch.finfo(torch.float64).eps * largest
    found = (noise.flip(0) * roundings * torch.finfo(dtype).eps * largest).to(dtype)
    assert errors_of(found, truth, largest) <= BOUNDS[dtype]


@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(-8, 8), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_value_in_the_place_of_zero_and_zero_in_the_place_of_a_value_are_errors(exponent, dtype):
    largest = 10.0**exponent
    small = 1e3 * torch.finfo(dtype).eps * largest
    zero, value = torch.zeros(5, dtype=torch.float64), torch.full((5,), small, dtype=torch.float64)
    assert errors_of(value.to(dtype), zero, largest) > BOUNDS[dtype]
    assert errors_of(zero.to(dtype), value, largest) > BOUNDS[dtype]
