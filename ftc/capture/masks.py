"""Masks that the shell builds from sizes alone: recognised as causal or sliding window, and declared to the regions.

A block sees only a tensor; that it is the plain causal mask is known outside. Where a mask handed to regions depends on
nothing but sizes and is, at every size tried, M[q, k] = (k <= q and q - k < window), the region is called with a
`CausalMask` instead, and builds the same mask (same bits) inside, where raising can recognise it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

import ftc.dialect  # noqa: F401  (registers ftc::causal_mask)
from ftc.capture.captured import CapturedGraph, InputSpec, acceptance
from ftc.capture.variants import Call, Hole

_LENGTHS = (2, 3, 5, 9, 17, 40, 97, 257)


@dataclass(frozen=True)
class CausalMask:
    """Stands for a mask argument. `blocked` is what a forbidden place holds (None: the mask is boolean, True = may attend).

    `shape` gives each size as an int or as (tensor, dim): the size of that dim of the call's tensor of that number.
    """

    window: int | None
    dtype: torch.dtype
    blocked: float | None
    shape: tuple

    ftc_constant = True

    def as_dict(self) -> dict:
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch."), "shape": [list(s) if isinstance(s, tuple) else s for s in self.shape]}

    @classmethod
    def from_dict(cls, data: dict) -> CausalMask:
        shape = tuple(tuple(s) if isinstance(s, list) else s for s in data["shape"])
        return cls(data["window"], getattr(torch, data["dtype"]), data["blocked"], shape)

    def sizes(self, tensors) -> list[int]:
        """The mask's sizes for a call with these tensors."""
        return [tensors[s[0]].shape[s[1]] if isinstance(s, tuple) else s for s in self.shape]

    def tensor(self, tensors) -> torch.Tensor:
        """The mask itself for a call with these tensors."""
        sizes = [int(size) for size in self.sizes(tensors)]
        made = torch.ops.ftc.causal_mask(sizes[-2], sizes[-1], self.window)
        if self.blocked is not None:
            made = torch.where(made, torch.zeros((), dtype=self.dtype), torch.full((), self.blocked, dtype=self.dtype))
        return made.expand(sizes)


def declare_masks(captured: CapturedGraph) -> int:
    """Replace size-only causal masks in the region calls of a shell graph, in place; returns how many arguments."""
    accepts = acceptance(captured)
    known: dict[fx.Node, tuple | None] = {}
    done = 0
    for node in list(captured.graph.nodes):
        if node.op != "call_module":
            continue
        leaves = tree_leaves((node.args, dict(node.kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, fx.Node) and isinstance(leaf.meta["val"], torch.Tensor)]
        masks = {}
        for candidate in dict.fromkeys(tensors):
            value = candidate.meta["val"]
            if value.dim() < 2 or not (value.dtype == torch.bool or value.is_floating_point()):
                continue
            if candidate not in known:
                known[candidate] = _recognise(candidate, captured, accepts)
            if known[candidate] is not None:
                masks[candidate] = known[candidate]
        rest = [t for t in tensors if t not in masks]
        replaced = {m: mask for m, found in masks.items() if (mask := _declaration(m, found, rest)) is not None}
        if len(replaced) < len(masks):
            rest = [t for t in tensors if t not in replaced]
            replaced = {m: mask for m in replaced if (mask := _declaration(m, masks[m], rest)) is not None}
        if replaced:
            swap = lambda leaf, r=replaced: r.get(leaf, leaf) if isinstance(leaf, fx.Node) else leaf  # noqa: E731
            node.args = fx.node.map_aggregate(node.args, swap)
            node.kwargs = fx.node.map_aggregate(node.kwargs, swap)
            done += len(replaced)
    return done


def _declaration(mask: fx.Node, found: tuple, tensors: list[fx.Node]) -> CausalMask | None:
    window, blocked = found
    value = mask.meta["val"]
    shape = []
    for size in value.shape:
        if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
            shape.append(int(size))
            continue
        places = [
            (i, d)
            for i, t in enumerate(tensors)
            for d, s in enumerate(t.meta["val"].shape)
            if isinstance(s, torch.SymInt) and s.node.expr == size.node.expr
        ]
        if not places:
            return None
        shape.append(places[0])
    return CausalMask(window, value.dtype, blocked, tuple(shape))


def _recognise(mask: fx.Node, captured: CapturedGraph, accepts) -> tuple | None:
    """(window, blocked) when the mask is causal at every size tried, None when it is not, or depends on data."""
    ancestors = _size_only(mask)
    if ancestors is None:
        return None
    window, blocked, seen_rows = None, None, []
    for sizes in _assignments(captured, accepts):
        value = _evaluate(ancestors, mask, sizes, captured)
        if value.dim() < 2 or value.shape[-1] != value.shape[-2] or not bool((value == value.reshape(-1, *value.shape[-2:])[0]).all()):
            return None
        square = value.reshape(-1, *value.shape[-2:])[0]
        if square.dtype == torch.bool:
            allowed = square
        else:
            allowed = square == 0
            forbidden = square[~allowed].unique()
            if forbidden.numel() > 1 or (forbidden.numel() == 1 and blocked not in (None, float(forbidden))):
                return None
            blocked = float(forbidden) if forbidden.numel() else blocked
        seen_rows.append((allowed, allowed.shape[-1]))
    if not seen_rows:
        return None
    longest, length = max(seen_rows, key=lambda pair: pair[1])
    reach = int(longest[-1].sum())
    window = reach if reach < length else None
    for allowed, length in seen_rows:
        if not torch.equal(allowed, torch.ops.ftc.causal_mask(length, length, window)):
            return None
    if mask.meta["val"].dtype != torch.bool and (blocked is None or blocked > torch.finfo(mask.meta["val"].dtype).min):
        return None
    return window, blocked


def _size_only(mask: fx.Node) -> list[fx.Node] | None:
    """The nodes that make `mask`, in graph order, when it depends on sizes and constants only."""
    wanted, stack = {mask}, [mask]
    while stack:
        node = stack.pop()
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            continue  # a size: its expression is known
        if node.op in ("placeholder", "call_module", "output") or (node.op == "get_attr" and "constant" not in node.meta):
            return None
        for parent in node.all_input_nodes:
            if parent not in wanted:
                wanted.add(parent)
                stack.append(parent)
    if any(n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in n.target.tags for n in wanted):
        return None
    return [node for node in mask.graph.nodes if node in wanted]


def _assignments(captured: CapturedGraph, accepts):
    """Sizes to try: the example's, and others that the guards admit."""
    symbols = list(captured.hints)
    yield captured.hints
    for symbol in symbols:
        for length in _LENGTHS:
            sizes = captured.hints | {symbol: length}
            inputs = [torch.empty([int(s.subs(sizes)) if isinstance(s, sympy.Basic) else s for s in spec.sizes], device="meta") for spec in captured.inputs]
            if accepts(inputs):
                yield sizes


def _evaluate(nodes: list[fx.Node], mask: fx.Node, sizes: dict, captured: CapturedGraph) -> torch.Tensor:
    values: dict[fx.Node, object] = {}
    for node in nodes:
        val = node.meta.get("val")
        if isinstance(val, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            expr = val.node.shape_env.replace(val.node.expr).subs(sizes)
            values[node] = bool(expr) if isinstance(val, torch.SymBool) else float(expr) if isinstance(val, torch.SymFloat) else int(expr)
        elif node.op == "get_attr":
            values[node] = node.meta["constant"]
        else:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values[mask]


def plain_call(call: Call, dynamic) -> tuple[Call, list, dict[int, CausalMask]]:
    """The call with a tensor in the place of every CausalMask; also the dynamic flags, and which tensors those are."""
    tensors, flags, leaves, declared = list(call.tensors), [list(d) for d in dynamic], [], {}
    for leaf in call.leaves:
        if isinstance(leaf, CausalMask):
            declared[len(tensors)] = leaf
            sizes = [int(s) for s in leaf.sizes(call.tensors)]
            flags.append([isinstance(s, tuple) and dynamic[s[0]][s[1]] for s in leaf.shape])
            leaf_tensor = torch.empty(sizes, dtype=leaf.dtype, device="meta")
            leaves.append(Hole(len(tensors)))
            tensors.append(leaf_tensor)
        else:
            leaves.append(leaf)
    return Call(tensors, tuple(leaves), call.spec), flags, declared


def build_masks(captured: CapturedGraph, declared: dict[int, CausalMask]) -> None:
    """Make the declared masks inside the graph, in the place of their placeholders. In place."""
    graph = captured.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    device = placeholders[0].meta["val"].device
    for number, mask in declared.items():
        old = placeholders[number]
        if old.users:
            with graph.inserting_before(first):
                new = _mask_nodes(graph, mask, placeholders, device, old)
            old.replace_all_uses_with(new)
        graph.erase_node(old)
    captured.inputs[:] = [spec for i, spec in enumerate(captured.inputs) if i not in declared]
    graph.lint()


def _mask_nodes(graph: fx.Graph, mask: CausalMask, placeholders, device, old: fx.Node) -> fx.Node:
    mode = old.meta["val"].fake_mode
    aten = torch.ops.aten

    def add(target, *args, **kwargs):
        node = graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with mode:
            node.meta["val"] = target(*values[0], **values[1])
        node.meta["stack_trace"] = old.meta.get("stack_trace", "")
        return node

    sizes = [add(aten.sym_size.int, placeholders[s[0]], s[1]) if isinstance(s, tuple) else s for s in mask.shape]
    made = add(torch.ops.ftc.causal_mask.default, sizes[-2], sizes[-1], mask.window, device=device)
    if mask.blocked is not None:
        zero = add(aten.full.default, [], 0.0, dtype=mask.dtype, device=device)
        blocked = add(aten.full.default, [], mask.blocked, dtype=mask.dtype, device=device)
        made = add(aten.where.self, made, zero, blocked)
    for _ in range(len(mask.shape) - 2):
        made = add(aten.unsqueeze.default, made, 0)
    return add(aten.expand.default, made, sizes)


def spec_of(spec: InputSpec) -> str:
    """`name: dtype [sizes]`, for people."""
    return f"{spec.name}: {str(spec.dtype).removeprefix('torch.')} [{', '.join(map(str, spec.sizes))}]"
