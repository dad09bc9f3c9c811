"""Inputs of `ftc::moe` and its results with gradients."""

import torch
from hypothesis import strategies as st

from ftc.dialect.moe import CLAMPED
from ftc.kernels.cpu_moe import ACTIVATIONS

# Of the largest number of the tensor; in bfloat16 every product rounds.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
NAMES = ("out", "x", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
CASES = {
    "seed": st.integers(0, 2**20),
    "tokens": st.sampled_from([0, 1, 2, 7, 40]),
    "experts": st.integers(1, 6),
    "top_k": st.integers(1, 3),
    "width": st.sampled_from([1, 8, 19, 40]),
    "middle": st.sampled_from([1, 6, 16, 37]),
    "activation": st.sampled_from(ACTIVATIONS),
    "gated": st.booleans(),
    "bias": st.booleans(),
    "dropped": st.booleans(),
    "weight_on_input": st.booleans(),
}


def draw(seed, tokens, experts, top_k, width, middle, activation, gated, bias, dropped, weight_on_input, dtype=torch.float64, weights_dtype=None):
    """(tensors, options) of a call of `ftc::moe`; with `dropped` some indices are E. Tokens choose among the first experts more often."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    gated = gated or activation == CLAMPED
    wide, top_k = 2 * middle if gated else middle, min(top_k, experts)
    scores = make(tokens, experts) - torch.arange(experts) / 2
    weights, indices = scores.softmax(-1).topk(top_k, -1)
    if dropped:
        indices = torch.where(torch.rand(indices.shape, generator=generator) < 0.3, experts, indices)
    tensors = [make(tokens, width), weights, make(experts, wide, width) / width**0.5, make(experts, width, middle) / middle**0.5]
    tensors += [make(experts, wide), make(experts, width)] if bias else [None, None]
    x, weights, *rest = (None if t is None else t.to(dtype).requires_grad_() for t in tensors)
    weights = weights.detach().to(weights_dtype or dtype).requires_grad_()
    constants = [1.7, 0.8] if activation == CLAMPED else []
    return (x, indices, weights, *rest), {"activation": activation, "constants": constants, "weight_on_input": weight_on_input}


def with_gradients(function, tensors, options, seed=0):
    """The result of `function` and the gradients of all that asks for one, by name."""
    out = function(*tensors, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    leaves = {n: t for n, t in zip(NAMES[1:], (tensors[0], *tensors[2:]), strict=True) if t is not None and t.requires_grad}
    return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, leaves.values(), upstream), strict=True))}


def assert_equal(got, expected, tolerance):
    assert set(got) == set(expected)
    for name, one in got.items():
        other = expected[name]
        assert one.dtype == other.dtype and one.shape == other.shape and one.isfinite().all(), name
        scale = max(other.abs().max().item(), 1e-2) if other.numel() else 1.0
        error = (one.double() - other.double()).abs().max().item() / scale if one.numel() else 0.0
        assert error <= tolerance, f"{name}: {error:.2e}"
