"""What the raise passes share: a graph made ready, anchors visited in order, each either rewritten, declined with a reason, or left alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ftc.rewrite.functional import functionalise
from ftc.rewrite.lens import Lens
from ftc.rewrite.movement import drop_round_trips
from ftc.rewrite.outcome import Declined, Match, Outcome
from ftc.rewrite.passes import Expectation, Pass
from ftc.rewrite.recognise import Analysis, analyse, drop_dead, finish
from ftc.rewrite.repeated import merge_products


@dataclass(frozen=True)
class RaisePass(Pass):
    """A pass that brings every spelling of one idea to `canonical` operators. It has no options; parameters it rearranges at most."""

    contract: ClassVar[str] = "exact"
    inverse: ClassVar[bool] = True
    default_expect: ClassVar[Expectation] = "any"  # what is left is reported as residue
    canonical: ClassVar[frozenset]
    last_first: ClassVar[bool] = False  # whether anchors are visited from the end of the graph

    def is_anchor(self, analysis: Analysis, node: fx.Node) -> bool:
        """Whether a hypothesis may begin at a node that depends on activations."""
        raise NotImplementedError

    def raise_at(self, analysis: Analysis, anchor: fx.Node) -> Match | tuple[Match, list[Lens]] | None:
        """Rewrite the site of an anchor and say what it was (and how its parameters follow); None where it is no site. Raises Declined where it
        only looks like one."""
        raise NotImplementedError

    def make_ready(self, analysis: Analysis) -> None:
        """What a pass does to the graph before it looks for anchors."""

    def apply(self, graph: fx.Graph) -> Outcome:
        """Rewrite `graph` in place; see `ftc.rewrite.outcome`."""
        functionalise(graph)
        analysis, outcome = analyse(graph), Outcome()
        if not analysis.ready:
            drop_round_trips(analysis)
            merge_products(analysis)
            analysis.ready = True
        already = [node for node in graph.nodes if node.target in self.canonical]
        self.make_ready(analysis)
        drop_dead(graph)
        refused: list[tuple[fx.Node, Declined]] = []
        for anchor in self._order(graph):
            if anchor._erased or anchor in analysis.changing or not anchor.users:
                continue
            if anchor.op != "call_function" or not analysis.active(anchor) or not self.is_anchor(analysis, anchor):
                continue
            try:
                match = self.raise_at(analysis, anchor)
            except Declined as declined:
                refused.append((anchor, declined))
            else:
                if match is None:
                    continue
                match, lenses = match if isinstance(match, tuple) else (match, [])
                outcome.matches.append(match)
                outcome.lenses += lenses
            drop_dead(graph)
        finish(analysis)
        if self.last_first:
            outcome.matches.reverse()
        outcome.already = sum(not node._erased for node in already)
        # One idea may have several anchors: where a later one matched, the refusal of an earlier one is no miss.
        outcome.misses = [declined.miss(anchor) for anchor, declined in refused if not anchor._erased]
        return outcome

    def _order(self, graph: fx.Graph) -> Iterable[fx.Node]:
        nodes = list(graph.nodes)
        return reversed(nodes) if self.last_first else nodes
