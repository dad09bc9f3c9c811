"""What crosses between stages, as tensors without memory: so that a schedule knows sizes before anything has run.

torch's PipelineStage finds them out by running the first microbatch forward and backward on memory that holds anything; given them as
`input_args` and `output_args` it does not, and what counts tokens in the backward pass (`ftc::balance`) counts none that are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ftc.capture.captured import CapturedGraph
from ftc.capture.results import output_node
from ftc.pipeline.cut_graph import Piece

aten = torch.ops.aten
_CUTS_GRADIENT = {aten.detach.default, aten.argmax.default}


def examples(
    captured: CapturedGraph, pieces: Sequence[Piece], index: int, tensors: Sequence[Tensor], trained: Callable[[str], bool]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(what stage `index` takes from the stage before, what it gives): tensors on the meta device with the sizes that a call with the
    input `tensors` leads to, and with `requires_grad` where a parameter or region above them is `trained` (asked by name)."""
    sizes = _symbols(captured, tensors)
    flags: list[bool] = []
    takes: tuple[Tensor, ...] = ()
    for number, piece in enumerate(pieces[: index + 1]):
        if number == index:
            takes = tuple(_example(value, sizes, flag) for value, flag in zip(piece.takes_values, flags, strict=True))
        flags = _flags(piece.graph, flags, trained)
    results = output_node(pieces[index].graph).args[0]
    return takes, tuple(_example(node.meta["val"], sizes, flag) for node, flag in zip(results, flags, strict=True))


def _symbols(captured: CapturedGraph, tensors: Sequence[Tensor]) -> dict[sympy.Symbol, int]:
    found = {}
    for spec, tensor in zip(captured.inputs, tensors, strict=True):
        found |= {size: int(actual) for size, actual in zip(spec.sizes, tensor.shape, strict=True) if isinstance(size, sympy.Symbol)}
    return found


def _example(value: Tensor, sizes: dict[sympy.Symbol, int], flag: bool) -> Tensor:
    """A meta tensor of the shape and strides of a fake one, its symbols replaced."""

    def number(size) -> int:
        return int(size.node.expr.xreplace(sizes)) if isinstance(size, torch.SymInt) else int(size)

    shape, stride = [number(s) for s in value.shape], [number(s) for s in value.stride()]
    return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta", requires_grad=flag)


def _flags(graph: fx.Graph, entering: Sequence[bool], trained: Callable[[str], bool]) -> list[bool]:
    """Whether each result of a piece has a gradient, where `entering` says it of its first placeholders."""
    flag: dict[fx.Node, bool] = {}
    given = iter(entering)
    for node in graph.nodes:
        if node.op == "placeholder":
            flag[node] = next(given, False)
        elif node.op == "get_attr":
            flag[node] = trained(node.target)
        elif node.op != "output":
            above = any(flag[parent] for parent in node.all_input_nodes) or (node.op == "call_module" and trained(node.target))
            flag[node] = above and node.target not in _CUTS_GRADIENT and _has_gradient(node.meta.get("val"))
    return [flag[node] for node in output_node(graph).args[0]]


def _has_gradient(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.is_floating_point()
