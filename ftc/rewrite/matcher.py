"""Matching a pattern, an ordinary PyTorch function, against a graph; a mismatch names the first node where they part.

The function is traced as models are. Its tensor arguments match any node (the same argument always the same node), its
operations match operations with equal arguments, in either order where they commute, and what lies between arguments
and results may have no other users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ftc.capture.trace import World, trace
from ftc.rewrite.outcome import Miss, location, operation

_COMMUTATIVE = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.maximum.default,
    torch.ops.aten.minimum.default,
}


@dataclass(frozen=True)
class Found:
    """One match: which node each argument of the pattern is, the pattern's results, and every node in between."""

    arguments: dict[str, fx.Node]
    results: tuple[fx.Node, ...]
    inner: frozenset[fx.Node]


class Mismatch(Exception):
    """Pattern and graph part at `node`, after `depth` operations that agreed."""

    def __init__(self, node: fx.Node, reason: str, depth: int):
        super().__init__(reason)
        self.node, self.reason, self.depth = node, reason, depth


class Pattern:
    """A function of tensors as a pattern. `shapes` gives each argument's example shape, by name, in order."""

    def __init__(self, function: Callable, shapes: dict[str, Sequence[int]]):
        world = World.new()
        fakes = [world.fake(shape, torch.float32, "cpu") for shape in shapes.values()]

        def traced(*tensors, tracer):
            out = function(*tensors)
            return list(out) if isinstance(out, (tuple, list)) else [out]

        self.name = getattr(function, "__name__", None) or function.func.__name__
        self.graph = trace(traced, world, fakes).graph
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.arguments = dict(zip(placeholders, shapes, strict=True))
        self.results = tuple(next(node for node in self.graph.nodes if node.op == "output").args[0])

    def find(self, graph: fx.Graph) -> tuple[list[Found], list[Miss]]:
        """All matches that share no inner node, in graph order, and the near misses (more than the anchor agreed)."""
        found: list[Found] = []
        misses: list[Miss] = []
        taken: set[fx.Node] = set()
        for anchor in graph.nodes:
            if anchor.op != "call_function" or anchor.target is not self.results[0].target or anchor in taken:
                continue
            try:
                match = self.match_at(graph, anchor, taken)
            except Mismatch as part:
                if part.depth > 0:
                    misses.append(Miss(anchor.name, part.reason, part.node.name, location(part.node)))
                continue
            found.append(match)
            taken |= match.inner | set(match.results)
        return found, misses

    def match_at(self, graph: fx.Graph, anchor: fx.Node, taken: frozenset | set = frozenset()) -> Found:
        """The match whose first result is `anchor`. Raises the Mismatch that got furthest."""
        best: list[Mismatch] = []

        def results(index: int, bound: dict) -> Iterator[dict]:
            if index == len(self.results):
                yield bound
                return
            wanted = self.results[index]
            nodes = [anchor] if index == 0 else [n for n in graph.nodes if n.target is wanted.target and n not in taken]
            for node in nodes:
                if node in (bound.get(result) for result in self.results[:index]):
                    continue
                for deeper in self._unify(wanted, node, bound, best):
                    yield from results(index + 1, deeper)

        for bound in results(0, {}):
            match = self._found(bound)
            stray = self._stray_user(match)
            if stray is None:
                return match
            best.append(Mismatch(stray, f"{stray.name} is also used outside the pattern", len(bound)))
        raise max(best, key=lambda part: part.depth, default=Mismatch(anchor, "nothing matches the other results", 0))

    def _found(self, bound: dict) -> Found:
        arguments = {name: bound[node] for node, name in self.arguments.items() if node in bound}
        results = tuple(bound[node] for node in self.results)
        inner = {n for p, n in bound.items() if p.op == "call_function" and n not in results}
        return Found(arguments, results, frozenset(inner))

    @staticmethod
    def _stray_user(match: Found) -> fx.Node | None:
        inside = match.inner | set(match.results)
        return next((node for node in match.inner if any(user not in inside for user in node.users)), None)

    def _unify(self, wanted: fx.Node, node: object, bound: dict, best: list[Mismatch]) -> Iterator[dict]:
        if not isinstance(node, fx.Node):
            return
        if wanted in bound:
            if bound[wanted] is node:
                yield bound
            else:
                best.append(Mismatch(node, f"{node.name} is not the {bound[wanted].name} that stands elsewhere in the pattern", len(bound)))
            return
        if wanted.op == "placeholder":
            yield bound | {wanted: node}
            return
        if wanted.target is not node.target:
            best.append(Mismatch(node, f"{operation(wanted)} was expected, {operation(node)} found", len(bound)))
            return
        ours, theirs = _normal(wanted), _normal(node)
        orders = [theirs]
        if wanted.target in _COMMUTATIVE:
            orders.append([theirs[1], theirs[0], *theirs[2:]])
        for order in orders:
            yield from self._unify_all(ours, order, 0, bound | {wanted: node}, node, best)

    def _unify_all(self, ours: list, theirs: list, index: int, bound: dict, node: fx.Node, best: list[Mismatch]) -> Iterator[dict]:
        if index == len(ours):
            yield bound
            return
        mine, other = ours[index], theirs[index]
        if isinstance(mine, fx.Node):
            for deeper in self._unify(mine, other, bound, best):
                yield from self._unify_all(ours, theirs, index + 1, deeper, node, best)
        elif isinstance(mine, (list, tuple)) and isinstance(other, (list, tuple)) and len(mine) == len(other):
            spliced = [*ours[:index], *mine, *ours[index + 1 :]], [*theirs[:index], *other, *theirs[index + 1 :]]
            yield from self._unify_all(*spliced, index, bound, node, best)
        elif not isinstance(other, fx.Node) and mine == other and type(mine) is type(other):
            yield from self._unify_all(ours, theirs, index + 1, bound, node, best)
        else:
            best.append(Mismatch(node, f"{node.name} has {other!r} where the pattern has {mine!r}", len(bound)))


def _normal(node: fx.Node) -> list:
    """All arguments of an operator node in schema order, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [*node.args, *(node.kwargs[k] for k in sorted(node.kwargs))]
    values = []
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            values.append(node.args[position])
        else:
            values.append(node.kwargs.get(argument.name, argument.default_value))
    return values
