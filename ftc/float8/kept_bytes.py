"""How many bytes a forward pass keeps for its backward pass, counted."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept_bytes(function: Callable[[], object], but: Iterable[Tensor] = ()) -> tuple[int, list[tuple[int, tuple, torch.dtype]]]:
    """(bytes, [(bytes, shape, dtype)]) of the storages that autograd keeps when `function` runs: each storage once, those of `but` (parameters) not."""
    known = {t.untyped_storage()._cdata for t in but}
    found: dict[int, tuple[int, tuple, torch.dtype]] = {}
    alive = []  # or a storage that was freed would give its address to another

    def keep(t: Tensor) -> Tensor:
        key = t.untyped_storage()._cdata
        if key not in known and key not in found:
            found[key] = (t.untyped_storage().nbytes(), tuple(t.shape), t.dtype)
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = function()
    rows = sorted(found.values(), key=lambda row: -row[0])
    del result
    return sum(row[0] for row in rows), rows
