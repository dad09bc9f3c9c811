"""Gradients of large regions kept in a temporary file, and freed memory given back, so that a proof needs little memory beside the model."""

import contextlib
import ctypes
import tempfile
from collections.abc import Iterator, Mapping

import torch

LARGE_BYTES = 96 << 20  # gradients of a region that take more than this go to a file
PART_BYTES = 64 << 20  # at most so much, or one tensor, is in memory at a time


def give_back() -> None:
    """Let glibc return what was freed to the system; it keeps tensors of some MB for itself. Elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Spilled(Mapping):
    """Tensors by name in a temporary file, read back one at a time. The file goes with the object."""

    def __init__(self):
        self._file = tempfile.TemporaryFile()
        self._entries: dict[str, tuple[int, torch.dtype, torch.Size]] = {}

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Append a CPU tensor. OSError when the disk is full."""
        self._entries[name] = (self._file.seek(0, 2), tensor.dtype, tensor.shape)
        pieces = tensor.detach().split(1024) if tensor.dim() else (tensor.detach(),)
        for piece in pieces:  # a gradient is often a transposed view, of which a whole copy would be as large again
            self._file.write(memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy()))

    def __getitem__(self, name: str) -> torch.Tensor:
        start, dtype, shape = self._entries[name]
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        self._file.readinto(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def gradients(total: torch.Tensor, leaves: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Gradients of the scalar `total` for each leaf, zeros where it does not depend on one.

    Where they take more than LARGE_BYTES they are found in parts, by several backward passes, and kept in a file.
    """
    sizes = {name: leaf.numel() * leaf.element_size() for name, leaf in leaves.items()}
    if sum(sizes.values()) > PART_BYTES // 4:
        give_back()
    if sum(sizes.values()) <= LARGE_BYTES or any(leaf.device.type != "cpu" for leaf in leaves.values()):
        return _part(total, leaves, retain=False)
    parts: list[dict[str, torch.Tensor]] = [{}]
    taken = 0
    for name, leaf in leaves.items():
        if parts[-1] and taken + sizes[name] > PART_BYTES:
            parts.append({})
            taken = 0
        parts[-1][name] = leaf
        taken += sizes[name]
    spilled = Spilled()
    for number, part in enumerate(parts):
        for name, gradient in _part(total, part, retain=number < len(parts) - 1).items():
            spilled.put(name, gradient)
    return spilled


def _part(total: torch.Tensor, leaves: dict[str, torch.Tensor], retain: bool) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=retain)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)}
