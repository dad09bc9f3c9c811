"""Mixtures of experts in the spellings people use, with the routers and experts people use, and what can be wrong with them.

B batch, T tokens, N = B T, D model, E experts, K experts a token, F an expert's middle.
"""

import torch
import torch.nn.functional as F_
from torch import Tensor, nn

B, T, D, E, K, F = 2, 5, 12, 4, 2, 7


class Expert(nn.Module):
    """A gated or plain MLP; `kind` says which."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, bias = kind, "bias" in kind
        self.w1, self.w2 = nn.Linear(D, F, bias), nn.Linear(F, D, bias)
        if "plain" not in kind:
            self.w3 = nn.Linear(D, F, bias)

    def forward(self, x: Tensor) -> Tensor:
        if "plain" in self.kind:
            return self.w2(F_.relu(self.w1(x)))
        act = F_.gelu if "gelu" in self.kind else F_.silu
        return self.w2(act(self.w1(x)) * self.w3(x))


EXPERTS = ("silu", "gelu", "silu bias", "plain bias")


def softmax_topk(logits):
    weights, indices = logits.float().softmax(-1).topk(K, -1)
    return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), indices


def topk_softmax(logits):
    values, indices = logits.topk(K, -1)
    return values.softmax(-1), indices


def sigmoid_topk(logits):
    scores = logits.sigmoid()
    indices = (scores + torch.linspace(0, 1, E, dtype=scores.dtype)).topk(K, -1, sorted=False).indices
    return scores.gather(-1, indices) * 2.5, indices


def sorted_scores(logits):
    values, order = logits.softmax(-1).sort(dim=-1, descending=True)
    return values[:, :K], order[:, :K]


def grouped(logits):
    scores = logits.sigmoid()
    best = scores.view(-1, 2, E // 2).topk(2, -1).values.sum(-1).topk(1, -1).indices
    mask = torch.zeros(scores.shape[0], 2, dtype=scores.dtype).scatter(1, best, 1.0)
    allowed = mask[..., None].expand(-1, -1, E // 2).reshape(-1, E)
    indices = scores.masked_fill(allowed == 0, float("-inf")).topk(K, -1).indices
    return scores.gather(-1, indices), indices


def in_place(logits):
    weights, indices = logits.softmax(-1).topk(K, -1)
    weights /= weights.sum(-1, keepdim=True)
    return weights, indices


ROUTERS = (softmax_topk, topk_softmax, sigmoid_topk, sorted_scores, grouped, in_place)


class Mixture(nn.Module):
    """A router and experts, each a module of its own; `combine` is the spelling, `route` the router."""

    def __init__(self, combine, route=softmax_topk, kind: str = "silu", wrong: str = ""):
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(Expert(kind) for _ in range(E))
        self.combine, self.route, self.wrong = combine, route, wrong
        if wrong == "changed activation":
            self.experts[2].kind = "gelu" if kind == "silu" else "silu"

    def order(self) -> list[int]:
        """Which module computes for each number that the router gives."""
        return {"swapped": [0, 2, 1, 3], "duplicated": [0, 1, 1, 3], "dropped": [0, 1, 3]}.get(self.wrong, list(range(E)))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, indices = self.route(self.router(rows))
        if self.wrong == "stale index":
            indices = indices.roll(1, 0)
        return x + self.combine(self, rows, weights, indices).view_as(x)


def weighed(self: Mixture, number: int, rows: Tensor, weight: Tensor) -> Tensor:
    """One expert's share of the result."""
    expert = self.experts[number]
    if self.wrong == "weight on the wrong side" and number == 2:
        return expert(rows * weight)
    return expert(rows) * weight


def loop_with_index_add(self, x, weights, indices):
    out = torch.zeros_like(x)
    for e, number in enumerate(self.order()):
        token, slot = torch.where(indices == e)
        out.index_add_(0, token, weighed(self, number, x[token], weights[token, slot, None]))
    return out


def loop_with_mask(self, x, weights, indices):
    out = torch.zeros_like(x)
    for e, number in enumerate(self.order()):
        out = out + weighed(self, number, x, (weights * (indices == e)).sum(-1, keepdim=True))
    return out


def loop_over_slots(self, x, weights, indices):
    out = torch.zeros_like(x)
    for e, number in enumerate(self.order()):
        for slot in range(K):
            out = out + torch.where((indices[:, slot] == e)[:, None], weighed(self, number, x, weights[:, slot, None]), 0)
    return out


def written_into(self, x, weights, indices):
    flat, token = indices.flatten(), torch.arange(x.shape[0]).repeat_interleave(K)
    rows = torch.zeros(flat.shape[0], D, dtype=x.dtype)
    for e, number in enumerate(self.order()):
        places = torch.where(flat == e)[0]
        rows = rows.index_put((places,), weighed(self, number, x[token[places]], weights.flatten()[places, None]))
    return rows.view(-1, K, D).sum(1)


def one_hot_combine(self, x, weights, indices):
    results = torch.stack([self.experts[number](x) for number in self.order()], 1)
    dense = (F_.one_hot(indices, E).to(x.dtype) * weights[..., None]).sum(1)
    return torch.einsum("ne,ned->nd", dense, results) if self.wrong != "dropped" else torch.einsum("ne,ned->nd", dense[:, :3], results)


LOOPS = (loop_with_index_add, loop_with_mask, loop_over_slots, written_into, one_hot_combine)
WRONG = ("swapped", "duplicated", "dropped", "changed activation", "weight on the wrong side", "stale index")


class Stacked(nn.Module):
    """A router and stacked experts; `layout` says how the matrices lie."""

    def __init__(self, combine, route=softmax_topk, layout: str = "fused"):
        super().__init__()
        self.router, self.layout = nn.Linear(D, E, bias=False), layout
        shapes = {"fused": (2 * F, D), "transposed": (D, 2 * F), "interleaved": (D, 2 * F), "apart": (F, D)}[layout]
        self.w_in = nn.Parameter(torch.randn(E, *shapes) / D**0.5)
        self.w_up = nn.Parameter(torch.randn(E, *shapes) / D**0.5) if layout == "apart" else None
        self.w_out = nn.Parameter(torch.randn(E, *((F, D) if layout in ("transposed", "interleaved") else (D, F))) / F**0.5)
        self.combine, self.route = combine, route

    @property
    def right(self) -> tuple[Tensor, Tensor]:
        """Both matrices to be multiplied from the right: [E, D, 2F] and [E, F, D]."""
        turned = self.layout in ("transposed", "interleaved")
        first = torch.cat([self.w_in, self.w_up], 1) if self.layout == "apart" else self.w_in
        return (first, self.w_out) if turned else (first.mT, self.w_out.mT)

    def act(self, both: Tensor) -> Tensor:
        """[.., 2F] to [.., F]."""
        if self.layout != "interleaved":
            gate, up = both.chunk(2, -1)
            return F_.silu(gate) * up
        gate, up = both[..., ::2].clamp(max=2.0), both[..., 1::2].clamp(-2.0, 2.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, indices = self.route(self.router(rows))
        return x + self.combine(self, rows, weights, indices).view_as(x)


def gathered_bmm(self, x, weights, indices):
    first, second = (w[indices.flatten()] for w in self.right)
    rows = x.repeat_interleave(K, 0)[:, None]
    rows = (self.act(rows @ first) @ second)[:, 0]
    return (rows * weights.reshape(-1, 1)).view(-1, K, D).sum(1)


def grouped_products(self, x, weights, indices):
    order = indices.flatten().argsort()
    counts = torch.bincount(indices.flatten(), minlength=E) if False else F_.one_hot(indices.flatten(), E).sum(0)
    ends = counts.cumsum(0).to(torch.int32)
    first, second = (w.contiguous() for w in self.right)
    rows = torch._grouped_mm(x[order // K].contiguous(), first, offs=ends)
    rows = torch._grouped_mm(self.act(rows).contiguous(), second, offs=ends)
    rows = rows * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // K, rows)


def stacked_loop(self, x, weights, indices):
    out, (first, second) = torch.zeros_like(x), self.right
    for e in range(E):
        token, slot = torch.where(indices == e)
        out = out.index_add(0, token, self.act(x[token] @ first[e]) @ second[e] * weights[token, slot, None])
    return out


def every_expert(self, x, weights, indices):
    dense = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, indices, weights)
    first, second = self.right
    results = self.act(x.expand(E, -1, -1) @ first) @ second
    return (results * dense.t()[..., None]).sum(0)


def weighed_input(self, x, weights, indices):
    dense = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, indices, weights)
    first, second = self.right
    return (self.act((x * dense.t()[..., None]) @ first) @ second).sum(0)


STACKED = (gathered_bmm, stacked_loop, every_expert, weighed_input)
LAYOUTS = ("fused", "transposed", "interleaved", "apart")
