"""A batch's tokens divided over the ranks of context parallelism."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ftc.dialect.sequence import own_part


def split_batch(batch: Mapping[str, Tensor], rank: int, degree: int, balanced: bool = True) -> dict[str, Tensor]:
    """This rank's tokens of each tensor [B, T, ...]; others (less than 2 dims) as they are.

    `balanced` as in the pass: rank r gets chunks r and 2 degree - 1 - r of 2 degree. Labels have to be shifted before. Raises FtcError when the
    length is no multiple of 2 degree (or degree, not balanced).
    """
    return {name: own_part(x, 1, rank, degree, balanced) if x.dim() > 1 else x for name, x in batch.items()}
