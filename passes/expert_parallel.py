"""expert-parallel: the experts of every mixture divided over ranks that have tokens of their own (Lepikhin et al. 2020, GShard, arXiv:2006.16668).

    ftc::moe(x, i, w, experts)  ->  ftc::expert_parallel_moe(x, i, w, experts of this rank)        y_n = sum_r f_r(x_n)

The ranks are ranks of data: each has a batch of its own, and everything outside of the experts stays whole on each and knows nothing of the others. So
the gradients of the experts are sums over all ranks' tokens when they come, and those of all else are a rank's own, to be added up as in data
parallelism. Weights follow by `shard` lenses along the experts.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from ftc.dialect.ranks import standing_at
from ftc.errors import FtcError
from ftc.rewrite.certificate_ranks import Layout
from ftc.rewrite.divide import Divider
from ftc.rewrite.edit import Editor, is_parameter
from ftc.rewrite.lockstep import already_on, arguments, check_axis
from ftc.rewrite.outcome import Declined, Match, Outcome, location
from ftc.rewrite.passes import Pass

EXPERTS = ("gate_up", "down", "gate_up_bias", "down_bias")
OPERATORS = ("ftc::moe", "ftc::fused_moe")


@dataclass(frozen=True)
class ExpertParallel(Pass):
    """Each rank gets E/n of the experts of every mixture, and sends its tokens to those that they chose."""

    degree: int = field(metadata={"help": "number of ranks"})
    axis: str = field(default="expert", metadata={"help": "name by which the program is bound to a group of ranks"})

    name: ClassVar[str] = "expert-parallel"
    summary: ClassVar[str] = "the experts are divided over ranks, which exchange the tokens that chose them"
    contract: ClassVar[str] = "exact"
    inverse: ClassVar[bool] = True

    def __post_init__(self):
        check_axis(self.degree, self.axis)

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome(already=already_on(graph, self.axis, self.degree))
        if outcome.already:
            return outcome
        divider = Divider(graph, self.axis, self.degree)
        with standing_at({}):
            for node in mixtures(graph):
                try:
                    experts = self._experts(node)
                except Declined as declined:
                    outcome.misses.append(declined.miss(node))
                    continue
                outcome.matches.append(self._divide(graph, node, experts, divider))
        if outcome.matches:
            outcome.layout = Layout.of_own_batches(graph, self.axis, self.degree)
        outcome.lenses += divider.lenses
        return outcome

    def _experts(self, node: fx.Node) -> list[fx.Node]:
        """The parameters that hold the experts. Declined where they are no parameters of this mixture alone."""
        bound = arguments(node)
        experts = [bound[name] for name in EXPERTS if bound.get(name) is not None]
        for expert in experts:
            if not is_parameter(expert):
                raise Declined(f"the experts {expert.name} are computed, not a parameter", expert)
            if len(expert.users) > 1:
                raise Declined(f"{expert.target} is used more than once", expert)
            self._check_number(expert)
        return experts

    def _check_number(self, expert: fx.Node) -> None:
        number = int(expert.meta["val"].shape[0])
        if number % self.degree:
            fits = [str(n) for n in range(2, number + 1) if number % n == 0]
            raise FtcError(
                f"{expert.target} holds {number} experts, which an expert-parallel degree of {self.degree} does not divide; "
                f"use {', '.join(fits)} ({location(expert)})"
            )

    def _divide(self, graph: fx.Graph, node: fx.Node, experts: list[fx.Node], divider: Divider) -> Match:
        number, place = int(experts[0].meta["val"].shape[0]), location(node)
        for expert in experts:
            divider.divide(expert, 0, (number,))
        options = {**node.kwargs, "fused": node.target._schema.name == OPERATORS[1]}
        new = Editor(graph, node)(torch.ops.ftc.expert_parallel_moe.default, *node.args, **options, axis=self.axis, degree=self.degree)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        names = tuple(str(expert.target) for expert in experts)
        return Match("mixture", names, {"experts": number, "of_a_rank": number // self.degree}, place)


def mixtures(graph: fx.Graph) -> list[fx.Node]:
    """The canonical mixtures of experts in a graph."""
    calls = [node for node in graph.nodes if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)]
    return [node for node in calls if node.target._schema.name in OPERATORS]
