"""strip-mtp: the modules of add-mtp go; what is left is the next-token model, same bits.

The loss that a call with labels returns is the next-token loss again, logits are as they were.
"""

from dataclasses import dataclass
from typing import ClassVar

from ftc.passes.add_mtp import is_mtp
from torch import fx

from ftc.capture.results import drop_results, extras, output_node
from ftc.rewrite.lens_add import Drop
from ftc.rewrite.outcome import Match, Outcome, location
from ftc.rewrite.passes import Pass


@dataclass(frozen=True)
class StripMtp(Pass):
    """Takes the modules out of graphs, parameters and regions."""

    name: ClassVar[str] = "strip-mtp"
    summary: ClassVar[str] = "the modules of add-mtp go; the next-token model is left, same bits"
    contract: ClassVar[str] = "bitwise"
    inverse: ClassVar[bool] = True
    sees_calls: ClassVar[bool] = True

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome()
        parameters = sorted({str(n.target) for n in graph.nodes if n.op == "get_attr" and is_mtp(str(n.target))})
        regions = leave_out(graph, outcome)
        if regions:
            outcome.gone = regions
            outcome.lenses = [Drop(name) for name in parameters]
        return outcome


def leave_out(graph: fx.Graph, outcome: Outcome) -> list[str]:
    """Take the results that add-mtp added out of `graph`; returns the regions that it called for them, in order.

    The outcome gets the match, the results that go, and which one takes the place of the total loss.
    """
    calls = [node for node in graph.nodes if node.op == "call_module" and is_mtp(str(node.target))]
    places = extras(graph)
    added = sorted(place for name, place in places.items() if name.startswith("mtp_"))
    if not calls or not added:
        return []
    if "mtp_total_loss" in places:
        outcome.answers = {places["mtp_total_loss"]: places["next_token_loss"]}
    outcome.dropped = added
    drop_results(graph, added)
    output = output_node(graph)
    output.kwargs = {name: place for name, place in output.kwargs.items() if name != "next_token_loss"}
    outcome.matches.append(Match("mtp", tuple(call.name for call in calls), {"modules": len(calls)}, location(calls[0])))
    return [str(call.target) for call in calls]
