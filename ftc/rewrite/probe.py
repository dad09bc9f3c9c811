"""Evaluate a region graph at concrete sizes with random inputs and parameters, and keep every value.

This is what "prove" rests on: a rewrite is accepted when the new nodes give the recorded value of the old ones, and a certificate compares
whole graphs. Lifted evaluation runs in float64 with every pinned dtype lifted too, so that `exact` means equal in real arithmetic.
Randomness: seeded normals for inputs and parameters (norm weights too, never ones), so that no factor hides behind a 1.
"""

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

aten = torch.ops.aten
LIFTED_DTYPES = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
Sizes = dict[sympy.Symbol, int]


# ---------------------------------------------------------------------------------------------------------------- sizes


def shape_env(graph: fx.Graph):
    """The ShapeEnv behind the graph's symbolic sizes, or None where all sizes are static."""
    for node in graph.nodes:
        for size in _sizes_of(node.meta.get("val")):
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    return None


def _sizes_of(val: Any) -> Iterable[Any]:
    if isinstance(val, torch.SymInt):
        return (val,)
    return val.shape if isinstance(val, Tensor) else ()


def symbol_sizes(graph: fx.Graph) -> list[Sizes]:
    """Two assignments of the graph's size symbols that its ranges and guards allow: the hints, then another. Hints of more than a few tokens are
    cut short where that is allowed: sums over many would differ by their order alone.

    A graph without symbols gives `[{}]`; one whose guards leave a single assignment gives that one.
    """
    env = shape_env(graph)
    symbols: dict[sympy.Symbol, None] = {}
    for node in graph.nodes:
        for size in _sizes_of(node.meta.get("val")):
            if isinstance(size, torch.SymInt):
                symbols |= dict.fromkeys(sorted(env.replace(size.node.expr).free_symbols, key=str))
    if not symbols:
        return [{}]
    hinted = getattr(env, "backed_var_to_val", None) or env.var_to_val
    hints = {symbol: int(hinted[symbol]) if symbol in hinted else 4 for symbol in symbols}
    small = {symbol: min(value, 8 + index) for index, (symbol, value) in enumerate(hints.items())}
    few = {symbol: min(value, 12 + index) for index, (symbol, value) in enumerate(hints.items())}
    hints = few if _allowed(env, few) else hints
    choices = random.Random(0)
    tried = itertools.chain(
        ({s: v - 1 for s, v in small.items()}, {s: v + 1 for s, v in small.items()}),
        ({s: choices.randint(2, 3 * v + 2) for s, v in hints.items()} for _ in range(200)),
    )
    other = next((sizes for sizes in tried if sizes != hints and _allowed(env, sizes)), None)
    return [hints] if other is None else [hints, other]


def _allowed(env: Any, sizes: Sizes) -> bool:
    for symbol, value in sizes.items():
        bounds = env.var_to_range.get(symbol)
        if bounds is not None and not (bounds.lower <= value <= bounds.upper):
            return False
    for guard in env.guards:
        held = env.replace(guard.expr).subs(sizes)
        if held is sympy.false:
            return False
    return True


def concrete(value: Any, sizes: Sizes) -> int:
    """The integer that a SymInt (or int) takes under `sizes`."""
    if not isinstance(value, torch.SymInt):
        return int(value)
    expr = value.node.expr
    if expr in sizes:
        return sizes[expr]
    expr = value.node.shape_env.replace(expr)
    return (
        sizes[expr]
        if expr in sizes
        else int(expr.xreplace({symbol: sympy.Integer(size) for symbol, size in sizes.items()}))
    )


# --------------------------------------------------------------------------------------------------------- random values


def constant_value(node: fx.Node) -> Tensor | None:
    """The value of a get_attr node that is no parameter: meta["constant"], or a buffer of the graph's owning module."""
    if isinstance(node.meta.get("constant"), Tensor):
        return node.meta["constant"]
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) and not isinstance(found, torch.nn.Parameter) else None


def _normal(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers; large tensors repeat a block of odd length, so that a real-width region costs memory traffic, not sampling."""
    if dtype.is_complex:
        real = torch.float64 if dtype == torch.complex128 else torch.float32
        return torch.complex(_normal(shape, real, generator), _normal(shape, real, generator)).to(dtype)
    count = torch.Size(shape).numel()
    block = min(count, 1_000_003)
    values = torch.randn(block, generator=generator, dtype=torch.float64).to(dtype)
    if count > block:
        values = values.repeat(-(-count // block))[:count]
    return values.view(shape)


def _random_tensor(
    name: str, shape: list[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        value = _normal(shape, dtype, generator)
    elif dtype == torch.bool:
        value = torch.rand(shape, generator=generator) < 0.6
        if len(shape) >= 2:
            value = (value | torch.eye(shape[-2], shape[-1], dtype=torch.bool)).tril()
    elif "position" in name or not shape:
        value = torch.arange(shape[-1] if shape else 1, dtype=dtype).expand(shape or [1]).reshape(shape).clone()
    else:
        value = torch.randint(0, 2, shape, generator=generator, dtype=torch.int64).to(dtype)
    return value.to(device)


def random_inputs(graph: fx.Graph, sizes: Sizes, seed: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """One random tensor per placeholder, in order. Floats are normal (in `dtype` where given, complex in its width); boolean masks random, lower
    triangular, with the diagonal True; integers are valid positions. Same seed, same values."""
    inputs = []
    for index, node in enumerate(node for node in graph.nodes if node.op == "placeholder"):
        val = node.meta["val"]
        shape = [concrete(size, sizes) for size in val.shape]
        generator = torch.Generator().manual_seed(seed * 1_000 + index)
        inputs.append(_random_tensor(str(node.target), shape, _in_dtype(val.dtype, dtype), val.device, generator))
    return inputs


def _in_dtype(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not (own.is_floating_point or own.is_complex) or own.itemsize == 1:  # codes of quantised weights are not lifted
        return own
    if own.is_complex:
        return torch.complex128 if dtype == torch.float64 else torch.complex64
    return dtype


def random_parameters(
    graph: fx.Graph, seed: int, shapes: dict[str, torch.Size] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A random value per get_attr target (constants keep theirs): matrices normal over the square root of their last dimension,
    vectors normal about 1 so that no norm weight is 1. `shapes` overrides the shapes in meta["val"]."""
    parameters: dict[str, Tensor] = {}
    for index, node in enumerate(node for node in graph.nodes if node.op == "get_attr"):
        name, val = str(node.target), node.meta["val"]
        if name in parameters:
            continue
        own = _in_dtype(val.dtype, dtype)
        constant = constant_value(node)
        if constant is not None:
            parameters[name] = constant.detach().to(own if own.is_floating_point or own.is_complex else constant.dtype)
            continue
        shape = list((shapes or {}).get(name, val.shape))
        generator = torch.Generator().manual_seed(seed * 1_000 + 500 + index)
        value = _random_tensor(name, shape, own, val.device, generator)
        if value.is_floating_point() and value.dtype.itemsize > 1:
            value = value.div_(max(shape[-1], 1) ** 0.5) if len(shape) >= 2 else 1.0 + 0.3 * value
        parameters[name] = value
    return parameters


# ------------------------------------------------------------------------------------------------------------ evaluation


def lift_arguments(value: Any) -> Any:
    """Arguments of a node with every pinned floating dtype replaced by float64 (complex by complex128)."""
    return fx.node.map_aggregate(
        value, lambda leaf: LIFTED_DTYPES.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf
    )


def lift(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph with every pinned floating dtype lifted to float64; meta is kept. Run it under `lifted_defaults()`."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph, mapping)
    copy.output(output)
    for node in copy.nodes:
        node.args, node.kwargs = lift_arguments(node.args), lift_arguments(node.kwargs)
    return copy


@contextlib.contextmanager
def lifted_defaults():
    """float64 as the default dtype, for factory functions that name none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _without_dropout(node: fx.Node, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Attention with its dropout off; a mask in the dtype of the scores."""
    schema = [argument.name for argument in node.target._schema.arguments]
    bound = dict(zip(schema, args, strict=False)) | kwargs
    if "dropout_p" in bound:
        bound["dropout_p"] = 0.0
    positional = [
        argument.name
        for argument in node.target._schema.arguments
        if not argument.kwarg_only and argument.name in bound
    ]
    return tuple(bound.pop(name) for name in positional), bound


def _grouped_mm(
    x: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype=None
) -> Tensor:
    """aten._grouped_mm in any dtype: x [N, D] (or [D, N] for a gradient), weight [E, D, F], offs [E] cumulative rows."""
    if x.dim() == 2 and weight.dim() == 3 and offs is not None:
        starts = [0, *offs.tolist()]
        out = x.new_zeros(x.shape[0], weight.shape[-1])
        parts = [x[a:b] @ weight[e] for e, (a, b) in enumerate(itertools.pairwise(starts))]
        rest = out[starts[-1] :]
        return torch.cat([*parts, rest])
    if x.dim() == 3 and weight.dim() == 3:
        return torch.bmm(x, weight)
    raise NotImplementedError("grouped_mm with this layout")


def call(node: fx.Node, args: tuple, kwargs: dict, lifted: bool) -> Any:
    """Run one call_function node on concrete arguments; dropout is the identity."""
    target = node.target
    if target in (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default):
        return args[0]
    if target is aten.native_dropout.default:
        return args[0], torch.ones_like(args[0], dtype=torch.bool)
    if isinstance(target, torch._ops.OpOverload) and "attention" in target.__name__:
        args, kwargs = _without_dropout(node, args, kwargs)
    if lifted:
        args, kwargs = lift_arguments(args), lift_arguments(kwargs)
        if target is aten._grouped_mm.default:
            return _grouped_mm(*args, **kwargs)
    return target(*args, **kwargs)


def node_values(
    graph: fx.Graph,
    inputs: list[Tensor],
    parameters: dict[str, Tensor],
    lifted: bool = True,
    override: Callable[[fx.Node, tuple, dict], Any] | None = None,
) -> dict[fx.Node, Any]:
    """Every node's value. `override(node, args, kwargs)` may give a node's value itself (anything but NotImplemented)."""
    values: dict[fx.Node, Any] = {}
    remaining = iter(inputs)
    with lifted_defaults() if lifted else contextlib.nullcontext():
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(remaining)
            elif node.op == "get_attr":
                values[node] = parameters[str(node.target)]
            elif node.op == "output":
                values[node] = fx.node.map_arg(node.args[0], values.__getitem__)
            else:
                args = fx.node.map_arg(node.args, values.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
                value = NotImplemented if override is None else override(node, args, kwargs)
                values[node] = call(node, args, kwargs, lifted) if value is NotImplemented else value
    return values


def run(
    graph: fx.Graph, inputs: list[Tensor], parameters: dict[str, Tensor], lifted: bool = True
) -> tuple[Tensor, ...]:
    """The graph's outputs. Differentiable; frees what is no longer needed."""
    last_user: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last_user[used] = node
    values: dict[fx.Node, Any] = {}
    remaining = iter(inputs)
    with lifted_defaults() if lifted else contextlib.nullcontext():
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(remaining)
            elif node.op == "get_attr":
                values[node] = parameters[str(node.target)]
            elif node.op == "output":
                out = fx.node.map_arg(node.args[0], values.__getitem__)
                return tuple(out) if isinstance(out, tuple | list) else (out,)
            else:
                args = fx.node.map_arg(node.args, values.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
                values[node] = call(node, args, kwargs, lifted)
            for used in node.all_input_nodes:
                if last_user[used] is node:
                    values.pop(used, None)
    raise ValueError("the graph has no output node")


def relative_error(value: Tensor, reference: Tensor, scale: float | None = None) -> float:
    """max|value - reference| over max(max|reference|, 1e-3 * scale); `scale` is the largest gradient in the region. NaN matches NaN, and an
    infinity the same infinity; a difference in either, or in shape, is an infinite error."""
    if value.shape != reference.shape:
        return float("inf")
    if reference.numel() == 0:
        return 0.0
    wide = torch.complex128 if reference.is_complex() or value.is_complex() else torch.float64
    value, reference = value.detach().to(wide), reference.detach().to(wide)
    if not (math.isfinite(largest(reference)) and math.isfinite(largest(value))):
        finite = torch.isfinite(reference)
        if not torch.equal(torch.isfinite(value), finite):
            return float("inf")
        if not torch.equal(value[~finite].nan_to_num(nan=1.0), reference[~finite].nan_to_num(nan=1.0)):
            return float("inf")
        value, reference = value[finite], reference[finite]
        if reference.numel() == 0:
            return 0.0
    denominator = max(largest(reference), 1e-3 * (scale or 0.0))
    difference = largest(value - reference)
    return difference / denominator if denominator > 0 else (0.0 if difference == 0 else float("inf"))


def largest(value: Tensor) -> float:
    """max|value|, NaN where there is one, without a copy of a large tensor."""
    if value.is_complex():
        return float(value.abs().max())
    low, high = torch.aminmax(value)
    return max(float(high), -float(low)) if not torch.isnan(high) else float("nan")
