"""What a placement of experts does to a recorded routing: the load of each rank, and the bytes that tokens and weights travel.

Tokens live on ranks; a row goes to every other rank that holds an expert its token chose and is to use, and a sum comes back, as in
`ftc::expert_parallel_moe`.

Legend: T tokens, L layers, K experts a token, E experts, R ranks, S slots of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ftc.moe.placement import Plan


@dataclass(frozen=True, eq=False)
class Served:
    """`rank_loads_LR`: rows times experts that each rank computed. `row_bytes`: what all tokens' rows travelled between ranks, there and back;
    `node_bytes`: how much of it between nodes."""

    rank_loads_LR: np.ndarray
    row_bytes: int
    node_bytes: int

    @property
    def max_vio(self) -> np.ndarray:
        """float64 [L]: how far the busiest rank is above the mean, over the mean (Wang et al. 2024, arXiv:2408.15664); 0 where nothing was routed."""
        mean = self.rank_loads_LR.mean(1)
        return np.divide(self.rank_loads_LR.max(1) - mean, mean, out=np.zeros_like(mean), where=mean > 0)


def simulate(plan: Plan, trace_TLK, row_bytes: int, home_T=None, near: bool = False) -> Served:
    """Run a routing trace, int [T, L, K] with E for a choice that was dropped, through a placement.

    `row_bytes`: of one token's row. `home_T`: the rank where each token lives; without it tokens stand in order, as many on each rank. The copies of an
    expert are used in turn; with `near` one on the token's own rank, else its node, goes first. ValueError where the trace does not fit the plan.
    """
    trace = np.asarray(trace_TLK, np.int64)
    layers, ranks, _ = plan.experts_LRS.shape
    if trace.ndim != 3 or trace.shape[1] != layers or (trace.size and not 0 <= trace.min() <= trace.max() <= plan.num_experts):
        raise ValueError(f"a trace for {layers} layers of {plan.num_experts} experts is [T, {layers}, K] of 0 to {plan.num_experts}; got {list(trace.shape)}")
    home = np.arange(len(trace)) * ranks // max(len(trace), 1) if home_T is None else np.asarray(home_T, np.int64)
    if home.shape != (len(trace),) or (home.size and not 0 <= home.min() <= home.max() < ranks):
        raise ValueError(f"each of {len(trace)} tokens lives on a rank 0 to {ranks - 1}; got homes of shape {list(home.shape)}")
    loads, crossing, between_nodes = np.zeros((layers, ranks)), 0, 0
    node_R = np.arange(ranks) * plan.nodes // ranks
    for layer in range(layers):
        rank_TK = _ranks_used(plan.held_LRE[layer], trace[:, layer], home, node_R, near)
        used_TR = np.zeros((len(trace), ranks + 1), bool)
        np.put_along_axis(used_TR, rank_TK, True, 1)
        loads[layer] = np.bincount(rank_TK.ravel(), minlength=ranks + 1)[:ranks]
        away_TR = used_TR[:, :ranks] & (np.arange(ranks) != home[:, None])
        crossing += int(away_TR.sum())
        between_nodes += int((away_TR & (node_R != node_R[home][:, None])).sum())
    return Served(loads, 2 * row_bytes * crossing, 2 * row_bytes * between_nodes)


def _ranks_used(held_RE: np.ndarray, chosen_TK: np.ndarray, home_T: np.ndarray, node_R: np.ndarray, near: bool) -> np.ndarray:
    """int64 [T, K]: the rank whose copy of the expert is used; R where the choice was dropped."""
    ranks, experts = held_RE.shape
    used_TK = np.full(chosen_TK.shape, ranks)
    for expert in range(experts):
        token, slot = np.nonzero(chosen_TK == expert)
        copies = np.nonzero(held_RE[:, expert])[0]
        rank = copies[np.arange(len(token)) % len(copies)]
        if near:
            home = home_T[token]
            for node in np.unique(node_R[copies]):
                there, own = node_R[home] == node, copies[node_R[copies] == node]
                rank[there] = own[np.arange(there.sum()) % len(own)]
            rank = np.where(held_RE[home, expert], home, rank)
        used_TK[token, slot] = rank
    return used_TK


def migration_bytes(old: Plan, new: Plan, expert_bytes: int) -> int:
    """What ranks have to be sent to go from one placement to another: experts that they do not hold yet. ValueError for plans of different sizes."""
    if old.held_LRE.shape != new.held_LRE.shape:
        raise ValueError(f"the plans are for [layers, ranks, experts] {list(old.held_LRE.shape)} and {list(new.held_LRE.shape)}")
    return expert_bytes * int((new.held_LRE & ~old.held_LRE).sum())


def loads_of(trace_TLK, num_experts: int) -> np.ndarray:
    """Tokens of each expert, float64 [L, E], in a trace."""
    trace = np.asarray(trace_TLK, np.int64)
    return np.stack([np.bincount(trace[:, layer].ravel(), minlength=num_experts + 1)[:num_experts] for layer in range(trace.shape[1])]).astype(np.float64)


def in_order(layers: int, num_experts: int, ranks: int, nodes: int = 1) -> Plan:
    """The plan without a plan: experts once each, neighbours together, as `expert-parallel` divides them. ValueError where ranks do not divide them."""
    if num_experts % ranks:
        raise ValueError(f"{num_experts} experts cannot be shared equally by {ranks} ranks")
    return Plan(np.broadcast_to(np.arange(num_experts).reshape(ranks, -1), (layers, ranks, num_experts // ranks)).copy(), num_experts, nodes)
