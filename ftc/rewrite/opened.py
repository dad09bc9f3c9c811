"""Shell graphs, opened: each region call becomes an input (its result) and outputs (its tensor arguments).

An opened graph has no calls left, so passes and certificates treat it like any region graph: what the shell hands to the
regions is compared as its outputs are. `close_calls` puts the calls back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ftc.capture.results import extras, renumbered
from ftc.errors import FtcFailure


@dataclass(frozen=True)
class _Slot:
    """Stands for output number `index` in the recorded arguments of a call."""

    index: int


@dataclass
class Calls:
    """What was opened: per call, its placeholders' names by result, the region, its arguments with _Slots for tensors, and its meta."""

    records: list[tuple]
    num_outputs: int


def has_calls(graph: fx.Graph) -> bool:
    """Whether the graph calls regions."""
    return any(node.op == "call_module" for node in graph.nodes)


def open_calls(graph: fx.Graph) -> tuple[fx.Graph, Calls]:
    """A copy of `graph` without calls, and what is needed to close it again. Deterministic."""
    new, mapping = fx.Graph(), {}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    results = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            mapping[node] = new.node_copy(node)
    for number, node in enumerate(calls):
        for position, result in enumerate(_results(node)):
            holder = new.placeholder(f"call_{number}_result_{position}")
            holder.meta = dict(result.meta)
            mapping[result] = holder
            results[result] = holder.name
    extra: list[fx.Node] = []
    records = []
    outputs = None
    for node in graph.nodes:
        if node.op == "output":
            outputs = tuple(mapping[n] for n in node.args[0])
        elif node.op == "call_module" or node in mapping:
            continue
        else:
            mapping[node] = new.node_copy(node, lambda n: mapping[n])
    count = len(outputs)

    def slot(item):
        if isinstance(item, fx.Node):
            extra.append(mapping[item])
            return _Slot(count + len(extra) - 1)
        return item

    for node in calls:
        args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), slot)
        names = {position: results[result] for position, result in enumerate(_results(node))}
        records.append((names, node.target, args, dict(kwargs), dict(node.meta)))
    tensors = [n for n in extra if isinstance(n.meta.get("val"), torch.Tensor)]
    if len(tensors) != len(extra):
        raise FtcFailure("a region takes a size as an argument; pass it as a tensor")
    new.output(outputs + tuple(extra))
    return new, Calls(records, count)


def _results(node: fx.Node) -> list[fx.Node]:
    """The nodes that hold a call's tensors: the call itself, or what picks them out of its structure."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        return [node]
    found = []
    for user in node.users:
        found += _results(user) if "val" in user.meta and not isinstance(user.meta["val"], torch.Tensor) else [user]
    return found


def close_calls(graph: fx.Graph, calls: Calls, original: fx.Graph, dropped: Sequence[int] = ()) -> fx.Graph:
    """The shell graph that an opened (and since rewritten) graph stands for. `original` is the graph that was opened,
    `dropped` the positions of its outputs that the pass took away."""
    outputs = list(next(node for node in graph.nodes if node.op == "output").args[0])
    for position in sorted(dropped):
        outputs.insert(position, None)  # the recorded positions count the dropped ones
    by_holder = {name: (number, position) for number, r in enumerate(calls.records) for position, name in r[0].items()}
    originals = [node for node in original.nodes if node.op == "call_module"]
    new, mapping, made = fx.Graph(), {}, {}
    waiting = [node for node in graph.nodes if node.op != "output"]
    while waiting:
        left = []
        for node in waiting:
            if node.op == "placeholder" and node.name in by_holder:
                number, position = by_holder[node.name]
                ready = _emit(new, calls.records[number], number, outputs, mapping, made)
                if ready:
                    mapping[node] = _pick(new, made[number], originals[number], position)
                    continue
            elif all(parent in mapping for parent in node.all_input_nodes):
                mapping[node] = new.node_copy(node, lambda n: mapping[n])
                continue
            left.append(node)
        if len(left) == len(waiting):
            raise FtcFailure("the region calls of a rewritten shell depend on each other in a circle")
        waiting = left
    for number, record in enumerate(calls.records):
        if number not in made:
            _emit(new, record, number, outputs, mapping, made)
    result = new.output(tuple(mapping[n] for n in outputs[: calls.num_outputs] if n is not None))
    result.kwargs = renumbered(extras(original), [place for place in dropped if place < calls.num_outputs])
    return _placeholders_first(new)


def _emit(new: fx.Graph, record, number: int, outputs, mapping: dict, made: dict) -> bool:
    if number in made:
        return True
    _, target, args, kwargs, meta = record
    needed = [leaf.index for leaf in _slots((args, kwargs))]
    if any(outputs[index] not in mapping for index in needed):
        return False
    args, kwargs = _fill((args, kwargs), lambda s: mapping[outputs[s.index]])
    node = new.create_node("call_module", target, tuple(args), dict(kwargs))
    node.meta = dict(meta)
    made[number] = node
    return True


def _pick(new: fx.Graph, call: fx.Node, original: fx.Node, position: int) -> fx.Node:
    """The node for result number `position` of a call: the call, or a chain of getitems like the original's."""
    result = _results(original)[position]
    chain = []
    while result is not original:
        chain.append(result)
        result = result.args[0]
    node = call
    for link in reversed(chain):
        node = new.call_function(link.target, (node, *link.args[1:]), dict(link.kwargs))
        node.meta = dict(link.meta)
    return node


def _slots(item) -> list[_Slot]:
    found: list[_Slot] = []
    _fill(item, lambda s: found.append(s))
    return found


def _fill(item, function):
    if isinstance(item, _Slot):
        return function(item)
    if isinstance(item, (tuple, list)):
        return type(item)(_fill(part, function) for part in item)
    if isinstance(item, dict):
        return {key: _fill(part, function) for key, part in item.items()}
    return item


def _placeholders_first(graph: fx.Graph) -> fx.Graph:
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    passed = False
    for node in list(graph.nodes):
        passed = passed or node is first
        if node.op == "placeholder" and passed:
            first.prepend(node)
    graph.lint()
    return graph
