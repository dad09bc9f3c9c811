"""How a divided dimension moves through an operator, and what each rank's own call of it is.

A node whose value is divided over ranks has a `Split`: the dimension, and the blocks of which it is made, each divided by itself. `follow` gives the
split of an operator's result from those of its operands, or declines. Operands that all ranks hold alike enter as copies, or, where they reach along
the divided dimension, each rank takes its part of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import ftc.dialect  # noqa: F401  (registers the ftc:: operators)
from ftc.rewrite.outcome import Declined, operation
from ftc.rewrite.regroup import Indivisible, numbers, regroup

aten, dialect = torch.ops.aten, torch.ops.ftc
ATTENTION = {aten.scaled_dot_product_attention.default, dialect.softcap_attention.default, dialect.sequence_attention.default}


@dataclass(frozen=True)
class Split:
    """Dimension `dim` is divided over the ranks, each of its `blocks` by itself, into `parts` different parts. No blocks (): it is a sequence, in
    whatever order; None: what is divided is the inner factor of a merged dimension. Both may meet operators that treat all entries alike."""

    dim: int
    blocks: tuple[int, ...] | None
    parts: int

    def at(self, dim: int) -> Split:
        """The same at another dim."""
        return Split(dim, self.blocks, self.parts)


@dataclass
class Step:
    """One operator on ranks: the split of its result (a list for several results), operands that enter as copies or as the rank's part along a dim,
    and what follows the first argument in the rank's own sizes."""

    out: Split | list[Split | None] | None
    copies: list[fx.Node] = field(default_factory=list)
    slices: list[tuple[fx.Node, int]] = field(default_factory=list)
    rest: tuple | None = None


Splits = dict[fx.Node, Any]  # Split, or a list of them for a node with several results
Rule = Callable[[fx.Node, Splits], Step]
RULES: dict[Any, Rule] = {}


def follow(node: fx.Node, splits: Splits) -> Step:
    """The step of a node with at least one divided operand. Raises Declined where the operator mixes what is divided."""
    rule = RULES.get(node.target)
    if rule is None and _is_pointwise(node):
        rule = pointwise
    if rule is None:
        raise Declined(f"{operation(node)} is not known to leave a divided dimension alone", node)
    try:
        return rule(node, splits)
    except ValueError as part:
        raise Declined(str(part), node) from part


def rule(*targets) -> Callable[[Rule], Rule]:
    """Register the decorated function for these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a node, each once."""
    return [used for used in node.all_input_nodes if isinstance(used.meta.get("val"), Tensor)]


def rank_of(node: fx.Node) -> int:
    """Number of dimensions."""
    return node.meta["val"].dim()


def _one(node: fx.Node, splits: Splits) -> Split:
    """The split of the first operand, where no other is divided."""
    others = [used for used in operands(node)[1:] if used in splits]
    if node.args[0] not in splits or others:
        raise Declined(f"{operation(node)} has another operand that is divided", node)
    return splits[node.args[0]]


# -------------------------------------------------------------------------------------------------------------- pointwise


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags and not target._schema.is_mutable


@rule(
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    dialect.gated.default,
    dialect.copy_to_ranks.default,
    dialect.reduce_from_ranks.default,
    dialect.max_over_ranks.default,
    dialect.rank_offset.default,
)
def pointwise(node: fx.Node, splits: Splits) -> Step:
    """Each entry by itself, operands broadcast."""
    found, aligned = None, None
    for used in operands(node):
        if used in splits:
            own = splits[used].at(splits[used].dim - rank_of(used))
            if found is not None and own != found:
                raise Declined(f"the operands of {operation(node)} are divided differently", node)
            found, aligned = own, own.dim
    step = Step(found.at(rank_of(node) + aligned))
    for used in operands(node):
        if used not in splits:
            _enter(step, node, used, rank_of(used) + aligned, sum(found.blocks) if found.blocks else None)
    return step


def _enter(step: Step, node: fx.Node, used: fx.Node, dim: int, size: int | None) -> None:
    """Let an operand that all ranks hold alike take part: whole, or each rank's part of `dim`."""
    own = 1 if dim < 0 else numbers(used.meta["val"].shape)[dim]
    if own == 1:
        step.copies.append(used)
    elif size is None or own == size:
        step.slices.append((used, dim))
    else:
        raise Declined(f"{used.name} does not fit the divided dimension of {operation(node)}", node)


@rule(aten.dropout.default)
def _dropout(node: fx.Node, splits: Splits) -> Step:
    if node.args[1] and node.args[2]:
        raise Declined("dropout would draw the same mask on every rank", node)
    return pointwise(node, splits)


@rule(dialect.rope.default)
def _rope(node: fx.Node, splits: Splits) -> Step:
    step = pointwise(node, splits)
    if step.out.dim == rank_of(node) - 1:
        raise Declined("the rotated dimension is divided", node) from _one_head(node, step.out)
    return step


def _one_head(node: fx.Node, split: Split) -> Indivisible | None:
    """Why the entries of a head are divided, where it is for want of another head."""
    alone = split.dim == rank_of(node) - 1 and 1 in numbers(node.meta["val"].shape)[1:-1]
    return Indivisible(1, split.parts, "heads") if alone else None


# ----------------------------------------------------------------------------------------------------------------- layout


def _dim(node: fx.Node, dim: int, of: fx.Node | None = None) -> int:
    return dim % rank_of(of if of is not None else node.args[0])


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _view(node: fx.Node, splits: Splits) -> Step:
    split = _one(node, splits)
    dim, blocks = regroup(node.args[0].meta["val"].shape, node.meta["val"].shape, split.dim, split.blocks, split.parts)
    return Step(Split(dim, blocks, split.parts), rest=(_local(node.args[1], dim, split.parts),))


def _local(sizes: list, dim: int, parts: int) -> list:
    """Sizes with the one of the divided dim in the rank's own measure; -1 and symbols follow by themselves."""
    sizes = list(sizes)
    if isinstance(sizes[dim], int) and sizes[dim] > 0:
        sizes[dim] //= parts
    return sizes


@rule(aten.unflatten.int)
def _unflatten(node: fx.Node, splits: Splits) -> Step:
    x, at, sizes = node.args[:3]
    split, at = _one(node, splits), _dim(node, at)
    dim, blocks = regroup(x.meta["val"].shape, node.meta["val"].shape, split.dim, split.blocks, split.parts)
    rest = (at, _local(sizes, dim - at, split.parts)) if at <= dim < at + len(sizes) else None
    return Step(Split(dim, blocks, split.parts), rest=rest)


@rule(aten.flatten.using_ints)
def _flatten(node: fx.Node, splits: Splits) -> Step:
    split = _one(node, splits)
    dim, blocks = regroup(node.args[0].meta["val"].shape, node.meta["val"].shape, split.dim, split.blocks, split.parts)
    return Step(Split(dim, blocks, split.parts))


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def _transpose(node: fx.Node, splits: Splits) -> Step:
    split, a, b = _one(node, splits), _dim(node, node.args[1]), _dim(node, node.args[2])
    return Step(split.at({a: b, b: a}.get(split.dim, split.dim)))


@rule(aten.t.default, aten.mT.default)
def _turn(node: fx.Node, splits: Splits) -> Step:
    split, last = _one(node, splits), rank_of(node) - 1
    return Step(split.at({last: last - 1, last - 1: last}.get(split.dim, split.dim)) if last else split)


@rule(aten.permute.default)
def _permute(node: fx.Node, splits: Splits) -> Step:
    split = _one(node, splits)
    return Step(split.at([_dim(node, d) for d in node.args[1]].index(split.dim)))


@rule(aten.unsqueeze.default)
def _unsqueeze(node: fx.Node, splits: Splits) -> Step:
    split, at = _one(node, splits), _dim(node, node.args[1], of=node)
    return Step(split.at(split.dim + (at <= split.dim)))


@rule(aten.squeeze.dim)
def _squeeze(node: fx.Node, splits: Splits) -> Step:
    split, at = _one(node, splits), _dim(node, node.args[1])
    if rank_of(node) == rank_of(node.args[0]):
        return Step(split)
    if at == split.dim:
        raise Declined("the divided dimension is squeezed away", node)
    return Step(split.at(split.dim - (at < split.dim)))


@rule(aten.expand.default)
def _expand(node: fx.Node, splits: Splits) -> Step:
    split = _one(node, splits)
    out = split.at(split.dim + rank_of(node) - rank_of(node.args[0]))
    return Step(out, rest=(_local(node.args[1], out.dim, split.parts), *node.args[2:]))


@rule(aten.expand_as.default)
def _expand_as(node: fx.Node, splits: Splits) -> Step:
    if rank_of(node.args[0]) != rank_of(node.args[1]):
        raise Declined("expand_as adds dimensions", node)
    return pointwise(node, splits)


@rule(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)
def _new(node: fx.Node, splits: Splits) -> Step:
    return Step(None)  # reads no values of its operand; whole on every rank


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(node: fx.Node, splits: Splits) -> Step:
    split, at = _one(node, splits), node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if at is None:
        raise Declined("repeat_interleave flattens what is divided", node)
    if _dim(node, at) != split.dim:
        return Step(split)
    if not split.blocks or not isinstance(node.args[1], int):
        raise Declined("repeat_interleave repeats along the divided dimension", node)
    return Step(Split(split.dim, tuple(size * node.args[1] for size in split.blocks), split.parts))


# ------------------------------------------------------------------------------------------------------------------ parts


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, aten.unbind.int, aten.tensor_split.sections)
def _split(node: fx.Node, splits: Splits) -> Step:
    split = _one(node, splits)
    whole = {aten.unbind.int: 0}.get(node.target, 1)
    position = node.args[1 + whole] if len(node.args) > 1 + whole else node.kwargs.get("dim", 0)
    dim, results = _dim(node, position), node.meta["val"]
    if dim != split.dim:
        gone = node.target is aten.unbind.int and dim < split.dim
        return Step([split.at(split.dim - gone)] * len(results))
    if node.target is aten.unbind.int or not split.blocks:
        raise Declined("the divided dimension is taken apart", node)
    found, args = _blocks_of(node, [int(r.shape[dim]) for r in results], split), list(node.args)
    if node.target is not aten.chunk.default and node.target is not aten.tensor_split.sections:
        sizes = args[1]
        args[1] = sizes // split.parts if isinstance(sizes, int) else [size // split.parts for size in sizes]
    if isinstance(node.args[1], int) and len({r.shape[dim] for r in results}) > 1:
        raise Declined("the divided dimension is taken apart unevenly", node)
    return Step([Split(dim, blocks, split.parts) for blocks in found], rest=tuple(args[1:]))


def _blocks_of(node: fx.Node, sizes: list[int], split: Split) -> list[tuple[int, ...]]:
    """The blocks in each of the parts of the divided dimension, whose borders have to be borders of blocks."""
    found, rest = [], list(split.blocks)
    for size in sizes:
        own = []
        while sum(own) < size and rest:
            own.append(rest.pop(0))
        if sum(own) != size:
            raise Declined(f"a part of {size} of the divided dimension ends inside a block of {list(split.blocks)}", node)
        found.append(tuple(own))
    return found


@rule(operator.getitem)
def _getitem(node: fx.Node, splits: Splits) -> Step:
    parts = splits[node.args[0]]
    return Step(parts[node.args[1]] if isinstance(parts, list) else parts)


@rule(aten.slice.Tensor, aten.narrow.default)
def _slice(node: fx.Node, splits: Splits) -> Step:
    split = _one(node, splits)
    bound = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    dim = _dim(node, bound.get("dim", 0))
    if dim != split.dim or numbers(node.meta["val"].shape)[dim] == numbers(node.args[0].meta["val"].shape)[dim]:
        return Step(split)
    start, size = bound.get("start") or 0, node.meta["val"].shape[dim]
    if not split.blocks or not isinstance(start, int) or not isinstance(size, int) or bound.get("step", 1) != 1:
        raise Declined("the divided dimension is cut", node)
    start %= sum(split.blocks)
    before, blocks, _ = _blocks_of(node, [start, size, sum(split.blocks) - start - size], split)
    first, count = sum(before) // split.parts, sum(blocks) // split.parts
    end = first + count if node.target is aten.slice.Tensor else count
    return Step(Split(dim, blocks, split.parts), rest=(dim, first, end))


@rule(aten.select.int)
def _select(node: fx.Node, splits: Splits) -> Step:
    split, at = _one(node, splits), _dim(node, node.args[1])
    if at == split.dim:
        raise Declined("one entry of the divided dimension is taken", node)
    return Step(split.at(split.dim - (at < split.dim)))


@rule(aten.cat.default, aten.stack.default)
def _cat(node: fx.Node, splits: Splits) -> Step:
    tensors, stacked = node.args[0], node.target is aten.stack.default
    at = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % rank_of(node)
    found = {splits[t] for t in tensors if t in splits}
    if len(found) > 1:
        raise Declined("tensors that are divided differently are put together", node)
    (split,) = found
    if not stacked and at == split.dim:
        raise Declined("tensors are put together along the divided dimension", node)
    step = Step(split.at(split.dim + (stacked and at <= split.dim)))
    for t in dict.fromkeys(tensors):
        if t not in splits:
            _enter(step, node, t, split.dim, sum(split.blocks) if split.blocks else None)
    return step


@rule(aten.slice_scatter.default)
def _slice_scatter(node: fx.Node, splits: Splits) -> Step:
    step = pointwise(node, splits)
    if _dim(node, node.args[2] if len(node.args) > 2 else 0) == step.out.dim:
        raise Declined("the divided dimension is written to in part", node)
    return step


# --------------------------------------------------------------------------------------------- products, norms, reductions


@rule(aten.linear.default)
def _linear(node: fx.Node, splits: Splits) -> Step:
    split = _one(node, splits)
    if split.dim == rank_of(node) - 1:
        raise Declined("a product sums over the divided dimension", node)
    return Step(split, copies=operands(node)[1:])


@rule(aten.mm.default, aten.addmm.default)
def _mm(node: fx.Node, splits: Splits) -> Step:
    x = node.args[1] if node.target is aten.addmm.default else node.args[0]
    if x not in splits or splits[x].dim != 0 or sum(used in splits for used in operands(node)) > 1:
        raise Declined("a product sums over the divided dimension", node)
    return Step(splits[x], copies=[used for used in operands(node) if used is not x])


@rule(aten.matmul.default, aten.bmm.default)
def _matmul(node: fx.Node, splits: Splits) -> Step:
    if any(splits[x].dim - rank_of(x) >= -2 for x in operands(node) if x in splits):
        raise Declined("a product of activations sums over or spreads the divided dimension", node)
    return pointwise(node, splits)


@rule(aten.rms_norm.default, aten.layer_norm.default)
def _norm(node: fx.Node, splits: Splits) -> Step:
    split = _one(node, splits)
    if split.dim >= rank_of(node) - len(node.args[1]):
        raise Declined("a norm sums over the divided dimension", node)
    return Step(split, copies=operands(node)[1:])


@rule(aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.logsumexp.default)
def _reduction(node: fx.Node, splits: Splits) -> Step:
    split, dims = _one(node, splits), node.args[1] if len(node.args) > 1 else None
    dims = sorted(_dim(node, d) for d in ([dims] if isinstance(dims, int) else dims or range(rank_of(node.args[0]))))
    if split.dim in dims:
        raise Declined(f"{operation(node)} works along the divided dimension", node)
    gone = rank_of(node) < rank_of(node.args[0])
    return Step(split.at(split.dim - sum(d < split.dim for d in dims) * gone))


@rule(*ATTENTION)
def _attention(node: fx.Node, splits: Splits) -> Step:
    query, key, value = node.args[:3]
    for x in (query, key, value):
        if x not in splits or splits[x].dim != 1 or len(splits[x].blocks or ()) != 1:
            alone = _one_head(x, splits[x]) if x in splits else None
            raise Declined("query, key and value are not all divided by heads", x if alone else node) from alone
    if len(node.args) > 4 and node.args[4]:
        raise Declined("dropout would draw the same mask on every rank", node)
    step = Step(splits[query])
    for used in operands(node):
        if used not in (query, key, value):
            _enter(step, node, used, rank_of(used) - 3, sum(splits[query].blocks))
    return step


@rule(aten.gather.default)
def _gather(node: fx.Node, splits: Splits) -> Step:
    x, at, index = node.args[:3]
    if splits.get(x) != splits.get(index) or splits[x].dim == _dim(node, at):
        raise Declined("entries are picked along or across the divided dimension", node)
    return Step(splits[x])


@rule(dialect.chunk_logsumexp.default)
def _chunk_logsumexp(node: fx.Node, splits: Splits) -> Step:
    hidden, labels = node.args[0], node.args[3]
    if splits.get(hidden) != splits.get(labels) or splits[hidden].dim != 0:
        raise Declined("hidden states and labels are divided differently", node)
    return Step([splits[hidden]] * 3, copies=operands(node)[1:])


@rule(aten.embedding.default)
def _embedding(node: fx.Node, splits: Splits) -> Step:
    if node.args[0] in splits:
        raise Declined("the rows of an embedding are divided", node)
    return Step(splits[node.args[1]], copies=[node.args[0]])


@rule(dialect.gather_sequence.default, dialect.gather_from_ranks.default, dialect.rank_slice.default)
def _other_axis(node: fx.Node, splits: Splits) -> Step:
    split = _one(node, splits)
    if _dim(node, node.args[1]) == split.dim:
        raise Declined("the divided dimension is that of another axis too", node)
    return Step(split)

