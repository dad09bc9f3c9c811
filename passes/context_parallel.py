"""context-parallel: the sequence divided over ranks.

    attention   rank r:  attention(q_r, [k_0 .. k_n-1], [v_0 .. v_n-1]), causal by the tokens' true positions
    loss        sum_r losses_r / sum_r counted_r, the same number on every rank

Keys and values are gathered (their gradients reduced and scattered back); everything else is each token's own business, and the pass checks that it is:
it follows the sequence through every operator of the graph, and declines a graph in which one mixes tokens. All graphs of a program have to follow.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from ftc.dialect.ranks import standing_at
from ftc.rewrite.certificate_ranks import Layout
from ftc.rewrite.edit import Editor
from ftc.rewrite.lockstep import already_on, arguments, check_axis
from ftc.rewrite.outcome import Declined, Match, Outcome, location
from ftc.rewrite.passes import Pass
from ftc.rewrite.sequence_split import ARANGES, LOSSES, SUMS, Sequence, follow_sequence, sequence_of

aten, dialect = torch.ops.aten, torch.ops.ftc
_MEAN, _SUM = 1, 2


@dataclass(frozen=True)
class ContextParallel(Pass):
    """Each rank gets its tokens. Inputs [B, T, ...] and outputs of the program are divided along T; parameters stay whole, and a rank's gradients
    are its tokens' share of the sum over the ranks."""

    degree: int = field(metadata={"help": "number of ranks"})
    axis: str = field(default="context", metadata={"help": "name by which the program is bound to a group of ranks"})
    balanced: bool = field(default=True, metadata={"help": "rank r holds chunks r and 2n - 1 - r of 2n, so that all do the same work"})

    name: ClassVar[str] = "context-parallel"
    summary: ClassVar[str] = "the sequence is divided over ranks, which gather keys and values"
    contract: ClassVar[str] = "exact"
    inverse: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("raise-norm", "raise-rope", "raise-attention", "raise-mlp")
    every_graph: ClassVar[bool] = True

    def __post_init__(self):
        check_axis(self.degree, self.axis)

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome(already=already_on(graph, self.axis, self.degree))
        if outcome.already:
            return outcome
        try:
            sequence = sequence_of(graph)
            if sequence is None:
                return outcome
            splits = follow_sequence(graph, sequence, self.degree)
            outcome.layout = self._layout(graph, splits)
        except Declined as declined:
            outcome.misses.append(declined.miss(declined.node))
            return outcome
        outcome.shares = {sequence.symbol: self.degree}
        with standing_at({}):
            for node in list(graph.nodes):
                self._site(graph, node, splits, sequence, outcome)
        return outcome

    def _layout(self, graph: fx.Graph, splits: dict) -> Layout:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        outputs = next(node for node in graph.nodes if node.op == "output").args[0]
        for node in (*inputs, *outputs):
            if node in splits and splits[node].blocks is None:
                raise Declined("tokens and batch are merged in an input or a result", node)
        dims = [tuple(splits[node].dim if node in splits else None for node in nodes) for nodes in (inputs, outputs)]
        return Layout(self.axis, self.degree, self.balanced, *dims)

    def _site(self, graph: fx.Graph, node: fx.Node, splits: dict, sequence: Sequence, outcome: Outcome) -> None:
        place, kind = location(node), None
        if node in sequence.attentions:
            kind, new = "attention", self._attention(graph, node, sequence)
        elif node.target in ARANGES and node in splits:
            kind, new = "positions", self._positions(graph, node)
        elif node.target in LOSSES and node.args[0] in splits and node not in splits:
            kind, new = "loss", self._loss(graph, node)
        elif node.target in SUMS and node.args[0] in splits and node not in splits:
            kind, new = "sum", self._sum(graph, node)
        if kind is not None:
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
            if not node.users:
                graph.erase_node(node)
            outcome.matches.append(Match(kind, (new.name,), {}, place))

    def _ranked(self, edit: Editor, op, *operands, **options) -> fx.Node:
        return edit(op.default, *operands, **options, axis=self.axis, degree=self.degree)

    def _attention(self, graph: fx.Graph, node: fx.Node, sequence: Sequence) -> fx.Node:
        edit, bound, window = Editor(graph, node), arguments(node), sequence.attentions[node]
        key, value = (edit(dialect.gather_sequence.default, bound[name], 2, self.balanced, self.axis, self.degree) for name in ("key", "value"))
        if window == sequence.UNMASKED:
            options = {name: bound[name] for name in ("scale", "enable_gqa", "softcap") if name in bound}
            new = edit(node.target, bound["query"], key, value, None, 0.0, False, **options)
        else:
            scale = bound.get("scale") or 1 / math.sqrt(int(bound["query"].meta["val"].shape[-1]))
            options = {"scale": scale, "softcap": bound.get("softcap"), "enable_gqa": bound.get("enable_gqa", False), "balanced": self.balanced}
            new = self._ranked(edit, dialect.sequence_attention, bound["query"], key, value, window, 0.0, **options)
        new.meta["val"] = node.meta["val"]
        return new

    def _positions(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        edit, bound = Editor(graph, node), arguments(node)
        new = edit(dialect.sequence_positions.default, bound["end"], self.balanced, self.axis, self.degree, device=bound.get("device"))
        return edit(aten.to.dtype, new, node.meta["val"].dtype) if node.meta["val"].dtype != torch.int64 else new

    def _reduced(self, edit: Editor, x: fx.Node) -> fx.Node:
        return edit(dialect.reduce_from_ranks.default, x, self.axis, self.degree)

    def _sum(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        return self._reduced(Editor(graph, node.next, like=node), node)

    def _loss(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        edit, bound = Editor(graph, node), arguments(node)
        chunked = node.target is dialect.chunk_cross_entropy.default
        labels = bound["labels" if chunked else "target"]
        mean = bound.get("reduction", "mean" if chunked else _MEAN) in ("mean", _MEAN)
        bound["reduction"] = "sum" if chunked else _SUM
        given = [bound.get(argument.name, argument.default_value) for argument in node.target._schema.arguments]
        total = self._reduced(edit, edit(node.target, *given))
        if not mean:
            return total
        counted = edit(aten.sum.default, edit(aten.ne.Scalar, labels, int(bound.get("ignore_index", -100))))
        return edit(aten.div.Tensor, total, self._reduced(edit, counted))
