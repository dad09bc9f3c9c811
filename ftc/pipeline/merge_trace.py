"""The forward and the backward graph of a region, a stage or any function, with a name for each thing that goes in and out.

    results, saved  = forward(parameters, inputs)
    gradients       = backward(parameters, saved, gradients of the results)

The joint graph is AOTAutograd's (flat, functional ATen operators), cut by its default partition: what autograd would keep is kept. Two things differ.
Values that follow from parameters alone by views are made again in the backward graph and not kept, so that a gathered parameter can be dropped
in between; and what the partition repeats in the backward graph without a reader is left out.

Sizes are those of the example: a pipeline's microbatches have one size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from ftc.errors import FtcError


@dataclass(frozen=True)
class Slot:
    """What goes in or out of a graph: kind "parameter" (key: its name), "input", "result", "saved", "gradient" (of a result, by number),
    "parameter gradient" (by name) or "input gradient" (by number). A parameter that ranks share: "shard" and "shard gradient"."""

    kind: str
    key: str | int

    def __str__(self) -> str:
        return f"{self.kind} {self.key}"


@dataclass
class Half:
    """A graph of tensors whose placeholders are `inputs` and whose outputs are `outputs`, in order."""

    graph: fx.Graph
    inputs: list[Slot]
    outputs: list[Slot]

    def __post_init__(self):
        placeholders = self.graph.find_nodes(op="placeholder")
        assert len(placeholders) == len(self.inputs), f"{len(placeholders)} placeholders, {len(self.inputs)} names"
        assert len(self.results()) == len(self.outputs), f"{len(self.results())} outputs, {len(self.outputs)} names"

    def placeholders(self) -> dict[Slot, fx.Node]:
        return dict(zip(self.inputs, self.graph.find_nodes(op="placeholder"), strict=True))

    def results(self) -> list:
        """The nodes (or None) that the graph returns."""
        return list(next(iter(self.graph.find_nodes(op="output"))).args[0])

    def __call__(self, given: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
        """Run the graph as it is, under no_grad."""
        with torch.no_grad():
            values = fx.Interpreter(fx.GraphModule(nn.Module(), self.graph)).run(*(given[slot] for slot in self.inputs))
        return dict(zip(self.outputs, values, strict=True))

    def copy(self) -> Half:
        return Half(copied(self.graph), list(self.inputs), list(self.outputs))


@dataclass
class Traced:
    """Forward and backward of one function at one size. `num_saved` tensors go from one to the other."""

    forward: Half
    backward: Half
    num_results: int
    num_saved: int


def trace(
    function: Callable[..., Sequence[Tensor]],
    parameters: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    differentiable: Sequence[int] = (),
) -> Traced:
    """The two graphs of `function(parameters by name, *inputs) -> tensors`, at the sizes of the (real, fake or meta) tensors given.

    Parameters that require gradients get one, and the inputs numbered in `differentiable`. Nothing is computed or mutated. FtcError where the function
    changes its inputs, returns one of them, or needs a value that only data tell.
    """
    names = list(parameters)
    leaves = [parameters[name].detach().requires_grad_(parameters[name].requires_grad) for name in names]
    leaves += [x.detach().requires_grad_(i in differentiable) for i, x in enumerate(inputs)]
    wanted = [x.requires_grad for x in leaves]
    if not any(wanted):
        raise FtcError("nothing of this function wants a gradient: no parameter requires one, and no input is named in `differentiable`")

    def flat(*values):
        # An unsafe view keeps AOTAutograd from treating a result that is a view as one; it is taken out again below.
        results = function(dict(zip(names, values, strict=False)), *values[len(names) :])
        return [torch.ops.aten._unsafe_view.default(x, x.shape) for x in results]

    sources = [Slot("parameter", name) for name in names] + [Slot("input", i) for i in range(len(inputs))]
    return _halves(*_partitioned(flat, leaves), sources, leaves)


def _partitioned(flat: Callable, leaves: list[Tensor]) -> tuple[fx.Graph, fx.Graph, list[bool]]:
    """Forward and backward graph, and which of the function's results have a gradient."""
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import default_partition
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )

    found: list = []

    def partition(joint, inputs, *, num_fwd_outputs, **options):
        pair = default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)
        found.append((*(copied(module.graph) for module in pair), num_fwd_outputs))
        return pair

    mode = torch._guards.detect_fake_mode(leaves) or FakeTensorMode(allow_non_fake_inputs=True)
    as_it_is = lambda module, _: module  # noqa: E731 - nothing is compiled: the graphs are what is wanted
    with mode, torch.enable_grad():
        fakes = [x if isinstance(x, FakeTensor) else mode.from_tensor(x) for x in leaves]
        try:
            results = aot_function(flat, as_it_is, as_it_is, partition)(*fakes)
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise FtcError(
                f"a stage's sizes or values depend on data ({error.func}), which a merged graph cannot hold; a loop over the tokens of each expert "
                "is one operator after the pass raise-moe"
            ) from error
    forward, backward, num_results = found[0]
    if num_results != len(results):
        raise FtcError("a stage that changes its inputs in place cannot be merged with another; make it functional")
    return forward, backward, [x.requires_grad for x in results]


def copied(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes and what is known of them."""
    new, mapping = fx.Graph(), {}
    new.output(new.graph_copy(graph, mapping))
    for old, node in mapping.items():
        node.meta = dict(old.meta)
    return new


def _halves(forward: fx.Graph, backward: fx.Graph, trained: list[bool], sources: list[Slot], leaves: list[Tensor]) -> Traced:
    num_results = len(trained)
    by_name = {node.name: slot for node, slot in zip(forward.find_nodes(op="placeholder"), sources, strict=True)}
    _drop_repeated(backward, {node.name for node in forward.nodes})
    outputs = list(next(iter(forward.find_nodes(op="output"))).args[0])
    saved = outputs[num_results:]
    parameters = {node for node in forward.find_nodes(op="placeholder") if by_name[node.name].kind == "parameter"}
    _remake_views(forward, backward, saved, parameters)
    received = backward.find_nodes(op="placeholder")
    names = {p.name for p in received}
    kept = [node for node in dict.fromkeys(saved) if node.name in names and node not in parameters]
    index = {node.name: Slot("saved", i) for i, node in enumerate(kept)}
    tangents = [p for p in received if p.name not in index and p.name not in by_name]
    numbers = [i for i, wanted in enumerate(trained) if wanted]
    index |= {p.name: Slot("gradient", i) for p, i in zip(tangents, numbers, strict=True)}
    _return(forward, [*(_bare(node) for node in outputs[:num_results]), *kept])
    asked = list(next(iter(backward.find_nodes(op="output"))).args[0])
    found = [(n, Slot(f"{s.kind} gradient", s.key)) for n, s, x in zip(asked, sources, leaves, strict=True) if x.requires_grad]
    _return(backward, [node for node, _ in found])
    for graph in (forward, backward):
        graph.eliminate_dead_code(is_impure_node=_keeps)
        graph.lint()
    return Traced(
        Half(forward, sources, [Slot("result", i) for i in range(num_results)] + [Slot("saved", i) for i in range(len(kept))]),
        Half(backward, [index.get(p.name) or by_name[p.name] for p in received], [slot for _, slot in found]),
        num_results,
        len(kept),
    )


def _bare(node: fx.Node) -> fx.Node:
    """A result without the unsafe view around it."""
    return node.args[0] if node.target is torch.ops.aten._unsafe_view.default else node


def _keeps(node: fx.Node) -> bool:
    """Whether a node stays though nothing reads it: it writes to what it is given, or moves the random generator on."""
    return node.op in ("placeholder", "output") or (node.op == "call_function" and node.is_impure())


def _drop_repeated(backward: fx.Graph, names: set[str]) -> None:
    """Remove what the partition copied from the forward graph for its effect alone (an operator that may draw random numbers) and nobody reads."""
    for node in reversed(list(backward.nodes)):
        if node.op == "call_function" and not node.users and node.name in names:
            backward.erase_node(node)


def _remake_views(forward: fx.Graph, backward: fx.Graph, saved: list[fx.Node], parameters: set[fx.Node]) -> None:
    """Where a saved value is a view of a parameter, let the backward graph take the parameter and make the view."""
    received = {node.name: node for node in backward.find_nodes(op="placeholder")}
    first = next(node for node in backward.nodes if node.op != "placeholder")
    for value in saved:
        chain, node = [], value
        while node not in parameters and is_view(node) and len(node.all_input_nodes) == 1:
            chain.append(node)
            node = node.all_input_nodes[0]
        if node not in parameters or not chain or value.name not in received:
            continue
        if node.name not in received:
            with backward.inserting_before(next(iter(backward.nodes))):
                received[node.name] = backward.placeholder(node.name)
            received[node.name].meta = dict(node.meta)
        old, made = received.pop(value.name), {node: received[node.name]}
        with backward.inserting_before(first):
            for link in reversed(chain):
                made[link] = backward.node_copy(link, lambda n, made=made: made[n])
        old.replace_all_uses_with(made[value])
        backward.erase_node(old)


def is_view(node: fx.Node) -> bool:
    """Whether a node's value shares memory with its operand by the operator's schema."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _return(graph: fx.Graph, values: list) -> None:
    output = next(iter(graph.find_nodes(op="output")))
    output.args = (tuple(values),)
    output.meta.pop("desc", None)


def node_bytes(node: fx.Node) -> int:
    """Bytes of a node's tensors by their sizes."""
    leaves = tree_flatten(node.meta.get("val"))[0]
    return sum(int(v.numel()) * v.element_size() for v in leaves if isinstance(v, Tensor))


def is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem
