"""ftc::latent_attention, attention over a latent from which keys and values are expanded (DeepSeek-V2 report, 2024, equations 9 to 19)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ftc.dialect.library import composite

# Shapes: B batch, T queries, S keys, H heads, G groups of heads that share keys and values, L latent,
# N part of a head without RoPE, E part with RoPE, M value.


@composite(
    "latent_attention(Tensor q_nope, Tensor q_pe, Tensor latent, Tensor k_pe, Tensor kv_b, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, *, int groups, float scale) -> Tensor"
)
def latent_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    latent: Tensor,
    k_pe: Tensor,
    kv_b: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    groups: int,
    scale: float,
) -> Tensor:
    """softmax(scale (q_nope [W_UK c] + q_pe k_pe) + mask) W_UV c, keys and values expanded: how training and prefill compute it.

    q_nope [B, H, T, N] (N may be 0), q_pe [B, H, T, E] rotated, latent c [B, S, L], k_pe [B, S, E] rotated and shared by all heads, kv_b
    [G (N + M), L], group by group [W_UK; W_UV]; head h reads group h // (H / G). The mask is as in scaled_dot_product_attention. Returns
    [B, H, T, M] in the dtype of the queries; mutates nothing.
    """
    heads, width = q_nope.shape[1], q_nope.shape[-1]
    kv = F.linear(latent, kv_b).unflatten(-1, (groups, kv_b.shape[0] // groups)).transpose(1, 2)
    key, value = kv.split([width, kv.shape[-1] - width], -1)
    key = torch.cat([key, k_pe[:, None].expand(-1, groups, -1, -1)], -1)
    query = torch.cat([q_nope, q_pe], -1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=heads != groups
    )
