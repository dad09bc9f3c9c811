"""tensor-parallel: attention heads, MLP features and the vocabulary divided over ranks (Shoeybi et al. 2019, Megatron-LM).

    [q k v] = f(x) [Wq Wk Wv]_r^T,  y = g(attention(q, k, v) Wo_r^T) + bo        rank r has its heads
    y = g(act(f(x) Wg_r^T) * (f(x) Wu_r^T) Wd_r^T) + bd                          rank r has its features

f is the identity whose gradient is summed over the ranks, g the sum whose gradient passes (`ftc.copy_to_ranks`, `ftc.reduce_from_ranks`). Weights follow
by `shard` lenses. The graph names the axis and its degree, no rank and no group: all ranks share it.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from ftc.dialect.ranks import standing_at
from ftc.errors import FtcError
from ftc.rewrite import vocabulary_parallel
from ftc.rewrite.divide import Divider
from ftc.rewrite.lockstep import already_on, check_axis
from ftc.rewrite.outcome import Declined, Match, Miss, Outcome, location
from ftc.rewrite.passes import Pass
from ftc.rewrite.regroup import Indivisible
from ftc.rewrite.sharding import ATTENTION
from ftc.rewrite.tensor_site import Site, StackedHeads, plan, seeds_of

aten = torch.ops.aten
_GATED = torch.ops.ftc.gated.default
_ACTIVATIONS = {aten.gelu.default, aten.silu.default, aten.relu.default, aten.mish.default, aten.hardswish.default}


@dataclass(frozen=True)
class TensorParallel(Pass):
    """Each rank gets its heads, features and ids. What ranks hold alike stays whole: norms, biases of sums, what is not recognised."""

    degree: int = field(metadata={"help": "number of ranks"})
    axis: str = field(default="tensor", metadata={"help": "name by which the program is bound to a group of ranks"})
    strict: bool = field(default=False, metadata={"help": "a size that the degree does not divide is an error, not a miss"})
    vocabulary: bool = field(default=True, metadata={"help": "divide embedding, head and loss as well"})

    name: ClassVar[str] = "tensor-parallel"
    summary: ClassVar[str] = "attention heads, MLP features and the vocabulary are divided over ranks"
    contract: ClassVar[str] = "exact"
    inverse: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("raise-norm", "raise-rope", "raise-attention", "raise-mlp")

    def __post_init__(self):
        check_axis(self.degree, self.axis)

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome(already=already_on(graph, self.axis, self.degree))
        if outcome.already:
            return outcome
        divider = Divider(graph, self.axis, self.degree)
        with standing_at({}):
            self._blocks(graph, divider, outcome)
            if self.vocabulary:
                self._vocabularies(graph, divider, outcome)
        outcome.lenses += divider.lenses
        return outcome

    def _blocks(self, graph: fx.Graph, divider: Divider, outcome: Outcome) -> None:
        done: set[fx.Node] = set()
        for kind, anchor, starts in _anchors(graph):
            if anchor in done or not anchor.users:
                continue
            try:
                site = self._planned(graph, divider, outcome, kind, starts)
            except Declined as declined:
                outcome.misses.append(self._miss(declined, anchor))
                continue
            done |= set(site.steps)
            place, columns = location(anchor), [str(c.product.weight.target) for c in site.columns]
            rows = [str(product.weight.target) for product, _ in site.rows]
            divider.apply(site)
            shared = {"kv_heads_shared_by": self.degree // min(c.parts for c in site.columns)} if any(c.parts < self.degree for c in site.columns) else {}
            outcome.matches.append(Match(kind, tuple(columns + rows), {"columns": ", ".join(columns), "rows": ", ".join(rows)} | shared, place))

    def _miss(self, declined: Declined, anchor: fx.Node) -> Miss:
        if self.strict and isinstance(declined.__cause__, Indivisible):
            raise FtcError(f"a tensor-parallel degree of {self.degree} does not fit the model: {declined.reason} ({location(anchor)})")
        return declined.miss(anchor)

    def _planned(self, graph: fx.Graph, divider: Divider, outcome: Outcome, kind: str, starts: list[fx.Node]) -> Site:
        try:
            return plan(graph, kind, seeds_of(starts, kind != "attention"), self.degree)
        except StackedHeads as stacked:
            weight = str(stacked.column.product.weight.target)
            place = location(stacked.column.product.node)
            divider.unstack(stacked.column)
            outcome.matches.append(Match("unstacked", (weight,), {"weight": weight}, place))
            return plan(graph, kind, seeds_of(starts, kind != "attention"), self.degree)

    def _vocabularies(self, graph: fx.Graph, divider: Divider, outcome: Outcome) -> None:
        for found in vocabulary_parallel.vocabularies(graph):
            place, weight = location(found.readers[0]), str(found.weight.target)
            try:
                vocabulary_parallel.check(found, self.degree)
            except Declined as declined:
                outcome.misses.append(self._miss(declined, found.readers[0]))
                continue
            for kind in vocabulary_parallel.divide(found, divider):
                outcome.matches.append(Match(kind, (weight,), {"weight": weight}, place))


def _anchors(graph: fx.Graph) -> list[tuple[str, fx.Node, list[fx.Node]]]:
    """(kind, node, where to look for the products before it): attentions first, then gated MLPs, then plain activations."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    attentions = [("attention", node, list(node.args[:3])) for node in calls if node.target in ATTENTION]
    gated = [("mlp", node, list(node.args[:2])) for node in calls if node.target is _GATED]
    plain = [("mlp", node, list(node.args[:1])) for node in calls if node.target in _ACTIVATIONS]
    return attentions + gated + plain
