"""Where one dimension goes when a tensor's dimensions are merged and taken apart (a view), and where its division goes."""

from __future__ import annotations

import math
from typing import Any

import torch

_PRIMES: dict[Any, int] = {}
_FIRST = 1_000_003
_MANY = 64  # copies of the blocks side by side, at most; more are no blocks any more


class Indivisible(ValueError):
    """A size that does not divide into the number of parts."""

    def __init__(self, size: int, parts: int, what: str = "entries"):
        super().__init__(f"{size} {what} cannot be divided over {parts} ranks; {self.valid(size)}")
        self.size = size

    @staticmethod
    def valid(size: int) -> str:
        """A clause that names numbers of ranks that `size` can be divided over."""
        found = [str(number) for number in range(2, min(size, 1024) + 1) if size % number == 0][:8]
        return f"{', '.join(found)} can be" if found else "no number up to 1024 can be"


def numbers(shape) -> list[int]:
    """Sizes as integers, every size symbol a large prime of its own, so that products are equal only where they are."""
    return [_number(size) for size in shape]


def _number(size) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.shape_env.replace(size.node.expr)
    return int(expr.xreplace({symbol: _prime(symbol) for symbol in expr.free_symbols}))


def _prime(symbol) -> int:
    if symbol not in _PRIMES:
        candidate = max(_PRIMES.values(), default=_FIRST - 2) + 2
        while any(candidate % d == 0 for d in range(3, math.isqrt(candidate) + 1, 2)):
            candidate += 2
        _PRIMES[symbol] = candidate
    return _PRIMES[symbol]


def symbol_free(value: object) -> bool:
    """Whether a value is no size, or one without symbols."""
    return not isinstance(value, torch.SymInt) or value.node.expr.is_number


def groups(before: list[int], after: list[int]) -> list[tuple[range, range]]:
    """Runs of dimensions before and after that hold the same entries, as small as can be."""
    found, i, j = [], 0, 0
    while i < len(before) and j < len(after):
        a, b, left, right = i, j, before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                if i == len(before):
                    raise ValueError(f"{before} is no view of {after}")
                left, i = left * before[i], i + 1
            else:
                if j == len(after):
                    raise ValueError(f"{before} is no view of {after}")
                right, j = right * after[j], j + 1
        found.append((range(a, i), range(b, j)))
    return found


def regroup(before, after, dim: int, blocks: tuple[int, ...] | None, parts: int) -> tuple[int, tuple[int, ...] | None]:
    """(dim, blocks) after a view of the dimension `dim` made of `blocks`. Raises Indivisible, or ValueError where the division does not survive."""
    before, after = numbers(before), numbers(after)
    run, target = next(pair for pair in groups(before, after) if dim in pair[0])
    outer = math.prod(before[d] for d in run if d < dim)
    passed = 1
    for at in target:
        if passed == outer and after[at] > 1:
            if parts == 1 and at - 1 in target and after[at - 1] == 1:
                return at - 1, blocks and (1,)  # a lone head that all ranks have
            return _begins(before[dim], after, at, target, blocks, parts)
        if passed * after[at] > outer:  # what is outside of the dimension is merged with it
            times = outer // passed
            if passed * times != outer or after[at] % times:
                break
            if blocks is None or times > _MANY:
                return at, None
            at, inner = _begins(before[dim], [*after[:at], after[at] // times, *after[at + 1 :]], at, target, blocks, parts)
            return at, inner * times
        passed *= after[at]
    raise ValueError("the divided dimension is taken apart and merged with others")


def _begins(size: int, after: list[int], at: int, target: range, blocks, parts: int) -> tuple[int, tuple[int, ...] | None]:
    """The divided dimension begins at dim `at` of the result."""
    own = after[at]
    if own == size or blocks is None:
        return at, blocks
    if own % size == 0:
        return at, tuple(block * (own // size) for block in blocks)
    if size % own:
        raise ValueError("the divided dimension is taken apart and merged with others")
    if len(set(blocks)) == 1 < len(blocks) == own and at + 1 in target:  # [3 x H x K] becomes [3, H, K]
        return _begins(blocks[0], after, at + 1, target, blocks[:1], parts)
    inner = size // own
    if all(block % inner == 0 for block in blocks):
        counts = tuple(block // inner for block in blocks)
        for count in counts:
            if count % parts:
                raise Indivisible(count, parts, "heads")
        return at, counts
    raise ValueError("the divided dimension is taken apart inside its blocks")
