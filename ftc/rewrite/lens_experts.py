"""The lens of stacked experts: the matrices of a mixture, however they are kept, as one tensor [E, rows, columns].

    target[e] = [P_1[e]; P_2[e]; ...]          P_i[e]: matrix i of expert e, transposed where it is kept so, its rows even ones first where they alternate

A pure rearrangement: the same bits there and back, of weights and of both moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ftc.errors import FtcError
from ftc.rewrite.lens import Lens


@dataclass(frozen=True)
class Experts(Lens):
    """`sources`: one stacked tensor [E, ...] for each part, or E tensors for each part, all of the first part first.

    `rows`: rows of each part in the target. `transposed`: matrices are kept as [columns, rows]. `interleaved`: the rows of the one part alternate
    between gate and up. Biases are vectors: then sources are [E, rows] or E times [rows], the target [E, sum of rows].
    """

    sources: tuple[str, ...]
    target: str
    num_experts: int
    rows: tuple[int, ...]
    transposed: bool = False
    interleaved: bool = False

    kind = "experts"

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "rows", tuple(int(size) for size in self.rows))
        parts = len(self.rows)
        if len(self.sources) not in (parts, parts * self.num_experts) or (self.interleaved and (parts != 1 or self.rows[0] % 2)):
            raise FtcError(
                f"{self.target!r} stacks {self.num_experts} experts of {parts} parts with rows {list(self.rows)}, and is given {len(self.sources)} tensors"
            )

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    @property
    def stacked(self) -> bool:
        """Whether the sources hold all experts already."""
        return len(self.sources) == len(self.rows)

    def with_prefix(self, prefix: str) -> Experts:
        return replace(self, sources=tuple(prefix + name for name in self.sources), target=prefix + self.target)

    def _apply(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        count = self.num_experts
        parts = values if self.stacked else [torch.stack(list(values[i : i + count])) for i in range(0, len(values), count)]
        for name, part, rows in zip(self.sources if self.stacked else self.sources[::count], parts, self.rows, strict=True):
            dim = -1 if self.transposed or part.dim() == 2 else -2
            if part.shape[0] != count or part.shape[dim] != rows:
                raise FtcError(f"{name!r} has shape {list(part.shape)}, but its experts lens expects {count} experts of {rows} rows")
        parts = [part.mT if self.transposed else part for part in parts]
        if self.interleaved:
            parts = [torch.cat([parts[0][:, 0::2], parts[0][:, 1::2]], 1)]
        return [(parts[0] if len(parts) == 1 else torch.cat(parts, 1)).contiguous()]

    def _undo(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        whole = values[0]
        if whole.shape[0] != self.num_experts or whole.shape[1] != sum(self.rows):
            raise FtcError(f"{self.target!r} has shape {list(whole.shape)}, not {self.num_experts} experts of {sum(self.rows)} rows")
        if self.interleaved:
            whole = torch.stack(whole.chunk(2, 1), 2).flatten(1, 2)
        parts = [part.mT if self.transposed else part for part in whole.split(self.rows, 1)]
        if not self.stacked:
            parts = [expert for part in parts for expert in part.unbind(0)]
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]
