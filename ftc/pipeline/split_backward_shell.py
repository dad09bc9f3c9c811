"""The code around a stage's regions in steps: a segment (what can be computed before the next regions), regions, a segment, and so on.

    segment 0   embedding               region   layers.0        ...        segment 4   norm, head, loss

A segment is a function of its own, so that its backward pass can be split as a region's is: the head's weight gradient is as large as a region's.
Between the steps another microbatch can be moved on, and on a `Tape` the backward pass runs step by step too: that is how a forward and a
backward pass are interleaved.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from ftc.capture.captured import compile_graph
from ftc.capture.results import output_node
from ftc.capture.variants import Variant
from ftc.errors import FtcError
from ftc.rewrite.functional import functionalise, mutated


@dataclass
class Tape:
    """A forward pass whose autograd graph was cut between its steps: for each step what it gave, and the leaves that later steps read instead."""

    steps: list[tuple[list[Tensor], list[Tensor]]] = field(default_factory=list)

    def cut(self, value: Any) -> Any:
        """The same values with leaves in the places of tensors that have a gradient."""
        outputs: list[Tensor] = []
        leaves: list[Tensor] = []

        def leaf(t: Tensor) -> Tensor:
            if t.grad_fn is None:
                return t
            outputs.append(t)
            leaves.append(t.detach().requires_grad_())
            return leaves[-1]

        value = tree_map_only(Tensor, leaf, value)
        if outputs:
            self.steps.append((outputs, leaves))
        return value

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Iterator[None]:
        """The backward pass from the last step's outputs, a step at a time; what a step is done with is freed."""
        torch.autograd.backward(list(outputs), list(gradients))
        yield
        while self.steps:
            outputs, leaves = self.steps.pop()
            pairs = [(output, leaf.grad) for output, leaf in zip(outputs, leaves, strict=True) if leaf.grad is not None]
            del outputs, leaves
            if pairs:
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
            del pairs
            yield


_tape: list[Tape | None] = [None]
_between: list[Callable[[], object] | None] = [None]


@contextlib.contextmanager
def taped(tape: Tape | None) -> Iterator[None]:
    """Inside, forward passes of stages that are run in steps are cut onto `tape`."""
    _tape.append(tape)
    try:
        yield
    finally:
        _tape.pop()


@contextlib.contextmanager
def between_steps(function: Callable[[], object] | None) -> Iterator[None]:
    """Inside, `function` is called after each step of a stage's forward pass."""
    _between.append(function)
    try:
        yield
    finally:
        _between.pop()


@dataclass
class _Segment:
    """Nodes of one level as a function: `run(attributes, inputs)` -> what later steps read, in the order of `gives`."""

    run: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
    attributes: list[str]
    takes: list[str]
    gives: list[str]


@dataclass
class _Call:
    """A call of a region, and the values picked out of what it returns."""

    node: fx.Node
    picked: list[fx.Node]


@dataclass
class _Cut:
    """A graph in steps: names of its placeholders, and of its results (or constants in their places)."""

    steps: list[_Segment | _Call]
    takes: list[str]
    gives: list[Any]


class ShellRunner:
    """Runs graphs of a stage's shell in steps. `split(function, dynamic, compiled, what)` makes a function whose backward pass has two parts."""

    def __init__(self, split: Callable):
        self.split = split
        self._made: weakref.WeakKeyDictionary[fx.Graph, _Cut] = weakref.WeakKeyDictionary()

    def __call__(self, body: Any, variant: Variant, graph: fx.Graph, tensors: Sequence[Tensor]) -> list[Any]:
        """What the graph gives, in order. `tensors`: its placeholders; its attributes are fetched from `body`. Calls the body's regions."""
        if graph not in self._made:
            self._made[graph] = _cut(graph, variant.captured.constants, self.split, f"the code around the regions of {body.name}")
        cut = self._made[graph]
        values: dict[str, Any] = dict(zip(cut.takes, tensors, strict=True))
        tape, between = _tape[-1], _between[-1]
        for step in cut.steps:
            parted = tape.cut if tape is not None and step is not cut.steps[-1] else _as_it_is  # what the last gives begins the backward pass
            if isinstance(step, _Segment):
                attributes = variant.attribute_values(step.attributes, body.fetch, tensors)
                made = step.run(attributes, [values[name] for name in step.takes])
                values.update(zip(step.gives, parted(list(made)), strict=True))
            else:
                values[step.node.name] = parted(_called(body, step, values))
                for node in step.picked:
                    values[node.name] = values[node.args[0].name][node.args[1]]
            if between is not None:
                between()
        return [values[item.name] if isinstance(item, fx.Node) else item for item in cut.gives]


def _as_it_is(value: Any) -> Any:
    return value


def _called(body: Any, step: _Call, values: dict[str, Any]) -> Any:
    args, kwargs = fx.node.map_arg((step.node.args, dict(step.node.kwargs)), lambda n: values[n.name])
    return body.get_submodule(str(step.node.target))(*args, **kwargs)


# ------------------------------------------------------------------------------------------------------------------ cutting


def _cut(original: fx.Graph, constants: dict, split: Callable, what: str) -> _Cut:
    graph = fx.Graph()
    graph.output(graph.graph_copy(original, {}))
    functionalise(graph)
    if mutated(graph):
        raise FtcError(f"{what} writes into tensors, so its backward pass cannot be put off; use GPipe, 1F1B or Interleaved1F1B")
    results = list(output_node(graph).args[0])
    level, calls, picked = _levels(graph)
    again = {node for node in graph.nodes if node.op == "get_attr" or _is_size(node)}
    steps: list[_Segment | _Call] = []
    for depth in range(max(level.values(), default=0) + 1):
        here = [n for n in graph.nodes if level.get(n) == depth and n not in picked]
        nodes = [n for n in here if n.op == "call_function" and n not in again]
        given = [n for n in nodes if n in results or any(user not in nodes and user not in again for user in n.users) or _is_read_later(n, again, nodes)]
        given = [n for n in given if isinstance(n.meta.get("val"), Tensor)]
        asked = [n for n in here if n in again and (n in results or any(user.op == "call_module" for user in n.users))]
        if given:
            function, attributes, takes = _segment(nodes, given, again, constants, len(steps))
            dynamic = [[isinstance(s, torch.SymInt) and not s.node.expr.is_number for s in n.meta["val"].shape] for n in takes]
            steps.append(_Segment(split(function, dynamic, None, what), attributes, [n.name for n in takes], [n.name for n in given]))
        if asked:  # attributes and sizes that regions are called with; these are no weights of the segment
            function, attributes, takes = _segment([], asked, again, constants, len(steps))
            steps.append(_Segment(_plain(function), attributes, [n.name for n in takes], [n.name for n in asked]))
        steps += [_Call(call, picked_of) for call, picked_of in calls if level[call] == depth]
    return _Cut(steps, [node.name for node in graph.find_nodes(op="placeholder")], results)


def _is_read_later(node: fx.Node, again: set[fx.Node], nodes: list[fx.Node]) -> bool:
    """Whether a size of the node's value is read in a later segment, which finds it again."""
    stack = [user for user in node.users if user in again]
    while stack:
        size = stack.pop()
        if any(user not in nodes and user not in again for user in size.users):
            return True
        stack += [user for user in size.users if user in again]
    return False


def _plain(function: Callable) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]:
    return lambda attributes, inputs: function(*attributes, *inputs)


def _levels(graph: fx.Graph) -> tuple[dict[fx.Node, int], list[tuple[fx.Node, list[fx.Node]]], set[fx.Node]]:
    """How many calls stand before each node; the calls, each with the nodes that pick values out of what it returns; and all of these nodes."""
    level: dict[fx.Node, int] = {}
    calls: dict[fx.Node, list[fx.Node]] = {}
    picked: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "output":
            continue
        above = [level[n] + (n.op == "call_module" or n in picked) for n in node.all_input_nodes]
        level[node] = max(above, default=0)
        source = node.args[0] if node.op == "call_function" and node.args and node.target.__name__ == "getitem" else None
        if node.op == "call_module":
            calls[node] = []
        elif isinstance(source, fx.Node) and (source in calls or source in picked):
            call = source
            while call not in calls:
                call = call.args[0]
            calls[call].append(node)
            picked.add(node)
            level[node] = level[call]
    return level, list(calls.items()), picked


def _is_size(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def _segment(
    nodes: list[fx.Node], given: list[fx.Node], again: set[fx.Node], constants: dict, number: int
) -> tuple[Callable, list[str], list[fx.Node]]:
    """The function (attributes, then what it takes) of `nodes`, its attributes, and what it takes: sizes that it reads are found again within it."""
    members, stack = set(), [*nodes, *given]
    while stack:
        node = stack.pop()
        if node not in members:
            members.add(node)
            stack += [n for n in node.all_input_nodes if n in again]
    takes = list(dict.fromkeys(n for node in sorted(members) for n in node.all_input_nodes if n not in members))
    part, mapping = fx.Graph(), {}
    for node in takes:
        mapping[node] = part.placeholder(node.name)
        mapping[node].meta = dict(node.meta)
    for node in sorted(members):
        mapping[node] = part.node_copy(node, lambda n: mapping[n])
    part.output(tuple(mapping[node] for node in given))
    part.lint()
    function, attributes, _ = compile_graph(part, constants, f"segment_{number}")
    return (lambda *tensors: function(None, *tensors)), attributes, takes
