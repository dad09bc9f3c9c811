"""raise-rope: every spelling of rotary position embedding becomes `ftc.rope`.

    x[j] cos[j] - x[j + R/2] sin[j], x[j + R/2] cos[j + R/2] + x[j] sin[j + R/2]   = rope(x, cos, sin)                     (half-split)
    x[2j] cos[2j] - x[2j+1] sin[2j], x[2j+1] cos[2j+1] + x[2j] sin[2j+1]           = rope(x, cos, sin, interleaved=True)
    view_as_real(view_as_complex(x) * (cos + i sin))                               = rope(x, cos, sin, interleaved=True)

over the first R elements of the last dimension (Su et al. 2021, equation 34), the rest passed through. The pass runs the code below every product
of activations with a table symbolically (`ftc.rewrite.recognise_rotation`), reads pairing, signs and table elements off the result, finds or builds
tables of full width, and keeps the rotation only if values and gradients are proved equal.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

import ftc.dialect  # noqa: F401  registers ftc::rope
from ftc.rewrite.movement import cone, sources
from ftc.rewrite.outcome import Declined, Match, location
from ftc.rewrite.probe import aten, concrete
from ftc.rewrite.raising import RaisePass
from ftc.rewrite.recognise import Analysis, Builder, replace, sizes_of
from ftc.rewrite.recognise_rotation import LINEAR, MULTIPLY, NotLinear, Rotation, Tables, as_rotation, linear_form

ROPE = torch.ops.ftc.rope.default


@dataclass(frozen=True)
class RaiseRope(RaisePass):
    """The pass."""

    name: ClassVar[str] = "raise-rope"
    summary: ClassVar[str] = "rotary position embedding in any spelling becomes ftc.rope"
    canonical: ClassVar[frozenset] = frozenset({ROPE})

    def is_anchor(self, analysis: Analysis, node: fx.Node) -> bool:
        """A product of activations with a table."""
        return is_anchor(analysis, node)

    def raise_at(self, analysis: Analysis, anchor: fx.Node) -> Match | None:
        """The match whose result is the farthest below the anchor; None where the anchor is no part of a rotation."""
        return _raise(analysis, anchor)


def is_anchor(analysis: Analysis, node: fx.Node) -> bool:
    """A product of activations with a table of more than one number; one that depends on parameters must have two dims, as no norm weight has."""
    if node.op != "call_function" or node.target not in MULTIPLY | {aten.addcmul.default} or not analysis.active(node):
        return False
    factors = node.args[1:3] if node.target is aten.addcmul.default else node.args[:2]
    for one, other in (factors, factors[::-1]):
        if analysis.active(one) and isinstance(other, fx.Node) and not analysis.active(other):
            wide = [size for size in sizes_of(other) if size != 1]
            return len(wide) >= (2 if "P" in analysis.kind(other) else 1)
    return False


def _raise(analysis: Analysis, anchor: fx.Node) -> Match | None:
    below = _below(analysis, anchor)
    mixes: fx.Node | None = None
    for result in sorted(below, reverse=True):
        val = result.meta.get("val")
        if not isinstance(val, Tensor) or not val.is_floating_point() or val.dim() < 2:
            continue
        for source, swapped in _sources(analysis, result, anchor):
            tables = Tables(analysis, analysis.trials[0])
            try:
                form = linear_form(analysis, result, source, tables)
            except NotLinear:
                continue
            except (RuntimeError, IndexError):
                continue
            rotation = as_rotation(form, _shape(analysis, source), swapped)
            if rotation is not None:
                match = _build(analysis, result, source, rotation, tables, swapped)
                if match is not None:
                    return match
            if len(form) >= 2:
                mixes = result
    if mixes is not None:
        raise Declined("sums of activations times table elements that are no rotation of pairs", mixes)
    return None


def mixing(analysis: Analysis, graph: fx.Graph) -> set[fx.Node]:
    """Products of activations with tables whose sum mixes elements of one tensor: rotations that are no ftc.rope."""
    found = set()
    for node in graph.nodes:
        if not is_anchor(analysis, node):
            continue
        for below in _below(analysis, node):
            if not isinstance(below.meta.get("val"), Tensor) or not below.meta["val"].is_floating_point():
                continue
            for source, _ in _sources(analysis, below, node)[:4]:
                try:
                    form = linear_form(analysis, below, source, Tables(analysis, analysis.trials[0]))
                except (NotLinear, RuntimeError, IndexError):
                    continue
                if len(form) >= 2 and any(bool((term.table != 0).any()) for term in form):
                    found.add(node)
    return found


def _below(analysis: Analysis, anchor: fx.Node) -> set[fx.Node]:
    found, queue = {anchor}, [anchor]
    while queue:
        for user in queue.pop(0).users:
            linear = user.target in LINEAR or sources(user) is not None or user.target is operator.getitem
            if linear and user not in found and user not in analysis.changing and len(found) < 40:
                found.add(user)
                queue.append(user)
    return found


def _shape(analysis: Analysis, node: fx.Node) -> torch.Size:
    return torch.Size(concrete(size, analysis.trials[0].sizes) for size in node.meta["val"].shape)


def _sources(analysis: Analysis, result: fx.Node, anchor: fx.Node) -> list[tuple[fx.Node, bool]]:
    """Activations of the shape of `result` above it through linear steps, nearest first; then those with dims 1 and 2 swapped."""
    shape = sizes_of(result)
    other = (shape[0], shape[2], shape[1], *shape[3:]) if len(shape) == 4 else shape
    seen, queue, found = {result}, [result], []
    while queue:
        node = queue.pop(0)
        if node is not result and node < anchor and isinstance(node.meta["val"], Tensor):
            if sizes_of(node) == shape:
                found.append((node, False))
            if len(shape) == 4 and sizes_of(node) == other:
                found.append((node, True))
        if node.target in LINEAR or sources(node) is not None:
            for used in node.all_input_nodes:
                if analysis.active(used) and used not in seen and len(seen) < 60:
                    seen.add(used)
                    queue.append(used)
    return sorted(found, key=lambda pair: pair[1])


# ---------------------------------------------------------------------------------------------------------------- tables

Recipe = list[tuple[Callable, tuple[Any, ...]]]


def _recipes(rank: int, width: int, interleaved: bool) -> Iterator[Recipe]:
    """Ways to bring a table to full width and to the dims of x: drop or merge a pair dim, double, insert dims for heads."""
    shapes: list[Recipe] = [
        [],
        [(aten.squeeze.dim, (-1,))],
        [(aten.squeeze.dim, (-2,))],
        [(aten.flatten.using_ints, (-2, -1))],
    ]
    widths: list[Recipe] = [[], [(aten.slice.Tensor, (-1, 0, width))]]
    doubled: list[Recipe] = [[(_twice, ())], [(aten.repeat_interleave.self_int, (2, -1))]]
    widths += doubled[::-1] if interleaved else doubled
    inserts: list[Recipe] = [[]] + [[(aten.unsqueeze.default, (dim,))] for dim in (-2, -3, 0, 1)]
    for parts in itertools.product(shapes, widths, inserts):
        yield [step for part in parts for step in part]


def _twice(table: Any) -> Any:
    return aten.cat.default([table, table], -1)


def _follow(recipe: Recipe, numbers: Tensor) -> Tensor | None:
    try:
        for function, args in recipe:
            if function is aten.squeeze.dim and numbers.shape[args[0]] != 1:
                return None
            numbers = function(numbers, *args)
    except (RuntimeError, IndexError):
        return None
    return numbers


def _fits(numbers: Tensor | None, wanted: Tensor) -> int:
    """1 where a table of these numbers, broadcast, holds the wanted ones; -1 where it holds them negated; else 0."""
    if numbers is None or numbers.dim() > wanted.dim() or numbers.shape[-1:] != wanted.shape[-1:]:
        return 0
    try:
        wide = numbers.expand(wanted.shape)
    except RuntimeError:
        return 0
    return 1 if torch.equal(wide, wanted) else -1 if torch.equal(wide, -wanted) else 0


def _table(build: Builder, tables: Tables, wanted: Tensor, rotation: Rotation) -> fx.Node | None:
    """A node of full width with the wanted elements: a table as it is used, or one of the nodes that it is moved from, brought to shape."""
    analysis = build.analysis
    nodes = list(dict.fromkeys(tables.used))
    nodes += [
        member for node in list(nodes) for member in cone(analysis, node, signs=True).members if member not in nodes
    ]
    nodes = [node for node in dict.fromkeys(nodes) if isinstance(node.meta["val"], Tensor)]
    parts = []
    for node in nodes:
        real, imag = tables.numbers(node)
        parts += [(node, real, None)] if imag is None else [(node, real, 0), (node, imag, 1)]
    for recipe in sorted(_recipes(wanted.dim(), rotation.width, rotation.interleaved), key=len):
        for node, numbers, part in parts:
            sign = _fits(_follow(recipe, numbers), wanted)
            if sign == 0:
                continue
            if part is not None:
                node = build(aten.imag.default if part else aten.real.default, node)
            for function, args in recipe:
                node = build(aten.cat.default, [node, node], -1) if function is _twice else build(function, node, *args)
            return node if sign > 0 else build(aten.neg.default, node)
    return None


def _build(
    analysis: Analysis, result: fx.Node, source: fx.Node, rotation: Rotation, tables: Tables, swapped: bool
) -> Match | None:
    build = Builder(analysis, result)
    try:
        cos = _table(build, tables, rotation.cos, rotation)
        sin = _table(build, tables, rotation.sin, rotation)
        if cos is None or sin is None:
            raise Declined("its tables are not cos and sin of full width, nor halves of them", result)
        turned = build(aten.transpose.int, source, 1, 2) if swapped else source
        if rotation.order != "as is":
            width = int(source.meta["val"].shape[-1])
            pairs = [width // 2, 2] if rotation.order == "split pairs" else [2, width // 2]
            turned = build(aten.unflatten.int, turned, -1, pairs)
            turned = build(aten.flatten.using_ints, build(aten.transpose.int, turned, -1, -2), -2)
        dtypes = [node.meta["val"].dtype for node in (source, cos, sin)]
        same = functools.reduce(torch.promote_types, dtypes) == result.meta["val"].dtype
        canonical = build(ROPE, turned, cos, sin, rotation.interleaved, val=result.meta["val"] if same else None)
        new = build.cast(canonical, result.meta["val"].dtype)
        borders = [source, *(root for root in tables.offsets if root is not source)]
        if analysis.differs(result, new, borders) is not None:
            raise Declined("the rotation that was read off is not the one computed", result)
    except Declined:
        build.undo()
        return None
    replace(analysis, result, new)
    detail = {"width": rotation.width, "of": int(source.meta["val"].shape[-1]), "interleaved": rotation.interleaved}
    return Match("rope", (canonical.name,), detail, location(result))
