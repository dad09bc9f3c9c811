"""`torch.compile(model, backend="ftc", options={"passes": [...]})`: passes inside torch.compile, parameters kept.

Dynamo hands over a graph whose parameters are inputs; it is traced to the graph format of ftc, the passes are applied, each
with its certificate, and what comes out goes to Inductor. A pass that would change parameters is refused, since the model
that torch.compile returns shares them with the eager one: `ftc.rewrite` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from ftc.capture.captured import CapturedGraph, finish
from ftc.capture.trace import World, trace
from ftc.capture.variants import Hole
from ftc.errors import FtcError, nearest

if TYPE_CHECKING:
    from ftc.rewrite.registry import Request

OPTIONS = ("passes", "inner", "check")
INNER = ("inductor", "aot_eager", "eager")


def ftc_backend(
    gm: fx.GraphModule, example_inputs: Sequence[object], options: dict | None = None, **kwargs
) -> Callable:
    """Rewrite a Dynamo graph by passes and compile the result; returns the compiled function.

    `options`: "passes" (as in `ftc.rewrite`, [] by default), "inner" (what compiles the result: "inductor", "aot_eager" or
    "eager"), "check" (False skips the certificates). Raises FtcError for unknown options, and for a pass that would change
    parameters or drop outputs.
    """
    from ftc.rewrite.registry import parse_passes

    options = {**kwargs, **(options or {})}
    for name in options:
        if name not in OPTIONS:
            raise FtcError(f'backend "ftc" has no option {name!r}; {nearest(name, OPTIONS)}')
    inner = options.get("inner", "inductor")
    if inner not in INNER:
        raise FtcError(f'backend "ftc": inner = {inner!r} is not valid; {nearest(str(inner), INNER)}')
    requests = parse_passes(options["passes"]) if options.get("passes") else []
    module = _rewritten(gm, example_inputs, requests, options.get("check", True)) if requests else gm
    return _compile(module, example_inputs, inner)


def _rewritten(gm: fx.GraphModule, example_inputs: Sequence[object], requests: list, check: bool) -> fx.GraphModule:
    """`gm` with the passes applied: same inputs in the same order, same outputs."""
    from ftc.rewrite.registry import make

    captured, outputs = _traced(gm, example_inputs)
    graph = captured.graph
    done: set[str] = set()
    for request in requests:
        for name in getattr(request.pass_, "requires", ()):
            if name not in done:
                graph = _applied(make(name, {"expect": "any"}), graph, check)
                done.add(name)
        graph = _applied(request, graph, check)
        done.add(request.name)
    return _module(graph, captured.constants, gm, outputs)


def _applied(request: Request, graph: fx.Graph, check: bool) -> fx.Graph:
    """The graph after one pass. FtcError when it changes parameters or does not find what is expected of it."""
    from ftc.rewrite import pipeline

    graph, outcome, _ = pipeline.apply_to_graph(request, graph, "the graph from Dynamo", check=check)
    if outcome.lenses or outcome.dropped or outcome.regions or outcome.gone:
        raise FtcError(
            f"pass {request.name} changes the model's parameters, which torch.compile cannot do; apply it with "
            f"ftc.rewrite(model, [{request.name!r}], example=...) and call .compile() on the program"
        )
    found = len(outcome.matches) + outcome.already
    expect = request.expect
    kept = {"any": True, "some": found > 0, "all": found > 0 and not outcome.misses}.get(expect, found == expect)
    if not kept:
        miss = outcome.misses[0] if outcome.misses else None
        near = f"nearest miss: {miss.reason} ({miss.location})" if miss else "nothing in the graph resembles one"
        raise FtcError(
            f"pass {request.name} expected {expect} sites in a graph from Dynamo and found {found}; {near}. Set expect = "
            '"any" to go on without, as a model with graph breaks needs, where not every graph has a site'
        )
    return graph


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _traced(gm: fx.GraphModule, example_inputs: Sequence[object]) -> tuple[CapturedGraph, list[object]]:
    """The graph format of ftc for `gm` over Dynamo's own symbols, and the leaves of its result (Hole or a plain value).

    Assumptions on sizes that tracing makes go to Dynamo's ShapeEnv, and so become guards.
    """
    nodes = _placeholders(gm)
    fakes = [node.meta["example_value"] for node in nodes]
    tensors = [i for i, fake in enumerate(fakes) if isinstance(fake, torch.Tensor)]
    is_parameter = {i: isinstance(example_inputs[i], torch.nn.Parameter) for i in tensors}
    order = sorted(tensors, key=lambda i: not is_parameter[i])  # parameters first
    mode = next(fakes[i].fake_mode for i in tensors)
    world = World(mode.shape_env, mode)
    leaves: list[object] = []

    def function(*flat, tracer):
        given = dict(zip(order, flat, strict=True))
        sizes = {size.node.expr: size for value in flat for size in value.shape if isinstance(size, torch.SymInt)}
        arguments = [given[i] if i in given else _same_size(fake, sizes) for i, fake in enumerate(fakes)]
        results = gm(*arguments)
        out: list[torch.Tensor] = []
        for leaf in results:
            leaves.append(Hole(len(out)) if isinstance(leaf, torch.Tensor) else leaf)
            if isinstance(leaf, torch.Tensor):
                out.append(leaf)
        return out

    raw = trace(function, world, [fakes[i] for i in order], [_scalar(nodes[i]) for i in order])
    names = [nodes[i].name for i in order]
    num_parameters = sum(is_parameter.values())
    return finish(raw, world, names[num_parameters:], num_parameters, names[:num_parameters]), leaves


def _scalar(node: fx.Node) -> torch.Tensor | None:
    """The value of an input that stands for a Python float, which becomes a constant (with a guard); None for tensors."""
    for user in node.users:
        value = user.meta.get("example_value")
        if user.target == "item" and isinstance(value, (torch.SymFloat, torch.SymInt)):
            kind = float if isinstance(value, torch.SymFloat) else int
            return torch.tensor(kind(value), dtype=node.meta["example_value"].dtype)
    return None


def _same_size(value: object, sizes: dict) -> object:
    """The traced size that stands for a size given as an input of its own; other values as they are."""
    return sizes.get(value.node.expr, value) if isinstance(value, torch.SymInt) else value


def _module(
    graph: fx.Graph, constants: dict[str, torch.Tensor], gm: fx.GraphModule, leaves: Sequence[object]
) -> fx.GraphModule:
    """A module with the inputs and outputs of `gm` that runs `graph`."""
    root, new = torch.nn.Module(), fx.Graph()
    inputs, sizes = {}, {}
    for node in _placeholders(gm):
        placeholder = inputs[node.name] = new.placeholder(node.name)
        placeholder.meta = dict(node.meta)
        if hasattr(node, "_dynamo_source"):
            placeholder._dynamo_source = node._dynamo_source
        value = node.meta["example_value"]
        if isinstance(value, torch.SymInt):
            sizes[value.node.expr] = placeholder
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or (node.op == "get_attr" and node.target in inputs):
            mapping[node] = inputs[node.target]
        elif node.op == "get_attr":
            if not hasattr(root, node.target):
                root.register_buffer(node.target, constants[node.target], persistent=False)
            mapping[node] = new.get_attr(node.target)
        elif node.op == "output":
            tensors = [mapping[n] for n in node.args[0]]
            new.output(tuple(_result(leaf, tensors, sizes) for leaf in leaves))
        else:
            mapping[node] = new.node_copy(node, lambda n: mapping[n])
    new.lint()
    module = fx.GraphModule(root, new)
    module.meta = dict(gm.meta)
    return module


def _result(leaf: object, tensors: Sequence[fx.Node], sizes: dict) -> object:
    if isinstance(leaf, Hole):
        return tensors[leaf.index]
    if isinstance(leaf, torch.SymInt):
        if leaf.node.expr in sizes:
            return sizes[leaf.node.expr]
        raise FtcError(
            f'backend "ftc": the graph returns a computed size ({leaf}), which is not supported; return tensors'
        )
    return leaf


def _compile(module: fx.GraphModule, example_inputs: Sequence[object], inner: str) -> Callable:
    if inner == "eager":
        return module.forward
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(module, example_inputs)
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(module, example_inputs)
