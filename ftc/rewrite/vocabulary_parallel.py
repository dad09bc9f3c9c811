"""The vocabulary divided over ranks: embedding, output head, and cross-entropy of logits of which each rank has a part.

    embedding      x = sum_r [id on rank r] E_r[id - r V/n]
    cross-entropy  -log p_y = m + log sum_r exp(l_r - m) - sum_r [y on rank r] z_y,   l_r = log sum_v exp z_v over rank r's part, m = max_r l_r

so that ranks tell each other three numbers a token (with label smoothing four), never logits (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ftc.rewrite.divide import Divider
from ftc.rewrite.edit import Editor, is_parameter
from ftc.rewrite.lockstep import arguments
from ftc.rewrite.outcome import Declined
from ftc.rewrite.recognise import fake_value
from ftc.rewrite.regroup import Indivisible
from ftc.rewrite.sharding import Split, Step, follow, operands, rank_of
from ftc.rewrite.tensor_site import Product, product_of

aten, dialect = torch.ops.aten, torch.ops.ftc
LOSS, CHUNKED, EMBEDDING = aten.cross_entropy_loss.default, dialect.chunk_cross_entropy.default, aten.embedding.default
_REDUCTIONS = ("none", "mean", "sum")


@dataclass
class Vocabulary:
    """One weight over the vocabulary, and every node that reads it: embeddings, products, chunked losses."""

    weight: fx.Node
    readers: list[fx.Node]

    @property
    def size(self) -> int:
        """Number of ids."""
        return int(self.weight.meta["val"].shape[0])


def vocabularies(graph: fx.Graph) -> list[Vocabulary]:
    """The weights over the vocabulary: of losses, of returned products that widen their input, and embeddings as long as one of them."""
    heads, losses = set(), set()
    output = next(node for node in graph.nodes if node.op == "output")
    for node in graph.nodes:
        if node.target is CHUNKED:
            losses.add(node.args[1])
        elif node.target is LOSS:
            heads |= {p.node for p in [_head_of(node.args[0])] if p is not None}
    for returned in output.all_input_nodes:
        product = _head_of(returned)
        if product is not None and product.width > product.x.meta["val"].shape[-1]:
            heads.add(product.node)
    weights = {product_of(node).weight for node in heads if product_of(node).out_dim == 0} | {w for w in losses if is_parameter(w)}
    sizes = {int(weight.meta["val"].shape[0]) for weight in weights}
    for node in graph.nodes:
        if node.target is EMBEDDING and is_parameter(node.args[0]) and (not sizes or int(node.args[0].meta["val"].shape[0]) in sizes):
            weights.add(node.args[0])
    return [Vocabulary(weight, list(weight.users)) for weight in sorted(weights)]


def _head_of(node: fx.Node) -> Product | None:
    """The product that logits come from: layout, casts, scale and cap between."""
    while node.op == "call_function":
        product = product_of(node)
        if product is not None:
            return product
        if len(operands(node)) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        try:
            follow(node, {node.args[0]: Split(rank_of(node.args[0]) - 1, None, 1)})
        except Declined:
            return None
        node = node.args[0]
    return None


def check(vocabulary: Vocabulary, degree: int) -> None:
    """Raises Declined where this weight cannot be divided."""
    weight = vocabulary.weight
    if vocabulary.size % degree:
        size = Indivisible(vocabulary.size, degree, "ids of the vocabulary")
        raise Declined(f"{size}; vocabulary = false (in a run: [parallelism] disable_loss_parallel = true) leaves it whole", vocabulary.readers[0]) from size
    if sum(node.op == "get_attr" and node.target == weight.target for node in weight.graph.nodes) > 1:
        raise Declined(f"{weight.target} is read in two places", vocabulary.readers[0])
    for node in vocabulary.readers:
        product = product_of(node)
        head = product is not None and product.weight is weight and product.out_dim == 0
        if product is not None and product.bias is not None and len(product.bias.users) > 1:
            raise Declined(f"{product.bias.target} is used more than once", node)
        if not (head or (node.target is EMBEDDING and node.args[0] is weight) or (node.target is CHUNKED and node.args[1] is weight)):
            raise Declined(f"{weight.target} is also read by {node.name}", node)


def divide(vocabulary: Vocabulary, to: Divider) -> list[str]:
    """Make every reader of a checked vocabulary each rank's own; returns what kinds they were."""
    size = vocabulary.size
    to.divide(vocabulary.weight, 0, (size,))
    kinds = []
    for node in vocabulary.readers:
        if node.target is EMBEDDING:
            _embedding(to, node, size // to.degree)
        elif node.target is CHUNKED:
            _chunked(to, node, size)
        else:
            _head(to, product_of(node), size)
        kinds.append({EMBEDDING: "embedding", CHUNKED: "head and loss"}.get(node.target, "head"))
    return kinds


def _embedding(to: Divider, node: fx.Node, own: int) -> None:
    bound = arguments(node)
    ids, padding = bound["indices"], int(bound.get("padding_idx", -1))
    edit = Editor(to.graph, node)
    local = to.ranked(edit, dialect.rank_offset, ids, own)
    elsewhere = edit(aten.logical_or.default, edit(aten.lt.Scalar, local, 0), edit(aten.ge.Scalar, local, own))
    rows = edit(EMBEDDING, bound["weight"], edit(aten.masked_fill.Scalar, local, elsewhere, 0))
    if padding >= 0:  # the row of the padding id gets no gradient
        is_padding = edit(aten.unsqueeze.default, edit(aten.eq.Scalar, ids, padding), -1)
        rows = edit(aten.where.self, is_padding, edit(aten.detach.default, rows), rows)
    rows = edit(aten.masked_fill.Scalar, rows, edit(aten.unsqueeze.default, elsewhere, -1), 0.0)
    node.replace_all_uses_with(to.ranked(edit, dialect.reduce_from_ranks, rows))
    to.graph.erase_node(node)


def _head(to: Divider, product: Product, size: int) -> None:
    """Follow the logits to where they are needed: a loss takes its part, anything else gets them gathered."""
    product.node.replace_input_with(product.x, to.copy(product.x))
    if product.bias is not None:
        to.divide(product.bias, 0, (size,))
    product.node.meta["val"] = fake_value(to.graph, product.node)
    splits = {product.node: Split(rank_of(product.node) - 1, (size,), to.degree)}
    for node in list(to.graph.nodes):
        parts = [used for used in node.all_input_nodes if used in splits]
        if not parts or node in splits:
            continue
        if not isinstance(node.meta.get("val"), (Tensor, list, tuple)) and node.op != "output":
            continue  # a size
        if node.target is LOSS and parts == [node.args[0]] and _plain_loss(node) and splits[node.args[0]].dim == 1:
            _loss(to, node, size)
            continue
        step = _try(node, splits)
        if step is None:
            for used in parts:
                node.replace_input_with(used, _gathered(to, used, splits[used].dim))
        else:
            to.step(node, step)
            node.meta["val"] = fake_value(to.graph, node)
            splits[node] = step.out


def _try(node: fx.Node, splits: dict) -> Step | None:
    """The step of a node whose results are still divided by the vocabulary in one block; None where it has to see all logits."""
    if node.op != "call_function":
        return None
    kept = {used: used.meta["val"] for used in node.all_input_nodes if used in splits}
    try:
        for used, value in kept.items():
            used.meta["val"] = _widened(value, splits[used])
        step = follow(node, splits)
    except Declined:
        return None
    finally:
        for used, value in kept.items():
            used.meta["val"] = value
    single = isinstance(step.out, Split) and step.out.blocks is not None and len(step.out.blocks) == 1
    return step if single and not step.slices else None


def _widened(value: Tensor, split: Split) -> Tensor:
    shape = list(value.shape)
    shape[split.dim] = sum(split.blocks)
    with value.fake_mode:
        return torch.empty(shape, dtype=value.dtype, device=value.device)


def _gathered(to: Divider, used: fx.Node, dim: int) -> fx.Node:
    known = [user for user in used.users if user.target is dialect.gather_from_ranks.default and user.args[1] == dim]
    return known[0] if known else to.ranked(Editor(to.graph, used.next, like=used), dialect.gather_from_ranks, used, dim)


def _plain_loss(node: fx.Node) -> bool:
    bound = arguments(node)
    labels = bound["target"].meta["val"]
    return bound.get("weight") is None and not labels.is_floating_point() and labels.dim() == 1


def _loss(to: Divider, node: fx.Node, size: int) -> None:
    """cross_entropy_loss of this rank's logits [N, V/n]."""
    bound = arguments(node)
    logits, labels, own = bound["self"], bound["target"], size // to.degree
    edit = Editor(to.graph, node)
    smoothing = float(bound.get("label_smoothing", 0.0))
    local = to.ranked(edit, dialect.rank_offset, labels, own)
    elsewhere = edit(aten.logical_or.default, edit(aten.lt.Scalar, local, 0), edit(aten.ge.Scalar, local, own))
    index = edit(aten.unsqueeze.default, edit(aten.masked_fill.Scalar, local, elsewhere, 0), 1)
    label = edit(aten.squeeze.dim, edit(aten.gather.default, logits, 1, index), 1)
    label = edit(aten.masked_fill.Scalar, label, elsewhere, 0.0)
    logsumexp = edit(aten.logsumexp.default, logits, [1])
    total = edit(aten.sum.dim_IntList, logits, [1]) if smoothing else None
    options = (int(bound.get("ignore_index", -100)), smoothing, _REDUCTIONS[int(bound.get("reduction", 1))])
    _replace(to, node, edit, _combined(to, edit, logsumexp, label, total, labels, size, *options))


def _chunked(to: Divider, node: fx.Node, size: int) -> None:
    """chunk_cross_entropy over this rank's rows of the head."""
    bound = arguments(node)
    labels, smoothing = bound["labels"], float(bound.get("label_smoothing", 0.0))
    if bound.get("bias") is not None:
        to.divide(bound["bias"], 0, (size,))
    edit = Editor(to.graph, node)
    local = to.ranked(edit, dialect.rank_offset, labels, size // to.degree)
    options = (bound.get("softcap"), bound.get("logit_scale", 1.0), bound.get("chunk"))
    rows = edit(dialect.chunk_logsumexp.default, to.copy(bound["hidden"]), bound["weight"], bound.get("bias"), local, *options)
    logsumexp, label, total = (edit(operator.getitem, rows, i) for i in range(3))
    options = (int(bound.get("ignore_index", -100)), smoothing, bound.get("reduction", "mean"))
    _replace(to, node, edit, _combined(to, edit, logsumexp, label, total, labels, size, *options))


def _combined(to: Divider, edit: Editor, logsumexp, label, total, labels, size: int, ignore: int, smoothing: float, reduction: str) -> fx.Node:
    """The loss from what each rank knows of each row."""
    peak = to.ranked(edit, dialect.max_over_ranks, logsumexp)
    terms = to.ranked(edit, dialect.reduce_from_ranks, edit(aten.exp.default, edit(aten.sub.Tensor, logsumexp, peak)))
    normaliser = edit(aten.add.Tensor, edit(aten.log.default, terms), peak)
    row = edit(aten.sub.Tensor, normaliser, to.ranked(edit, dialect.reduce_from_ranks, label))
    if smoothing:
        mean = edit(aten.div.Scalar, to.ranked(edit, dialect.reduce_from_ranks, total), size)
        smooth = edit(aten.mul.Scalar, edit(aten.sub.Tensor, normaliser, mean), smoothing)
        row = edit(aten.add.Tensor, edit(aten.mul.Scalar, row, 1.0 - smoothing), smooth)
    ignored = edit(aten.eq.Scalar, labels, ignore)
    row = edit(aten.masked_fill.Scalar, row, ignored, 0.0)
    if reduction == "none":
        return row
    loss = edit(aten.sum.default, row)
    if reduction == "sum":
        return loss
    count = edit(aten.sum.default, edit(aten.logical_not.default, ignored))
    return edit(aten.div.Tensor, loss, count)


def _replace(to: Divider, node: fx.Node, edit: Editor, new: fx.Node) -> None:
    if new.meta["val"].dtype != node.meta["val"].dtype:
        new = edit(aten.to.dtype, new, node.meta["val"].dtype)
    node.replace_all_uses_with(new)
    to.graph.erase_node(node)
