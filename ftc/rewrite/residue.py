"""What raise left over: a softmax, a mean of squares, a rotation, a gate or a mixture of experts outside the canonical operators, with its place in the source."""

from dataclasses import dataclass

from torch import fx

from ftc.rewrite.movement import sources
from ftc.rewrite.outcome import location, operation
from ftc.rewrite.probe import aten


@dataclass(frozen=True)
class Residue:
    """One leftover. `kind`: attention, norm, rope, mlp, moe; and two that are no fault of raise: router, scores that a topk selects from, and
    returned, attention probabilities that the region gives out beside its result."""

    kind: str
    op: str
    location: str


def only_returned(node: fx.Node) -> bool:
    """Whether nothing but the graph's output reads a node, directly or through casts, dropout and moves."""
    if node.op == "output":
        return True
    return bool(node.users) and all(
        user.op == "output" or (sources(user) is not None and only_returned(user)) for user in node.users
    )


def residue(graph: fx.Graph) -> list[Residue]:
    """Everything in a region graph that raise should have brought to canonical spelling and did not; the graph is not changed."""
    from ftc.passes import raise_attention, raise_mlp, raise_norm, raise_rope
    from ftc.rewrite.recognise import analyse
    from ftc.rewrite.recognise_attention import SOFTMAXES
    from ftc.rewrite.recognise_experts import chooses_experts

    analysis = analyse(graph)
    found: list[Residue] = []
    rotated = raise_rope.mixing(analysis, graph)
    for node in graph.nodes:
        if node.op != "call_function" or not analysis.active(node):
            continue
        kind = None
        if node.target in SOFTMAXES | {aten.log_softmax.int, aten._log_softmax.default}:
            kind = "router" if raise_attention.feeds_topk(node) else "returned" if only_returned(node) else "attention"
        elif node.target is aten.sigmoid.default and raise_attention.feeds_topk(node):
            kind = "router"
        elif raise_norm.is_reduced_root(analysis, node):
            kind = "norm"
        elif node in rotated:
            kind = "rope"
        elif raise_mlp.is_gate(analysis, node):
            kind = "mlp"
        elif chooses_experts(analysis, node):
            kind = "moe"
        if kind is not None:
            found.append(Residue(kind, operation(node), location(node)))
    return found
