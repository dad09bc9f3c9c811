"""What crosses a cut, made as little as can be: nodes without parameters of their own move to an earlier stage where that sends less.

Placed as late as their users allow, a running sum of the blocks' statistics would cross as all its terms, and values for every block as one
tensor that holds those of the blocks behind the cut too. For each cut, in order, the set S of nodes computed before it minimises

    sum over v in S that a node outside of S uses of (bytes(v) + MESSAGE_BYTES),    S closed under what its nodes are made from

which is a minimum cut of a flow network (Ford and Fulkerson 1956) where every node is an edge of that capacity. Of equal ones the smallest S is
taken, so nothing moves without a gain.
"""

from __future__ import annotations

from collections.abc import Set

import networkx
import torch
from networkx.algorithms.flow import dinitz
from torch import fx

MESSAGE_BYTES = 4096  # what sending one more tensor costs beside its bytes: about a microsecond of a link of 4 GB/s


def send_less(graph: fx.Graph, place: dict[fx.Node, int], fixed: Set[fx.Node], num_stages: int) -> None:
    """Move nodes to earlier stages in `place`, in place, where less crosses then. Nodes in `fixed` stay: calls, what reads parameters."""
    early = _earliest(graph, place, fixed)
    for cut in range(num_stages - 1):
        movable = {node for node, stage in place.items() if early[node] <= cut < stage}
        if movable:
            for node in _before(place, movable, cut):
                place[node] = cut


def _earliest(graph: fx.Graph, place: dict[fx.Node, int], fixed: Set[fx.Node]) -> dict[fx.Node, int]:
    """The first stage on which each node could be computed; what is made from nothing on a stage stays where it is."""
    early: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node in place:
            above = [early[parent] for parent in node.all_input_nodes if parent in early]
            early[node] = max(above) if above and node not in fixed else place[node]
    return early


def _before(place: dict[fx.Node, int], movable: set[fx.Node], cut: int) -> set[fx.Node]:
    """Those of the `movable` nodes that the cheapest set of nodes before the cut holds."""
    network = networkx.DiGraph()
    network.add_nodes_from(("source", "sink"))
    standing = {node for node, stage in place.items() if stage <= cut}
    for node in standing | movable:
        users = [user for user in node.users if user in place and user not in standing]
        if not users:
            continue
        _add_value(network, node)
        if node in standing:
            network.add_edge("source", (node, "in"))
        for user in users:
            network.add_edge((node, "out"), (user, "in") if user in movable else "sink")
            if user in movable and node in movable:
                network.add_edge((user, "in"), (node, "in"))  # what a node is made from is made before it
    reached = _reached(dinitz(network, "source", "sink"))
    return {node for node in movable if (node, "in") in reached}


def _reached(residual: networkx.DiGraph) -> set:
    """The side of the source in the smallest minimum cut: what flow could still reach. The same on every rank, whatever the order of sets."""
    reached, stack = {"source"}, ["source"]
    while stack:
        for head, edge in residual[stack.pop()].items():
            if head not in reached and edge["flow"] < edge["capacity"]:
                reached.add(head)
                stack.append(head)
    return reached


def _add_value(network: networkx.DiGraph, node: fx.Node) -> None:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        network.add_edge((node, "in"), (node, "out"), capacity=_num_bytes(value) + MESSAGE_BYTES)
    else:
        network.add_edge((node, "in"), (node, "out"))  # only tensors cross


def _num_bytes(value: torch.Tensor) -> int:
    """The bytes of a tensor at the sizes that it was captured with."""
    count = 1
    for size in value.shape:
        count *= int(size.node.hint if isinstance(size, torch.SymInt) else size)
    return count * value.dtype.itemsize
