"""The parts of a decoder's shell, found by the flow of data alone: token embedding, last block, head, logits, loss.

    ids -> embedding -> ... -> [last block: trunk -> hidden] -> norm ... -> head -> logits -> cross-entropy -> loss

No name of a module counts. What does not look like this is declined with the node where it parts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

import ftc.dialect  # noqa: F401  registers ftc::chunk_cross_entropy
from ftc.capture.results import output_node
from ftc.rewrite.edit import is_parameter
from ftc.rewrite.opened import _results
from ftc.rewrite.outcome import Declined, operation

aten = torch.ops.aten
CROSS_ENTROPIES = {aten.cross_entropy_loss.default: 1, torch.ops.ftc.chunk_cross_entropy.default: 3}  # place of the labels
HEADS = {aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default, torch.ops.ftc.chunk_cross_entropy.default}


@dataclass(frozen=True)
class ShellParts:
    """Nodes of a shell graph. `hidden` [B, T, D] leaves the last block and `trunk` enters it; `loss` is a cross-entropy over
    labels, None in a graph without labels; `logits` [B, T, V] is a result of the graph, None where it gives only the loss."""

    ids: fx.Node
    embedding: fx.Node
    last: fx.Node
    trunk: fx.Node
    hidden: fx.Node
    head: fx.Node
    logits: fx.Node | None
    loss: fx.Node | None


def find_parts(graph: fx.Graph, skip: Callable[[str], bool] = lambda name: False) -> ShellParts:
    """The parts of `graph`; calls of regions whose name `skip` accepts are not looked at. Raises Declined."""
    calls = [node for node in graph.nodes if node.op == "call_module" and not skip(str(node.target))]
    output = output_node(graph)
    if not calls:
        raise Declined("the model has no repeated blocks", output)
    last = calls[-1]
    hidden = _hidden(last)
    below = descendants([hidden])
    embeddings = [node for node in graph.nodes if node.target is aten.embedding.default and is_parameter(node.args[0])]
    if not embeddings:
        raise Declined("the model looks up no embedding: call it with token ids", output)
    trunk = _trunk(last, hidden, descendants(embeddings))
    losses = [n for n in graph.nodes if n.target in CROSS_ENTROPIES and n in below]
    if len(losses) > 1:
        raise Declined("it has more than one cross-entropy", losses[1])
    logits, head = _logits(output.args[0], hidden, below)
    if losses:
        head = _head(losses[0], hidden, below)
    if head is None:
        raise Declined("neither logits [batch, tokens, vocabulary] nor a cross-entropy depend on the last block", output)
    embedding = _token_embedding(embeddings, _num_classes(losses[0] if losses else logits))
    loss = losses[0] if losses else None
    return ShellParts(embedding.args[1], embedding, last, trunk, hidden, head, logits, loss)


def descendants(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on any of `roots`, these included."""
    found, stack = set(), list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += list(node.users)
    return found


def ancestors(roots: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that any of `roots` depends on, these included, but not past `stop`."""
    found, stack, border = set(), list(roots), set(stop)
    while stack:
        node = stack.pop()
        if node not in found and node not in border:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _hidden(last: fx.Node) -> fx.Node:
    tensors = [n for n in _results(last) if n.meta["val"].is_floating_point() and n.meta["val"].dim() == 3 and n.users]
    if not tensors:
        raise Declined("the last block gives no hidden states [batch, tokens, width]", last)
    return tensors[0]


def _trunk(last: fx.Node, hidden: fx.Node, after_embedding: set[fx.Node]) -> fx.Node:
    wanted = hidden.meta["val"]
    found = [
        node
        for node in dict.fromkeys(last.all_input_nodes)
        if node in after_embedding
        and isinstance(value := node.meta.get("val"), torch.Tensor)
        and value.dtype == wanted.dtype
        and value.dim() == 3
        and str(value.shape[-1]) == str(wanted.shape[-1])
    ]
    if len(found) != 1:
        raise Declined(f"{len(found)} of the last block's arguments look like the hidden states that it takes in", last)
    return found[0]


def _logits(results: Iterable[fx.Node], hidden: fx.Node, below: set[fx.Node]) -> tuple[fx.Node | None, fx.Node | None]:
    """The first result [B, T, V] that a product with a parameter leads to, and that product."""
    for node in results:
        value = node.meta.get("val")
        if node in below and isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 3:
            try:
                return node, _head(node, hidden, below)
            except Declined:
                continue  # hidden states that the model returns too
    return None, None


def _num_classes(end: fx.Node) -> int:
    if end.target is torch.ops.ftc.chunk_cross_entropy.default:
        return int(end.args[1].meta["val"].shape[0])
    scores = (end.args[0] if end.target in CROSS_ENTROPIES else end).meta["val"]
    return int(scores.shape[1 if end.target in CROSS_ENTROPIES else -1])


def _head(end: fx.Node, hidden: fx.Node, below: set[fx.Node]) -> fx.Node:
    """The product with a parameter that is nearest to the logits or the loss; all between must be one chain of tensors."""
    node = end
    while True:
        if node is hidden or node.op != "call_function":
            raise Declined("no product with a parameter stands between the last block and the logits", node)
        if node.target in HEADS and _weights(node):
            return node
        nearer = [parent for parent in node.all_input_nodes if parent in below]
        if len(nearer) != 1:
            raise Declined(f"{operation(node)} joins several tensors on the way to the logits", node)
        node = nearer[0]


def _weights(node: fx.Node) -> list[fx.Node]:
    """The matrices among a product's operands that depend on parameters alone."""
    return [
        parent
        for parent in node.all_input_nodes
        if isinstance(value := parent.meta.get("val"), torch.Tensor)
        and value.dim() == 2
        and all(n.op in ("get_attr", "call_function") for n in ancestors([parent]))
        and any(is_parameter(n) for n in ancestors([parent]))
    ]


def _token_embedding(embeddings: list[fx.Node], vocabulary: int) -> fx.Node:
    """The lookup of token ids: a table of as many rows as the head has classes, read at an input of the model."""
    fitting = [n for n in embeddings if int(n.args[0].meta["val"].shape[0]) == vocabulary]
    fitting = fitting or [max(embeddings, key=lambda n: int(n.args[0].meta["val"].shape[0]))]
    read = [n for n in fitting if any(a.op == "placeholder" and "position" not in str(a.target) for a in ancestors([n.args[1]]))]
    if len(read) != 1 or read[0].args[1].meta["val"].dim() != 2:
        raise Declined("it is not clear which lookup is that of the token ids [batch, tokens]", embeddings[0])
    return read[0]
