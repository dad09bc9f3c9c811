"""ftc::token_positions, the places in their texts of tokens that continue what a cache holds."""

import torch
from torch import Tensor

from ftc.dialect.library import composite


@composite("token_positions(Tensor cached, Tensor new, SymInt length) -> Tensor")
def token_positions(cached: Tensor, new: Tensor, length: int) -> Tensor:
    """int64 [B * length], sequence by sequence: cached[b] + t for the first new[b] of `length` tokens, 0 for padding behind them.

    cached and new [B] of an integer dtype. Padding gets the first position, so that it never reads past the end of a table."""
    step = torch.arange(length, device=cached.device)
    return torch.where(step < new[:, None], cached[:, None] + step, 0).flatten()
