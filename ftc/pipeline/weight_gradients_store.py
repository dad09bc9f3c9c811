"""Weight gradients that are put off: where a backward pass leaves them, and how they reach `.grad` later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftc.errors import FtcError


@dataclass
class WeightGradients:
    """What one stage has put off for one microbatch, in the order of its backward pass.

    `work`: functions that return a gradient (or None) for each of their weights. `held`: what each of them reads, in lists that it may empty.
    """

    work: list[tuple[Callable[[], Sequence[Tensor | None]], list[Tensor | None]]] = field(default_factory=list)
    held: list[list] = field(default_factory=list)

    def add(self, compute: Callable[[], Sequence[Tensor | None]], weights: list[Tensor | None], held: list) -> None:
        """Put `compute` off, which reads `held` and whose gradients belong to `weights` one by one. FtcError for a weight with a hook that waits for
        its gradient: autograd calls it in the backward pass, and would have no gradient to give."""
        if any(weight is not None and (weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)) for weight in weights):
            raise FtcError(
                "a weight has a hook on its gradient (Tensor.register_hook or register_post_accumulate_grad_hook, as an optimizer that steps in the "
                "backward pass has), and its gradient is put off; remove it, or use a schedule that does not split: GPipe, 1F1B or Interleaved1F1B"
            )
        self.work.append((compute, weights))
        self.held.append(held)

    def compute(self) -> None:
        """Compute all, add them to the weights' `.grad` in the order in which a whole backward pass does, and keep nothing."""
        with torch.no_grad():
            while self.work:
                compute, weights = self.work.pop(0)
                for weight, gradient in zip(weights, compute(), strict=True):
                    if weight is not None and gradient is not None:
                        accumulate(weight, gradient)
        self.held.clear()

    @property
    def num_bytes(self) -> int:
        """Of the distinct storages that the work put off keeps alive, weights left out."""
        weights = {w.untyped_storage()._cdata for _, own in self.work for w in own if w is not None}
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for each in self.held for t in each if isinstance(t, Tensor)}
        return sum(size for key, size in storages.items() if key not in weights)

    def __len__(self) -> int:
        return len(self.work)


def accumulate(weight: Tensor, gradient: Tensor) -> None:
    """Add a gradient to a leaf's `.grad` as autograd does."""
    if weight.grad is None:
        plain = gradient.layout is torch.strided and gradient.stride() != weight.stride() and weight.is_contiguous()
        weight.grad = gradient.contiguous() if plain else gradient
    else:
        weight.grad += gradient


class AtOnce(WeightGradients):
    """Nothing is put off: gradients are added to `.grad` where they are made, and do not pass through autograd.

    For a backward pass on a stream of its own: a leaf belongs to the stream that it was first used on, which autograd lets wait for each gradient."""

    def add(self, compute: Callable[[], Sequence[Tensor | None]], weights: list[Tensor | None], held: list) -> None:
        super().add(compute, weights, held)
        self.compute()


# The store of the backward pass that is running. Not of a thread: autograd runs backward passes of a GPU in a thread of its own.
_open: list[WeightGradients | None] = [None]


def store() -> WeightGradients | None:
    """Where a region's backward pass leaves its weight gradients; None where it is to compute them."""
    return _open[-1]


@contextlib.contextmanager
def putting_off(where: WeightGradients | None) -> Iterator[None]:
    """Inside, backward passes of split functions compute the gradients of inputs and leave those of weights in `where`; None: they compute both."""
    _open.append(where)
    try:
        yield
    finally:
        _open.pop()
