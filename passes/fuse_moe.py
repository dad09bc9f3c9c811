"""fuse-moe: a mixture of experts as one differentiable dispatch.

    moe(x, i, w) = fused_moe(x, i, w)                 the same function; rows are sorted by expert and multiplied in groups

One node, whatever the number of experts: the graph and the time to compile it do not grow with them. Which implementation runs is decided inside the
operator by device and number of tokens (`ftc.dialect.fused_moe`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import ftc.dialect  # noqa: F401  registers ftc::fused_moe
from ftc.rewrite.outcome import Declined, Match, Outcome, location
from ftc.rewrite.passes import Pass
from ftc.rewrite.recognise import analyse
from ftc.rewrite.recognise_experts import choice_at, find

MOE, FUSED = torch.ops.ftc.moe.default, torch.ops.ftc.fused_moe.default


@dataclass(frozen=True)
class FuseMoe(Pass):
    """Replaces every `ftc.moe` by `ftc.fused_moe`. Lens: none of its own."""

    name: ClassVar[str] = "fuse-moe"
    summary: ClassVar[str] = "a mixture of experts becomes one sorted, grouped and differentiable dispatch"
    contract: ClassVar[str] = "exact"
    inverse: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("raise-moe",)

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome(already=sum(node.target is FUSED for node in graph.nodes))
        for node in graph.nodes:
            if node.target is MOE:
                node.target = FUSED
                experts, top_k = int(node.args[4].meta["val"].shape[0]), int(node.args[1].meta["val"].shape[1])
                outcome.matches.append(Match("moe", (node.name,), {"experts": experts, "top_k": top_k}, location(node)))
        if not outcome.matches and not outcome.already:
            outcome.misses += _misses(graph)
        return outcome


def _misses(graph: fx.Graph) -> list:
    """Why what chooses among experts was not raised."""
    analysis, found = analyse(graph), []
    for node in graph.nodes:
        choice = choice_at(analysis, node) if analysis.active(node) else None
        if choice is not None:
            try:
                find(analysis, choice)
            except Declined as declined:
                found.append(declined.miss(node))
    return found
