"""The sequence followed through a whole graph: which dimension of each value it is, and that no operator but attention and sums mixes tokens.

Sequences are recognised by their size: T is a symbol, and a value is divided over tokens where T is one of its sizes (or a factor of one, where batch
and tokens are merged).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import sympy
import torch
from torch import Tensor, fx

from ftc.rewrite.lockstep import arguments
from ftc.rewrite.outcome import Declined, operation
from ftc.rewrite.sharding import Split, Splits, follow, operands

aten, dialect = torch.ops.aten, torch.ops.ftc
ATTENTION = {aten.scaled_dot_product_attention.default, dialect.softcap_attention.default}
ARANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
LOSSES = {aten.cross_entropy_loss.default, dialect.chunk_cross_entropy.default}
SUMS = {aten.sum.default, aten.sum.dim_IntList}
_MASK = dialect.causal_mask.default
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int}
_CONSTANT = {aten.full.default, aten.ones.default, aten.zeros.default, aten.empty.memory_format, aten.expand.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
_TAKE_SIZES = _VIEWS | _CONSTANT | ARANGES | {aten.slice.Tensor, aten.sym_size.int}


@dataclass
class Sequence:
    """The size symbol of the sequence, and the attentions over it with their window (None: causal; UNMASKED: every token sees all)."""

    symbol: sympy.Symbol
    attentions: dict[fx.Node, int | None] = field(default_factory=dict)

    UNMASKED: ClassVar[int] = -1

    def dims(self, value: Tensor) -> list[tuple[int, bool]]:
        """(dim, whether tokens are all of it) of each dim whose size holds the sequence."""
        found = []
        for dim, size in enumerate(value.shape):
            expr = _expr(size)
            if self.symbol in expr.free_symbols:
                found.append((dim, expr == self.symbol))
        return found


def _expr(size) -> sympy.Expr:
    return size.node.shape_env.replace(size.node.expr) if isinstance(size, torch.SymInt) else sympy.Integer(size)


def sequence_of(graph: fx.Graph) -> Sequence | None:
    """The sequence of a graph: that of its attentions, else dim 1 of its inputs. None where nothing has one; Declined where its size is fixed."""
    attentions = [node for node in graph.nodes if node.target in ATTENTION]
    for node in attentions:
        size = _expr(node.args[0].meta["val"].shape[2])
        if not size.is_Symbol:
            raise Declined(f"the sequence has the fixed length {size} in this graph; rewrite with a longer example", node)
        return Sequence(size)
    values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    values.sort(key=lambda value: value.is_floating_point())  # ids before hidden states
    for value in values:
        if value.dim() > 1 and _expr(value.shape[1]).is_Symbol:
            return Sequence(_expr(value.shape[1]))
    return None


def follow_sequence(graph: fx.Graph, sequence: Sequence, degree: int) -> Splits:
    """The split of every node that is divided over tokens. Raises Declined at the first operator that mixes them."""
    splits: Splits = {}
    masks: set[fx.Node] = set()
    sums: set[fx.Node] = set()  # what hangs on a sum over all tokens
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "output":
            for used in node.all_input_nodes:
                if used in masks:
                    raise Declined("a mask over the sequence is a result", used)
            continue
        if not isinstance(value, (Tensor, list, tuple)) or node.op == "get_attr":
            continue
        if node.op == "call_function" and node.target not in _TAKE_SIZES | {_MASK}:
            _no_length(node, sequence)
        if node.target is _MASK or (node.op == "call_function" and masks & set(node.all_input_nodes) and node.target not in ATTENTION):
            masks.add(node)
            continue
        found = _split_of(node, splits, sequence, degree)
        if found is not None:
            splits[node] = found
        if sums & set(node.all_input_nodes) or (found is None and node.target in SUMS | LOSSES and node.args[0] in splits):
            if found is not None:
                raise Declined("a sum over all tokens is used by each token again", node)
            sums.add(node)
    return splits


def _no_length(node: fx.Node, sequence: Sequence) -> None:
    for used in node.all_input_nodes:
        size = used.meta.get("val")
        if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) and sequence.symbol in size.node.expr.free_symbols:
            raise Declined(f"{operation(node)} computes with the length of the sequence", node)


def _split_of(node: fx.Node, splits: Splits, sequence: Sequence, degree: int):
    """The split of one node; None where it is alike on all ranks."""
    value = node.meta["val"]
    own = sequence.dims(value) if isinstance(value, Tensor) else None
    if node.target in ATTENTION:
        sequence.attentions[node] = _window(node, splits, sequence)
        return splits[node.args[0]]
    divided = [used for used in operands(node) if used in splits]
    reads_parts = any(isinstance(splits.get(used), list) for used in node.all_input_nodes)
    if not divided and not reads_parts:
        if not own:
            return None
        if node.op == "placeholder" or node.target in _CONSTANT or (node.target in ARANGES and _counts_tokens(node, sequence)):
            return _only(node, own, degree)
        raise Declined(f"{operation(node)} makes a sequence of its own", node)
    if node.target in SUMS and not own:
        return None  # summed over the ranks
    if node.target in LOSSES:
        return _loss(node, splits, own, degree)
    if node.target in _VIEWS:
        return _only(node, own, degree)
    step = follow(node, splits)
    if step.slices:
        raise Declined(f"{step.slices[0][0].name} reaches along the sequence, and is not divided", node)
    if step.out is None and not own:
        return None
    if own is not None and (not isinstance(step.out, Split) or [step.out.dim] != [dim for dim, _ in own]):
        raise Declined(f"the sequence cannot be followed through {operation(node)}", node)
    return step.out


def _only(node: fx.Node, own: list[tuple[int, bool]], degree: int) -> Split:
    """The split of a value with one dimension of tokens."""
    if len(own) != 1:
        raise Declined("a value of tokens by tokens (a mask of its own, or scores) cannot be divided", node)
    (dim, alone), = own
    return Split(dim, () if alone else None, degree)


def _counts_tokens(node: fx.Node, sequence: Sequence) -> bool:
    bound = arguments(node)
    end = bound["end"].meta["val"] if isinstance(bound["end"], fx.Node) else bound["end"]
    return bound.get("start", 0) == 0 and bound.get("step", 1) == 1 and _expr(end) == sequence.symbol


def _loss(node: fx.Node, splits: Splits, own: list, degree: int) -> Split | None:
    bound = arguments(node)
    labels = bound["labels" if "labels" in bound else "target"]
    if splits.get(node.args[0]) != splits.get(labels) or splits[labels].dim != 0:
        raise Declined("logits and labels are divided differently", node)
    if node.target is aten.cross_entropy_loss.default and (bound.get("weight") is not None or labels.meta["val"].is_floating_point()):
        raise Declined("the loss weighs its classes", node)
    return _only(node, own, degree) if own else None


def _window(node: fx.Node, splits: Splits, sequence: Sequence) -> int | None:
    """The window of an attention over the sequence. Raises Declined for masks that are not made of positions alone."""
    bound = arguments(node)
    for name in ("query", "key", "value"):
        if bound[name] not in splits or splits[bound[name]].dim != 2:
            raise Declined(f"the {name} of this attention is not divided over tokens", node)
    if bound.get("dropout_p"):
        raise Declined("dropout would draw the same mask on every rank", node)
    mask = bound.get("attn_mask")
    if mask is None:
        return None if bound.get("is_causal") else Sequence.UNMASKED
    root = mask
    while root.op == "call_function" and root.target in (aten.unsqueeze.default, aten.expand.default):
        root = root.args[0]
    if root.target is not _MASK or bound.get("is_causal"):
        raise Declined(f"the mask {mask.name} is neither causal nor a sliding window", node)
    given = arguments(root)
    return given.get("window")

