"""Watching a program run: the values of chosen nodes of its regions' graphs, with their gradients where they are asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ftc.capture.captured import compile_graph
from ftc.capture.program import Program, Region
from ftc.capture.results import output_node
from ftc.capture.variants import Variant

Watch = Callable[[str, list[Tensor]], None]


@contextlib.contextmanager
def observing(program: Program, nodes: Mapping[str, Callable[[Variant], Sequence[str]]], watch: Watch) -> Iterator[None]:
    """Within it, every run of a region named in `nodes` also calls `watch(region, values)` with the values of the nodes that
    `nodes[region](variant)` names, part of autograd's graph as in any run. Restores `around` at the end."""
    before = {name: program._regions[name].around for name in nodes}
    functions: dict[tuple[str, int], tuple] = {}

    def around(region: Region, names):
        def run(_, args, kwargs):
            variant, tensors = region.code.find(region, args, kwargs)
            place = region.ftc_name, id(variant)
            if place not in functions:
                functions[place] = (*_with_values(variant, names(variant)), variant)
            function, attributes, count, _ = functions[place]
            results = function(None, *variant.attribute_values(attributes, region.fetch, tensors), *tensors)
            watch(region.ftc_name, list(results[count:]))
            return variant.structured(results[:count])

        return run

    try:
        for name, names in nodes.items():
            program._regions[name].around = around(program._regions[name], names)
        yield
    finally:
        for name, function in before.items():
            program._regions[name].around = function


def _with_values(variant: Variant, names: Sequence[str]):
    """A function of the variant's graph that also returns the nodes called `names`, the attributes it takes, and the number of own results."""
    from ftc.rewrite.pipeline import copy_graph

    graph = copy_graph(variant.captured.graph)
    by_name = {node.name: node for node in graph.nodes}
    output = output_node(graph)
    results = list(output.args[0])
    output.args = ([*results, *(by_name[name] for name in names)],)
    function, attributes, _ = compile_graph(graph, variant.captured.constants, f"{variant.name}_observed")
    return function, attributes, len(results)


@contextlib.contextmanager
def no_trained_parameters(program: torch.nn.Module) -> Iterator[None]:
    """Within it no parameter takes a gradient, so that a backward pass keeps and makes only what activations need; eval mode."""
    trained = [p for p in program.parameters() if p.requires_grad]
    training = program.training
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        program.eval()
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        program.train(training)
