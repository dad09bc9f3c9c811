"""fuse-gate-up: the two input products of a gated MLP as one.

    act(x Wg^T) * (x Wu^T) = gated(split(x [Wg; Wu]^T))
"""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

import ftc.dialect  # noqa: F401  registers ftc::gated
from ftc.rewrite.edit import fuse_linears, why_not_fusible
from ftc.rewrite.outcome import Match, Miss, Outcome, location, operation
from ftc.rewrite.passes import Pass

GATED = torch.ops.ftc.gated.default
LINEAR = torch.ops.aten.linear.default
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


def pattern(x: Tensor, w_gate: Tensor, w_up: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, [..., F] each, as two products; what `gated` takes."""
    return torch.nn.functional.linear(x, w_gate), torch.nn.functional.linear(x, w_up)


def replacement(x: Tensor, w_gate_up: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """The same as one product, [..., 2F], split."""
    return torch.nn.functional.linear(x, w_gate_up).split([features, w_gate_up.shape[0] - features], -1)


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
            part = next((node for node in (gate, up) if node.target is not LINEAR), None)
            reason = ("", None)
            if part is not None:
                reason = (f"{part.name} is {operation(part)}, not a linear product", part)
            elif gate is up:
                reason = ("gate and up are the same product", gate)
            elif len(gate.users) > 1 or len(up.users) > 1:
                reason = ("the products have other users", gate if len(gate.users) > 1 else up)
            else:
                reason = why_not_fusible([gate, up]) or reason
            if reason[0]:
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


def _source(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and node.target in _SPLITS:
        node = node.args[0]
    return node
