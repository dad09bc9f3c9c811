"""Calibrated rounding loses least where it says so: on the inputs that it was made for."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.quantize.calibrate import _moved
from ftc.quantize.formats import Format
from ftc.quantize.rounding import calibrated

NAMES = ["fp8-row", "fp8-block", "fp8-tensor", "int8-row", "int4-g32", "int4-g32-symmetric", "int4-g8"]


def problem(rows, columns, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) * torch.rand(columns, generator=generator, dtype=torch.float64) ** 2
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    return weight.to(dtype), x.mT @ x / len(x)


def lost(format, stored, weight, hessian):
    error = weight.double() - format.decode(stored, weight.shape[1], torch.float64 if weight.dtype == torch.float64 else weight.dtype).double()
    return float(((error @ hessian) * error).sum())


@settings(max_examples=12)
@given(name=st.sampled_from(NAMES), rows=st.integers(1, 20), columns=st.integers(2, 45), seed=st.integers(0, 99))
def test_results_change_less_than_by_rounding_to_nearest(name, rows, columns, seed):
    format = Format.named(name)
    weight, hessian = problem(rows, columns, seed)
    before = lost(format, format.nearest(weight), weight, hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    assert lost(format, calibrated(weight, hessian, format), weight, damped) <= lost(format, format.nearest(weight), weight, damped) * (1 + 1e-9)
    assert before >= 0


@settings(max_examples=8)
@given(seed=st.integers(0, 99), name=st.sampled_from(["int4-g32", "int4-g32-symmetric"]))
def test_int4_for_correlated_inputs_loses_at_most_half(seed, name):
    format = Format.named(name)
    weight, hessian = problem(16, 44, seed)  # a last group of 12
    assert lost(format, calibrated(weight, hessian, format), weight, hessian) <= 0.5 * lost(format, format.nearest(weight), weight, hessian)


@settings(max_examples=6)
@given(seed=st.integers(0, 99))
def test_no_single_code_could_be_better(seed):
    """Descent ends where no column has a better code: for the scales found, each of the 16 codes of each element is tried."""
    format = Format.named("int4-g8")
    weight, hessian = problem(2, 8, seed)
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    stored = calibrated(weight, hessian, format, turns=30)
    value = format.decode(stored, 8, torch.float64)
    zero = stored.zero.double()
    loss = lambda v: ((weight - v) @ hessian * (weight - v)).sum(1)  # noqa: E731
    for row, column, code in itertools.product(range(2), range(8), range(-8, 8)):
        tried = value.clone()
        tried[row, column] = (code - zero[row, 0]) * stored.scale[row, 0]
        assert float(loss(tried)[row]) >= float(loss(value)[row]) * (1 - 5e-2) - 1e-12


@settings(max_examples=6)
@given(seed=st.integers(0, 99))
def test_moved_weights_give_on_changed_inputs_what_the_old_gave(seed):
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(5, 12, generator=generator, dtype=torch.float64), torch.randn(400, 12, generator=generator, dtype=torch.float64)
    changed = x @ (torch.eye(12, dtype=torch.float64) + 0.2 * torch.randn(12, 12, generator=generator, dtype=torch.float64)) + 0.01
    moved = _moved(weight, x.mT @ changed / 400, changed.mT @ changed / 400)
    before, after = ((x @ weight.mT - changed @ w.mT).square().mean() for w in (weight, moved))
    assert float(after) < 0.05 * float(before)


def test_a_weight_is_left_as_it_is_and_its_dtype_counts():
    weight, hessian = problem(4, 40, 3, torch.bfloat16)
    kept = weight.clone()
    stored = calibrated(weight, hessian.float(), Format.named("int4-g32"))
    assert torch.equal(weight, kept) and stored.scale.dtype == torch.bfloat16
