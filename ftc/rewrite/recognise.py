"""What the raise passes know of one graph: what each node depends on, its value on random inputs, and how to add nodes that are proved equal.

A raise pass makes a hypothesis (this node is rms_norm of that one with this eps), builds the canonical nodes, and keeps them only if
`Analysis.same` finds values and gradients equal in lifted float64 for fresh random values on the borders of the site, at two sizes and two seeds.

What a node depends on (`kind`) is a set of letters: A the hidden activations, C other inputs (tables, masks, positions), P parameters;
the empty set means sizes and constants only.

Products with parameters are cut: their value is drawn at random instead of computed. Each is then a free variable, which makes the proof
stronger, and a region of real width costs no more than its activations.
"""

import contextlib
import math
import operator
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor

import ftc.dialect  # noqa: F401  registers ftc::moe
from ftc.rewrite import probe
from ftc.rewrite.functional import is_mutation, mutated
from ftc.rewrite.probe import aten

PRODUCTS = {
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._grouped_mm.default,
    aten.einsum.default,
    aten.embedding.default,
    aten.convolution.default,
    aten.conv1d.default,
    torch.ops.ftc.moe.default,
    torch.ops.ftc.fused_moe.default,
}
VALUE_TOLERANCE = 1e-12
GRADIENT_TOLERANCE = 1e-10
SMALLEST_STAND_IN = 1_000_003


class Trial:
    """One assignment of sizes with one seed, and the values computed for it so far."""

    def __init__(self, sizes: probe.Sizes, seed: int, inputs: dict[fx.Node, Tensor]):
        self.sizes, self.seed = sizes, seed
        self.values: dict[fx.Node, Any] = dict(inputs)


class Analysis:
    """Kinds, trials and proofs for one graph, which the passes extend through `Builder`."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.kinds: dict[fx.Node, frozenset[str]] = {}
        self.changing = mutated(graph)
        self.ready = False  # set by raising.RaisePass
        self._hidden = _hidden_inputs(graph)
        for node in graph.nodes:
            self.kinds[node] = self._kind(node)
        self.trials: list[Trial] = []
        for sizes in small_sizes(graph):
            for seed in (1, 2):
                inputs = probe.random_inputs(graph, sizes, seed + 10 * len(self.trials), torch.float64)
                placeholders = [node for node in graph.nodes if node.op == "placeholder"]
                self.trials.append(Trial(sizes, seed, dict(zip(placeholders, inputs, strict=True))))

    # ---- kinds

    def _kind(self, node: fx.Node) -> frozenset[str]:
        if node.op == "placeholder":
            return frozenset("A" if node in self._hidden else "C")
        if node.op == "get_attr":
            return frozenset() if known_constant(node) is not None else frozenset("P")
        if node.target is aten.sym_size.int:
            return frozenset()
        kinds = (
            frozenset().union(*(self.kinds[used] for used in node.all_input_nodes))
            if node.all_input_nodes
            else frozenset()
        )
        if node.target in PRODUCTS and "P" in kinds and "C" in kinds:
            return kinds | {"A"}
        return kinds

    def kind(self, value: Any) -> frozenset[str]:
        """The kind of a node; of anything else, the empty set."""
        return self.kinds[value] if isinstance(value, fx.Node) else frozenset()

    def active(self, value: Any) -> bool:
        """Whether `value` is a node that depends on the hidden activations."""
        return isinstance(value, fx.Node) and "A" in self.kinds[value]

    def fixed(self, value: Any) -> bool:
        """Whether `value` depends on sizes and constants only."""
        return not self.kind(value)

    # ---- values

    def value(self, node: fx.Node, trial: Trial | None = None) -> Any:
        """The node's value in a trial (the first where none is given), products with parameters cut."""
        trial = trial or self.trials[0]
        if node not in trial.values:
            self._fill([node], trial, trial.values)
        return trial.values[node]

    def _fill(self, targets: Iterable[fx.Node], trial: Trial, values: dict[fx.Node, Any]) -> None:
        missing: set[fx.Node] = set()
        stack = [node for node in targets if node not in values]
        while stack:
            node = stack.pop()
            if node in missing:
                continue
            missing.add(node)
            if not self._is_cut(node):
                stack.extend(used for used in node.all_input_nodes if used not in values)
        with probe.lifted_defaults(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for node in sorted(missing):
                values[node] = self._compute(node, trial, values)

    def _is_cut(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node.target not in PRODUCTS:
            return False
        parts = [self.kinds[used] for used in node.all_input_nodes]
        if not any("P" in part and "A" not in part for part in parts) or not any(
            "A" in part or "C" in part for part in parts
        ):
            return False
        return isinstance(node.meta.get("val"), Tensor) and _backed(node.meta["val"])

    def _compute(self, node: fx.Node, trial: Trial, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            constant = known_constant(node)
            if constant is not None:
                return constant.detach().to(probe.LIFTED_DTYPES.get(constant.dtype, constant.dtype))
            return self._random(node, trial, 1.0)
        if node.op == "placeholder":
            return self._random(node, trial, 1.0)
        if self._is_cut(node):
            return self._random(node, trial, 1.0)
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        return probe.call(node, args, kwargs, lifted=True)

    def _random(self, node: fx.Node, trial: Trial, magnitude: float, salt: int = 0) -> Tensor:
        val = node.meta["val"]
        shape = [probe.concrete(size, trial.sizes) for size in val.shape]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{node.name} {trial.seed} {salt} {shape}".encode()))
        dtype = probe.LIFTED_DTYPES.get(val.dtype, val.dtype)
        value = probe._random_tensor(node.name, shape, dtype, val.device, generator)
        return value * magnitude if value.is_floating_point() or value.is_complex() else value

    def evaluate(self, targets: list[fx.Node], trial: Trial, given: dict[fx.Node, Tensor]) -> list[Any]:
        """Values of `targets` with the nodes of `given` set to given values; differentiable in them, all else as in the trial."""
        ancestors: set[fx.Node] = set()
        stack = list(targets)
        while stack:
            node = stack.pop()
            if node in ancestors or node in given:
                continue
            ancestors.add(node)
            stack.extend(node.all_input_nodes)
        values: dict[fx.Node, Any] = dict(given)
        affected = [node for node in sorted(ancestors) if _touch(node, values)]
        values = dict(given)
        outside = {used for node in affected for used in node.all_input_nodes} | set(targets)
        for node in outside - set(affected) - set(given):
            values[node] = self.value(node, trial)
        with probe.lifted_defaults(), torch.random.fork_rng(devices=[]):
            for node in affected:
                args = fx.node.map_arg(node.args, values.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
                values[node] = probe.call(node, args, kwargs, lifted=True)
        return [values[node] for node in targets]

    def constant(self, value: Any) -> float | None:
        """The number that `value` is at every size: a Python number, or a fixed tensor of one element; else None."""
        if isinstance(value, bool):
            return None
        if isinstance(value, int | float):
            return float(value)
        if not isinstance(value, fx.Node) or not self.fixed(value):
            return None
        numbers = set()
        for trial in self.trials:
            result = self.value(value, trial)
            if isinstance(result, Tensor):
                if result.numel() != 1 or result.is_complex():
                    return None
                result = result.item()
            numbers.add(float(result))
        return numbers.pop() if len(numbers) == 1 or all(math.isnan(n) for n in numbers) else None

    def size_node(self, size: Any) -> fx.Node | None:
        """The node that reads a symbolic size off an input, made beside the inputs where there is none yet; None where no input has it."""
        expr = _expr(size)
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        if expr is None or not inputs:
            return None
        node = inputs[-1].next
        while node.target is aten.sym_size.int or node.op == "get_attr":
            if node.op == "call_function" and _expr(node.meta["val"]) == expr and node.args[0].op == "placeholder":
                return node
            node = node.next
        for used in inputs:
            for dim, own in enumerate(used.meta["val"].shape):
                if _expr(own) == expr:
                    with self.graph.inserting_after(inputs[-1]):
                        new = self.graph.call_function(aten.sym_size.int, (used, dim))
                    new.meta["val"] = own
                    self.kinds[new] = frozenset()
                    return new
        return None

    # ---- proofs

    def differs(
        self,
        old: fx.Node,
        new: fx.Node,
        borders: Iterable[fx.Node],
        magnitudes: Iterable[float] = (1.0,),
        quick: bool = False,
    ) -> str | None:
        """None where `new` equals `old` as a function of the borders, values and gradients; otherwise what differs.

        The borders get fresh random values of each magnitude; `quick` looks at the first trial alone, to screen hypotheses.
        """
        a, b = old.meta["val"], new.meta["val"]
        if a.dtype != b.dtype:
            return f"dtype {b.dtype} instead of {a.dtype}"
        borders = list(dict.fromkeys(borders))
        rounded = self.rounds(old, borders)
        if rounded is not None:
            return f"{rounded.name} rounds to {rounded.meta['val'].dtype}"
        for trial in self.trials[:1] if quick else self.trials:
            for salt, magnitude in enumerate(magnitudes):
                given = {}
                for node in borders:
                    value = (
                        self._random(node, trial, magnitude, salt + 1)
                        if _backed(node.meta["val"])
                        else self.value(node, trial)
                    )
                    given[node] = value.requires_grad_(not quick) if value.is_floating_point() else value
                reason = self.parted(old, new, trial, given, quick)
                if reason is not None:
                    return reason
        return None

    def rounds(self, old: fx.Node, borders: list[fx.Node]) -> fx.Node | None:
        """A node between borders and result in a dtype narrower than either: a rounding that lifted evaluation does not see."""
        wide = [old.meta["val"].dtype, *(node.meta["val"].dtype for node in borders if self.active(node))]
        seen, stack = set(borders), [old]
        while stack:
            node = stack.pop()
            if node in seen or not self.active(node):
                continue
            seen.add(node)
            val = node.meta.get("val")
            if (
                isinstance(val, Tensor)
                and val.is_floating_point()
                and not any(torch.promote_types(val.dtype, d) == val.dtype for d in wide)
            ):
                return node
            stack.extend(node.all_input_nodes)
        return None

    def parted(
        self, old: fx.Node, new: fx.Node, trial: Trial, given: dict[fx.Node, Tensor], quick: bool = False, leaves: list[Tensor] | None = None
    ) -> str | None:
        """None where both nodes have the same values and, unless `quick`, gradients in one trial with given values; otherwise what differs.
        Gradients are those of `leaves`, from which given values may have been made; of the given values where none are named."""
        try:
            expected, found = self.evaluate([old, new], trial, given)
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            return f"cannot be evaluated: {str(error).splitlines()[0]}"
        error = probe.relative_error(found, expected)
        if not error <= VALUE_TOLERANCE:
            return f"values differ by {error:.2g}"
        wanted = [value for value in (given.values() if leaves is None else leaves) if value.requires_grad]
        if quick or not wanted:
            return None
        if not (expected.requires_grad and found.requires_grad):
            return None if expected.requires_grad == found.requires_grad else "only one side has a gradient"
        along = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(7)).to(
            expected.device
        )
        before = torch.autograd.grad(expected, wanted, along, allow_unused=True, retain_graph=True)
        after = torch.autograd.grad(found, wanted, along, allow_unused=True)
        for value, x, y in zip(wanted, before, after, strict=True):
            x = torch.zeros_like(value) if x is None else x
            y = torch.zeros_like(value) if y is None else y
            scale = float(max((g.abs().max() for g in before if g is not None and g.numel()), default=0.0))
            if not torch.isfinite(x).all():
                continue
            error = probe.relative_error(y, x, scale=1e3 * scale)
            if not error <= GRADIENT_TOLERANCE:
                return f"gradients differ by {error:.2g}"
        return None


def known_constant(node: fx.Node) -> Tensor | None:
    """The value of a buffer that may be relied on: integers, booleans, single numbers and masks (zeros, ones, and numbers beyond -1e4).

    Any other buffer may be loaded or trained to something else, and counts as a parameter."""
    value = probe.constant_value(node)
    if value is None or not value.is_floating_point() or value.numel() == 1:
        return value
    if value.dim() < 2 or value.shape[-1] != value.shape[-2]:
        return None
    return value if bool(((value == 0) | (value == 1) | (value <= -1e4)).all()) else None


def sizes_of(node: fx.Node, strides: bool = False) -> tuple[int, ...]:
    """Sizes for comparison, each symbol standing for a large number of its own: comparing them asks nothing of the symbols and adds no guard.
    Empty for what is no tensor. With `strides`, its strides."""
    val = node.meta.get("val")
    return tuple(stand_in(size) for size in (val.stride() if strides else val.shape)) if isinstance(val, Tensor) else ()


def stand_in(size: Any) -> int:
    """A number for a size: itself, or for a symbol one of its own of SMALLEST_STAND_IN or more."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr
    numbers = {
        symbol: sympy.Integer(SMALLEST_STAND_IN + zlib.crc32(str(symbol).encode()) % 1_000_000)
        for symbol in expr.free_symbols
    }
    return int(expr.xreplace(numbers))


def _touch(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if any(used in values for used in node.all_input_nodes):
        values[node] = None
        return True
    return False


def _backed(val: Any) -> bool:
    if not isinstance(val, Tensor):
        return False
    sizes = [size for size in val.shape if isinstance(size, torch.SymInt)]
    return not any(str(symbol).startswith("u") for size in sizes for symbol in size.node.expr.free_symbols)


def _hidden_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The placeholders that carry activations: the floating ones that the first product with a parameter depends on."""
    sources: dict[fx.Node, frozenset[fx.Node]] = {}
    floats = [n for n in graph.nodes if n.op == "placeholder" and n.meta["val"].dtype.is_floating_point]
    learned: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        sources[node] = frozenset().union(*(sources[used] for used in inputs)) if inputs else frozenset()
        if node in floats:
            sources[node] = frozenset([node])
        is_parameter = node.op == "get_attr" and known_constant(node) is None and node.meta["val"].dim() >= 2
        if is_parameter or (inputs and node.op == "call_function" and all(used in learned for used in inputs)):
            learned.add(node)
        elif node.target in PRODUCTS and any(used in learned for used in inputs) and sources[node]:
            return set(sources[node])
    return set([n for n in floats if n.meta["val"].dim() >= 2][:1] or floats[:1])


def small_sizes(graph: fx.Graph) -> list[probe.Sizes]:
    """Two small assignments of the size symbols, all values different, where the guards allow it; else those of `probe.symbol_sizes`."""
    found = probe.symbol_sizes(graph)
    env = probe.shape_env(graph)
    if env is None or not found[0]:
        return found
    symbols = sorted(found[0], key=lambda symbol: (found[0][symbol], str(symbol)))
    chosen = []
    for pool in ([2, 7, 11, 13, 17], [3, 5, 9, 10, 14], [2, 8, 12, 16, 20], [3, 6, 9, 15, 18]):
        sizes = dict(zip(symbols, pool + list(range(21, 21 + len(symbols))), strict=False))
        if len(chosen) < 2 and probe._allowed(env, sizes):
            chosen.append(sizes)
    return chosen + [sizes for sizes in found if sizes not in chosen][: 2 - len(chosen)]


# -------------------------------------------------------------------------------------------------------------- building


class Builder:
    """Adds nodes before `before`, with meta["val"] from fake propagation and the source place of `like`."""

    def __init__(self, analysis: Analysis, before: fx.Node, like: fx.Node | None = None):
        self.analysis, self.graph, self.before = analysis, analysis.graph, before
        self.like = like or before
        self.made: list[fx.Node] = []

    def __call__(self, target: Callable, *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
        """Add a call; `val` is its fake value where the caller knows it, which saves the propagation."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        self.made.append(node)
        try:
            node.meta["val"] = fake_value(self.graph, node) if val is None else val
        except Exception:
            self.undo()
            raise
        for key in ("stack_trace", "nn_module_stack"):
            if key in self.like.meta:
                node.meta[key] = self.like.meta[key]
        self.analysis.kinds[node] = self.analysis._kind(node)
        return node

    def undo(self) -> None:
        """Remove the nodes made here that nothing uses."""
        for node in reversed(self.made):
            if not node.users and node.graph is self.graph and not node._erased:
                self.graph.erase_node(node)
                for trial in self.analysis.trials:
                    trial.values.pop(node, None)
        self.made = [node for node in self.made if not node._erased]

    def size(self, node: fx.Node, dim: int) -> int | fx.Node:
        """The size of a dim: an int, or a node that gives it (an existing one where there is one)."""
        size = node.meta["val"].shape[dim]
        if not isinstance(size, torch.SymInt):
            return int(size)
        return self.analysis.size_node(size) or self(aten.sym_size.int, node, dim % node.meta["val"].dim())

    def shape(self, node: fx.Node) -> list[int | fx.Node]:
        """All sizes of a node."""
        return [self.size(node, dim) for dim in range(node.meta["val"].dim())]

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`node` in `dtype`, itself where it has it."""
        return node if node.meta["val"].dtype == dtype else self(aten.to.dtype, node, dtype)

    def numel(self, sizes: list[int | fx.Node]) -> int | fx.Node:
        """The product of sizes that are ints or nodes."""
        total: int | fx.Node = 1
        for size in sizes:
            if isinstance(size, fx.Node) or isinstance(total, fx.Node):
                total = size if total == 1 else total if size == 1 else self(operator.mul, total, size)
            else:
                total *= size
        return total


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else None


def read_sizes_off_inputs(analysis: Analysis) -> None:
    """Let every reader of the size of an intermediate read it off an input, so that sizes keep no intermediate alive; in place."""
    for node in list(analysis.graph.nodes):
        if node.target is aten.sym_size.int and node.args[0].op == "call_function":
            new = analysis.size_node(node.meta["val"])
            if new is not None:
                node.replace_all_uses_with(new)


def fake_value(graph: fx.Graph, node: fx.Node) -> Any:
    """What the node gives on the fake values of its arguments, in their fake mode; adds no guard."""

    def val(used: fx.Node) -> Any:
        return used.meta["val"]

    args, kwargs = fx.node.map_arg(node.args, val), fx.node.map_arg(node.kwargs, val)
    mode = fake_mode(graph)
    if mode is None:
        return node.target(*args, **kwargs)
    quiet = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with mode, quiet, enable_python_dispatcher(), torch.no_grad():
        return node.target(*args, **kwargs)


def fake_mode(graph: fx.Graph):
    """The fake mode of the graph's values."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    return None


def replace(analysis: Analysis, old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` (that stands after `new`) use `new`."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user > new)


def analyse(graph: fx.Graph) -> Analysis:
    """The analysis of a graph: that of the last raise pass where nothing has touched the graph since. It lives and dies with the graph."""
    known = graph.__dict__.pop("_ftc_analysis", None)
    return known[1] if known is not None and known[0] == _print(graph) else Analysis(graph)


def _print(graph: fx.Graph) -> list[tuple]:
    return [(node, node.target, node.args, node.kwargs) for node in graph.nodes]


def finish(analysis: Analysis) -> None:
    """Drop what nothing uses any more, check the graph, and keep the analysis for the next pass."""
    graph = analysis.graph
    read_sizes_off_inputs(analysis)
    drop_dead(graph)
    graph.lint()
    graph.__dict__["_ftc_analysis"] = _print(graph), analysis


def drop_dead(graph: fx.Graph) -> None:
    """Remove nodes that nothing uses; dropout counts as unused too, writing in place does not."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or is_mutation(node))
