"""A program as one graph: the shell with the graphs of its regions in the place of their calls, for compiling a whole step at once."""

from dataclasses import dataclass

from torch import fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from ftc.capture.code import _hinted
from ftc.capture.program import Program, Region
from ftc.capture.variants import Call, Hole, Variant, take_apart
from ftc.errors import FtcFailure


@dataclass
class FlatGraph:
    """`graph` has the shell's inputs; attributes are named by region and name. `result` is what the program returns, made of nodes of the graph."""

    graph: fx.Graph
    result: object
    constants: dict

    def attributes(self) -> list[str]:
        """Names of what the graph reads beside its inputs, in order of first use."""
        return list(dict.fromkeys(str(node.target) for node in self.graph.nodes if node.op == "get_attr"))


def flatten(program: Program, shell: Variant) -> FlatGraph:
    """The graph of a shell variant without calls; an output node is not set yet."""
    flat = FlatGraph(fx.Graph(), None, {})
    inputs = {}
    for node in shell.captured.graph.nodes:
        if node.op == "placeholder":
            inputs[node] = flat.graph.node_copy(node)
    results = _copy(flat, program, "", shell, inputs)
    flat.result = shell.structured(results)
    return flat


def _copy(flat: FlatGraph, program: Program, prefix: str, variant: Variant, mapping: dict) -> tuple:
    """Add a variant's nodes, its inputs mapped already; what its output node gives."""
    for node in variant.captured.graph.nodes:
        if node.op == "output":
            return fx.node.map_arg(node.args[0], mapping.__getitem__)
        if node in mapping:
            continue
        if node.op == "get_attr":
            name = prefix + str(node.target)
            mapping[node] = flat.graph.get_attr(name)
            mapping[node].meta = dict(node.meta)
            if node.target in variant.captured.constants:
                flat.constants[name] = variant.captured.constants[node.target]
        elif node.op == "call_module":
            mapping[node] = _call(flat, program, node, mapping)
        elif node.op == "call_function" and not isinstance(mapping.get(_first(node)), fx.Node) and _first(node) in mapping:
            mapping[node] = node.target(mapping[_first(node)], *node.args[1:], **node.kwargs)  # picks a result of a region
        else:
            mapping[node] = flat.graph.node_copy(node, mapping.__getitem__)
    raise FtcFailure("a graph ends without an output")


def _first(node: fx.Node):
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _call(flat: FlatGraph, program: Program, node: fx.Node, mapping: dict):
    region: Region = program._regions[node.target]
    args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda a: a.meta["val"] if isinstance(a, fx.Node) else a)
    call = take_apart((tuple(args), dict(kwargs)), tree_flatten, region.ftc_name)
    hinted = [_hinted(t) for t in call.tensors]
    fitting = [v for v in region.code.variants.get(region.code.key(region, call), ()) if v.accepts(hinted)]
    if not fitting:
        raise FtcFailure(f"{region.ftc_name} has no graph for the call that the shell makes of it")
    variant = fitting[0]
    given = _leaves(call, fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda a: a))
    holders = [n for n in variant.captured.graph.nodes if n.op == "placeholder"]
    results = _copy(flat, program, f"{region.ftc_name}.", variant, {h: mapping[n] for h, n in zip(holders, given, strict=True)})
    leaves = [results[leaf.index] if isinstance(leaf, Hole) else leaf for leaf in variant.outputs]
    return tree_unflatten(leaves, variant.out_spec)


def _leaves(call: Call, arguments: tuple) -> list[fx.Node]:
    return [leaf for leaf in tree_flatten((tuple(arguments[0]), dict(arguments[1])))[0] if isinstance(leaf, fx.Node)]
