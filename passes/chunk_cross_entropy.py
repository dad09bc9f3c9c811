"""chunk-cross-entropy: output head and loss in one op that never holds all logits.

    cross_entropy(cap(s h W^T + b), y) = chunk_cross_entropy(h, W, b, y, softcap=cap, logit_scale=s)
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

import ftc.dialect  # noqa: F401  registers ftc::chunk_cross_entropy
from ftc.rewrite.edit import Editor, is_parameter, linear_operands
from ftc.rewrite.outcome import Declined, Match, Outcome, location, operation
from ftc.rewrite.passes import Pass

aten = torch.ops.aten
LOSS = aten.cross_entropy_loss.default
CHUNKED = torch.ops.ftc.chunk_cross_entropy.default
_REDUCTIONS = ("none", "mean", "sum")
_FLATTENING = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.contiguous.default}
_WHOLE_SLICE_END = 2**62


@dataclass(frozen=True)
class ChunkCrossEntropy(Pass):
    """The loss without all logits. Where the graph also returns the logits they are dropped (None), unless `keep_logits`,
    which keeps them and with them their memory."""

    chunk: int | None = field(default=None, metadata={"help": "tokens at a time; chosen from a byte budget when not given"})
    keep_logits: bool = field(default=False, metadata={"help": "still return the logits beside the loss"})

    name: ClassVar[str] = "chunk-cross-entropy"
    summary: ClassVar[str] = "output head and cross-entropy become one op that never holds all logits"
    contract: ClassVar[str] = "exact"
    inverse: ClassVar[bool] = True
    trained_by: ClassVar[str] = "model"

    def __post_init__(self):
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk = {self.chunk} is not a number of tokens; use 1 or more")

    def apply(self, graph: fx.Graph) -> Outcome:
        outcome = Outcome(already=sum(node.target is CHUNKED for node in graph.nodes))
        for loss in [node for node in graph.nodes if node.op == "call_function" and node.target is LOSS]:
            try:
                self._rewrite(graph, loss, outcome)
            except Declined as declined:
                outcome.misses.append(declined.miss(loss))
        return outcome

    def _rewrite(self, graph: fx.Graph, loss: fx.Node, outcome: Outcome) -> None:
        logits, labels, weight, reduction, ignore, smoothing = _loss_arguments(loss)
        if weight is not None:
            raise Declined("the loss weighs its classes", loss)
        if labels.meta["val"].is_floating_point():
            raise Declined("the labels are probabilities, not classes", labels)
        head = _head(logits)
        x, matrix, bias = linear_operands(head.linear)
        place = location(head.linear)
        edit = Editor(graph, loss)
        width = int(x.meta["val"].shape[-1])
        hidden = edit(aten.reshape.default, x, [-1, width]) if x.meta["val"].dim() != 2 else x
        flat = labels
        if labels.meta["val"].dim() != 1:
            raise Declined("the labels are not one class a row", labels)
        new = edit(CHUNKED, hidden, matrix, bias, flat, ignore, smoothing, _REDUCTIONS[reduction], head.softcap, head.scale, head.upcast, self.chunk)
        if new.meta["val"].dtype != loss.meta["val"].dtype:
            new = edit(aten.to.dtype, new, loss.meta["val"].dtype)
        loss.replace_all_uses_with(new)
        graph.erase_node(loss)
        if not self.keep_logits:
            _drop_logits(graph, head.linear, outcome)
        outcome.matches.append(Match("loss", (new.name,), {"weight": str(getattr(matrix, "target", matrix)), "reduction": _REDUCTIONS[reduction]}, place))


@dataclass
class _Head:
    linear: fx.Node
    softcap: float | None = None
    scale: float = 1.0
    upcast: bool = False


def _loss_arguments(loss: fx.Node) -> tuple:
    names = ["self", "target", "weight", "reduction", "ignore_index", "label_smoothing"]
    given = dict(zip(names, loss.args, strict=False)) | dict(loss.kwargs)
    return (
        given["self"],
        given["target"],
        given.get("weight"),
        int(given.get("reduction", 1)),
        int(given.get("ignore_index", -100)),
        float(given.get("label_smoothing", 0.0)),
    )


def _head(logits: fx.Node) -> _Head:
    """Walk from the loss's logits [N, V] back to the linear that makes them: layout, casts, scale and soft cap between."""
    head, node = _Head(logits), logits
    while node.target is not aten.linear.default:
        if node.op != "call_function":
            raise Declined(f"the logits come from {node.name}, not from a linear head", node)
        if node.target in _FLATTENING or _is_whole_slice(node):
            if int(node.meta["val"].shape[-1]) != int(node.args[0].meta["val"].shape[-1]):
                raise Declined("the vocabulary dimension is reshaped", node)
            node = node.args[0]
        elif node.target in (aten.to.dtype, aten._to_copy.default):
            if not node.meta["val"].is_floating_point() or node.meta["val"].dtype.itemsize < node.args[0].meta["val"].dtype.itemsize:
                raise Declined("the logits are cast to a narrower dtype", node)
            head.upcast = node.meta["val"].dtype != node.args[0].meta["val"].dtype or head.upcast
            node = node.args[0]
        elif node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            node = _constant_factor(head, node)
        else:
            raise Declined(f"{operation(node)} stands between the head and the loss", node)
    head.linear = node
    if not is_parameter(node.args[1]):
        raise Declined("the head's weight is computed, not a parameter", node)
    return head


def _constant_factor(head: _Head, node: fx.Node) -> fx.Node:
    value = node.args[1]
    if not isinstance(value, (int, float)):
        raise Declined("the logits are scaled by a tensor", node)
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    inner = node.args[0]
    if not divides and inner.target is aten.tanh.default and head.softcap is None:
        capped = inner.args[0]
        by_division = capped.target in (aten.div.Tensor, aten.div.Scalar) and capped.args[1] == value
        by_factor = capped.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(capped.args[1], float) and capped.args[1] * value == 1.0
        if (by_division or by_factor) and head.scale == 1.0:
            head.softcap = float(value)
            return capped.args[0]
    head.scale *= 1.0 / value if divides else float(value)
    return inner


def _is_whole_slice(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else None
    return start in (0, None) and (end is None or (isinstance(end, int) and end > _WHOLE_SLICE_END)) and len(node.args) < 5


def _drop_logits(graph: fx.Graph, linear: fx.Node, outcome: Outcome) -> None:
    """Take outputs that are the logits (the head's product, or views of it) out of the graph's results."""
    output = next(node for node in graph.nodes if node.op == "output")
    logits = {linear}
    for node in graph.nodes:
        if node.op == "call_function" and node.args and node.args[0] in logits and node.target is not CHUNKED:
            logits.add(node)
    kept = [node for node in output.args[0] if node not in logits]
    if len(kept) < len(output.args[0]):
        outcome.dropped += [i for i, node in enumerate(output.args[0]) if node in logits]
        output.args = (tuple(kept),)
