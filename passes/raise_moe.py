"""raise-moe: any spelling of a mixture of experts becomes `ftc.moe` over stacked experts.

    sum_e [e in i_n] w[n, e] f(x_n; e)  =  moe(x, i, w)_n                    (Shazeer et al. 2017, arXiv:1701.06538, equation 1)

Loops over experts with masks and index_add, gathered weights with bmm, grouped products over sorted rows, all experts computed and combined: the pass
reads none of it. It takes what goes in (the token that the router saw, the choice, the weights, the experts' parameters) and what comes out, and keeps
the hypothesis that is proved equal in values and gradients with every expert chosen (`ftc.rewrite.recognise_experts`). The router stays as it is.

Lens: experts, a rearrangement: E modules of matrices, or stacked ones that lie otherwise, become [E, 2F, D] and [E, D, F].
"""

import operator
import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import ftc.dialect  # noqa: F401  registers ftc::moe
from ftc.rewrite.edit import Editor
from ftc.rewrite.lens import Lens
from ftc.rewrite.lens_experts import Experts
from ftc.rewrite.outcome import Declined, Match, location
from ftc.rewrite.probe import aten
from ftc.rewrite.raising import RaisePass
from ftc.rewrite.recognise import Analysis, Builder, drop_dead, replace
from ftc.rewrite.recognise_experts import MAGNITUDES, Site, choice_at, find, given_values, num_tokens, rounds

MOE = torch.ops.ftc.moe.default


@dataclass(frozen=True)
class RaiseMoe(RaisePass):
    """The pass. Unlike other raise passes it moves parameters, by a lens that only rearranges."""

    name: ClassVar[str] = "raise-moe"
    summary: ClassVar[str] = "any spelling of a mixture of experts becomes ftc.moe over stacked experts"
    canonical: ClassVar[frozenset] = frozenset({MOE, torch.ops.ftc.fused_moe.default})

    def is_anchor(self, analysis: Analysis, node: fx.Node) -> bool:
        """A choice of experts."""
        return choice_at(analysis, node) is not None

    def raise_at(self, analysis: Analysis, anchor: fx.Node) -> tuple[Match, list[Lens]] | None:
        """The mixture behind a choice."""
        site = find(analysis, choice_at(analysis, anchor))
        return None if site is None else _rewrite(analysis, site)


def _rewrite(analysis: Analysis, site: Site) -> tuple[Match, list[Lens]]:
    """Put `ftc.moe` in the place of the result, with the parameters that the lenses make; Declined where it is not proved equal."""
    result, place = site.result, location(site.result)
    lenses = site.layout.lenses(site.choice.num_experts, _names(analysis.graph, site))
    roles = {role: _attribute(analysis, site, role, lens) for role, lens in lenses.items()}
    build = Builder(analysis, result)
    width = site.token.meta["val"].shape[-1]
    rows = site.token if site.token.meta["val"].dim() == 2 else build(aten.reshape.default, site.token, [-1, width])
    rows = build.cast(rows, roles["down"].meta["val"].dtype)
    indices = site.choice.indices or build(operator.getitem, site.choice.node, 1)
    indices = _flat(build, indices, site.choice.top_k)
    weights = site.weights
    if site.dense:
        weights = build(aten.gather.default, _flat(build, weights, site.choice.num_experts), 1, indices)
    options = {"activation": site.activation, "constants": site.constants, "weight_on_input": site.weight_on_input}
    options = {name: value for name, value in options.items() if value or name == "activation"}
    arguments = [rows, indices, _flat(build, weights, site.choice.top_k), roles["gate_up"], roles["down"]]
    moe = new = build(MOE, *arguments, *_trailing(roles.get("gate_up_bias"), roles.get("down_bias")), **options)
    if result.meta["val"].dim() != 2:
        new = build(aten.reshape.default, new, build.shape(result))
    new = build.cast(new, result.meta["val"].dtype)
    reason = _differs(analysis, site, new, roles, lenses)
    if reason is not None:
        build.undo()
        raise Declined(reason, result)
    replace(analysis, result, new)
    drop_dead(analysis.graph)
    detail = {
        "experts": site.choice.num_experts,
        "top_k": site.choice.top_k,
        "activation": site.activation,
        "weight": "on the input" if site.weight_on_input else "on the output",
        "parameters": ", ".join(str(node.target) for node in roles.values()),
    }
    return Match("moe", (moe.name,), detail, place), [lens for lens in lenses.values() if lens is not None]


def _trailing(*values: fx.Node | None) -> tuple:
    """Optional arguments up to the last that is given."""
    while values and values[-1] is None:
        values = values[:-1]
    return values


def _flat(build: Builder, node: fx.Node, columns: int) -> fx.Node:
    value = node.meta["val"]
    return node if value.dim() == 2 and value.shape[-1] == columns else build(aten.reshape.default, node, [-1, columns])


def _names(graph: fx.Graph, site: Site) -> dict[str, str]:
    """Names of the canonical parameters: beside or in the place of the experts' own, none of them taken."""
    names = [name.split(".") for family in site.families for name in family.names]
    parent = os.path.commonprefix([name[:-1] for name in names])
    taken = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    found = {}
    for role in ("gate_up", "down", "gate_up_bias", "down_bias"):
        number = 0
        while (name := ".".join([*parent, role + (str(number) if number else "")])) in taken:
            number += 1
        found[role] = name
    return found


def _attribute(analysis: Analysis, site: Site, role: str, lens: Experts | None) -> fx.Node:
    """The node of a canonical parameter: an original one, or a new one with the shape that the lens makes."""
    layout = site.layout
    families = {"gate_up": layout.up, "down": (layout.down,), "gate_up_bias": layout.up_bias, "down_bias": (layout.down_bias,)}[role]
    first = families[0].nodes[0]
    if lens is None:
        return first
    shape = [site.choice.num_experts, sum(lens.rows)]
    if len(families[0].shape) == 2:
        shape.append(families[0].shape[0 if lens.transposed else 1])
    node = Editor(analysis.graph, site.result, first).attribute(lens.target, shape, first)
    node.meta["nn_module_stack"] = first.meta.get("nn_module_stack", {})
    analysis.kinds[node] = frozenset("P")
    return node


def _differs(analysis: Analysis, site: Site, new: fx.Node, roles: dict[str, fx.Node], lenses: dict[str, Experts | None]) -> str | None:
    """None where `new` is proved equal to the result, values and gradients, every expert chosen in each trial; otherwise what differs."""
    old, parameters = site.result, [node for family in site.families for node in family.nodes]
    by_name = {str(node.target): node for node in parameters}
    if old.meta["val"].dtype != new.meta["val"].dtype:
        return f"dtype {new.meta['val'].dtype} instead of {old.meta['val'].dtype}"
    rounded = analysis.rounds(old, [site.token, site.choice.scores, *parameters])
    if rounded is not None:
        return f"{rounded.name} rounds to {rounded.meta['val'].dtype}"
    for number, trial in enumerate(analysis.trials):
        for turn in range(rounds(site.choice, num_tokens(site.token, trial))):
            magnitude = MAGNITUDES[(number + turn) % len(MAGNITUDES)]
            given = given_values(analysis, site.token, site.choice, parameters, trial, turn, magnitude)
            leaves = [value.requires_grad_() for value in given.values()]
            for role, lens in lenses.items():
                if lens is not None:
                    sources = {name: given[by_name[name]] for name in lens.sources}
                    given[roles[role]] = lens.forward(sources)[lens.target]
            reason = analysis.parted(old, new, trial, given, leaves=leaves)
            if reason is not None:
                return reason
    return None
