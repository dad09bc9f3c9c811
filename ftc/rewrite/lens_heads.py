"""The lens of heads that are put in another order, mixed by matrices, and merged.

    head map    y_b = M_b x_b,    x_b the heads order[b n / k .. (b + 1) n / k) of the source, one after the other along `dim`

With one head a block it is a change of basis of each head; with several, a merge. Columns of the product after an attention are heads along dim 1.
The way back is `back`, where given: what a merged head says about its members. Then the original's form computes what the rewritten one does, trained or not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftc.errors import FtcError
from ftc.rewrite.lens import _check_size, _exchange, _OneToOne
from ftc.rewrite.lens_latent import _matrix_entry, _product, _Resetting

# Shapes: N blocks, m rows of a block of the target, n of the source.


@dataclass(frozen=True, eq=False)
class HeadMap(_Resetting, _OneToOne):
    """See the module's docstring. `matrix` [N, m, n], `back` [N, n, m] or None for the pseudo-inverse, on the CPU; `order` of the source's heads.

    Moments begin anew. Raises FtcError for matrices and orders that do not fit each other.
    """

    source: str
    target: str
    order: tuple[int, ...]
    matrix: Tensor = field(hash=False)
    back: Tensor | None = field(default=None, hash=False)
    dim: int = 0

    kind = "head_map"

    def __post_init__(self):
        object.__setattr__(self, "order", tuple(int(i) for i in self.order))
        matrix = torch.as_tensor(self.matrix).detach()
        if matrix.ndim != 3:
            raise FtcError(f"the matrices that map {self.source!r} have shape {list(matrix.shape)}, not [blocks, m, n]")
        object.__setattr__(self, "matrix", matrix)
        if self.back is not None and self.back.shape != matrix.mT.shape:
            raise FtcError(f"the way back of {self.source!r} has shape {list(self.back.shape)}, not {list(matrix.mT.shape)}")
        if sorted(self.order) != list(range(len(self.order))) or not self.order or self._size % len(self.order):
            raise FtcError(f"{list(self.order)} is no order of heads that are {self._size} entries of {self.source!r} together")

    @property
    def _size(self) -> int:
        return self.matrix.shape[0] * self.matrix.shape[2]

    @property
    def has_inverse(self) -> bool:
        blocks = self.matrix.double()
        return blocks.shape[1] >= blocks.shape[2] and bool((torch.linalg.matrix_rank(blocks) == blocks.shape[2]).all())

    def __eq__(self, other):
        return type(other) is type(self) and self.as_dict() == other.as_dict()

    def as_dict(self, tensors: dict | None = None) -> dict:
        plain = {"kind": self.kind, "source": self.source, "target": self.target, "order": list(self.order), "dim": self.dim}
        matrices = {name: _matrix_entry(self, name, tensors) for name in ("matrix", "back") if getattr(self, name) is not None}
        return {**plain, **matrices}

    def pull_back(self, gradients: dict) -> dict:
        return _exchange(self, gradients, self.targets, self.sources, lambda values: [self._from_blocks(self.matrix.mT, values[0])])

    def _apply(self, values):
        value = values[0]
        _check_size(self, self.source, value, self.dim, self._size)
        rows = value.movedim(self.dim, 0).unflatten(0, (len(self.order), -1))
        return [self._mapped(self.matrix, rows[torch.tensor(self.order, device=value.device)].flatten(0, 1))]

    def _undo(self, values):
        back = torch.linalg.pinv(self.matrix.double()) if self.back is None else self.back
        return [self._from_blocks(back, values[0])]

    def _from_blocks(self, matrix: Tensor, value: Tensor) -> Tensor:
        _check_size(self, self.target, value, self.dim, matrix.shape[0] * matrix.shape[2])
        rows = self._mapped(matrix, value.movedim(self.dim, 0)).movedim(self.dim, 0).unflatten(0, (len(self.order), -1))
        inverse = torch.tensor(self.order, device=value.device).argsort()
        return rows[inverse].flatten(0, 1).movedim(0, self.dim).contiguous()

    def _mapped(self, matrix: Tensor, rows: Tensor) -> Tensor:
        """The matrices times the blocks of rows [N n, ...], put back along `dim`."""
        shape = (matrix.shape[0] * matrix.shape[1], *rows.shape[1:])
        if rows.device.type == "meta":
            return rows.new_empty(shape).movedim(0, self.dim).contiguous()
        blocks = rows.reshape(matrix.shape[0], matrix.shape[2], -1)
        made = torch.stack([_product(one, block) for one, block in zip(matrix, blocks, strict=True)])  # one at a time: products are float64
        return made.reshape(shape).movedim(0, self.dim).contiguous()
