"""One shell graph cut into the graphs of stages: what each computes, what crosses from one to the next.

A node is *free* where it can be had on every stage: it depends on the program's inputs, buffers and constants alone, or on parameters
alone (the latter's gradient is then summed over the stages that hold the parameter). Free nodes are computed wherever they are used.
Every other node stands on one stage, as late as its users allow:

    stage(call of a region) = the region's stage        stage(result) = the last        stage(n) = min over users u of stage(u)

so the lookup of the embedding is on the first stage, norm and head are on the last, and a lookup that only the last stage uses (multi-token
prediction) is there; but for nodes that read no parameters and send less from an earlier stage (`cut_cheapest`). A value crosses every cut
between its stage and its last user; what stages in between do not use they pass on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from ftc.capture.results import output_node
from ftc.errors import FtcError
from ftc.pipeline.cut_cheapest import send_less
from ftc.rewrite.edit import is_parameter

aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """One stage's graph: its placeholders are what crosses into it, in the order of `takes`, then all inputs of the program.

    It ends in the values that cross to the next stage, in the order of `gives` (names of nodes of the shell graph), on the last stage in
    the results of the shell graph. `takes_values` and `gives_values` are their fake tensors: shapes in the program's symbols, and dtypes.
    """

    graph: fx.Graph
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    takes_values: tuple[torch.Tensor, ...]
    gives_values: tuple[torch.Tensor, ...]


def cut_graph(graph: fx.Graph, stage_of: Mapping[str, int], num_stages: int, parameters: Iterable[str]) -> list[Piece]:
    """The pieces of a shell graph, one a stage. `stage_of` gives the stage of each region by name; `parameters` are the names of
    attributes that are trained (other attributes are buffers and constants). `graph` is left as it is.

    Raises FtcError where the regions' order of calls contradicts the order of the stages, where a value that is no tensor would have to
    cross, and where the graph writes in place into what several stages may see.
    """
    from ftc.rewrite.pipeline import copy_graph

    graph = copy_graph(graph)
    _without_mutation(graph)
    parameters = set(parameters)
    _sizes_from_inputs(graph, parameters)
    free = _free(graph, parameters)
    place = _places(graph, free, stage_of, num_stages)
    send_less(graph, place, _fixed(graph, place, free, parameters), num_stages)
    crossing = _crossing(graph, free, place, num_stages)
    return [_piece(graph, free, place, crossing, stage, num_stages) for stage in range(num_stages)]


def _without_mutation(graph: fx.Graph) -> None:
    """Functional twins for in-place operations, in place. FtcError where one is left."""
    from ftc.rewrite.functional import functionalise, is_mutation

    if not any(is_mutation(node) for node in graph.nodes):
        return
    functionalise(graph)
    left = next((node for node in graph.nodes if is_mutation(node)), None)
    if left is not None:
        raise FtcError(
            f"the code between the regions writes in place ({left.name} = {left.target} of {left.args[0]}), and what it writes into may be "
            "read on several stages; such a program cannot be cut"
        )


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _reach(graph: fx.Graph, parameters: set[str]) -> dict[fx.Node, tuple[bool, bool, bool]]:
    """What each node depends on: (inputs, parameters, results of regions or random numbers)."""
    reach: dict[fx.Node, tuple[bool, bool, bool]] = {}
    for node in graph.nodes:
        own = (node.op == "placeholder", is_parameter(node) and node.target in parameters, node.op == "call_module" or _is_random(node))
        reach[node] = tuple(any(column) for column in zip(own, *(reach[parent] for parent in node.all_input_nodes), strict=True))
    return reach


def _free(graph: fx.Graph, parameters: set[str]) -> set[fx.Node]:
    """The nodes that every stage can compute for itself."""
    reach = _reach(graph, parameters)
    return {node for node, (inputs, trained, fixed) in reach.items() if node.op != "output" and not fixed and not (inputs and trained)}


def _fixed(graph: fx.Graph, place: Mapping[fx.Node, int], free: set[fx.Node], parameters: set[str]) -> set[fx.Node]:
    """The nodes that stay where their users want them: calls of regions, random numbers, the results, and what reads parameters."""
    reach = _reach(graph, parameters)
    reads = {node for node in place if any(parent in free and reach[parent][1] for parent in node.all_input_nodes)}
    return reads | {node for node in place if node.op in ("call_module", "output") or _is_random(node)}


def _sizes_from_inputs(graph: fx.Graph, parameters: set[str]) -> None:
    """Read sizes off the program's inputs where they are read off something that stands on one stage, in place."""
    free = _free(graph, parameters)
    sources = {}
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(value := node.meta.get("val"), torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                    sources.setdefault(size.node.expr, (node, dim))
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or node in free or not isinstance(value, torch.SymInt) or not value.node.expr.free_symbols <= set(sources):
            continue
        with graph.inserting_before(node):
            size = _emit(graph, value.node.expr, sources)
        if size is not None:
            node.replace_all_uses_with(size)
            graph.erase_node(node)


def _emit(graph: fx.Graph, expression: sympy.Expr, sources: Mapping[sympy.Symbol, tuple[fx.Node, int]]):
    """A node (or int) for a size made of sums and products of the inputs' sizes; None for other expressions."""
    import operator

    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        node, dim = sources[expression]
        size = graph.call_function(aten.sym_size.int, (node, dim))
        size.meta["val"] = node.meta["val"].shape[dim]
        return size
    if not (expression.is_Add or expression.is_Mul):
        return None
    terms = [_emit(graph, term, sources) for term in expression.args]
    if None in terms:
        return None
    combine = operator.add if expression.is_Add else operator.mul
    result = terms[0]
    for term in terms[1:]:
        values = [t.meta["val"] if isinstance(t, fx.Node) else t for t in (result, term)]
        result = graph.call_function(combine, (result, term))
        result.meta["val"] = combine(*values)
    return result


def _places(graph: fx.Graph, free: set[fx.Node], stage_of: Mapping[str, int], num_stages: int) -> dict[fx.Node, int]:
    """The stage of every node that is not free and leads to a result. FtcError where a region is called after one of a later stage."""
    place: dict[fx.Node, int] = {output_node(graph): num_stages - 1}
    for node in reversed(list(graph.nodes)):
        if node.op == "output" or node in free:
            continue
        wanted = [place[user] for user in node.users if user in place]
        if not wanted:
            continue  # dead: nothing that is returned depends on it
        place[node] = min(wanted)
        if node.op == "call_module":
            own = stage_of[node.target]
            if own > min(wanted):
                raise FtcError(_wrong_order(node, own, place, stage_of))
            place[node] = own
        if not isinstance(node.meta.get("val"), torch.Tensor):
            _keep_parts(node, place)
    return place


def _keep_parts(node: fx.Node, place: dict[fx.Node, int]) -> None:
    """What picks tensors out of a structure stands where the structure is made, as only tensors cross."""
    import operator

    for user in node.users:
        if user.target is operator.getitem and user in place:
            place[user] = place[node]
            if not isinstance(user.meta.get("val"), torch.Tensor):
                _keep_parts(user, place)


def _wrong_order(node: fx.Node, own: int, place: Mapping[fx.Node, int], stage_of: Mapping[str, int]) -> str:
    """Which region of an earlier stage needs the region that `node` calls."""
    stack, seen = list(node.users), set()
    while stack:
        user = stack.pop()
        if user in seen or user not in place or place[user] >= own:
            continue
        seen.add(user)
        if user.op == "call_module":
            return (
                f"region {node.target} would be on stage {own}, but {user.target} on stage {stage_of[user.target]} needs its result; "
                "choose bounds that keep both on one stage, or in the order in which they are called"
            )
        stack += list(user.users)
    raise AssertionError(f"{node.name} is needed before stage {own}, by no region")


def _crossing(graph: fx.Graph, free: set[fx.Node], place: Mapping[fx.Node, int], num_stages: int) -> list[list[fx.Node]]:
    """The nodes that cross each cut, in the order of the graph: cut c is between stages c and c + 1."""
    crossing: list[list[fx.Node]] = [[] for _ in range(num_stages - 1)]
    for node in graph.nodes:
        if node not in place or node in free:
            continue
        last = max((place[user] for user in node.users if user in place), default=place[node])
        if last > place[node] and not isinstance(node.meta.get("val"), torch.Tensor):
            raise FtcError(
                f"{node.name} ({node.target}) is a {type(node.meta.get('val')).__name__}, made on stage {place[node]} from what stands there and "
                f"used on stage {last}; only tensors cross from stage to stage. Choose bounds that keep both on one stage"
            )
        for cut in range(place[node], last):
            crossing[cut].append(node)
    return crossing


def _piece(graph: fx.Graph, free, place, crossing: list[list[fx.Node]], stage: int, num_stages: int) -> Piece:
    entering = crossing[stage - 1] if stage else []
    leaving = crossing[stage] if stage < num_stages - 1 else []
    output = output_node(graph)
    own = {node for node, where in place.items() if where == stage and node is not output}
    wanted = _needed(own, list(output.args[0]) if stage == num_stages - 1 else [], free)
    new, mapping = fx.Graph(), {}
    for node in entering:
        mapping[node] = new.placeholder(f"crossing_{node.name}")
        mapping[node].meta = dict(node.meta)
    for node in graph.nodes:
        if node.op == "placeholder" or node in own or node in wanted:
            mapping[node] = new.node_copy(node, lambda n: mapping[n])
    if stage == num_stages - 1:
        new.output(tuple(mapping[node] for node in output.args[0]), None)
        output_node(new).kwargs = dict(output.kwargs)
    else:
        new.output(tuple(_passed_on(new, mapping[node]) if node in entering else mapping[node] for node in leaving))
    new.lint()
    return Piece(
        new,
        tuple(node.name for node in entering),
        tuple(node.name for node in leaving),
        tuple(node.meta["val"] for node in entering),
        tuple(node.meta["val"] for node in leaving),
    )


def _passed_on(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What a stage only hands on, as a result of its own: a schedule that splits the backward pass asks each result for its gradient function."""
    alias = graph.call_function(aten.alias.default, (node,))
    alias.meta = dict(node.meta)
    return alias


def _needed(own: Iterable[fx.Node], results: Iterable[fx.Node], free: set[fx.Node]) -> set[fx.Node]:
    """The free nodes that nodes of a stage, or results, are made from."""
    found: set[fx.Node] = set()
    stack = [parent for node in own for parent in node.all_input_nodes] + list(results)
    while stack:
        node = stack.pop()
        if node in free and node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found
