"""raise-mlp: gated products are ftc.gated with the gate found by measurement; written-out activations are their operator."""

import pytest
import torch
import torch.nn.functional as F
from blocks import B, D, T, calls, copied, export, gelu_written_out, largest_error, silu_written_out
from ftc.passes.raise_mlp import GATED, RaiseMlp
from torch import nn

from ftc.rewrite.probe import aten
from ftc.rewrite.residue import residue


class Mlp(nn.Module):
    def __init__(self, spelling, fused: bool = False):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, 10), nn.Linear(D, 10), nn.Linear(10, D)
        self.both, self.fused, self.spelling = nn.Linear(D, 20), fused, spelling

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(self.spelling(gate, up))


SPELLINGS = [
    ("silu", lambda g, u: F.silu(g) * u),
    ("silu", lambda g, u: g * torch.sigmoid(g) * u),
    ("silu", lambda g, u: torch.sigmoid(g) * (u * g)),
    ("silu", lambda g, u: u * silu_written_out(g)),
    ("gelu", lambda g, u: F.gelu(g) * u),
    ("gelu", lambda g, u: 0.5 * g * (1 + torch.erf(g * 2**-0.5)) * u),
    ("gelu_tanh", lambda g, u: gelu_written_out(g) * u),
    ("relu", lambda g, u: F.relu(g) * u),
    ("relu2", lambda g, u: F.relu(g).square() * u),
    ("sigmoid", lambda g, u: torch.sigmoid(g) * u),
    ("identity", lambda g, u: g * u),
]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "spelling"), SPELLINGS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_gated_product_is_recognised(name, spelling, fused):
    graph = export(Mlp(spelling, fused), torch.randn(B, T, D))
    before = copied(graph)
    outcome = RaiseMlp().apply(graph)
    (call,) = calls(graph, GATED)
    assert call.args[2] == name and not outcome.misses and not residue(graph)
    assert largest_error(before, graph) <= 1e-12


def test_gate_and_up_in_each_others_place_stay_there():
    graph = export(Mlp(lambda g, u: g * F.silu(u)), torch.randn(B, T, D))
    before = copied(graph)
    RaiseMlp().apply(graph)
    (call,) = calls(graph, GATED)
    assert call.args[0].args[1].target.startswith("up") and call.args[1].args[1].target.startswith("gate")
    assert largest_error(before, graph) <= 1e-12


def test_a_written_out_gelu_is_one_operator():
    graph = export(Mlp(lambda g, u: gelu_written_out(g)), torch.randn(B, T, D))
    before = copied(graph)
    RaiseMlp().apply(graph)
    (call,) = calls(graph, aten.gelu.default)
    assert call.kwargs == {"approximate": "tanh"} and largest_error(before, graph) <= 1e-12


OTHERS = [
    lambda g, u: torch.sigmoid(1.702 * g) * g * u,
    lambda g, u: torch.tanh(g) * u,
    lambda g, u: torch.sigmoid(g) * u * (u + 1),
]


@pytest.mark.parametrize("spelling", OTHERS)
def test_other_gates_are_declined_and_named(spelling):
    graph = export(Mlp(spelling), torch.randn(B, T, D))
    before = copied(graph)
    outcome = RaiseMlp().apply(graph)
    assert not any(call.args[2] in ("silu", "gelu") for call in calls(graph, GATED))
    assert outcome.matches or (outcome.misses and [left.kind for left in residue(graph)] == ["mlp"])
    assert largest_error(before, graph) <= 1e-12


def test_a_clamp_that_random_inputs_do_not_reach_is_kept():
    graph = export(Mlp(lambda g, u: F.silu(g.clamp(max=1e6)) * u), torch.randn(B, T, D))
    RaiseMlp().apply(graph)
    assert calls(graph, aten.clamp.default) and calls(graph, GATED)


def test_a_gate_that_is_computed_twice_in_two_spellings_is_one_gate():
    class Twice(Mlp):
        def forward(self, x):
            flat = torch.addmm(self.gate.bias, x.reshape(-1, D), self.gate.weight.t())
            gate = flat.view(x.shape[0], x.shape[1], 10)
            return self.down(self.gate(x) * torch.sigmoid(gate) * self.up(x))

    graph = export(Twice(None), torch.randn(B, T, D))
    before = copied(graph)
    RaiseMlp().apply(graph)
    (call,) = calls(graph, GATED)
    assert call.args[2] == "silu" and len(calls(graph, aten.linear.default, aten.addmm.default)) == 3
    assert largest_error(before, graph) <= 1e-12
