"""A merged graph run through torch.compile piece by piece: what is computed between two transfers is compiled, transfers start and are waited for between.

Compiled whole, a graph does not keep its order: Inductor (seen with torch 2.13) moves each collective next to its wait, which undoes what the order is
for, and Dynamo breaks it anyway where rows are exchanged whose number only data tell. So the order stays in code of ours, and the compiler sees
compute alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ftc.pipeline.communication import is_start, is_wait
from ftc.pipeline.merge import Merged, boxed
from ftc.pipeline.merge_trace import copied, is_getitem, is_view


def compiled(merged: Merged, options: Mapping[str, Any] | None) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """The graph as a function of one list, which it empties; with `options` for torch.compile its pieces are compiled on their first call."""
    if options is None:
        return merged.boxed()
    split = pieces(merged)
    for name, module in split.named_children():
        if any(_computes(node) for node in module.graph.nodes):
            setattr(split, name, torch.compile(module, **options))
    return boxed(split.graph, split)


def pieces(merged: Merged) -> fx.GraphModule:
    """A module that calls, in the graph's order, one submodule for each run of nodes that a compiler may see, and for each run of those it may not."""
    from torch.fx.passes.split_module import split_module

    graph = copied(merged.graph)
    number, before, of = 0, None, {}
    for node in graph.nodes:
        if node.op == "call_function":
            plain = not (is_start(node) or is_wait(node) or _is_opaque(node))
            number += before is not None and plain != before
            before, of[node] = plain, number
    return split_module(fx.GraphModule(nn.Module(), graph), None, of.__getitem__, keep_original_order=True)


def _is_opaque(node: fx.Node) -> bool:
    """An operator around an exchange: it computes little, and the sizes it gives only data tell."""
    return getattr(getattr(node.target, "_schema", None), "name", "").startswith(("ftc::exchange_", "ftc::synthetic_"))


def _computes(node: fx.Node) -> bool:
    plain = node.op == "call_function" and not (is_start(node) or is_wait(node) or _is_opaque(node))
    return plain and not is_view(node) and not is_getitem(node)
