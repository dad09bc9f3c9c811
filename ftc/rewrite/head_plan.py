"""Which key-value heads are merged, and the matrices of the merge: a plan for one attention."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.rewrite.attention_site import pair_places
from ftc.rewrite.head_merge import TURNS, Merged, merged_keys, merged_values, pooled
from ftc.rewrite.head_statistics import HeadStatistics
from ftc.rewrite.latent_statistics import HeadSizes

# Shapes: G key-value heads before, N after, r = G / N members, H query heads, K key head, M value head.
_MOST_SETS = 500  # of members whose merge is tried for each; above it a set's loss is the sum of its pairs'


@dataclass(frozen=True)
class HeadPlan:
    """`order` of the old key-value heads, r after r; maps as in `ftc.rewrite.head_merge`, stacked: key_into [N, K, r K], key_back [N, r K, K], ..."""

    sizes: HeadSizes
    order: tuple[int, ...]
    key_into: Tensor
    key_back: Tensor
    value_into: Tensor
    value_back: Tensor
    loss: float = math.nan  # to second order, nats a token

    @property
    def groups(self) -> int:
        """N."""
        return len(self.key_into)

    @property
    def query_order(self) -> tuple[int, ...]:
        """Query heads in the order of the key-value heads that they read."""
        each = self.sizes.heads // self.sizes.groups
        return tuple(g * each + i for g in self.order for i in range(each))

    def reading(self, back: Tensor) -> Tensor:
        """[H, W, W]: B_g^T of the head that each query head reads, in the new order."""
        each = self.sizes.heads // self.sizes.groups
        return back.unflatten(1, (self.sizes.groups // self.groups, -1)).flatten(0, 1).mT.repeat_interleave(each, 0).contiguous()

    def members(self) -> list[list[int]]:
        """The old heads of each new one."""
        each = self.sizes.groups // self.groups
        return [list(self.order[start : start + each]) for start in range(0, len(self.order), each)]

    def about(self) -> dict:
        """JSON-ready: what a report shows of it."""
        elements = self.groups * (self.sizes.width + self.sizes.value)
        return {"heads": self.groups, "merged": self.members(), "cache_elements": elements, "expected_loss": self.loss}


def make_plan(statistics: HeadStatistics, groups: int, align: bool, choose: str) -> HeadPlan:
    """The plan that merges into `groups` heads, which must divide what there is."""
    sizes, each = statistics.sizes, statistics.sizes.groups // groups

    @functools.cache
    def loss(members: tuple[int, ...]) -> float:
        return sum(m.loss for m in _merge(statistics, members, align, turns=0))

    if choose == "neighbours":
        sets = [tuple(range(start, start + each)) for start in range(0, sizes.groups, each)]
    elif math.comb(sizes.groups, each) <= _MOST_SETS:
        sets = best_sets(sizes.groups, each, loss)
    else:
        sets = best_sets(sizes.groups, each, lambda members: sum(loss(pair) for pair in itertools.combinations(members, 2)))
    keys, values = zip(*(_merge(statistics, members, align, TURNS) for members in sets), strict=True)
    stacked = [torch.stack([getattr(m, word) for m in parts]) for parts in (keys, values) for word in ("into", "back")]
    return HeadPlan(sizes, tuple(g for members in sets for g in members), *stacked, sum(m.loss for m in (*keys, *values)))


def _merge(statistics: HeadStatistics, members: Sequence[int], align: bool, turns: int) -> tuple[Merged, Merged]:
    sizes, made = statistics.sizes, []
    for word, width in (("key", sizes.width), ("value", sizes.value)):
        rows = [g * width + at for g in members for at in range(width)]
        moments = [statistics.moment(name, rows) for name in (word, f"d_{word}")]
        if not align:
            made.append(pooled(*moments, width))
        elif word == "key":
            made.append(merged_keys(*moments, sizes, turns))
        else:
            made.append(merged_values(*moments, width))
    return made[0], made[1]


def best_sets(count: int, each: int, loss: Callable[[tuple[int, ...]], float]) -> list[tuple[int, ...]]:
    """0..count-1 in sets of `each` with a small sum of losses: greedily, then exchanging two members of two sets while that helps.

    From several starts, each with another first head; deterministic. Sets and the list of them are in ascending order.
    """
    costs: dict[tuple[int, ...], float] = {}

    def cost(members: tuple[int, ...]) -> float:
        members = tuple(sorted(members))
        if members not in costs:
            costs[members] = loss(members)
        return costs[members]

    tried = [_exchanged(_greedy(count, each, cost, start), cost) for start in range(min(count, 8))]
    best = min(tried, key=lambda sets: sum(cost(s) for s in sets))
    return sorted(best)


def _greedy(count: int, each: int, cost: Callable, start: int) -> list[tuple[int, ...]]:
    left, sets = [(start + i) % count for i in range(count)], []
    while left:
        members = (left.pop(0),)
        while len(members) < each:
            nearest = min(left, key=lambda other, m=members: cost((*m, other)))
            left.remove(nearest)
            members = (*members, nearest)
        sets.append(tuple(sorted(members)))
    return sets


def _exchanged(sets: list[tuple[int, ...]], cost: Callable) -> list[tuple[int, ...]]:
    improved = True
    while improved:
        improved = False
        for i, j in itertools.combinations(range(len(sets)), 2):
            for a, b in itertools.product(sets[i], sets[j]):
                first = tuple(sorted({*sets[i], b} - {a}))
                second = tuple(sorted({*sets[j], a} - {b}))
                if cost(first) + cost(second) < cost(sets[i]) + cost(sets[j]) - 1e-15:
                    sets[i], sets[j], improved = first, second, True
                    break
    return sets


def pooled_plan(sizes: HeadSizes, groups: int) -> HeadPlan:
    """Neighbours' plain means."""
    each = sizes.groups // groups
    maps = []
    for width in (sizes.width, sizes.value):
        back = torch.eye(width, dtype=torch.float64).repeat(groups, each, 1)
        maps += [back.mT / each, back]
    return HeadPlan(sizes, tuple(range(sizes.groups)), *maps)


def trial_plan(sizes: HeadSizes, groups: int, seed: int) -> HeadPlan:
    """Random maps that pass RoPE, in a random order of heads: what a merge could be. With as many groups as before it loses nothing."""
    generator = torch.Generator().manual_seed(seed)
    each = sizes.groups // groups
    pairs, rest = pair_places(sizes.rotary, sizes.width, sizes.interleaved)
    keys = torch.zeros(sizes.groups, sizes.width, sizes.width, dtype=torch.float64)
    for real, imaginary in pairs:
        angle = torch.rand(sizes.groups, generator=generator, dtype=torch.float64) * 2 * math.pi
        keys[:, real, real] = keys[:, imaginary, imaginary] = angle.cos()
        keys[:, real, imaginary], keys[:, imaginary, real] = -angle.sin(), angle.sin()
    at = torch.tensor(rest, dtype=torch.long)
    keys[:, at[:, None], at] = _orthogonal(sizes.groups, len(rest), generator)
    maps = []
    for back in (keys, _orthogonal(sizes.groups, sizes.value, generator)):
        back = back.unflatten(0, (groups, each)).flatten(1, 2)
        maps += [back.mT / each, back]
    return HeadPlan(sizes, tuple(torch.randperm(sizes.groups, generator=generator).tolist()), *maps)


def _orthogonal(count: int, width: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(count, width, width, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn)[0] if width else drawn
