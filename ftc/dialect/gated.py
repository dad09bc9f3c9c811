"""ftc::gated, the product in the middle of a gated MLP (Shazeer 2020, GLU Variants Improve Transformer)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ftc.dialect.library import composite

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "relu2": lambda gate: F.relu(gate).square(),
    "identity": lambda gate: gate,
}


@composite("gated(Tensor gate, Tensor up, str activation) -> Tensor")
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, elementwise; gate and up of one shape [..., F]. `activation` is a key of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"ftc::gated has no activation {activation!r}; valid: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation](gate) * up
