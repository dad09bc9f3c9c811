"""ftc::causal_mask, the boolean mask of causal attention, with a sliding window if asked."""

import torch
from torch import Tensor

from ftc.dialect.library import composite


@composite("causal_mask(SymInt q_len, SymInt k_len, SymInt? window=None, *, Device? device=None) -> Tensor")
def causal_mask(q_len: int, k_len: int, window: int | None = None, *, device: torch.device | None = None) -> Tensor:
    """bool [q_len, k_len], True where query q may attend to key k: k <= q, aligned at the top left as in
    scaled_dot_product_attention(is_causal=True), and q - k < window where a window is given."""
    query = torch.arange(q_len, device=device)[:, None]
    key = torch.arange(k_len, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (query - key < window)
