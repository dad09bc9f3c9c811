"""A captured graph: cleaned, with the conditions under which it holds, and run as one Python function."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx
from torch.utils._sympy.printers import PythonPrinter

from ftc.capture.trace import Trace, World
from ftc.errors import FtcError

_ASSERTIONS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}


@dataclass(frozen=True)
class InputSpec:
    """A tensor input of a graph: its name, dtype, device type and sizes (an int, or an expression of symbols)."""

    name: str
    dtype: torch.dtype
    device: str
    sizes: tuple


@dataclass
class CapturedGraph:
    """A graph of tensors in, tensors out; parameters, buffers and constants are `get_attr` nodes by dotted name.

    `guards` are conditions on sizes; `decisions` is a graph from the same inputs to the scalars that the model decided
    on, and `decided` their values at capture. The graph holds for an input where both agree. `assumed`: tracing took a choice
    as hitting everything (`ftc.capture.hits`).
    """

    graph: fx.Graph
    inputs: list[InputSpec]
    constants: dict[str, torch.Tensor]
    guards: list[sympy.Basic]
    decisions: fx.Graph | None = None
    decided: tuple = ()
    hints: dict[sympy.Symbol, int] = field(default_factory=dict)
    minimum: dict[sympy.Symbol, int] = field(default_factory=dict)
    maximum: dict[sympy.Symbol, int] = field(default_factory=dict)
    assumed: bool = False

    def attributes(self) -> list[str]:
        """Names of the parameters and buffers that the graph reads, in order of first use, constants left out."""
        names = dict.fromkeys(node.target for node in self.graph.nodes if node.op == "get_attr")
        return [name for name in names if name not in self.constants]


def finish(traced: Trace, world: World, names: Sequence[str], num_attributes: int, attributes: Sequence[str]) -> CapturedGraph:
    """Turn a raw trace into a CapturedGraph: the first `num_attributes` placeholders become `get_attr` of `attributes`,
    the others are inputs called `names`; assertions, no-op casts, grad-mode and autocast switches go."""
    graph = traced.graph
    constants = _name_constants(graph, traced.constants, world)
    decisions, decided = _decision_graph(graph, traced.decisions, attributes, names)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first_by_name: dict[str, fx.Node] = {}
    for node, name in zip(placeholders[:num_attributes], attributes, strict=True):
        if not node.users:
            graph.erase_node(node)
            continue
        with graph.inserting_before(placeholders[-1].next if len(placeholders) > num_attributes else node):
            attribute = graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
        first_by_name[name] = attribute
    for node, name in zip(placeholders[num_attributes:], names, strict=True):
        node.target = name
        node._rename(name) if node.name != name else None
    _drop_switches(graph)
    tidy(graph)
    inputs = [
        InputSpec(node.target, node.meta["val"].dtype, node.meta["val"].device.type, tensor_sizes(node.meta["val"]))
        for node in graph.nodes
        if node.op == "placeholder"
    ]
    env = world.env
    free = set().union(*(size.free_symbols for spec in inputs for size in spec.sizes if isinstance(size, sympy.Basic))) if inputs else set()
    hints, minimum, maximum = {}, {}, {}
    for symbol in sorted(free, key=str):
        hints[symbol] = _hint(env, symbol)
        bounds = env.var_to_range[symbol]
        minimum[symbol] = max(2, int(bounds.lower)) if bounds.lower.is_finite else 2
        if bounds.upper.is_finite and bounds.upper < 2**31:
            maximum[symbol] = int(bounds.upper)
    guards = list(dict.fromkeys(sympy.sympify(env.simplify(guard.expr)) for guard in env.guards))
    guards = [guard for guard in guards if guard is not sympy.true]
    return CapturedGraph(graph, inputs, constants, guards, decisions, decided, hints, minimum, maximum, traced.assumed)


def _hint(env, symbol: sympy.Symbol) -> int:
    values = getattr(env, "backed_var_to_val", None) or env.var_to_val  # renamed between torch 2.11 and 2.13
    return int(values[symbol])


def tensor_sizes(value: torch.Tensor) -> tuple:
    """The sizes of a fake tensor: ints, and expressions of symbols."""
    return tuple(s.node.expr if isinstance(s, torch.SymInt) and not s.node.expr.is_number else int(s) for s in value.shape)


def _decision_graph(graph: fx.Graph, decisions, attributes: Sequence[str], names: Sequence[str]):
    if not decisions:
        return None, ()
    wanted = {node for node, _ in decisions}
    stack = list(wanted)
    while stack:
        for parent in stack.pop().all_input_nodes:
            if parent not in wanted:
                wanted.add(parent)
                stack.append(parent)
    new, mapping = fx.Graph(), {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders[len(attributes) :], names, strict=True):
        mapping[node] = new.placeholder(name)
    for node, name in zip(placeholders[: len(attributes)], attributes, strict=True):
        if node in wanted:
            mapping[node] = new.get_attr(name)
    for node in graph.nodes:
        if node in wanted and node not in mapping:
            mapping[node] = new.node_copy(node, lambda n: mapping[n])
    new.output(tuple(mapping[node] for node, _ in decisions))
    return new, tuple(value for _, value in decisions)


def _name_constants(graph: fx.Graph, raw: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    constants = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in raw:
            value = raw[node.target]
            name = f"_constant_{len(constants)}"
            for known, tensor in constants.items():
                if tensor is value:
                    name = known
            constants[name] = value.detach()
            node.target = name
            node.meta["constant"] = value.detach()
            if not isinstance(node.meta.get("val"), torch._subclasses.fake_tensor.FakeTensor):
                node.meta["val"] = world.mode.from_tensor(value.detach(), static_shapes=True)
    return constants


def _drop_switches(graph: fx.Graph) -> None:
    """Remove grad-mode and autocast switches; what was computed without gradients is detached where it is used later."""
    enabled, inside = True, []
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif node.op == "call_function" and not enabled:
            inside.append(node)
        elif node.op == "call_function" and node.target is torch.amp.autocast_mode._enter_autocast:
            if len(node.args) > 2 and node.args[2]:
                raise FtcError("the model enters torch.autocast in its forward, which capture does not support; convert it with .to(dtype)")
    hidden = set(inside)
    for node in inside:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            later = [user for user in node.users if user not in hidden and user.op != "output"]
            if later or any(user.op == "output" for user in node.users):
                with graph.inserting_after(node):
                    detached = graph.call_function(torch.ops.aten.detach.default, (node,))
                detached.meta = dict(node.meta)
                node.replace_all_uses_with(detached, delete_user_cb=lambda user, d=detached: user not in hidden and user is not d)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in (
            torch._C._set_grad_enabled,
            torch.amp.autocast_mode._enter_autocast,
            torch.amp.autocast_mode._exit_autocast,
        ):
            graph.erase_node(node)


def tidy(graph: fx.Graph, keep_random: bool = True) -> None:
    """Remove assertions, casts to the dtype a tensor already has, dropout that is off, and dead code; then lint. In place.

    With `keep_random` unused random operations stay, because they advance the generator as they do in the model.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
        elif _is_same_dtype_cast(node) or _is_dropout_off(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: _has_effect(node, keep_random))
    graph.lint()


def _has_effect(node: fx.Node, keep_random: bool) -> bool:
    """Whether a node must stay though nothing uses it. Region calls and attributes have no effect of their own."""
    return node.op in ("placeholder", "output") or (node.op == "call_function" and node.is_impure(keep_random))


def _is_dropout_off(node: fx.Node) -> bool:
    """aten.dropout returns its input itself when p is 0 or it is not training."""
    return node.target is torch.ops.aten.dropout.default and (node.args[1] == 0 or not node.args[2])


def _is_same_dtype_cast(node: fx.Node) -> bool:
    """A cast that returns its input itself: same dtype and device, no copy asked for."""
    casts = (
        torch.ops.aten.to.dtype,
        torch.ops.aten.to.dtype_layout,
        torch.ops.aten.to.device,
        torch.ops.aten.to.other,
        torch.ops.aten.type_as.default,
    )
    if node.target not in casts:
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    arguments = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    plain = not arguments.get("copy") and arguments.get("memory_format") is None
    return plain and before.dtype == after.dtype and before.device == after.device


def compile_graph(graph: fx.Graph, constants: dict[str, torch.Tensor], name: str) -> tuple[Callable, list[str], str]:
    """Make a plain Python function of a graph: `f(root, *attributes, *inputs)` -> tuple of tensors.

    Returns the function, the names of the attributes it takes in order, and its readable source. `root` is only used by
    `call_module` nodes. Constants travel as attributes too, so that the caller can move them between devices.
    """
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    attributes = list(dict.fromkeys(node.target for node in graph.nodes if node.op == "get_attr"))
    used = {node.name for node in graph.nodes if node.op == "placeholder"}
    slots = {}
    for attribute in attributes:
        parameter = attribute.replace(".", "_")
        parameter = f"_{parameter}" if parameter[0].isdigit() else parameter  # a block may be a Sequential
        while parameter in used:
            parameter += "_"
        used.add(parameter)
        slots[attribute] = copy.placeholder(parameter)
    for node in graph.nodes:
        if node.op == "get_attr":
            mapping[node] = slots[node.target]
        else:
            mapping[node] = copy.node_copy(node, lambda n: mapping[n])
    copy.set_codegen(fx.graph.CodeGen())
    code = copy.python_code("self")
    source = code.src.replace("def forward(", f"def {name}(", 1)
    from ftc.capture.masks import CausalMask

    namespace = dict(code.globals) | {"CausalMask": CausalMask, "torch": torch}
    filename = f"<ftc graph {name} {abs(hash(source)):x}>"
    exec(compile(source, filename, "exec"), namespace)  # our own generated source
    import linecache

    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    return namespace[name], attributes, source


def acceptance(captured: CapturedGraph) -> Callable[[Sequence[torch.Tensor]], bool]:
    """A function that tells whether the graph holds for tensors of these sizes (data decisions are separate)."""
    lines, bound = [], {}
    for position, spec in enumerate(captured.inputs):
        for dim, size in enumerate(spec.sizes):
            actual = f"t[{position}].shape[{dim}]"
            if isinstance(size, sympy.Symbol) and size not in bound:
                bound[size] = actual
    printer = PythonPrinter()
    conditions = []
    for symbol, actual in bound.items():
        lines.append(f"    {symbol} = {actual}")
        conditions.append(f"{symbol} >= {captured.minimum.get(symbol, 2)}")
        if symbol in captured.maximum:
            conditions.append(f"{symbol} <= {captured.maximum[symbol]}")
    for position, spec in enumerate(captured.inputs):
        for dim, size in enumerate(spec.sizes):
            actual = f"t[{position}].shape[{dim}]"
            if isinstance(size, sympy.Basic):
                if bound.get(size) != actual and size.free_symbols <= set(bound):
                    conditions.append(f"{actual} == {printer.doprint(size)}")
            else:
                conditions.append(f"{actual} == {size}")
    for guard in captured.guards:
        if not guard.free_symbols <= set(bound):
            raise FtcError(f"a condition on sizes cannot be checked from the inputs: {guard}")
        conditions.append(f"({printer.doprint(guard)})")
    body = " and ".join(conditions) or "True"
    source = "def accepts(t):\n" + "\n".join(lines) + f"\n    return bool({body})\n"
    import math

    namespace = {"math": math, "torch": torch, "operator": operator}
    exec(source, namespace)  # our own generated source
    return namespace["accepts"]
