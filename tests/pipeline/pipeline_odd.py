"""A model whose shell does what decoders seldom do: structures as results, values for every block, masks written in place, sizes of hidden states."""

import torch
from torch import nn

WIDTH, VOCABULARY = 8, 16


class Block(nn.Module):
    """[B, T, D] to [B, T, D] and a structure of statistics, one of which has no gradient."""

    def __init__(self):
        super().__init__()
        self.values, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, extra, mask):
        mixed = torch.softmax(x @ x.transpose(-1, -2) + mask, -1) @ self.values(x)
        out = x + mixed + extra * self.gate(x).tanh()
        return out, {"square": out.square().mean(), "pair": (out.mean(), out.amax(-1).argmax(-1))}


class Odd(nn.Module):
    """Ids [B, T] to logits [B T, V] and a sum of statistics. Every block gets the first embedding again, and its slice of a second one."""

    def __init__(self, layers: int = 4):
        super().__init__()
        self.embed, self.per_layer = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, layers * WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.scale, self.unused = nn.Parameter(torch.randn(layers)), nn.Parameter(torch.ones(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("factors", torch.arange(1, 3.0))
        self.register_buffer("aside", torch.ones(2), persistent=False)

    def forward(self, ids):
        hidden = first = self.embed(ids) * self.factors.sum()
        extra = self.per_layer(ids).view(*ids.shape, len(self.blocks), -1)
        mask = torch.zeros(ids.shape[1], ids.shape[1], dtype=hidden.dtype)
        mask[:, 1:] += torch.triu(torch.full_like(mask, -9.0), 1)[:, 1:]
        total = 0.0
        for number, block in enumerate(self.blocks):
            hidden, said = block(hidden + self.scale[number] * first, extra[:, :, number], mask)
            total = total + said["square"] + said["pair"][0] + 0.01 * said["pair"][1].sum()
        hidden = self.norm(hidden)
        return self.head(hidden.reshape(hidden.shape[0] * hidden.shape[1], -1)), total


class Scaled(nn.Module):
    """An embedding and blocks, and nothing behind them."""

    def __init__(self, layers: int = 3):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers))

    def forward(self, ids):
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Backwards(Scaled):
    """The blocks called from the last to the first."""

    def forward(self, ids):
        hidden = self.embed(ids)
        for block in reversed(self.blocks):
            hidden = block(hidden)
        return hidden


class InPlace(Scaled):
    """Writes into its input between the blocks."""

    def forward(self, ids):
        ids.add_(1)
        return super().forward(ids)


class Optional(Scaled):
    """A second matrix behind the blocks, where it is asked for."""

    def __init__(self):
        super().__init__()
        self.second = nn.Parameter(torch.eye(WIDTH))

    def forward(self, ids, factor=None):
        hidden = super().forward(ids)
        return hidden if factor is None else hidden @ self.second * factor
