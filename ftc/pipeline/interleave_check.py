"""`check_order`: whether an order of a graph's nodes may run. It trusts nothing that made the order."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from ftc.errors import FtcError
from ftc.pipeline.communication import channel_of, is_start, is_wait, start_of
from ftc.pipeline.interleave_effects import order_edges


def check_order(graph: fx.Graph, order: Sequence[fx.Node] | None = None) -> None:
    """FtcError unless `order` (default: the graph's own) runs every node of `graph` once, and

    - each behind what it reads;
    - each wait behind the start of its transfer, and nothing but waits reads what is pending;
    - each write behind what it must not overtake, and random operators as they were in `graph`.
    """
    order = list(graph.nodes) if order is None else list(order)
    work = [node for node in order if node.op not in ("placeholder", "output")]
    place = {node: i for i, node in enumerate(work)}
    wanted = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    if len(place) != len(work) or set(place) != set(wanted):
        missing = [node.name for node in wanted if node not in place]
        raise FtcError(f"an order must name every node once; missing: {', '.join(missing) or 'none'}, named twice or foreign: {len(work) - len(wanted)}")
    for node in work:
        for operand in node.all_input_nodes:
            if operand in place and place[operand] > place[node]:
                verb = "waits for" if is_wait(node) else "reads"
                raise FtcError(f"{node.name} {verb} {operand.name}, which the order runs later")
        _check_pending(node)
    for node, before in order_edges(graph).items():
        for other in before:
            if place[other] > place[node]:
                raise FtcError(f"{node.name} must run behind {other.name}: they write the same memory, or both draw random numbers")


def _check_pending(node: fx.Node) -> None:
    """A pending tensor, or an element of several, goes to waits alone."""
    pending = node.target is operator.getitem and is_start(node.args[0])
    if not (is_start(node) or pending):
        return
    for user in node.users:
        if not is_wait(user) and user.target is not operator.getitem:
            raise FtcError(f"{user.name} reads {node.name}, which is pending: its transfer may be under way; read what the wait returns")


def collectives(graph: fx.Graph) -> list[tuple[str, str]]:
    """What the graph starts, in order, as (channel, operator): ranks that talk must have the same list."""
    return [(channel_of(node), str(node.target)) for node in graph.nodes if is_start(node)]


def unwaited(graph: fx.Graph) -> list[fx.Node]:
    """Starts that nothing waits for."""
    waited = {start_of(node) for node in graph.nodes if is_wait(node)}
    return [node for node in graph.nodes if is_start(node) and node not in waited]
