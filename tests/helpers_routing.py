"""Programs whose routing is known: a table says which experts each token id goes to, and what every expert predicts.

The hidden state has two halves of width V: the first is the token, one-hot, which routers and experts read; experts write to the second, which is the
result. So no layer changes the routing of the next.
"""

import torch
from torch import nn

import ftc
from ftc.moe.routing import Mixtures

SCALE = 20.0  # of the logit that an expert gives to the next token


class Experts(nn.Module):
    """Routes token v to the K experts with the largest `table_VE[v]`, weighed by the softmax; each predicts `following[v]`."""

    def __init__(self, table_VE, top_k: int, following, drop: float = 0.0, gate: str = "softmax"):
        super().__init__()
        vocabulary, experts = table_VE.shape
        self.top_k, self.drop, self.gate = top_k, drop, gate
        self.router = nn.Parameter(torch.cat([table_VE.T, torch.zeros(experts, vocabulary)], 1))
        read = torch.cat([torch.eye(vocabulary), torch.zeros(vocabulary, vocabulary)], 1)
        write = torch.zeros(2 * vocabulary, vocabulary)
        write[vocabulary + following, torch.arange(vocabulary)] = SCALE
        self.up, self.down = nn.Parameter(read.repeat(experts, 1, 1)), nn.Parameter(write.repeat(experts, 1, 1))

    def forward(self, x):
        rows = x.flatten(0, -2)
        logits = torch.nn.functional.linear(rows, self.router)
        weights, indices = (logits.softmax(-1) if self.gate == "softmax" else logits.sigmoid()).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        indices = torch.where(weights < self.drop, self.router.shape[0], indices)
        return torch.ops.ftc.moe(rows, indices, weights, self.up, self.down, activation="identity").view(x.shape)


class Block(nn.Module):
    """A mixture beside a residual stream."""

    def __init__(self, *arguments, **options):
        super().__init__()
        self.experts = Experts(*arguments, **options)

    def forward(self, x):
        return x + self.experts(x)


class Known(nn.Module):
    """Token ids [B, T] to logits [B, T, V], through one block for each table."""

    def __init__(self, tables, top_k, following, **options):
        super().__init__()
        self.vocabulary = len(following)
        self.blocks = nn.ModuleList(Block(table, top_k, following, **options) for table in tables)
        self.register_buffer("eye", torch.eye(self.vocabulary))

    def forward(self, input_ids):
        x = torch.cat([self.eye[input_ids], torch.zeros_like(self.eye[input_ids])], -1)
        for block in self.blocks:
            x = block(x)
        return x[..., self.vocabulary :]


def known(tables, top_k, following=None, **options) -> Mixtures:
    """The mixtures of a captured `Known` in float64. `following`: the next token of each, by default itself."""
    vocabulary = tables[0].shape[0]
    following = torch.arange(vocabulary) if following is None else following
    model = Known([table.double() for table in tables], top_k, following, **options).double()
    return Mixtures(ftc.capture(model, {"input_ids": torch.arange(6).view(2, 3) % vocabulary}))


def by_domain(domains: int, each: int, top_k: int, tokens: int) -> torch.Tensor:
    """A table [V, E]: the tokens of domain d, `tokens` of them one after the other, go to the experts d each ... (d + 1) each - 1, evenly."""
    table = torch.zeros(domains * tokens, domains * each)
    for token in range(domains * tokens):
        for choice in range(top_k):
            table[token, token // tokens * each + (token + choice) % each] = 5.0
    return table


def evenly(experts: int, top_k: int, vocabulary: int) -> torch.Tensor:
    """A table [V, E] by which token v goes to the experts v, v + 1, ... modulo E, whatever its domain."""
    table = torch.zeros(vocabulary, experts)
    for choice in range(top_k):
        table[torch.arange(vocabulary), (torch.arange(vocabulary) + choice) % experts] = 5.0
    return table


def chosen(table_VE, top_k: int, ids, drop: float = 0.0, gate: str = "softmax") -> list[list[int]]:
    """The experts of each token, by hand: those that were not dropped."""
    found = []
    for token in ids.flatten().tolist():
        scores = table_VE[token].double()
        scores = scores.softmax(-1) if gate == "softmax" else scores.sigmoid()
        best = sorted(range(len(scores)), key=lambda e: -float(scores[e]))[:top_k]
        total = sum(float(scores[e]) for e in best)
        found.append([e for e in best if float(scores[e]) / total >= drop])
    return found
