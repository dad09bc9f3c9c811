"""Several graphs made one: what goes in and out of each stays apart, parameters that several read go in once.

    merged(parameters, inputs of F, inputs of B) = (F(parameters, inputs of F), B(parameters, inputs of B))

The graphs keep their order, one behind the other; `ftc.pipeline.interleave` changes it. A lane is the name of a graph ("forward", "backward").
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ftc.errors import FtcError
from ftc.pipeline.merge_trace import Half, Slot, copied

Place = tuple[str | None, Slot]  # lane and slot; the lane of a shared parameter is None


@dataclass
class Merged:
    """One graph of several lanes. `inputs` and `outputs` say what its placeholders and outputs are, in order; `lane` whose each node is (None: shared)."""

    graph: fx.Graph
    inputs: list[Place]
    outputs: list[Place]
    lane: dict[fx.Node, str | None]

    def in_order(self, order: list[fx.Node]) -> Merged:
        """The same graph with its nodes in this order (placeholders first, the output last)."""
        new, mapping = fx.Graph(), {}
        placeholders = self.graph.find_nodes(op="placeholder")
        output = next(iter(self.graph.find_nodes(op="output")))
        rest = [node for node in order if node.op not in ("placeholder", "output")]
        for node in (*placeholders, *rest, output):
            mapping[node] = new.node_copy(node, lambda n: mapping[n])
        new.lint()
        return Merged(new, list(self.inputs), list(self.outputs), {mapping[node]: lane for node, lane in self.lane.items()})

    def boxed(self) -> Callable[[list[Tensor]], tuple]:
        """The graph as a function of one list of tensors, which it empties, so that each is freed behind its last reader; under no_grad."""
        return boxed(copied(self.graph))

    def __call__(self, given: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
        """Run the graph on tensors by place."""
        return dict(zip(self.outputs, self.boxed()([given[place] for place in self.inputs]), strict=True))


def boxed(graph: fx.Graph, owner: nn.Module | None = None) -> Callable[[list[Tensor]], tuple]:
    """See `Merged.boxed`; `owner` has the modules that the graph calls."""
    code = graph.python_code("self")
    head, body = code.src[: code.src.index("def forward(")], code.src[code.src.index("def forward(") :]
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    taken = f"    {', '.join(names)}, = values\n    values.clear()\n" if names else ""
    source = f"{head}def forward(self, values):\n{taken}{body[body.index(chr(10)) + 1 :]}"
    filename = f"<ftc merged graph {abs(hash(source)):x}>"
    namespace = dict(code.globals)
    exec(compile(source, filename, "exec"), namespace)  # our own generated source
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)

    def run(values: list[Tensor]) -> tuple:
        with torch.no_grad():
            return namespace["forward"](owner, values)

    run.source = source
    return run


def merge(halves: Mapping[str, Half], shared: tuple[str, ...] = ("parameter",), links: Mapping[Place, Place] | None = None) -> Merged:
    """One graph of all `halves`, by lane, in the order given. The halves are left as they are.

    An input whose kind is in `shared` goes in once under its slot, for all lanes that have it. `links` gives inputs that are results of an earlier
    lane: (lane, slot) -> (earlier lane, slot). FtcError where a link names what is not there, or a shared input has two shapes or dtypes.
    """
    links = dict(links or {})
    graph, inputs, outputs, lanes = fx.Graph(), [], [], {}
    known: dict[Place, fx.Node] = {}  # inputs and results so far
    mappings: dict[str, dict[fx.Node, fx.Node]] = {}
    for lane, half in halves.items():
        mappings[lane] = {}
        for slot, node in half.placeholders().items():
            place = (None, slot) if slot.kind in shared else (lane, slot)
            if (lane, slot) in links:
                continue
            if place in known:
                _check_alike(slot, known[place], node)
            else:
                known[place] = graph.placeholder(_identifier(place))
                known[place].meta = dict(node.meta)
                lanes[known[place]] = place[0]
                inputs.append(place)
            mappings[lane][node] = known[place]
    results: list = []
    for lane, half in halves.items():
        mapping = mappings[lane]
        for slot, node in half.placeholders().items():
            if (lane, slot) in links:
                source = links.pop((lane, slot))
                if source not in known:
                    raise FtcError(f"{slot} of lane {lane!r} is linked to {source[1]} of {source[0]!r}, which no earlier lane gives")
                mapping[node] = known[source]
        for node in half.graph.nodes:
            if node.op not in ("placeholder", "output"):
                mapping[node] = graph.node_copy(node, lambda n, mapping=mapping: mapping[n])
                lanes[mapping[node]] = lane
        for slot, node in zip(half.outputs, half.results(), strict=True):
            value = mapping[node] if isinstance(node, fx.Node) else node
            known[lane, slot] = value
            outputs.append((lane, slot))
            results.append(value)
    if links:
        raise FtcError(f"there is no input {next(iter(links))[1]} in lane {next(iter(links))[0]!r} to link")
    lanes[graph.output(tuple(results))] = None
    graph.lint()
    return Merged(graph, inputs, outputs, lanes)


def _identifier(place: Place) -> str:
    lane, slot = place
    return "".join(c if c.isalnum() else "_" for c in f"{lane or 'shared'}_{slot.kind}_{slot.key}")


def _check_alike(slot: Slot, a: fx.Node, b: fx.Node) -> None:
    one, two = a.meta["val"], b.meta["val"]
    if one.shape != two.shape or one.dtype != two.dtype:
        raise FtcError(f"{slot} is {one.dtype} {list(one.shape)} in one graph and {two.dtype} {list(two.shape)} in the other; they cannot share it")


def read_once(merged: Merged, pure: frozenset = frozenset()) -> int:
    """Let nodes that compute the same from shared inputs alone be one, in place; returns how many went.

    For gathers of shared parameters (`pure` names their operators) and casts and views of them: a value that both lanes want is made once, and
    held until the second has read it.
    """
    found: dict[tuple, fx.Node] = {}
    gone = 0
    for node in list(merged.graph.nodes):
        operands = node.all_input_nodes
        if node.op != "call_function" or not operands or any(merged.lane[operand] is not None for operand in operands):
            continue
        if not (node.target in pure or _is_pure(node)):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        if key in found:
            node.replace_all_uses_with(found[key])
            merged.graph.erase_node(node)
            del merged.lane[node]
            gone += 1
        else:
            found[key], merged.lane[node] = node, None  # so that what follows from it is met, too
    for node in reversed(found.values()):
        readers = {merged.lane[user] for user in node.users}
        merged.lane[node] = readers.pop() if len(readers) == 1 else None
    return gone


def _is_pure(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and (node.target.is_view or node.target is torch.ops.aten._to_copy.default)
