"""Loops over hits: code that goes through the experts which some token has chosen, captured as going through all of them.

    for e in (mask.sum((-1, -2)) > 0).nonzero(): ...            for e in all experts: ...
    if not chosen.any(): continue                               taken as hit
    rows = torch.where(chosen)[0]; if len(rows) == 0: ...       taken as more than one row

A loop whose body leaves the result alone where nothing was hit computes the same either way, in real arithmetic; that is what such loops are written
for, and both are compared on a random call (`ftc.capture.hits_check`). Only what comes from a choice (`topk`, `sort`, `argmax`) is treated so: decisions on other data,
a padding mask say, stay refused.

Along with the fake tensors that come of such loops go their values (`known`): numbers of experts, which are the same whatever was hit.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

_T = torch.Tensor
_CHOICES = {torch.topk, _T.topk, torch.sort, _T.sort, torch.argsort, _T.argsort, torch.argmax, _T.argmax, torch.multinomial, _T.multinomial}
_NONZERO = {torch.nonzero, _T.nonzero, torch.argwhere, _T.argwhere}
_UNBINDS = {torch.unbind, _T.unbind}
_READS: dict[object, Callable] = {
    _T.__bool__: bool, _T.__int__: int, _T.__float__: float, _T.__index__: int, _T.item: _T.item, _T.tolist: _T.tolist, torch.is_nonzero: bool,
}  # fmt: skip
_ANY = {torch.any, _T.any}
_COUNTS = {torch.sum, _T.sum, torch.count_nonzero, _T.count_nonzero}
# Comparisons of a count with a number, and what they say of a count that is at least 2.
_COMPARED: dict[object, Callable[[float], bool | None]] = {
    _T.__eq__: lambda number: False if number <= 0 else None,
    _T.__ne__: lambda number: True if number <= 0 else None,
    _T.__gt__: lambda number: True if number <= 0 else None,
    _T.__ge__: lambda number: True if number <= 1 else None,
    _T.__lt__: lambda number: False if number <= 1 else None,
    _T.__le__: lambda number: False if number <= 0 else None,
}


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Outside every mode: what runs here is neither traced nor fake."""
    with disable_proxy_modes_tracing(), torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class Hits(TorchFunctionMode):
    """See the module. `assumed` says whether anything was taken as hit while the mode was on."""

    def __init__(self):
        super().__init__()
        self.assumed = False
        self.known: dict[int, Tensor] = {}
        self.chosen: set[int] = set()
        self.counts: set[int] = set()
        self.alive: list[Tensor] = []  # ids stay unique while their tensors live

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _CHOICES:
            return self._mark_chosen(func(*args, **kwargs))
        if not any(id(t) in self.chosen or id(t) in self.known for t in tensors):
            return func(*args, **kwargs)
        if func is _T.__getitem__:
            args = (args[0], self._index(args[1]))
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if tensors and all(id(t) in self.known for t in tensors):
            return self._on_known(func, args, kwargs)
        return self._on_chosen(func, args, kwargs)

    def _on_known(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """A function of values that are known: its own value is known too."""
        with _apart():
            values = tree_map(lambda leaf: self.known[id(leaf)] if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            value = (_READS.get(func) or func)(*values[0], **values[1])
        if func in _UNBINDS and free_unbacked_symbols(args[0]):
            return tuple(self._traced(row) for row in value)
        if func in _READS:
            return value
        return self._learn(func(*args, **kwargs), value)

    def _on_chosen(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """A function of a choice: places of hits, questions whether there is one, and whatever else is made of it."""
        if func in (_T.tolist, *_UNBINDS) or func in _READS:
            return func(*args, **kwargs)
        out = self._mark_chosen(func(*args, **kwargs))
        if func in _NONZERO and not kwargs.get("as_tuple", False) and all(isinstance(size, int) for size in args[0].shape):
            self.assumed = True
            with _apart():
                places = torch.ones(tuple(args[0].shape), dtype=torch.bool).nonzero()
            return self._learn(out, places)
        if isinstance(out, Tensor) and out.dim() == 0 and func in _ANY:
            return self._answer(out, True)
        if isinstance(out, Tensor) and func in _COUNTS and not out.is_floating_point():
            self.counts.add(id(out))
        if isinstance(out, Tensor) and out.dim() == 0 and func in _COMPARED and id(args[0]) in self.counts and isinstance(args[1], int | float):
            return self._answer(out, _COMPARED[func](args[1]))
        return out

    def _mark_chosen(self, out: Any) -> Any:
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor):
                self.chosen.add(id(leaf))
                self.alive.append(leaf)
                for symbol in free_unbacked_symbols(leaf):
                    env = leaf.fake_mode.shape_env
                    env.var_to_range[symbol] = ValueRanges(2, int_oo)
                    env._version_counter += 1  # what it knew of the size is remembered by this number
                    self.assumed = True
        return out

    def _answer(self, out: Tensor, answer: bool | None) -> Tensor:
        if answer is None:
            return out
        self.assumed = True
        with _apart():
            return self._learn(out, torch.tensor(answer))

    def _learn(self, out: Any, value: Any) -> Any:
        for fake, real in zip(tree_leaves(out), tree_leaves(value), strict=False):
            if isinstance(fake, FakeTensor):
                self.known[id(fake)] = real
                self.alive.append(fake)
        return out

    def _traced(self, value: Tensor) -> Tensor:
        """A known integer tensor as operations without inputs: a value of the graph."""
        with _apart():
            number, parts = (value.item(), ()) if value.numel() == 1 else (None, value.unbind(0))
        if number is not None:
            made = torch.full(tuple(value.shape), number, dtype=value.dtype)
        else:
            made = torch.stack([self._traced(part) for part in parts])
        return self._learn(made, value)

    def _index(self, index: Any) -> Any:
        """An index with numbers in the place of tensors that are known: the number of an expert selects, it gathers nothing."""
        if isinstance(index, tuple):
            return tuple(self._index(part) for part in index)
        known = self.known.get(id(index))
        if known is None or known.dim() != 0 or known.dtype != torch.int64:
            return index
        with _apart():
            return int(known)
