"""A model of equal blocks, made by what the test gives."""

from torch import nn


class Stack(nn.Module):
    def __init__(self, make, count=3):
        super().__init__()
        self.layers = nn.ModuleList(make(i) for i in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
