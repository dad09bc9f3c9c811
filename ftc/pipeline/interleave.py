"""A merged graph in the order that hides the communication of one lane behind the compute of the other.

    merged = merge({"forward": lowered(f), "backward": lowered(b)})
    found = interleave(merged, costs=modelled(merged, H100))
    found.graph.boxed()          # runs it
    print(found.text())

Concatenated, a transfer is started and waited for at once where its lane computes one thing after the other, and the processor stands still: DeepSeek-AI
2024, DeepSeek-V3 (arXiv:2412.19437), section 3.2.1, pairs the two by hand for one architecture. Here the pair is one graph, and its order is searched for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from ftc.errors import FtcError
from ftc.pipeline.communication import channel_of, is_start, is_wait, start_of
from ftc.pipeline.interleave_check import check_order
from ftc.pipeline.interleave_effects import order_edges, roots
from ftc.pipeline.interleave_search import Found, search
from ftc.pipeline.interleave_tasks import COMPUTE, START, WAIT, Problem, Storage, Task
from ftc.pipeline.merge import Merged, Place

OWNED = ("saved", "gradient")  # kinds of inputs that a run may free behind their last reader


def interleave(
    merged: Merged,
    costs: Mapping[fx.Node, float],
    more_bytes: int | None = 0,
    owned: Callable[[Place], bool] = lambda place: place[1].kind in OWNED,
    group: Any = None,
) -> Interleaved:
    """The graph in the best order found: never slower than concatenation by `costs`, and at most `more_bytes` above its peak of memory (None: any peak).

    `costs` are seconds for each node of `merged` (`interleave_costs`). `owned` says which inputs the graph may free. Ranks that talk must run one order:
    where their costs or sizes may differ (measured costs, batches of different sizes), `group` names the process group whose first rank's order all
    take (a collective; times, peak and limit are then the first rank's, too). `merged` stays as it is. The order is checked before it is returned.
    """
    nodes, problem = problem_of(merged, costs, owned)
    found = search(problem, more_bytes) if group is None else _of_first_rank(problem, more_bytes, group)
    order = [nodes[number] for number in found.order]
    check_order(merged.graph, order)
    return Interleaved(merged.in_order(order), found, problem, tuple(node.name for node in nodes))


def _of_first_rank(problem: Problem, more_bytes: int | None, group) -> Found:
    import torch.distributed as dist

    first = dist.get_rank(group) == 0
    given = [(len(problem.tasks), search(problem, more_bytes)) if first else None]
    dist.broadcast_object_list(given, group=group, group_src=0)
    count, found = given[0]
    if count != len(problem.tasks):
        raise FtcError(f"the graph of this rank has {len(problem.tasks)} nodes, that of the group's first rank {count}; ranks that talk need one graph")
    return found


def problem_of(merged: Merged, costs: Mapping[fx.Node, float], owned: Callable[[Place], bool]) -> tuple[list[fx.Node], Problem]:
    """The graph's nodes that compute, in its order, and the tasks and memory they stand for."""
    nodes = [node for node in merged.graph.nodes if node.op not in ("placeholder", "output")]
    number = {node: i for i, node in enumerate(nodes)}
    extra = order_edges(merged.graph)
    tasks = []
    for node in nodes:
        before = [n for n in (*node.all_input_nodes, *extra[node]) if n in number]
        kind, start = COMPUTE, None
        if is_start(node):
            kind = START
        elif is_wait(node) and start_of(node) is not None:
            kind, start = WAIT, number[start_of(node)]
            before.append(nodes[start])
        needs = tuple(sorted({number[n] for n in before}))
        cost = 0.0 if kind == WAIT else float(costs[node])
        tasks.append(Task(kind, cost, needs, channel_of(node) if kind == START else None, start, merged.lane[node]))
    return nodes, Problem(tuple(tasks), _storages(merged, number, owned))


def _storages(merged: Merged, number: dict[fx.Node, int], owned: Callable[[Place], bool]) -> tuple[Storage, ...]:
    """Memory by the node whose value it first was; each element of several results is a memory of its own."""
    shown = roots(merged.graph)
    places = dict(zip(merged.graph.find_nodes(op="placeholder"), merged.inputs, strict=True))
    output = next(iter(merged.graph.find_nodes(op="output")))
    results = {shown[node] for node in output.all_input_nodes}
    readers: dict[fx.Node, set[int]] = {}
    makers: dict[fx.Node, int | None] = {}
    for node in merged.graph.nodes:
        if node.op == "output":
            continue
        root = shown[node]
        if root is node:
            element = node.target is operator.getitem
            makers[node] = number.get(node.args[0] if element else node)
        readers.setdefault(root, set()).update(number[user] for user in node.users if user in number)
    found = []
    for root, maker in makers.items():
        value = root.meta.get("val")
        if root.op == "call_function" and root.target is not operator.getitem and not isinstance(value, Tensor):
            continue  # several results: their elements count
        kept = root in results or (root in places and not owned(places[root]))
        found.append(Storage(_size(value), maker, tuple(sorted(readers.get(root, ()))), kept))
    return tuple(found)


def _size(value) -> int:
    tensors = [v for v in tree_flatten(value)[0] if isinstance(v, Tensor)]
    return sum(int(t.numel()) * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Interleaved:
    """A merged graph in the order found, with what it takes by the model."""

    graph: Merged
    found: Found
    problem: Problem
    names: tuple[str, ...]  # of the tasks

    def summary(self) -> dict:
        """Milliseconds and bytes by the model: concatenated, interleaved, and the bound that no order beats."""
        before, after = self.found.concatenated, self.found.interleaved
        return {
            "compute_ms": self.problem.compute * 1e3,
            "transfers_ms": self.problem.transfers * 1e3,
            "concatenated_ms": before.seconds * 1e3,
            "interleaved_ms": after.seconds * 1e3,
            "bound_ms": self.found.bound * 1e3,
            "exposed_concatenated_ms": before.exposed * 1e3,
            "exposed_interleaved_ms": after.exposed * 1e3,
            "hidden": self.found.hidden,
            "peak_bytes_concatenated": before.peak_bytes,
            "peak_bytes_interleaved": after.peak_bytes,
            "way": self.found.way,
        }

    def text(self) -> str:
        """The order in words: what each stretch of a lane computes, and which transfers run meanwhile."""
        from ftc.pipeline.interleave_text import order_text

        return order_text(self)
