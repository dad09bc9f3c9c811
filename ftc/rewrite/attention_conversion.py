"""What passes share that convert attentions: taking the old one out, the regions to plan for, and RoPE's tables in a proof."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import fx

from ftc.errors import FtcError
from ftc.rewrite.attention_site import ROPE, attention_nodes, latent_nodes, pair_places, read_site
from ftc.rewrite.edit import Editor
from ftc.rewrite.latent_statistics import HeadSizes
from ftc.rewrite.outcome import Declined, Outcome
from ftc.rewrite.passes import Pass

aten = torch.ops.aten


class Planned:
    """A lossy pass with the plan of one region, as `calibrate` gives it: `convert(graph)` edits by the plan, and `prove` is the pass's own."""

    contract = "lossy"

    def __init__(self, of: Pass, plan, convert: Callable[[fx.Graph], Outcome], prove: Callable[..., list[dict]]):
        self.name, self.version, self.inverse, self.about = of.name, of.version, of.inverse, plan.about
        self.apply, self.prove = convert, prove

    def kept_contract(self) -> str:
        return self.contract


def erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Take away `node` and what fed it and nothing else."""
    queue = [node]
    while queue:
        node = queue.pop()
        if not node._erased and not node.users and node.op in ("call_function", "get_attr"):
            parents = list(node.all_input_nodes)
            graph.erase_node(node)
            queue += parents


def tidied(graph: fx.Graph) -> fx.Graph:
    """The graph, tidied in place as after a pass."""
    from ftc.capture.captured import tidy

    tidy(graph, keep_random=False)
    return graph


def ending_at(graph: fx.Graph, nodes: Sequence[fx.Node]) -> fx.Graph:
    """The graph, in place, with the results of `nodes` as its only outputs."""
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (list(nodes),)
    return tidied(graph)


def hash_beside(graph: fx.Graph, names: Collection[str]) -> str:
    """Hash of what is left of a graph where the nodes that `names` names are inputs."""
    from ftc.rewrite.graph_json import graph_hash
    from ftc.rewrite.pipeline import copy_graph

    rest = copy_graph(graph)
    for number, node in enumerate([node for node in rest.nodes if node.name in names]):
        with rest.inserting_before(next(iter(rest.nodes))):
            given = rest.placeholder(f"given_{number}")
        given.meta["val"] = node.meta["val"].new_empty(node.meta["val"].shape)  # whichever way its memory lies
        node.replace_all_uses_with(given)
    return graph_hash(tidied(rest))


def with_tables(graph: fx.Graph, rotating: bool = True) -> fx.Graph:
    """Every RoPE, in place, with tables that turn a pair as one complex number (random inputs do not), or with cos 1 and sin 0."""
    made: dict = {}
    for node in [n for n in graph.nodes if n.target is ROPE]:
        interleaved = len(node.args) > 3 and node.args[3]
        for position in (1, 2):
            table = node.args[position]
            if (table, position, interleaved) not in made:
                made[table, position, interleaved] = _table(Editor(graph, node), table, position, interleaved, rotating)
            node.update_arg(position, made[table, position, interleaved])
    return graph


def _table(edit: Editor, table: fx.Node, position: int, interleaved: bool, rotating: bool) -> fx.Node:
    if not rotating:
        return edit((aten.ones_like, aten.zeros_like)[position - 1].default, table)
    width = int(table.meta["val"].shape[-1])
    columns = [0] * width
    for real, imaginary in pair_places(width, width, interleaved)[0]:
        columns[real] = columns[imaginary] = real
    return edit(aten.index_select.default, table, -1, edit.constant("pairs", torch.tensor(columns)))


def check_not_latent(program, name: str) -> None:
    """FtcError for a program with latent attention."""
    for code in program.codes:
        if latent_nodes(code):
            raise FtcError(f"pass {name}: the attention of {code.name} is latent already")


def regions_with_sites(program, name: str) -> dict[str, HeadSizes]:
    """The regions that have one site, with its sizes; FtcError where some have none, or several."""
    found = {}
    for region in program.regions:
        for variant in region.code.all_variants():
            nodes = attention_nodes(variant.captured.graph)
            if len(nodes) > 1:
                raise FtcError(f"pass {name}: {region.name} has {len(nodes)} attentions; only blocks with one can be planned for")
            for node in nodes:
                try:
                    found[region.name] = HeadSizes.of(read_site(node))
                except Declined as declined:
                    miss = declined.miss(node)
                    raise FtcError(f"pass {name} found no site in {region.name}: {miss.reason}, at {miss.node} ({miss.location})") from declined
            break
    if not found:
        raise FtcError(f"pass {name} found no attention in the model's blocks")
    return found
