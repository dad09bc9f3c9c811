"""The gated feed-forward layer: a decoder's own, or one expert of many."""

import torch.nn.functional as F
from torch import nn


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate x) * (up x)), [..., D] to [..., D] over a middle of F = intermediate_size."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
