"""Experts placed on ranks by their measured loads, heavy ones more than once, so that the busiest rank has little more than its share.

    plan = place(loads_LE, ranks=32, slots=9, groups=8, nodes=4)         32 x 9 slots for 256 experts: 32 copies more than there are experts
    plan.rank_loads(loads_LE).max(1), lower_bound(loads_LE, 32, 9)

The problem and its two policies are those of EPLB (DeepSeek-AI 2024, DeepSeek-V3, arXiv:2412.19437, section 3.4.1; github.com/deepseek-ai/EPLB). Over
all ranks at once: copies are handed out one at a time to the expert whose copies have most to do, which makes the heaviest copy as light as can be;
then copies go to ranks, heaviest first, each to the ranks with least. Hierarchical, where tokens choose among groups of experts: groups are packed on
nodes first, and each node does the same with its own experts, so that a token's rows stay in few nodes. Two things differ: no rank gets two copies of
one expert, which would save nothing (EPLB's issue 22), and pairs of copies are swapped afterwards as long as the busiest rank gets less. Where copies
make it worse (their loads are split evenly, whether it helps or not) the experts stand once, and slots stay empty.

Legend: L layers, E experts, R ranks, S slots of a rank, C copies in all.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

EMPTY = -1
_SWAPS = 1_000  # of one layer at most; each makes its busiest rank less so, a few dozen are usual


@dataclass(frozen=True, eq=False)
class Plan:
    """Which expert lies in each slot: `experts_LRS` int64 [L, R, S], EMPTY where none; ranks of one of `nodes` stand together."""

    experts_LRS: np.ndarray
    num_experts: int
    nodes: int = 1

    @property
    def copies_LE(self) -> np.ndarray:
        """How often each expert is placed, int64 [L, E]."""
        return self.held_LRE.sum(1)

    @property
    def held_LRE(self) -> np.ndarray:
        """Whether a rank holds an expert, bool [L, R, E]."""
        layers, ranks, _ = self.experts_LRS.shape
        held = np.zeros((layers, ranks, self.num_experts + 1), bool)
        np.put_along_axis(held, np.where(self.experts_LRS == EMPTY, self.num_experts, self.experts_LRS), True, 2)
        return held[..., :-1]

    def rank_loads(self, loads_LE: np.ndarray) -> np.ndarray:
        """What each rank has to do, float64 [L, R], where the load of an expert is split evenly among its copies."""
        return np.einsum("lre,le->lr", self.held_LRE, np.asarray(loads_LE, np.float64) / self.copies_LE)


def place(loads_LE, ranks: int, slots: int, groups: int = 1, nodes: int = 1) -> Plan:
    """Where the experts of each layer go, on `ranks` with `slots` each, by the number of tokens (or any measure, 0 or more) of each expert.

    `groups`: of neighbouring experts that tokens choose among, each kept on one of `nodes`. Every expert is placed at least once and at most once on a
    rank; by these loads the busiest rank never has more than if the experts were dealt out in turn, once each. ValueError for numbers that do not fit.
    """
    loads = np.asarray(loads_LE, np.float64)
    _check(loads, ranks, slots, groups, nodes)
    return Plan(np.stack([_layer(row, ranks, slots, groups, nodes) for row in loads]), loads.shape[1], nodes)


def lower_bound(loads_LE, ranks: int, slots: int) -> np.ndarray:
    """What the busiest rank has at least, however experts are placed, float64 [L]: the mean, and the heaviest copy where that is as light as can be."""
    loads = np.asarray(loads_LE, np.float64)
    heaviest = [(row / _copies(row, ranks * slots, ranks)).max() for row in loads]
    return np.maximum(loads.sum(1) / ranks, heaviest)


def _check(loads: np.ndarray, ranks: int, slots: int, groups: int, nodes: int) -> None:
    for name, value in (("ranks", ranks), ("slots", slots), ("groups", groups), ("nodes", nodes)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    if loads.ndim != 2 or not loads.size or not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError(f"loads must be [layers, experts], finite and 0 or more; got shape {list(loads.shape)}")
    experts = loads.shape[1]
    if experts % groups or groups % nodes or ranks % nodes:
        raise ValueError(f"{experts} experts, {groups} groups and {ranks} ranks cannot be shared by {nodes} nodes: each must be a multiple of the next")
    if not experts // nodes <= ranks // nodes * slots:
        raise ValueError(f"{ranks} ranks of {slots} slots cannot hold {experts} experts; use {-(-experts // ranks)} slots or more")
    if slots > experts // nodes:
        raise ValueError(f"a rank of {slots} slots would hold one of the {experts // nodes} experts of its node twice; use that many slots at most")


def _layer(loads_E: np.ndarray, ranks: int, slots: int, groups: int, nodes: int) -> np.ndarray:
    """int64 [R, S]: node by node, each with its groups' experts."""
    grouped = np.arange(len(loads_E)).reshape(groups, -1)
    by_node = _packed(loads_E[grouped].sum(1), nodes)
    planned = []
    for own in by_node:
        experts = grouped[sorted(own)].ravel()
        planned.append(_on_one_node(experts, loads_E[experts], ranks // nodes, slots))
    in_turn = [_without_copies(part, ranks // nodes, slots) for part in np.arange(len(loads_E)).reshape(nodes, -1)]
    candidates = [np.concatenate(planned), np.concatenate(in_turn)]
    return min(candidates, key=lambda plan_RS: _rank_loads(plan_RS, loads_E).max())


def _packed(weights: np.ndarray, bins: int) -> list[list[int]]:
    """The things in as many bins of equal numbers, heaviest first, each to the lightest bin with room (Graham 1969)."""
    room = len(weights) // bins
    found, totals = [[] for _ in range(bins)], np.zeros(bins)
    for thing in np.argsort(-weights, kind="stable"):
        chosen = min((b for b in range(bins) if len(found[b]) < room), key=totals.__getitem__)
        found[chosen].append(int(thing))
        totals[chosen] += weights[thing]
    return found


def _on_one_node(experts: np.ndarray, loads: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """int64 [R, S]: these experts with copies on the ranks of a node."""
    copies = _copies(loads, ranks * slots, ranks)
    plan = _improved(_spread(loads / copies, copies, ranks, slots), loads / copies)
    return experts[plan]


def _without_copies(experts: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """int64 [R, S]: these experts once each, in turn, and EMPTY."""
    plan = np.full((slots, ranks), EMPTY)
    plan.ravel()[: len(experts)] = experts
    return plan.T.copy()


def _rank_loads(plan_RS: np.ndarray, loads_E: np.ndarray) -> np.ndarray:
    copies = np.bincount(plan_RS[plan_RS != EMPTY], minlength=len(loads_E))
    each = np.append(loads_E / np.maximum(copies, 1), 0.0)  # EMPTY is the last
    return each[plan_RS].sum(1)


def _copies(loads_E: np.ndarray, total: int, most: int) -> np.ndarray:
    """How many copies each expert gets, int64 [E], `total` in all and `most` at most: one each, then always one to the heaviest."""
    copies = np.ones(len(loads_E), np.int64)
    heap = [(-load, expert) for expert, load in enumerate(loads_E.tolist())]
    heapq.heapify(heap)
    for _ in range(total - len(loads_E)):
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        if copies[expert] < most:
            heapq.heappush(heap, (-loads_E[expert] / copies[expert], expert))
    return copies


def _spread(each_E: np.ndarray, copies_E: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """int64 [R, S]: copies to the ranks with least to do, heaviest first, no two of an expert on one rank."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    totals = np.zeros(ranks)
    for expert in np.argsort(-each_E, kind="stable").tolist():
        for _ in range(copies_E[expert]):
            free = [r for r in range(ranks) if len(held[r]) < slots and expert not in held[r]]
            if not free:
                free = [_make_room(held, totals, each_E, expert, slots)]
            chosen = min(free, key=totals.__getitem__)
            held[chosen].append(expert)
            totals[chosen] += each_E[expert]
    return np.array(held, np.int64)


def _make_room(held: list[list[int]], totals: np.ndarray, each_E: np.ndarray, expert: int, slots: int) -> int:
    """A rank for `expert`, where all ranks with room hold it already: another one gives up an expert that one with room has not.

    There is one: at least slots - 1 of the experts of a full rank without `expert` are not among the at most slots - 2 others of the rank with room."""
    roomy = min((r for r in range(len(held)) if len(held[r]) < slots), key=totals.__getitem__)
    full = min((r for r in range(len(held)) if expert not in held[r]), key=totals.__getitem__)
    moved = min((e for e in held[full] if e not in held[roomy]), key=each_E.__getitem__)
    held[full].remove(moved)
    held[roomy].append(moved)
    totals[full] -= each_E[moved]
    totals[roomy] += each_E[moved]
    return full


def _improved(plan_RS: np.ndarray, each_E: np.ndarray) -> np.ndarray:
    """The plan after swaps of a copy on the busiest rank with one on another, each the best there is, as long as the busier of the two gets less."""
    plan = plan_RS.copy()
    for _ in range(_SWAPS):
        weights = each_E[plan]
        totals = weights.sum(1)
        busiest = int(totals.argmax())
        change_SRS = weights[busiest][:, None, None] - weights[None]  # what the busiest would lose, and the other gain
        worse_SRS = np.maximum(totals[busiest] - change_SRS, totals[None, :, None] + change_SRS)
        there_SR = (plan[None] == plan[busiest][:, None, None]).any(2)  # a rank has this expert of the busiest
        here_RS = np.isin(plan, plan[busiest])
        worse_SRS[np.broadcast_to(there_SR[:, :, None] | here_RS[None], worse_SRS.shape)] = np.inf
        own, other, slot = np.unravel_index(worse_SRS.argmin(), worse_SRS.shape)
        if not worse_SRS[own, other, slot] < totals[busiest] * (1 - 1e-12):
            break
        plan[busiest, own], plan[other, slot] = plan[other, slot], plan[busiest, own]
    return plan
