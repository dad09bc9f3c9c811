"""Forward, input gradients and weight gradients of a function as three graphs, by AOTAutograd: once for each structure of its arguments.

The joint graph of forward and backward is cut by AOTAutograd's default partition, so that the forward keeps what autograd would keep, or for
Inductor by the one that it uses. Sizes of inputs are symbols; what tracing found to depend on them is checked at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import sympy
import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._python_dispatch import _disable_current_modes

from ftc.capture.captured import InputSpec, acceptance, tensor_sizes
from ftc.capture.trace import World
from ftc.errors import FtcError
from ftc.pipeline.merge import boxed
from ftc.pipeline.weight_gradients import Halves, halve, shared_results


@dataclass(frozen=True)
class Structure:
    """What one trace holds for, but for sizes of inputs: of each argument dtype, device, whether it asks for a gradient, and whether that is a
    weight's; of attributes also sizes and strides; of inputs the number of dims."""

    attributes: tuple
    inputs: tuple


@dataclass
class Traced:
    """Graphs as functions, and how they are called.

    accepts(inputs): whether they hold for inputs of these sizes. forward(*arguments) -> (results, then what is kept: tensors and sizes).
    backward(*values) -> a gradient or None for each argument. first(*values) -> (the same for inputs alone, values handed on), second([those of `values`
    that `halves.kept` numbers, then what was handed on]) -> the same for weights alone; it empties the list.
    placeholders: what each of `values` is: ("saved", number among what is kept) or ("tangent", number among results with a gradient).
    passed: results that are arguments themselves (result -> argument), which the graph does not give. differentiable: results of the graph that have
    gradients. is_weight: of each argument, whether its gradient is put off. shared: gradients of `backward` that may share memory with something else.
    """

    accepts: Callable[[Sequence[Tensor]], bool]
    forward: Callable
    backward: Callable
    halves: Halves
    first: Callable
    second: Callable
    num_results: int
    passed: dict[int, int]
    differentiable: tuple[int, ...]
    placeholders: tuple[tuple[str, int], ...]
    is_weight: tuple[bool, ...]
    shared: frozenset[int]


def structure_of(attributes: Sequence[Tensor], inputs: Sequence[Tensor]) -> Structure:
    """The structure of a call: cheap, as it is asked at each one."""
    return Structure(
        tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad, is_weight(t)) for t in attributes),
        tuple((t.dim(), t.dtype, t.device, t.requires_grad) for t in inputs),
    )


def is_weight(tensor: Tensor) -> bool:
    """Whether a gradient of an attribute can wait: it is a leaf, so that nothing but `.grad` is behind it."""
    return tensor.requires_grad and tensor.is_leaf


def trace(
    function: Callable[..., Sequence[Tensor]], attributes: Sequence[Tensor], inputs: Sequence[Tensor], dynamic: Sequence[Sequence[bool]],
    compiled: dict | None, what: str,
) -> Traced:  # fmt: skip
    """Trace `function(*attributes, *inputs)` -> tensors.

    `dynamic` marks the dims of inputs that are symbols; `compiled` are options of torch.compile for each of the graphs, None: run as they are;
    `what` names it in errors. Reads no data and mutates nothing. FtcError where the function writes into its arguments, as the halves of its backward
    may then run after another call has written again.
    """
    with _disable_current_modes(), disable_proxy_modes_tracing(), torch.enable_grad():
        world = World.new(duck=False)
        fakes = [_fake_attribute(world, t) for t in attributes]
        fakes += [_fake_input(world, t, dims) for t, dims in zip(inputs, dynamic, strict=True)]
        seen = _Results()

        def fresh(*arguments: Tensor) -> tuple[Tensor, ...]:
            return seen.of(function(*arguments), arguments)

        marks = tuple(is_weight(t) for t in attributes) + (False,) * len(inputs)
        forward, backward, placeholders = _two_graphs(fresh, fakes, seen, _partition(compiled), what)
    halves = halve(backward.graph, marks)
    made = [_compiled(module, compiled) for module in (forward, backward, halves.input)]
    made.append(_emptying(halves.weight, compiled))
    return Traced(
        _acceptance(world, fakes[len(attributes) :]), made[0], made[1], halves, made[2], made[3],
        seen.number, seen.passed, seen.differentiable, placeholders, marks, frozenset(shared_results(backward.graph)),
    )  # fmt: skip


def _fake_attribute(world: World, t: Tensor) -> Tensor:
    with world.mode:
        fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=_device(t))
    return fake.requires_grad_(t.requires_grad)


def _fake_input(world: World, t: Tensor, dynamic: Sequence[bool]) -> Tensor:
    return world.fake([int(s) for s in t.shape], t.dtype, _device(t), dynamic).requires_grad_(t.requires_grad)


def _device(t: Tensor) -> torch.device:
    return torch.device("cpu") if t.device.type == "meta" else t.device


class _Results:
    """What tracing learns of a function's results; those that are left to the graph are given memory of their own."""

    number = 0  # of those that the graph gives
    passed: dict[int, int]  # results that are arguments themselves: which
    differentiable: tuple[int, ...] = ()  # those of the graph that have gradients

    def of(self, results: Sequence[Tensor], arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the graph is to give. Those that are views of an argument or of another result are copied, as a graph's results may not be."""
        places = {id(argument): i for i, argument in enumerate(arguments)}
        self.passed = {i: places[id(r)] for i, r in enumerate(results) if id(r) in places}
        own = [r for i, r in enumerate(results) if i not in self.passed]
        self.number, self.differentiable = len(own), tuple(i for i, r in enumerate(own) if r.requires_grad)
        storages, apart = {t.untyped_storage()._cdata for t in arguments}, []
        for result in own:
            shared = result.untyped_storage()._cdata in storages
            storages.add(result.untyped_storage()._cdata)
            apart.append(result.clone() if shared else result)
        return tuple(apart)


class _Function(nn.Module):
    """A function as AOTAutograd takes it."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        return self.function(*arguments)


def _partition(compiled: dict | None) -> Callable:
    """How the joint graph is cut into forward and backward: for Inductor as it does it itself, which makes again what it can fuse (Zhang et al. 2022)."""
    fuses = compiled is not None and compiled.get("backend", "inductor") == "inductor"
    return min_cut_rematerialization_partition if fuses else default_partition


def _two_graphs(
    function: Callable, fakes: Sequence[Tensor], results: _Results, cut: Callable, what: str
) -> tuple[fx.GraphModule, fx.GraphModule, tuple]:
    """The forward and backward graph, and what each placeholder of the second is."""
    found: list[fx.GraphModule] = []

    def partition(joint: fx.GraphModule, inputs: Sequence, *, num_fwd_outputs: int, **options) -> tuple[fx.GraphModule, fx.GraphModule]:
        if num_fwd_outputs != results.number:  # what is written comes out as a result
            raise FtcError(
                f"{what} writes into its inputs or buffers in the forward pass, so its backward pass cannot be put off in part; use a schedule "
                "that does not split it: GPipe, 1F1B or Interleaved1F1B"
            )
        found.extend(cut(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options))
        return tuple(found)

    aot_module_simplified(_Function(function), fakes, fw_compiler=_as_it_is, bw_compiler=_as_it_is, partition_fn=partition)
    forward, backward = found
    # The partition repeats random operators of the forward without a reader.
    backward.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    backward.recompile()
    given = next(iter(forward.graph.find_nodes(op="output"))).args[0]
    saved = {node.name: i for i, node in reversed(list(enumerate(given[results.number :]))) if isinstance(node, fx.Node)}
    placeholders, tangents = [], 0
    for node in backward.graph.find_nodes(op="placeholder"):
        if node.name.startswith("tangents"):
            placeholders.append(("tangent", tangents))
            tangents += 1
        else:
            placeholders.append(("saved", saved[node.name]))
    return forward, backward, tuple(placeholders)


def _as_it_is(module: fx.GraphModule, _: Sequence) -> Callable:
    return module.forward


def _compiled(module: fx.GraphModule, options: dict | None) -> Callable:
    return module.forward if options is None else torch.compile(module, **options)


def _emptying(module: fx.GraphModule, options: dict | None) -> Callable[[list], Sequence]:
    """A function of one list, which it empties: what the weight half was given is freed behind its last reader."""
    if options is None:
        return boxed(module.graph)
    compiled = torch.compile(module, **options)

    def run(values: list) -> Sequence:
        given = tuple(values)
        values.clear()
        return compiled(*given)

    return run


def _acceptance(world: World, inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], bool]:
    env = world.env
    specs = [InputSpec(f"input_{i}", t.dtype, t.device.type, tensor_sizes(t)) for i, t in enumerate(inputs)]
    free = set().union(*(s.free_symbols for spec in specs for s in spec.sizes if isinstance(s, sympy.Basic)), set())
    guards = list(dict.fromkeys(sympy.sympify(env.simplify(guard.expr)) for guard in env.guards))
    bounds = {symbol: env.var_to_range[symbol] for symbol in free}
    minimum = {symbol: max(2, int(b.lower)) if b.lower.is_finite else 2 for symbol, b in bounds.items()}
    maximum = {symbol: int(b.upper) for symbol, b in bounds.items() if b.upper.is_finite and b.upper < 2**31}
    guards = [guard for guard in guards if guard is not sympy.true]
    return acceptance(SimpleNamespace(inputs=specs, guards=guards, minimum=minimum, maximum=maximum))
