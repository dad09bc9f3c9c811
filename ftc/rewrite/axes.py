"""Which axes of a product each dim of a tensor holds, followed through transposes and reshapes.

A product of queries and keys has axes: batch, heads, queries, keys. What moves make of it holds the same axes in an order and a grouping of its
own: [B*H, T, S] holds two in its first dim, and a later view may part them again, or part them elsewhere. A layout lists the axes of each
dim, outermost first; `()` is a dim of size 1. An axis that a reshape takes apart is replaced by its parts wherever it stands (`refined`).
"""

import itertools
from typing import Any

import torch
from torch import Tensor, fx

from ftc.rewrite import probe
from ftc.rewrite.movement import apply
from ftc.rewrite.outcome import Declined
from ftc.rewrite.probe import aten
from ftc.rewrite.recognise import SMALLEST_STAND_IN, Analysis, Builder, stand_in

Group = tuple[int, ...]
Layout = list[Group]


class Axes:
    """The axes of one site. Each is a number; sizes are compared as stand-ins, which ask nothing of the symbols."""

    def __init__(self, analysis: Analysis):
        self.analysis = analysis
        self.sizes: list[int] = []
        self.parts: dict[int, Group] = {}
        self.seen: dict[int, tuple[fx.Node, int]] = {}  # where a size can be read: (node, dim)

    def new(self, node: fx.Node, dim: int) -> int:
        """A new axis as long as a dim of a node."""
        self.see(node)
        self.sizes.append(stand_in(node.meta["val"].shape[dim]))
        return len(self.sizes) - 1

    def of(self, node: fx.Node) -> Layout:
        """A layout of new axes for the dims of a node."""
        return [(self.new(node, dim),) for dim in range(node.meta["val"].dim())]

    def see(self, node: fx.Node) -> None:
        for dim, size in enumerate(node.meta["val"].shape):
            self.seen.setdefault(stand_in(size), (node, dim))

    def refined(self, layout: Layout) -> Layout:
        """The layout in axes that no reshape takes apart."""
        return [self.atoms(group) for group in layout]

    def atoms(self, group: Group) -> Group:
        """The axes of one dim, those that were taken apart as their parts."""
        return tuple(
            atom for axis in group for atom in (self.atoms(self.parts[axis]) if axis in self.parts else (axis,))
        )

    def extent(self, group: Group) -> int:
        """The stand-in of the size of a dim that holds a group of axes."""
        return torch.Size(self.sizes[axis] for axis in group).numel()

    def size(self, build: Builder, axis: int) -> int | fx.Node:
        """The size of an axis: an int, or a node that gives it."""
        if self.sizes[axis] in self.seen:
            return build.size(*self.seen[self.sizes[axis]])
        if self.sizes[axis] >= SMALLEST_STAND_IN:
            raise Declined("a dim is taken apart in parts whose sizes stand nowhere", build.before)
        return self.sizes[axis]

    def symbolic(self, axis: int) -> Any:
        """The size of an axis as it stands in meta["val"]."""
        node, dim = self.seen[self.sizes[axis]]
        return node.meta["val"].shape[dim]

    def is_static(self, axis: int) -> bool:
        """Whether the size of an axis is a plain number."""
        return self.sizes[axis] not in self.seen or isinstance(self.symbolic(axis), int)

    # ---- moves

    def moved(self, layout: Layout, node: fx.Node, above: fx.Node) -> Layout | None:
        """The layout of a move of `above`; None where it does more than permute and regroup the dims."""
        trial = self.analysis.trials[0]
        shape = [probe.concrete(size, trial.sizes) for size in above.meta["val"].shape]
        before = torch.arange(torch.Size(shape).numel()).view(shape)
        after = apply(node, trial, self.analysis, lambda _: before)
        if not isinstance(after, Tensor) or after.numel() != before.numel():
            return None
        self.see(node)
        if torch.equal(after.reshape(-1), before.reshape(-1)):
            return self.reshaped(layout, [stand_in(size) for size in node.meta["val"].shape])
        if after.dim() == before.dim():
            for order in itertools.permutations(range(before.dim())):
                if torch.equal(before.permute(order), after):
                    return [layout[dim] for dim in order]
        return None

    def reshaped(self, layout: Layout, sizes: list[int]) -> Layout | None:
        """The layout of a reshape to `sizes` (stand-ins); axes may be taken apart. None where the sizes do not divide. Axes of size 1 may
        get lost on the way."""
        atoms = [axis for group in self.refined(layout) for axis in group]
        made: Layout = []
        for size in sizes:
            group, have = [], 1
            while atoms and size > 1 and self.sizes[atoms[0]] == 1:
                atoms.pop(0)
            if size == 1 and atoms and self.sizes[atoms[0]] == 1:
                group.append(atoms.pop(0))
            while have < size:
                if not atoms:
                    return None
                if size % (have * self.sizes[atoms[0]]):
                    if not self._split(atoms, size // have):
                        return None
                    continue
                group.append(atoms.pop(0))
                have *= self.sizes[group[-1]]
            made.append(tuple(group))
        return made if all(self.sizes[axis] == 1 for axis in atoms) else None

    def _split(self, atoms: list[int], front: int) -> bool:
        """Take the first of `atoms` apart, in place, its outer part `front` long."""
        axis = atoms[0]
        if front <= 1 or self.sizes[axis] % front:
            return False
        self.sizes += [front, self.sizes[axis] // front]
        self.parts[axis] = len(self.sizes) - 2, len(self.sizes) - 1
        atoms[:1] = self.parts[axis]
        return True

    # ---- building

    def arranged(self, build: Builder, node: fx.Node, layout: Layout, wanted: Layout) -> fx.Node:
        """`node`, whose dims hold `layout`, with dims that hold `wanted`. A dim of size 1 broadcasts over its axes, and so does an axis that
        the node lacks. Raises Declined where the node holds an axis that is not wanted."""
        layout, wanted = self.refined(layout), self.refined(wanted)
        if layout == wanted:
            return node
        ones = [stand_in(size) == 1 for size in node.meta["val"].shape]
        held = {axis for group, one in zip(layout, ones, strict=True) if not one for axis in group}
        if not held <= {axis for group in wanted for axis in group}:
            raise Declined("a dim of it stands nowhere else in the attention", node)
        if any(group not in wanted for group, one in zip(layout, ones, strict=True) if not one):
            node, layout = self._taken_apart(build, node, layout, ones)
            wanted_now = [(axis,) for group in wanted for axis in group]
            node = self._permuted(build, node, layout, wanted_now)
            return self._grouped(build, node, wanted)
        return self._permuted(build, node, layout, wanted)

    def _taken_apart(self, build: Builder, node: fx.Node, layout: Layout, ones: list[bool]) -> tuple[fx.Node, Layout]:
        atoms = [(axis, one) for group, one in zip(layout, ones, strict=True) for axis in group]
        if [(axis,) for axis, _ in atoms] != layout:
            sizes = [1 if one else self.size(build, axis) for axis, one in atoms]
            node = build(aten.reshape.default, node, sizes)
        return node, [(axis,) for axis, _ in atoms]

    def _permuted(self, build: Builder, node: fx.Node, layout: Layout, wanted: Layout) -> fx.Node:
        """Dims in the order of `wanted`; those of size 1 come and go."""
        spare = [dim for dim, group in enumerate(layout) if not group or group not in wanted]
        if spare:
            node = build(aten.squeeze.dims, node, spare)
        layout = [group for dim, group in enumerate(layout) if dim not in spare]
        order = sorted(range(len(layout)), key=lambda dim: wanted.index(layout[dim]))
        if order != sorted(order):
            node = build(aten.permute.default, node, order)
        for dim, group in enumerate(wanted):
            if group not in layout:
                node = build(aten.unsqueeze.default, node, dim)
        return node

    def _grouped(self, build: Builder, node: fx.Node, wanted: Layout) -> fx.Node:
        """Neighbouring dims, one for each axis, put together in groups; those that broadcast beside others are expanded."""
        place, wide, sizes = 0, [], []
        shape = node.meta["val"].shape
        for group in wanted:
            ones = [stand_in(size) == 1 for size in shape[place : place + len(group)]]
            own = [self.size(build, axis) for axis in group]
            wide += [size if one and not all(ones) else -1 for size, one in zip(own, ones, strict=True)]
            sizes.append([1] if all(ones) else own)
            place += len(group)
        if any(size != -1 for size in wide):
            node = build(aten.expand.default, node, wide)
        if all(len(group) == 1 for group in wanted):
            return node
        free = [len(own) > 1 and not all(isinstance(size, int) for size in own) for own in sizes]
        products = [
            -1 if open_ and sum(free) == 1 else build.numel(own) for own, open_ in zip(sizes, free, strict=True)
        ]
        return build(aten.reshape.default, node, products)
