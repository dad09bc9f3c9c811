"""Weights divided over ranks: which part is whose, and how parts make the whole again.

    piece(W, r) = [block_0[part r], block_1[part r], ...]        whole([piece_0, piece_1, ...]) = W        both bitwise, moments too

A whole weight is one dimension of `blocks` (stacked query, key and value are three), and each block is divided by itself, so that the piece of a
stacked weight is the stack of the pieces. Until a program is bound to a group it holds whole weights: there `Shard` changes nothing and is a note of
what `bind` does. Whatever stacks or renames divided weights afterwards is followed by `placements`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ftc.errors import FtcError
from ftc.rewrite.lens import Lens, Rename, Stack
from ftc.rewrite.lens_add import Drop


@dataclass(frozen=True)
class Shard(Lens):
    """`source` is divided along `dim` over the `degree` ranks of `axis`, each of its `blocks` by itself."""

    source: str
    dim: int
    blocks: tuple[int, ...]
    degree: int
    axis: str = "tensor"

    kind = "shard"

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(int(size) for size in self.blocks))
        if any(size % self.degree for size in self.blocks):
            raise FtcError(f"{self.source!r} cannot be divided: blocks of {list(self.blocks)} are no multiples of {self.degree}")

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    targets = sources

    def with_prefix(self, prefix: str) -> Shard:
        return replace(self, source=prefix + self.source)

    def _apply(self, values):
        return values

    _undo = _apply

    def piece(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """The part of a rank: a view where there is one block."""
        self._check(whole, sum(self.blocks))
        parts = [block.chunk(self.degree, self.dim)[rank] for block in whole.split(self.blocks, self.dim)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def whole(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weight from the parts of all ranks, in order."""
        own = [size // self.degree for size in self.blocks]
        for piece in pieces:
            self._check(piece, sum(own))
        split = [piece.split(own, self.dim) for piece in pieces]
        return torch.cat([blocks[i] for i in range(len(own)) for blocks in split], self.dim)

    def local_size(self) -> int:
        """Entries of a rank's part along `dim`."""
        return sum(self.blocks) // self.degree

    def ranges(self, rank: int) -> list[tuple[int, int, int]]:
        """(start in the part, start in the whole, length) of each block of a rank's part."""
        found, local, start = [], 0, 0
        for block in self.blocks:
            size = block // self.degree
            found.append((local, start + rank * size, size))
            local, start = local + size, start + block
        return found

    def _check(self, tensor: torch.Tensor, size: int) -> None:
        if tensor.dim() <= self.dim or tensor.shape[self.dim] != size:
            raise FtcError(f"{self.source!r} has shape {list(tensor.shape)}, but its shard lens expects {size} entries along dim {self.dim}")


@dataclass(frozen=True)
class Unstack(Lens):
    """`targets = source.split(sizes, dim)`: the inverse of a stack."""

    source: str
    targets: tuple[str, ...]
    sizes: tuple[int, ...]
    dim: int = 0

    kind = "unstack"

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def with_prefix(self, prefix: str) -> Unstack:
        return replace(self, source=prefix + self.source, targets=tuple(prefix + name for name in self.targets))

    def _stack(self) -> Stack:
        return Stack(self.targets, self.source, self.sizes, self.dim)

    def _apply(self, values):
        return self._stack()._undo(values)

    def _undo(self, values):
        return self._stack()._apply(values)


def placements(lenses: Iterable[Lens]) -> dict[str, Shard]:
    """How each parameter that is divided stands after these lenses, by its present name.

    Raises FtcError for a lens that divided weights cannot go through.
    """
    placed: dict[str, Shard] = {}
    for lens in lenses:
        for step in lens.steps():
            if isinstance(step, Shard):
                if step.source in placed:
                    raise FtcError(f"{step.source!r} is divided over axis {placed[step.source].axis!r} already")
                placed[step.source] = step
                continue
            copied = [name for name in step.reads if name in placed]
            if copied:
                raise FtcError(f"{copied[0]} is divided over the ranks of axis {placed[copied[0]].axis!r}; apply the pass that copies it before")
            met = {name: placed.pop(name) for name in step.sources if name in placed}
            if met and not isinstance(step, Drop):
                placed |= _through(step, met)
    return placed


def _through(step: Lens, met: dict[str, Shard]) -> dict[str, Shard]:
    shards = [met.get(name) for name in step.sources]
    alike = all(s is not None and (s.dim, s.degree, s.axis) == (shards[0].dim, shards[0].degree, shards[0].axis) for s in shards)
    if isinstance(step, Rename):
        return {step.target: replace(shards[0], source=step.target)}
    if isinstance(step, Stack) and alike:
        if shards[0].dim == step.dim:
            blocks = tuple(size for shard in shards for size in shard.blocks)
            return {step.target: replace(shards[0], source=step.target, blocks=blocks)}
        if len({shard.blocks for shard in shards}) == 1:
            return {step.target: replace(shards[0], source=step.target)}
    axis = next(iter(met.values())).axis
    raise FtcError(f"{', '.join(met)} are divided over the ranks of axis {axis!r}, which a {step.kind} lens cannot follow; apply that pass before")


def divisions(lenses: Iterable[Lens]) -> dict[str, tuple[int, int]]:
    """(dim, number of ranks) of each parameter that is divided."""
    return {name: (shard.dim, shard.degree) for name, shard in placements(lenses).items()}


def for_wholes(lenses: Sequence[Lens], earlier: Sequence[Lens]) -> list[Lens]:
    """Lenses over ranks' pieces, found in a graph of a rank's own sizes, as they are over whole weights; `earlier` are those applied before."""
    found: list[Lens] = []
    for lens in lenses:
        placed = placements([*earlier, *found])
        if isinstance(lens, Stack):
            sizes = [
                sum(placed[name].blocks) if name in placed and placed[name].dim == lens.dim else size
                for name, size in zip(lens.sources, lens.sizes, strict=True)
            ]
            lens = replace(lens, sizes=tuple(sizes))
        found.append(lens)
    return found


def on_ranks(lenses: Sequence[Lens], degree: int, wholes: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """What each rank of the axis that these lenses divide over holds: the weights through the lenses, then each one's piece."""
    moved = wholes
    for lens in lenses:
        moved = lens.forward(moved)
    placed = placements(lenses)
    return [{name: placed[name].piece(value, rank) if name in placed else value for name, value in moved.items()} for rank in range(degree)]
