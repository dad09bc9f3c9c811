"""A cross-entropy in a graph and what stands between it and the loss that the model returns.

    loss = c * cross_entropy(logits, labels) + others        c: casts and factors that do not depend on it

`LossTerm.again` spells the same term for other logits and labels, as a sum over the labels divided as the original is, so that
two terms of one loss are weighed alike and a batch without a single label in one of them gives 0 there, not 0 / 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ftc.capture.results import output_node
from ftc.rewrite.edit import Editor
from ftc.rewrite.outcome import Declined, operation
from ftc.rewrite.shell_parts import CROSS_ENTROPIES, descendants

aten = torch.ops.aten
_CASTS = {aten.to.dtype, aten._to_copy.default}
_FACTORS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_SUMS = {aten.add.Tensor, aten.add.Scalar}
_SUM = {aten.cross_entropy_loss.default: 2, torch.ops.ftc.chunk_cross_entropy.default: "sum"}
_MEAN = {aten.cross_entropy_loss.default: 1, torch.ops.ftc.chunk_cross_entropy.default: "mean"}


@dataclass(frozen=True)
class LossTerm:
    """`loss` is the cross-entropy, `chain` the casts and factors after it, `result` what the model returns at `place`."""

    loss: fx.Node
    arguments: dict
    is_mean: bool
    chain: Sequence[fx.Node]
    result: fx.Node
    place: int

    @property
    def labels(self) -> fx.Node:
        """int64 [N] or [B, T]"""
        return self.arguments[_label_name(self.loss)]

    @property
    def ignore_index(self) -> int:
        return self.arguments["ignore_index"]

    def again(self, edit: Editor, exits: dict[fx.Node, fx.Node], labels: fx.Node, ahead: int = 0) -> fx.Node:
        """The term for copies of what leads to the logits (`exits`) and `labels` in the place of its own.

        With `ahead` the labels only say which places count: each is compared with the distribution that the term's own
        logits give that many places further on. Raises Declined where the loss never holds its logits.
        """
        given = {name: exits.get(value, value) if isinstance(value, fx.Node) else value for name, value in self.arguments.items()}
        if ahead:
            term = self._towards_own(edit, given["self"] if "self" in given else None, labels, ahead)
        else:
            given |= {_label_name(self.loss): labels, "reduction": _SUM[self.loss.target]}
            term = edit(self.loss.target, *given.values())
        if self.is_mean:
            counted = edit(aten.ne.Scalar, self.labels, self.ignore_index)
            term = edit(aten.div.Tensor, term, edit(aten.sum.default, counted))
        return edit.copy(self.chain, {self.chain[0].args[0]: term})[self.chain[-1]] if self.chain else term

    def _towards_own(self, edit: Editor, logits: fx.Node | None, labels: fx.Node, ahead: int) -> fx.Node:
        """sum of -softmax(own logits, `ahead` places on) log softmax(logits) where the labels count; logits are [N, V] or [B, V, T]."""
        if logits is None:
            raise Declined("the loss is computed without holding its logits, which target = 'model' needs", self.loss)
        own = self.arguments["self"]
        places = own.meta["val"].dim() - 1 if own.meta["val"].dim() == 3 else 0
        # Rolled over the end of a row: those places do not count.
        own = edit(aten.roll.default, edit(aten.detach.default, own), [-ahead], [places])
        each = edit(aten.cross_entropy_loss.default, logits, edit(aten.softmax.int, own, 1), None, 0)
        counts = edit(aten.ne.Scalar, labels, self.ignore_index)
        return edit(aten.sum.default, edit(aten.where.ScalarOther, counts, each, 0))


def find_loss_term(graph: fx.Graph, loss: fx.Node) -> LossTerm:
    """How the cross-entropy `loss` enters the graph's results. Raises Declined when it is not by casts, factors and sums."""
    arguments = _arguments(loss)
    reduction = arguments["reduction"]
    if reduction not in (_SUM[loss.target], _MEAN[loss.target]):
        raise Declined("the loss is not reduced to one number", loss)
    if loss.target is aten.cross_entropy_loss.default and arguments["weight"] is not None:
        raise Declined("the loss weighs its classes", loss)
    labels = arguments[_label_name(loss)]
    if labels.meta["val"].is_floating_point() or labels.meta["val"].dim() > 2:
        raise Declined("the labels are not class indices [tokens] or [batch, tokens]", labels)
    after = descendants([loss])
    results = output_node(graph).args[0]
    places = [place for place, node in enumerate(results) if node in after]
    if len(places) != 1:
        raise Declined(f"the cross-entropy enters {len(places)} of the model's results", loss)
    chain, node = [], loss
    while node is not results[places[0]]:
        users = [user for user in node.users if user in after and user.op != "output"]
        if len(users) != 1:
            raise Declined("the cross-entropy is used more than once", node)
        (user,) = users
        if user.target in _SUMS and user.args[0] is not user.args[1] and not user.kwargs:
            pass  # the other summand is no part of the term
        elif user.args[0] is node and (user.target in _CASTS or (user.target in _FACTORS and user.args[1] is not node)):
            chain.append(user)
        else:
            raise Declined(f"{operation(user)} stands between the cross-entropy and the loss", user)
        node = user
    links = []
    for number, link in enumerate(chain):  # sums left out, so that each link reads the one before
        links.append(link)
        if number and link.args[0] is not chain[number - 1]:
            raise Declined("a sum with another loss is scaled", link)
    return LossTerm(loss, arguments, reduction == _MEAN[loss.target], tuple(links), node, places[0])


def _arguments(loss: fx.Node) -> dict:
    """Every argument of the cross-entropy by name, defaults included, in the order of the schema."""
    schema = loss.target._schema.arguments
    given = dict(zip([a.name for a in schema], loss.args, strict=False)) | dict(loss.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _label_name(loss: fx.Node) -> str:
    return loss.target._schema.arguments[CROSS_ENTROPIES[loss.target]].name
