"""The results of a graph: those that the call returns, and further ones by name that passes added (its *extras*).

A graph ends in `output((a, b, c), mtp_loss_1=2)`: the keywords name places among the results. An ordinary call computes only
what its own results need; `Program.with_extras` computes all of them.
"""

from collections.abc import Collection, Iterable, Mapping

from torch import fx


def output_node(graph: fx.Graph) -> fx.Node:
    """The node that a graph ends in."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def extras(graph: fx.Graph) -> dict[str, int]:
    """The places of the results that have names."""
    return dict(output_node(graph).kwargs)


def add_results(graph: fx.Graph, named: Mapping[str, fx.Node]) -> dict[str, int]:
    """Append results under names, in place; returns where each stands."""
    output = output_node(graph)
    count = len(output.args[0])
    places = {name: count + number for number, name in enumerate(named)}
    output.args, output.kwargs = ([*output.args[0], *named.values()],), {**output.kwargs, **places}
    return places


def name_result(graph: fx.Graph, name: str, place: int) -> None:
    """Give the result at `place` a name too, in place."""
    output = output_node(graph)
    output.kwargs = {**output.kwargs, name: place}


def drop_results(graph: fx.Graph, dropped: Collection[int]) -> None:
    """Take the results at these places away, with their names."""
    output = output_node(graph)
    kept = [node for place, node in enumerate(output.args[0]) if place not in dropped]
    output.kwargs = renumbered(output.kwargs, dropped)
    output.args = (kept,)


def renumbered(places: Mapping[str, int], dropped: Collection[int]) -> dict[str, int]:
    """Named places after the results at `dropped` went."""
    return {name: place - sum(d < place for d in dropped) for name, place in places.items() if place not in dropped}


def pruned(graph: fx.Graph, wanted: Iterable[int]) -> tuple[fx.Graph, dict[int, int]]:
    """A graph that computes only the results at the places `wanted`, and where each of them stands in it.

    The graph itself where all are wanted. Random operations stay, as they advance the generator.
    """
    places = sorted(set(wanted))
    results = output_node(graph).args[0]
    if len(places) == len(results):
        return graph, {place: place for place in places}
    new, mapping = fx.Graph(), {}
    for node in graph.nodes:
        if node.op == "output":
            new.output(tuple(mapping[results[place]] for place in places))
        else:
            mapping[node] = new.node_copy(node, lambda n: mapping[n])
    from ftc.capture.captured import tidy

    tidy(new)
    return new, {place: number for number, place in enumerate(places)}
