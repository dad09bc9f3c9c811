"""In-place operations of a region graph as their functional twins, where all aliases are in sight: same bits, and every node has one value.

`y.copy_(x)` on a slice of a buffer becomes `slice_scatter`; `x.add_(y)` becomes `x + y` for all later readers of x and of its views.
Mutation of a placeholder or parameter, and through aliases that may or may not be copies, is left as it is; `mutated` lists it.
"""

import operator

import torch
from torch import fx

from ftc.rewrite.probe import aten

VIEWS = {
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.view.default,
    aten.t.default,
    aten.squeeze.dim,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.expand.default,
    aten.alias.default,
    aten.narrow.default,
}
MAYBE_VIEWS = {
    aten.reshape.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten.flatten.using_ints,
    aten.type_as.default,
    aten.detach.default,
}


COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}


def is_mutation(node: fx.Node) -> bool:
    """Whether the node writes into its first argument."""
    return (
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    )


def mutated(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value changes after they are made: written in place, or a view of what is."""
    roots = {_root(node.args[0]) for node in graph.nodes if is_mutation(node) and isinstance(node.args[0], fx.Node)}
    return {node for node in graph.nodes if _root(node) in roots or is_mutation(node)} if roots else set()


def functionalise(graph: fx.Graph) -> int:
    """Replace in-place operations by functional ones, in place, drop identities and merge equal nodes; returns how many were replaced."""
    done = 0
    for node in list(graph.nodes):
        if is_mutation(node) and _functional(graph, node):
            done += 1
    if not mutated(graph):
        done += drop_identities(graph) + merge_equal(graph)
    return done


def drop_identities(graph: fx.Graph) -> int:
    """Let readers of a node that gives its argument's own bits read the argument: a double negation, an alias, a cast to the same dtype, dropout
    that is off, a product with 1; and spell a product with -1 as a negation. In place; returns how many there were."""
    done = 0
    for node in list(graph.nodes):
        same = _same_bits(node)
        if same is None and node.target in (aten.mul.Tensor, aten.mul.Scalar) and _number(node, -1):
            with graph.inserting_before(node):
                same = _call(graph, aten.neg.default, (node.args[0],), node)
        if same is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            done += 1
    return done


def merge_equal(graph: fx.Graph) -> int:
    """Let readers of a node that repeats an earlier one (same operation, same arguments, nothing random) read the earlier one; in place."""
    seen: dict[tuple, fx.Node] = {}
    done = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or is_mutation(node) or _is_random(node):
            continue
        args = sorted(node.args, key=str) if node.target in COMMUTATIVE and len(node.args) == 2 else node.args
        key = (node.target, _key(args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            done += 1
    return done


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _key(value) -> object:
    if isinstance(value, tuple | list):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((name, _key(item)) for name, item in value.items()))
    return value if isinstance(value, fx.Node) else (type(value).__name__, repr(value))


def _number(node: fx.Node, number: int) -> bool:
    value, first = node.args[1], node.args[0]
    plain = isinstance(value, int | float) and not isinstance(value, bool) and value == number
    return (
        plain
        and isinstance(first, fx.Node)
        and first.meta["val"].is_floating_point()
        and first.meta["val"].dtype == node.meta["val"].dtype
    )


def _same_bits(node: fx.Node) -> fx.Node | None:
    """The argument whose bits the node gives, where it is one of the identities of `drop_identities`."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    first = node.args[0]
    if node.target is aten.alias.default:
        return first
    if node.target is aten.dropout.default and (node.args[1] == 0 or not node.args[2]):
        return first
    if (
        node.target is aten.to.dtype
        and first.meta["val"].dtype == node.meta["val"].dtype
        and not any(node.args[2:])
        and not node.kwargs
    ):
        return first
    if node.target is aten.neg.default and first.target is aten.neg.default:
        return first.args[0]
    if (
        node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
        and len(node.args) == 2
        and _number(node, 1)
    ):
        return first
    return None


def _parent(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is operator.getitem:
        return None if _gives_new(node.args[0]) else node.args[0]
    if node.target in VIEWS or node.target in MAYBE_VIEWS or is_mutation(node):
        return node.args[0]
    return None


def _gives_new(node: fx.Node) -> bool:
    """Whether an operation that gives several tensors (topk, sort) makes them: its schema names no alias, as that of split does."""
    return isinstance(node.target, torch._ops.OpOverload) and all(argument.alias_info is None for argument in node.target._schema.arguments)


def _root(node: fx.Node) -> fx.Node:
    while (parent := _parent(node)) is not None:
        node = parent
    return node


def _twin(node: fx.Node):
    name = node.target._schema.name.removeprefix("aten::")
    if not name.endswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, node.target._overloadname, None) if packet is not None else None


def _functional(graph: fx.Graph, node: fx.Node) -> bool:
    written = node.args[0]
    root = _root(written)
    if root.op != "call_function":
        return False
    family = [other for other in graph.nodes if other is not root and _root(other) is root]
    family = [other for other in family if not _is_view_of(other, node)]  # such a view sees the written value whatever is done here
    readers = [other for other in [root, *family] if other is not node and any(user > node for user in other.users)]
    chain = []
    walk = written
    while walk is not root:
        chain.append(walk)
        walk = _parent(walk)
    alone = all(other is written for other in readers) and not any(_later_alias(root, other, node) for other in family)
    if not alone and any(other.target not in _SCATTERED for other in chain):
        return False
    if not alone and any(
        other < node and (other.target in MAYBE_VIEWS or other.target is operator.getitem) for other in readers
    ):
        return False
    with graph.inserting_before(node):
        new = _written_value(graph, node, written)
        if new is None:
            return False
        _renew(graph, node, written, new)
        node.replace_all_uses_with(new)
        if not alone:
            _write_back(graph, node, chain, new, root, readers)
    graph.erase_node(node)
    return True


def _is_view_of(view: fx.Node, node: fx.Node) -> bool:
    """Whether a node is made from `node` itself, by views of its result."""
    while (parent := _parent(view)) is not None:
        if parent is node:
            return True
        view = parent
    return False


def _later_alias(root: fx.Node, other: fx.Node, node: fx.Node) -> bool:
    return other > node and _parent(other) is root and root is not node.args[0]


def _written_value(graph: fx.Graph, node: fx.Node, written: fx.Node) -> fx.Node | None:
    own = written.meta["val"]
    if node.target is aten.copy_.default:
        source = node.args[1]
        if source.meta["val"].dtype != own.dtype:
            source = _call(graph, aten.to.dtype, (source, own.dtype), node)
        return _call(graph, aten.expand_as.default, (source, written), node)
    twin = _twin(node)
    if twin is None:
        return None
    new = _call(graph, twin, node.args, node, node.kwargs)
    if new.meta["val"].dtype != own.dtype:
        new = _call(graph, aten.to.dtype, (new, own.dtype), node)
    return new


_SCATTERED = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.transpose.int: aten.transpose.int,
}


def _write_back(
    graph: fx.Graph, node: fx.Node, chain: list[fx.Node], new: fx.Node, root: fx.Node, readers: list[fx.Node]
) -> None:
    """Carry the written value from the view up to the root, and remake the other views that are read later."""
    value = new
    for view in chain:
        parent = view.args[0]
        target = _SCATTERED[view.target]
        args = (value, *view.args[1:]) if view.target is aten.transpose.int else (parent, value, *view.args[1:])
        value = _call(graph, target, args, node)
        _renew(graph, node, parent, value)
    remade = {root: value}
    for reader in sorted(readers):
        if reader < node and reader is not root and reader not in chain:
            _remake(graph, node, reader, remade)


def _remake(graph: fx.Graph, node: fx.Node, view: fx.Node, remade: dict[fx.Node, fx.Node]) -> fx.Node:
    if view not in remade:
        base = _remake(graph, node, _parent(view), remade)
        remade[view] = _call(graph, view.target, (base, *view.args[1:]), node, view.kwargs)
        _renew(graph, node, view, remade[view])
    return remade[view]


def _renew(graph: fx.Graph, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user > node)


def _call(graph: fx.Graph, target, args: tuple, like: fx.Node, kwargs: dict | None = None) -> fx.Node:
    from ftc.rewrite.recognise import fake_value

    new = graph.call_function(target, args, kwargs or {})
    new.meta = {key: like.meta[key] for key in ("stack_trace", "nn_module_stack") if key in like.meta}
    new.meta["val"] = fake_value(graph, new)
    return new
