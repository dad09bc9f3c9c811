"""raise-norm: RMSNorm and LayerNorm in any spelling become the ATen norms; what only resembles them stays."""

import pytest
import torch
from blocks import B, D, T, calls, copied, export, largest_error
from ftc.passes.raise_norm import RaiseNorm
from torch import nn

from ftc.rewrite import probe
from ftc.rewrite.probe import aten
from ftc.rewrite.residue import residue

RMS, LAYER = aten.rms_norm.default, aten.layer_norm.default


class Norm(nn.Module):
    def __init__(self, spelling, dtype=torch.float32):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, dtype=dtype)), nn.Parameter(torch.randn(D, dtype=dtype))
        self.spelling = spelling

    def forward(self, x):
        return x + self.spelling(x, self.weight, self.bias)


def mean_square(x):
    return x.pow(2).mean(-1, keepdim=True)


def usual(x, w, b):
    return w * (x * torch.rsqrt(mean_square(x) + 1e-5))


def one_plus(x, w, b):
    return x * torch.rsqrt(mean_square(x) + 1e-5) * (1 + w)


def divided(x, w, b):
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / D + 1e-5) * w


def power(x, w, b):
    return (x * w) * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5


def unweighted(x, w, b):
    return x * (mean_square(x) + 1e-5).sqrt().reciprocal()


def pinned(x, w, b):
    wide = x.float()
    return w * (wide * torch.rsqrt(mean_square(wide) + 1e-5)).to(x.dtype)


def pinned_later(x, w, b):
    wide = x.float()
    return (w.float() * (wide * torch.rsqrt(mean_square(wide) + 1e-5))).to(x.dtype)


def layer(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(mean_square(centred) + 1e-5) * w + b


def layer_by_variance(x, w, b):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * w + b


@pytest.mark.parametrize("spelling", [usual, one_plus, divided, power, unweighted], ids=lambda f: f.__name__)
def test_an_rms_norm_is_recognised(spelling):
    graph = export(Norm(spelling), torch.randn(B, T, D))
    before = copied(graph)
    outcome = RaiseNorm().apply(graph)
    (call,) = calls(graph, RMS)
    assert len(outcome.matches) == 1 and not outcome.misses and not residue(graph)
    assert call.args[1] == [D] and call.args[3] == pytest.approx(1e-5, rel=1e-9)
    assert (call.args[2] is None) == (spelling is unweighted)
    assert largest_error(before, graph) <= 1e-12 and largest_error(before, graph, lifted=False) <= 1e-5


@pytest.mark.parametrize("spelling", [layer, layer_by_variance], ids=lambda f: f.__name__)
def test_a_layer_norm_is_recognised(spelling):
    graph = export(Norm(spelling), torch.randn(B, T, D))
    before = copied(graph)
    RaiseNorm().apply(graph)
    (call,) = calls(graph, LAYER)
    assert call.args[2] is not None and call.args[3] is not None and not residue(graph)
    assert largest_error(before, graph) <= 1e-12


def test_casts_pinned_to_float32_stay_and_so_do_the_bits():
    graph = export(Norm(pinned, torch.bfloat16), torch.randn(B, T, D, dtype=torch.bfloat16))
    before = copied(graph)
    RaiseNorm().apply(graph)
    (call,) = calls(graph, RMS)
    assert call.meta["val"].dtype == torch.float32 and largest_error(before, graph) <= 1e-12
    assert call.args[2] is None, "the weight multiplies what was rounded to bfloat16 first"
    (old,), (new,) = (probe.run(g, *values(before), lifted=False) for g in (before, graph))
    assert old.dtype == new.dtype == torch.bfloat16 and torch.equal(old, new)


def test_a_weight_before_the_rounding_is_inside_the_norm():
    graph = export(Norm(pinned_later, torch.bfloat16), torch.randn(B, T, D, dtype=torch.bfloat16))
    before = copied(graph)
    RaiseNorm().apply(graph)
    (call,) = calls(graph, RMS)
    assert call.args[2] is not None and largest_error(before, graph) <= 1e-12


def values(graph):
    sizes = probe.symbol_sizes(graph)[0]
    return probe.random_inputs(graph, sizes, 5), probe.random_parameters(graph, 5)


def eps_outside(x, w, b):
    return x / (torch.sqrt(mean_square(x)) + 1e-5) * w


def clamped(x, w, b):
    return x * torch.rsqrt(mean_square(x).clamp(min=1e-5)) * w


def other_tensor(x, w, b):
    return x * torch.rsqrt(mean_square(x + 1.0) + 1e-5) * w


def detached(x, w, b):
    return x * torch.rsqrt(mean_square(x.detach()) + 1e-5) * w


def rounded(x, w, b):
    return (x * torch.rsqrt(mean_square(x) + 1e-5)).to(torch.float16).float() * w


@pytest.mark.parametrize("spelling", [eps_outside, clamped, other_tensor, detached], ids=lambda f: f.__name__)
def test_what_resembles_a_norm_is_declined_and_named(spelling):
    graph = export(Norm(spelling), torch.randn(B, T, D))
    before = copied(graph)
    outcome = RaiseNorm().apply(graph)
    assert not outcome.matches and outcome.misses and outcome.misses[0].reason
    assert not calls(graph, RMS, LAYER) and [left.kind for left in residue(graph)] == ["norm"]
    assert largest_error(before, graph) == 0.0


def test_a_rounding_inside_a_norm_is_kept():
    graph = export(Norm(rounded), torch.randn(B, T, D))
    RaiseNorm().apply(graph)
    assert [node for node in calls(graph, aten.to.dtype) if node.args[1] == torch.float16]
