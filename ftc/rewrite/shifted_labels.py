"""Labels for tokens further ahead, and where a document ends.

    y_i = t_(i+1);   labels^k_i = labels^(k-1)_(i+1) where t_i and t_(i+1) stand in one document and y_i counts, else ignored

so that labels^k_i = t_(i+k+1), and only where every token from t_i to t_(i+k+1) belongs together. What counts as a border, as far
as the graph can see it: an ignored label; positions that do not go on by one; an attention mask that does not let token i + 1 see
token i (packed documents, padding); the end-of-text token, where its id is given.
"""

import torch
from torch import fx

from ftc.rewrite.edit import Editor
from ftc.rewrite.loss_terms import LossTerm
from ftc.rewrite.shell_parts import ShellParts

aten = torch.ops.aten
_TO_THE_END = 2**63 - 1
_BLOCKED = -1e4  # an additive mask below this forbids; biases by distance (ALiBi) lie above


def labels_of(edit: Editor, parts: ShellParts, term: LossTerm) -> fx.Node:
    """The term's labels as [B, T'], T' being T or, where the model leaves the last position out, less."""
    labels = term.labels
    if labels.meta["val"].dim() == 2:
        return labels
    batch = edit(aten.sym_size.int, parts.ids, 0)
    whole = str(labels.meta["val"].numel()) == str(parts.ids.meta["val"].numel())
    length = edit(aten.sym_size.int, parts.ids, 1) if whole else -1
    return edit(aten.reshape.default, labels, [batch, length])


def continues(edit: Editor, parts: ShellParts, labels: fx.Node, ignore_index: int, end_of_text: int | None) -> fx.Node:
    """Bool [B, T']: whether the label at i counts and token i + 1 belongs to the document of token i."""
    ok = edit(aten.ne.Scalar, labels, ignore_index)
    same_length = str(labels.meta["val"].shape[1]) == str(parts.ids.meta["val"].shape[1])
    for joined in _joined(edit, parts, end_of_text):
        if not same_length:
            joined = edit(aten.slice.Tensor, joined, 1, 0, edit(aten.sym_size.int, labels, 1))
        ok = edit(aten.logical_and.default, ok, joined)
    return ok


def shifted(edit: Editor, labels: fx.Node, ok: fx.Node, ignore_index: int) -> fx.Node:
    """Labels for one token further: int64 [B, T'], ignored where it belongs to another document or the text ends."""
    return edit(aten.where.ScalarOther, ok, next_of(edit, labels, ignore_index), ignore_index)


def next_of(edit: Editor, tensor: fx.Node, fill: int) -> fx.Node:
    """[B, T]: at i what `tensor` [B, T] has at i + 1, `fill` at the end."""
    return edit(aten.constant_pad_nd.default, edit(aten.slice.Tensor, tensor, 1, 1, _TO_THE_END), [0, 1], fill)


def _joined(edit: Editor, parts: ShellParts, end_of_text: int | None) -> list[fx.Node]:
    """Bool [B, T] or [1, T] each: whether token i + 1 belongs to the document of token i, by each sign there is."""
    found = []
    if end_of_text is not None:
        found.append(edit(aten.ne.Scalar, next_of(edit, parts.ids, end_of_text), end_of_text))
    for node in edit.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and "position" in str(node.target) and value.dim() == 2 and not value.is_floating_point():
            found.append(edit(aten.eq.Tensor, next_of(edit, node, 0), edit(aten.add.Tensor, node, 1)))
    length = str(parts.ids.meta["val"].shape[1])
    for node in dict.fromkeys(parts.last.all_input_nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() == 4 and [str(size) for size in value.shape[-2:]] == [length, length]:
            found.append(_seen(edit, node))
    return found


def _seen(edit: Editor, mask: fx.Node) -> fx.Node:
    """Bool [B, T]: whether token i + 1 may attend to token i under `mask` [B, heads or 1, T, T], boolean or additive."""
    below = edit(aten.select.int, edit(aten.diagonal.default, mask, -1, -2, -1), 1, 0)
    if mask.meta["val"].dtype != torch.bool:
        below = edit(aten.gt.Scalar, below, _BLOCKED)
    return edit(aten.constant_pad_nd.default, below, [0, 1], False)
