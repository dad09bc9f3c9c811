"""fuse-gate-up: the two input products of a gated MLP as one.

    act(x Wg^T) * (x Wu^T) = gated(split(x [Wg; Wu]^T))
"""

import functools
import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.nn.functional import linear

import ftc.dialect  # noqa: F401  registers ftc::gated
from ftc.rewrite.edit import fuse_linears, why_not_fusible
from ftc.rewrite.matcher import Mismatch, Pattern
from ftc.rewrite.outcome import Match, Miss, Outcome, location
from ftc.rewrite.passes import Pass

GATED = torch.ops.ftc.gated.default
_ACTIVATIONS = {torch.ops.aten.gelu.default, torch.ops.aten.silu.default, torch.ops.aten.relu.default}
_SPLITS = {
    torch.ops.aten.split_with_sizes.default,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.chunk.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.narrow.default,
    torch.ops.aten.select.int,
    torch.ops.aten.unbind.int,
    operator.getitem,
}


def plain(x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str) -> Tensor:
    """What is matched: the middle [..., F] of a gated MLP from two products."""
    return torch.ops.ftc.gated(linear(x, w_gate), linear(x, w_up), activation)


def biased(x: Tensor, w_gate: Tensor, w_up: Tensor, b_gate: Tensor, b_up: Tensor, activation: str) -> Tensor:
    """The same with biases."""
    return torch.ops.ftc.gated(linear(x, w_gate, b_gate), linear(x, w_up, b_up), activation)


def replacement(x: Tensor, w_gate_up: Tensor, b_gate_up: Tensor | None, activation: str) -> Tensor:
    """What stands there after: one product [..., 2F], split."""
    gate, up = linear(x, w_gate_up, b_gate_up).chunk(2, -1)
    return torch.ops.ftc.gated(gate, up, activation)


@functools.cache
def patterns(activation: str) -> tuple[Pattern, Pattern]:
    """Both patterns for one activation, traced."""
    shapes = {"x": (2, 3, 8), "w_gate": (12, 8), "w_up": (12, 8)}
    return (
        Pattern(functools.partial(plain, activation=activation), shapes),
        Pattern(functools.partial(biased, activation=activation), shapes | {"b_gate": (12,), "b_up": (12,)}),
    )


@dataclass(frozen=True)
class FuseGateUp(Pass):
    """One product for gate and up. Lens: stack, rows of the gate first. Matches `ftc.gated` over two linears."""

    name: ClassVar[str] = "fuse-gate-up"
    summary: ClassVar[str] = "the gate and up products of a gated MLP become one product over stacked weights"
    contract: ClassVar[str] = "exact"
    inverse: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("raise-mlp",)

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome()
        for gated in [node for node in graph.nodes if node.target is GATED]:
            gate, up = gated.args[0], gated.args[1]
            if _source(gate) is _source(up) and gate is not up:
                outcome.already += 1
                continue
            try:
                _match(graph, gated)
            except Mismatch as part:
                outcome.misses.append(Miss(gated.name, part.reason, part.node.name, location(part.node)))
                continue
            reason = why_not_fusible([gate, up])
            if reason is not None:
                outcome.misses.append(Miss(gated.name, reason[0], reason[1].name, location(reason[1])))
                continue
            place = location(gate)
            parts, lenses = fuse_linears(graph, [gate, up], "gate_up")
            outcome.lenses += lenses
            outcome.matches.append(
                Match("gate-up", tuple(p.name for p in parts), {"activation": gated.args[2], "weight": lenses[0].target}, place)
            )
        if not outcome.matches and not outcome.already and not outcome.misses:
            outcome.misses += [
                Miss(n.name, "the activation's result is not multiplied by a second product: a plain MLP", n.name, location(n))
                for n in graph.nodes
                if n.op == "call_function" and n.target in _ACTIVATIONS
            ]
        return outcome


def _match(graph: fx.Graph, gated: fx.Node) -> None:
    """Raises the Mismatch that got furthest when neither pattern matches at `gated`."""
    parts = []
    for pattern in patterns(gated.args[2]):
        try:
            pattern.match_at(graph, gated)
            return
        except Mismatch as part:
            parts.append(part)
    raise max(parts, key=lambda part: part.depth)


def _source(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and node.target in _SPLITS:
        node = node.args[0]
    return node
